"""Where `k2` and `python -m k2cli` begin: Ctrl-C ends them without a word, from the first import on."""

import sys


def main() -> None:
    """The console script."""
    try:
        from k2cli import app

        app.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
