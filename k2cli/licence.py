"""The licence of the official weights: shown before first use, its acceptance recorded in a user file."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import typer

from k2cli.console import console, say
from k2cli.disk import write_files, writing
from k2cli.fast_toml import dump
from k2cli.texts import shell_quote
from model import library
from model.errors import K2Error


@dataclass(frozen=True)
class Licence:
    """What a user must know before the first use. `terms` are a summary; the full text is what counts."""

    name: str
    title: str
    url: str  # where it stands in full
    policy_url: str
    terms: tuple[str, ...]


KREA_2 = Licence(
    name=library.KREA_2_LICENCE,
    title="Krea 2 Community License, version 1 (22 June 2026)",
    url="https://krea.ai/krea-2-licensing",
    policy_url="https://www.krea.ai/krea-2-use-policy",
    terms=(
        "Commercial use is open only to companies below a revenue threshold (1,000,000 US dollars in the last twelve"
        " months, affiliates included); others need a commercial licence from Krea.",
        "Anyone who deploys the model must filter what is unlawful or what Krea's use policy forbids."
        " k2 supports filters through the entry point group k2.filters.",
        "Pictures must be disclosed as made by AI where the law requires it."
        " k2 marks every picture's metadata accordingly, unless --no-embed is given.",
        "Anyone who passes the weights on, changed or not, passes on these duties too.",
    ),
)
LICENCES = {KREA_2.name: KREA_2}


def record_file() -> Path:
    return Path(typer.get_app_dir("k2")) / "licences.toml"


def read_accepted() -> dict[str, datetime]:
    """Licences accepted on this machine -> when. An unreadable file counts as none."""
    try:
        table = tomllib.loads(record_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: when for name, when in table.items() if isinstance(when, datetime)}


def accept(licence: Licence) -> None:
    file = record_file()
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_files({file: dump(read_accepted() | {licence.name: datetime.now(UTC).replace(microsecond=0)})})


def require_accepted(name: str | None, subject: str, *, yes: bool = False, command: str = "pull") -> None:
    """Ensure that a licence is accepted: earlier, by `yes`, or by asking on a terminal. Raises K2Error if not.

    `name` is the licence's name on model cards; one whose terms k2 does not know needs no acceptance. `command` is
    where it can be accepted without a terminal.
    """
    licence = LICENCES.get(name or "")
    if licence is None or licence.name in read_accepted():
        return
    say(f"{subject} is licensed under the {licence.title}. In short:")
    for term in licence.terms:
        say(f"  • {term}")
    say(f"The full text counts, not this summary: {licence.url}\nUse policy: {licence.policy_url}")
    if not yes:
        hint = f"Read it, then: k2 models {command} {shell_quote(subject)} --accept-licence"
        if not (sys.stdin.isatty() and console.is_terminal):
            raise K2Error(f"The licence of {subject} has not been accepted on this machine.", hint=hint)
        if not typer.confirm("Have you read it, and do you accept it?", err=True):
            raise K2Error(f"{subject} cannot be used before its licence is accepted.", hint=hint)
    accept(licence)
    say(f"Accepted; recorded in {record_file()}.", "dim")


def require_for_model(name: str, variant: str | None = None, *, yes: bool = False) -> None:
    """The same for a local model, by the name that a render gives it; a model that is not here needs nothing."""
    model = library.find(name, variant)
    if model is not None and model.source != "box":
        require_accepted(model.licence, name, yes=yes, command="info")
