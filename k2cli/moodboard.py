"""A project's moodboard: its pictures, what they amount to, and the style file made from that.

Analysing a board needs torch and takes seconds, and every render would repeat it, so the result is cached under the
hashes of everything it depends on. The cache may be deleted at any time.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from k2cli.disk import uninterrupted, write_files, writing
from k2cli.expander import language_model_path, load_language_model, release_language_model
from k2cli.fast_toml import dump
from k2cli.new_style import copy_pictures, reference_toml
from k2cli.pictures import PathInside, check_picture, find_pictures, picture_hint
from k2cli.styles import BOARD_STYLE
from k2cli.texts import UNPRINTABLE, relative_path
from k2cli.toml_tables import PATH, between
from model import library, picture_file
from model.errors import K2Error
from model.hashes import cache_folder, sha256
from model.plan import memory_errors
from model.spec import Reference, Style, in_limits

if TYPE_CHECKING:
    from k2cli.folder import Folder
    from model.moodboard import Board, Look

MAX_PICTURES = 1000  # pictures of a board
CACHE_VERSION = 4  # changes whenever the same pictures would be read differently
COMMENT_WIDTH = 118  # characters of a comment
ADD_PICTURES = "Name png, jpg or webp files, or put some there."

OnPicture = Callable[[int, int], None]  # (pictures seen, of how many)


@dataclass(frozen=True)
class Moodboard:
    """[moodboard]"""

    images: list[str] = field(metadata=PATH)
    strength: float = between(0.35, -0.5, 1.5)


def gather_pictures(
    patterns: Sequence[str], root: Path, inside: PathInside, where: str
) -> tuple[list[Path], set[Path]]:
    """The pictures that paths, folders and globs match (each must match at least one), unique and sorted; and what else
    folders and globs hold. Whether they are readable is checked later."""
    if not patterns:
        raise K2Error(f"{where}: the moodboard holds no picture.", hint=ADD_PICTURES)
    found: set[Path] = set()
    others: set[Path] = set()
    for pattern in patterns:
        named, skipped = find_pictures(pattern, root, inside, where, MAX_PICTURES)
        if not named:
            raise K2Error(
                f"{where}: {pattern} matches no picture.", hint=picture_file.describe_skipped(skipped) or ADD_PICTURES
            )
        others |= skipped
        for path in named:
            if not path.exists():
                raise K2Error(f"{where}: there is no {pattern}.", hint=picture_hint(path, pattern) or "Check the name.")
            if not path.is_file():
                raise K2Error(f"{where}: {pattern} is not a picture.", hint="Use png, jpg or webp.")
        found.update(named)
        if len(found) > MAX_PICTURES:
            raise K2Error(f"{where}: more than {MAX_PICTURES} pictures.", hint="Choose those that show the look best.")
    return sorted(found), others - {path.parent for path in found}  # a subfolder that is named itself


def reader_model(model: str) -> str:
    """The bundled model whose style encoder reads the board: the project's own, or mini if that has none."""
    return (
        model
        if (library.BUNDLED / f"{model}-style.safetensors").is_file() and model in library.bundled_models()
        else "mini"
    )


def analyse_board(paths: Sequence[Path], model: str, on_picture: OnPicture | None = None) -> Board:
    """Analyse a board's pictures."""
    with uninterrupted():  # as in rendering
        from model.board_pictures import StyleReader
        from model.moodboard import analyse  # torch

    return analyse(paths, StyleReader.load(reader_model(model)), on_picture)


def describe_taste(board: Board, model: str, device: str | None = None) -> Board:
    """The board, also described by a resolved model's language side, if it has one."""
    from model.moodboard import describe_by_language

    try:
        if (text := language_model_path(model)) is None:
            return board
        with memory_errors("its language side"):
            return replace(board, told=describe_by_language(board, load_language_model(text, device)))
    except K2Error as error:  # the measurements stand without it
        return replace(board, notes=(*board.notes, f"The text encoder did not describe the moodboard: {error}"))
    finally:
        release_language_model()


def as_style(board: Moodboard, paths: Sequence[Path], model: str) -> tuple[tuple[Style, ...], set[Path]]:
    """The table as a style, with the board's representatives as references and its words; and the unreadable pictures
    that were left out. Strength 0 means no style at all."""
    if not board.strength:
        return (), set()
    hashes = [sha256(path) for path in paths]
    reader_files = [library.BUNDLED / f"{reader_model(model)}-{part}.safetensors" for part in ("style", "vae", "words")]
    parts = [CACHE_VERSION, *hashes, *(sha256(path) if path.is_file() else "" for path in reader_files)]
    cache_file = cache_folder() / "boards" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
    found = load_cached(cache_file, len(paths))
    if found is None:
        analysis = analyse_board(paths, model)
        found = {
            "references": [[paths.index(path), weight] for path, weight in analysis.representatives],
            "keywords": list(analysis.keywords),
            "avoids": list(analysis.avoids),
            "unread": [paths.index(path) for path in analysis.unread],
        }
        with suppress(K2Error, OSError):  # an unwritable cache only costs time
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_files({cache_file: json.dumps(found).encode()})
    unreadable = {paths[index] for index in found["unread"]}
    references = tuple(Reference(paths[index], weight) for index, weight in found["references"])
    return (
        Style(BOARD_STYLE, board.strength, references, tuple(found["keywords"]), tuple(found["avoids"])),
    ), unreadable


def load_cached(path: Path, count: int) -> dict[str, Any] | None:
    """An earlier result, if it is readable and fits this number of pictures."""
    try:
        found = json.loads(path.read_text("utf-8"))
        fits = all(
            0 <= int(index) < count and in_limits("strength", float(weight)) for index, weight in found["references"]
        )
        fits = fits and all(0 <= int(index) < count for index in found["unread"])
        words = all(isinstance(word, str) for word in [*found["keywords"], *found["avoids"]])
        return found if fits and words and found["references"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- the style file ---------------------------------------------------------------------------------------------


def with_copies(board: Board, home: Folder, folder: str) -> Board:
    """The board, with copies in a folder of the project instead of representatives that are in outputs, which may be
    deleted, or outside the project, unless it may reach outside, or whose names no style file can hold."""
    root, outputs = home.root.resolve(), (home.root / "outputs").resolve()

    def may_vanish(path: Path) -> bool:
        return path.is_relative_to(outputs) or not (home.allow_outside or path.is_relative_to(root))

    named = {path: relative_path(path, home.root) for path, _ in board.representatives}
    to_copy = [path for path, name in named.items() if may_vanish(path.resolve()) or UNPRINTABLE.search(name)]
    if not to_copy:
        return board
    extensions = {path: check_picture(path, "The moodboard", named[path]) for path in to_copy}
    copies = copy_pictures(extensions, home.path_inside(folder))

    def with_copied(look: Look) -> Look:
        return replace(look, representatives=tuple((copies.get(path, path), w) for path, w in look.representatives))

    return replace(board, looks=tuple(map(with_copied, board.looks)))


def save_style(board: Board, root: Path, target: Path, *, new: bool = False) -> Path:
    """Write the board as a style file, and its colours as a picture beside it -> the picture's path.

    Raises Exists if they should be `new` and are not.
    """
    from model.colours import swatches

    palette_file = target.with_suffix(".png")
    buffer = io.BytesIO()
    swatches(board.palette).save(buffer, "PNG")
    with writing(target):
        target.parent.mkdir(exist_ok=True)
    write_files({palette_file: buffer.getvalue(), target: style_toml(board, root).encode()}, new=new)
    return palette_file


def style_toml(board: Board, root: Path) -> str:
    """styles/NAME.toml: measurements as comments, what takes effect as keys. Every line may be edited."""
    lines = [f"# {line}".rstrip() for line in (*wrap(board.told, COMMENT_WIDTH), board.profile, "")]
    lines += [f"# {colour.hex}  {colour.share:4.0%}  {colour.name}" for colour in board.palette]
    lines += ["", dump({"keywords": board.keywords, "avoids": board.avoids}).decode().rstrip()]
    for number, each in enumerate(board.looks, 1):
        words = "".join(f", {name} {share:.0%}" for name, share in each.words.values())
        lines += ["", f"# look {number} of {len(board.looks)}: {each.share:.0%} of the board{words}"]
        for path, weight in each.representatives:
            lines.append(reference_toml(glob.escape(relative_path(path, root)), weight).decode())
    return "\n".join(lines).rstrip() + "\n"


def to_table(board: Board, root: Path) -> dict[str, Any]:
    """The board as plain values."""
    return {
        "profile": board.profile,
        "told": board.told or None,
        "keywords": list(board.keywords),
        "avoids": list(board.avoids),
        "palette": [{"hex": colour.hex, **asdict(colour)} for colour in board.palette],
        "looks": [
            {
                "share": look.share,
                "pictures": [relative_path(path, root) for path in look.pictures],
                "representatives": [
                    {"image": relative_path(path, root), "weight": weight} for path, weight in look.representatives
                ],
                "words": {kind: {"name": name, "share": share} for kind, (name, share) in look.words.items()},
            }
            for look in board.looks
        ],
        "notes": list(board.notes),
    }
