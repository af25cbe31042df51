"""A project as one static folder: a page, and beside it every picture with its record. It never uses the network.

`gallery.html` is the complete page. Only the title, one block of JSON, and the policy that lets the page's own script
run and no other are filled in; a prompt reaches the screen as text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from k2cli import history
from k2cli.disk import DRAFT_SUFFIX, write_files, writing
from k2cli.history import MadePicture
from k2cli.outputs import PICTURE_SUFFIXES
from k2cli.prompts import prompt_name
from k2cli.toml_tables import tables_in
from model import picture_file
from model.errors import K2Error, pluralise

PAGE_FILE, PICTURES_FOLDER = "index.html", "pictures"
COMPARED_SETTINGS = (  # settings that a run's pictures are labelled with if they differ in them
    *(f"settings.{key}" for key in ("steps", "guidance", "guidance_until", "sampler", "denoise")),
    "prompt.creativity",
)
GENERATOR_TAG = b'<meta name="generator" content="k2 gallery">'


def build_gallery(
    outputs: Path,
    target: Path,
    title: str,
    *,
    selection: history.Selection | None = None,
    on_skipped: Callable[[Path], None] | None = None,
) -> int:
    """Write the gallery of an outputs folder, or bring it up to date -> the number of pictures in it.

    Pictures and records take no extra space where the file system has hard links. The page is written last, so that it
    never shows a missing picture; an empty page comes first, which marks an interrupted build as a gallery. Whatever
    has no readable record or picture is passed to `on_skipped` and left out. If nothing matches `selection`, nothing is
    written. Raises K2Error if `target` holds something else.
    """
    check_target(target)
    made = [each for each in history.read(outputs, selection, on_skipped) if can_be_shown(each.path, on_skipped)]
    if selection and not made:  # an earlier selection may be there
        return 0
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    if not (target / PAGE_FILE).exists():
        write_files({target / PAGE_FILE: page_html(title, ()).encode()})
    with writing(target):
        (target / PICTURES_FOLDER).mkdir(exist_ok=True)
    wanted: dict[str, set[str]] = {}
    for each in made:
        wanted.setdefault(each.run, set()).update(path.name for path in (each.path, sidecar_record(each.path)) if path)
    for run, names in wanted.items():
        copy_run(outputs / run, target / PICTURES_FOLDER / run, names)
    write_files({target / PAGE_FILE: page_html(title, made).encode()})
    remove_stale(target / PICTURES_FOLDER, wanted)
    return len(made)


def can_be_shown(path: Path, on_skipped: Callable[[Path], None] | None) -> bool:
    """Whether a file is a picture, by its first bytes, as there are thousands. If not, it is passed to `on_skipped`."""
    try:
        with picture_file.open_picture(path):
            return True
    except Exception:  # Pillow raises anything over a broken file
        if on_skipped:
            on_skipped(path)
        return False


def sidecar_record(path: Path) -> Path | None:
    """The record beside a picture, if any; the one inside is enough to show it."""
    record = path.with_suffix(".toml")
    return record if record.is_file() and not record.is_symlink() else None


def check_target(target: Path) -> None:
    """Refuse a folder in which a gallery would overwrite somebody's files."""
    pictures = target / PICTURES_FOLDER
    if not target.exists():
        return
    with writing(target):
        if not target.is_dir():
            raise K2Error(f"{target} is a file.", hint="Choose another folder: --output DIR")
        if all(path.name.startswith(".") and path.name.endswith(DRAFT_SUFFIX) for path in target.iterdir()):
            return
        known = (target / PAGE_FILE).is_file() and GENERATOR_TAG in first_bytes(target / PAGE_FILE)
    if not known or pictures.is_symlink():
        raise K2Error(f"{target} holds something other than a k2 gallery.", hint="Choose another: --output DIR")


def first_bytes(path: Path) -> bytes:
    """The beginning of a file."""
    with path.open("rb") as file:
        return file.read(1000)


def copy_run(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Bring a run's files into the gallery, by hard link if possible, else as copies; those already there stay."""
    with writing(folder):
        if folder.is_symlink():
            folder.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        with os.scandir(folder) as entries:
            there = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        for name in names:
            old, new = there.get(name), os.stat(source / name, follow_symlinks=False)
            if old is not None:
                if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
                    continue
                (folder / name).unlink(missing_ok=True)
            try:
                os.link(source / name, folder / name, follow_symlinks=False)
            except FileExistsError:  # another build was faster
                continue
            except OSError:  # another disk, or a file system without links
                shutil.copy2(source / name, folder / name, follow_symlinks=False)


def remove_stale(folder: Path, wanted: Mapping[str, set[str]]) -> None:
    """Remove pictures that the project no longer has. Anything else in the folder stays."""
    for run in folder.iterdir():
        if run.is_symlink() or not run.is_dir():
            continue
        kept = wanted.get(run.name, set())
        for path in run.iterdir():
            if path.name not in kept and path.suffix in (*PICTURE_SUFFIXES, ".toml"):
                with writing(path):
                    path.unlink(missing_ok=True)
        if not kept:
            with suppress(OSError):
                run.rmdir()


def page_html(title: str, made: Iterable[MadePicture]) -> str:
    """The page as HTML text."""
    template = (files("k2cli") / "gallery.html").read_text("utf-8")
    script, style = (tag_content(template, tag) for tag in ("<script>", "<style>"))
    policy = (
        "default-src 'none'; img-src 'self' file: data:; "
        f"script-src '{csp_hash(script)}'; style-src '{csp_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Inside a script element only "</script" and "<!--" end the data; with every < escaped neither can occur.
    text = json.dumps(page_data(title, made), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    fill = {"@POLICY@": html.escape(policy, quote=False), "@TITLE@": html.escape(title), "@DATA@": text}
    return re.sub("@(?:POLICY|TITLE|DATA)@", lambda match: fill[match[0]], template)


def tag_content(template: str, tag: str) -> str:
    return template.split(tag, 1)[1].split(tag.replace("<", "</"), 1)[0]


def csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Numbering(dict[Any, int]):
    """Values numbered in order of first appearance, so that thousands of pictures share them."""

    def index_of(self, value: Any) -> int:
        return self.setdefault(value, len(self))


def page_data(title: str, made: Iterable[MadePicture]) -> dict[str, Any]:
    """What the page's script reads: runs, pictures, and the tables that pictures refer to by number."""
    runs: dict[str, MadePicture] = {}  # the first picture of each
    values_by_run: dict[
        str, dict[str, set[str]]
    ] = {}  # of each, the values of its pictures for each key of COMPARED_SETTINGS
    numbers, strings, looks, facts = Numbering(), Numbering(), Numbering(), Numbering()
    pictures: list[list[Any]] = []
    within: list[int] = []  # the pictures whose only record is inside the file
    for each in made:
        runs.setdefault(each.run, each)
        for key in COMPARED_SETTINGS:
            values_by_run.setdefault(each.run, {}).setdefault(key, set()).add(each.text(key))
        if sidecar_record(each.path) is None:
            within.append(len(pictures))
        pictures.append(
            [
                numbers.index_of(each.run),
                each.path.name,
                strings.index_of(each.text("prompt.text")),
                strings.index_of(
                    prompt_name(each.text("prompt.name"), each.text("prompt.caption")) or each.text("prompt.text")
                ),
                safe_integer(each["settings.seed"]),
                safe_integer(each["settings.width"]),
                safe_integer(each["settings.height"]),
                looks.index_of(tuple(each.styles.items())),
                [facts.index_of(fact) for fact in picture_facts(each)],
            ]
        )
    differing = {run: [key for key, values in said.items() if len(values) > 1] for run, said in values_by_run.items()}
    return {
        "project": title,
        "runs": [
            {
                "name": run,
                "about": describe_run(first, differing[run]),
                "apart": [key.split(".")[1] for key in differing[run]],
            }
            for run, first in runs.items()
        ],
        "strings": list(strings),
        "looks": list(looks),
        "facts": list(facts),
        "pictures": pictures,
        "within": within,
    }


def safe_integer(value: Any) -> int | None:
    """An integer that JavaScript represents exactly; larger seeds appear in the facts."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def describe_run(made: MadePicture, differing: Collection[str]) -> str:
    """What a run's pictures have in common, shown after its name; `differing` are the settings in which they differ."""
    when = f"{made.local_time.day} {made.local_time:%b %Y, %H:%M}" if made.local_time else ""
    steps = "" if "settings.steps" in differing else made.text("settings.steps")
    return " · ".join(filter(None, [when, model_label(made), pluralise(steps, "step") if steps else ""]))


def model_label(made: MadePicture) -> str:
    return f"{Path(made.text('model.name')).stem} {made.text('model.variant')}".strip()


def picture_facts(made: MadePicture) -> list[tuple[str, str]]:
    """A picture's record as facts, much as `k2 show` prints it; empty ones are left out."""
    expanded = made.text("prompt.expanded")
    facts: list[tuple[str, Any]] = [
        ("expanded", "" if expanded == made.text("prompt.text") else expanded),
        ("avoid", made.text("prompt.avoid")),
        ("styles", "\n".join(f"{name} {strength:g}" for name, strength in made.styles.items())),
        ("references", "\n".join(reference_names(made))),
        ("loras", "\n".join(f"{file} {weight}" for file, weight in history.lora_weights(made.table).items())),
        ("size", made.size.replace("x", " × ") if made["settings.width"] else ""),
        *((key, setting_text(made, key)) for key in ("seed", "steps", "guidance", "guidance_until", "sampler")),
        ("init image", made.text("init_image.image")),
        ("denoise", setting_text(made, "denoise")),
        ("mask", made.text("mask.region") or made.text("mask.image")),
        ("cohesion", cohesion_text(made)),
        ("style guidance", setting_text(made, "style_guidance")),
        ("leak guard", made.text("settings.leak_guard")),
        ("vision tiles", setting_text(made, "vision_tiles")),
        ("vision rows", setting_text(made, "vision_rows").lower()),
        ("mu", number_text(made["settings.mu"])),
        ("creativity", "" if made["prompt.creativity"] == "raw" else made.text("prompt.creativity")),
        ("model", model_label(made)),
        ("device", ", ".join(filter(None, (made.text(f"settings.{key}") for key in ("device", "dtype"))))),
        ("weights", "" if made["settings.precision"] == "native" else made.text("settings.precision")),
        ("offload", "" if made["settings.offload"] == "none" else made.text("settings.offload")),
        ("created", f"{made.local_time:%Y-%m-%d %H:%M:%S}" if made.local_time else ""),
        ("seconds", number_text(made["seconds"])),
        ("pixels", made.text("pixels")[:16]),
    ]
    return [(name, fact) for name, fact in facts if fact]


def setting_text(made: MadePicture, key: str) -> str:
    """A setting as a user would type it: 1, not 1.0."""
    value = made[f"settings.{key}"]
    return f"{value:g}" if isinstance(value, float) else made.text(f"settings.{key}")


def cohesion_text(made: MadePicture) -> str:
    """How much a picture shares, and with which one."""
    seed, prompt = made.text("leader.seed"), made.text("leader.prompt")
    return f"{setting_text(made, 'cohesion')}, follows seed {seed} of: {prompt}" if prompt or seed else ""


def reference_names(made: MadePicture) -> Iterable[str]:
    for style in tables_in(made.table, "style"):
        for each in tables_in(style, "reference"):
            yield " ".join(str(each.get("image", "")).split())


def number_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""
