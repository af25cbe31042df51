"""New styles: from pictures, a LoRA, both, or other styles."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.disk import Exists, remove_dead_drafts, write_files, writing
from k2cli.fast_toml import dump
from k2cli.pictures import check_picture, in_folder, nearly_called
from k2cli.styles import MOST_LORA, MOST_REFERENCES, Styles, taken
from k2cli.texts import as_name, masked, plain, relative
from model import library
from model.errors import K2Error, listed
from model.hashes import identity, peft_settings_file, sha256
from model.lora_file import check_kind, stated_triggers
from model.picture_file import describe_skipped
from model.reference_weights import MAX_REFERENCES

LORA = ".safetensors"


@dataclass(frozen=True)
class Added:
    """A style that was made from files."""

    file: Path
    pictures: Sequence[Path]  # in the project, like the LoRA
    lora: Path | None
    passed_over: str  # what was passed over, in sentences
    stated_triggers: Sequence[str] = ()  # triggers that the LoRA itself states, which the style uses


def add_style(
    styles: Styles,
    name: str,
    files: Sequence[Path],
    *,
    keywords: Sequence[str] = (),
    avoids: Sequence[str] = (),
    triggers: Sequence[str] = (),
    method: str | None = None,
    force: bool = False,
) -> Added:
    """Copy pictures into refs/NAME, a LoRA into loras, and write styles/NAME.toml.

    Existing files stay; a file that is there already, under any name, is not copied again. Everything is checked before
    anything is written, and the style file comes last.
    """
    file = styles.new_file(name, force=force)
    said: dict[str, Any] = {"keywords": check_words(keywords, "A keyword"), "avoids": check_words(avoids, "An avoid")}
    loras = [each for each in files if each.suffix.lower() == LORA]
    if len(loras) > 1:
        raise K2Error(f'Style "{name}" would have {len(loras)} LoRAs.', hint="Give each its own style, and mix them.")
    if triggers and not loras:
        raise K2Error("Triggers need a LoRA, and none was named.", hint="Use keywords instead: -k")
    images = [each for each in files if each not in loras]
    for each in images:
        if each.suffix.lower() in library.WEIGHT_LIKE_SUFFIXES and each.is_file():
            hint = "Rename it." if each.suffix.lower() in (".sft", ".safetensor") else "Fetch it as one, or convert it."
            raise K2Error(f"{masked(str(each))}: a LoRA is a {LORA} file.", hint=hint)
    if method and not images:
        raise K2Error("--method needs pictures, and none was named.", hint="Omit it, or name pictures.")
    lora = place_for(loras[0], name, styles) if loras else None
    stated, unsaid = stated_triggers(loras[0]) if loras and not triggers else ([], "")
    stated = [masked(each) for each in stated]
    if lora:
        said |= {"lora": relative(lora, styles.root), "triggers": check_words(triggers, "A trigger") or stated}
    pictures, patterns, over = add_pictures(styles, name, images, method, loras) if images else ([], [], "")
    if lora and not lora.exists():
        make(lora.parent)
        beside = peft_settings_file(loras[0])
        settings = {lora.with_name(beside.name): beside.read_bytes()} if beside else {}
        write_files({**settings, lora: loras[0].read_bytes()})
    make(file.parent)
    blocks = [dump({**said, "method": method}), *(reference(pattern, 1.0) for pattern in patterns)]
    put(file, b"\n".join(blocks), name, force=force)
    return Added(file, pictures, lora, " ".join(filter(None, (over, unsaid))), stated)


def place_for(file: Path, name: str, styles: Styles) -> Path:
    """Where a style's LoRA is in the project, or will be. Raises K2Error if it is not a LoRA."""
    if not file.is_file():
        raise K2Error(f"There is no {masked(str(file))}.", hint="Name a LoRA's .safetensors file.")
    if file.stat().st_size > MOST_LORA:
        raise K2Error(f"{masked(str(file))} is larger than {MOST_LORA >> 30} GB.", hint="Is it a model, not a LoRA?")
    check_kind(file)
    folder = styles.inside("loras", "")
    if peft_settings_file(file):  # found only by its name, so both get a folder of their own
        place = styles.inside(f"loras/{name}/{file.name}", "")
        if place.exists() and identity(place) != identity(file):
            raise K2Error(f"loras/{name} holds a different LoRA.", hint="Choose another name, or remove it.")
        return place
    loras = (each for each in sorted(folder.glob(f"*{LORA}")) if each.is_file() and not each.is_symlink())
    there = (each for each in loras if sha256(each) == sha256(file))
    return next(there, None) or free_name(folder, file.stem, LORA.removeprefix("."))


def add_pictures(
    styles: Styles, name: str, images: Sequence[Path], method: str | None, loras: Sequence[Path]
) -> tuple[list[Path], list[str], str]:
    """Copy pictures, and those in folders, into refs/NAME -> their paths there, the patterns that match them, and what
    was passed over. `loras` are those named as well."""
    folder = styles.inside(f"refs/{name}", "")
    for image in images:
        if not image.exists():
            hint = nearly_called(image, str(image)) or "Name pictures, or a folder of them."
            raise K2Error(f"There is no {masked(str(image))}.", hint=hint)
        if image.is_dir() and not in_folder(image):
            hint = describe_skipped(image.iterdir()) or weights_among(image.iterdir(), loras)
            hint = hint or "Name pictures, or a folder of them."
            raise K2Error(f"{masked(str(image))} holds no picture.", hint=hint)
    files = [each for image in images for each in (in_folder(image) if image.is_dir() else [image])]
    beside = {path for image in images if image.is_dir() for path in image.iterdir()}
    kinds: dict[Path, str] = {}
    unread: list[str] = []
    for each in files:
        try:
            kinds[each] = check_picture(each, f'Style "{name}"', masked(str(each)), whole=True)
        except K2Error:
            if each in images or (each == files[-1] and not kinds):
                raise
            unread.append(masked(each.name))  # in a folder the others still count, as on a moodboard
    left_out = f"Left out as unusable: {listed(unread)}." if unread else ""
    others = describe_skipped(beside - {each.parent for each in files})
    over = " ".join(filter(None, (others, weights_among(beside, loras), left_out)))
    count = len({sha256(each) for each in kinds})
    most, by = MAX_REFERENCES.get(method or "", MOST_REFERENCES), f" by {method}" if method in MAX_REFERENCES else ""
    if count > most:
        raise K2Error(
            f'Style "{name}" would have {count} reference pictures{by}.',
            hint=f"Give at most {most}, those that show the look best.",
        )
    pictures = sorted({*copy_pictures(kinds, folder).values()})
    whole = pictures == in_folder(folder)
    patterns = [f"refs/{name}/*"] if whole else [glob.escape(f"refs/{name}/{each.name}") for each in pictures]
    return pictures, patterns, over


def weights_among(paths: Iterable[Path], loras: Sequence[Path]) -> str:
    """A note that a folder holds weights, since a LoRA is used only if named itself; "" if it holds none."""
    taken = {path.resolve() for path in loras}
    others = (path for path in paths if path.resolve() not in taken and not path.name.startswith("."))
    found = sorted(masked(path.name) for path in others if path.suffix.lower() in library.WEIGHT_LIKE_SUFFIXES)
    return f"Passed over: weights ({listed(found)}); to use a LoRA, name its file." if found else ""


def copy_pictures(kinds: Mapping[Path, str], folder: Path) -> dict[Path, Path]:
    """Copy pictures of known kinds into a folder -> where each is there. One that is there already, under any name, is
    not copied again."""
    make(folder)
    there = {sha256(each): each for each in in_folder(folder)}
    for image, kind in kinds.items():
        if (key := sha256(image)) not in there:
            there[key] = free_name(folder, image.stem, kind)
            write_files({there[key]: image.read_bytes()})
    return {image: there[sha256(image)] for image in kinds}


def make(folder: Path) -> None:
    """Create a folder, and clear what a killed process left in it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(folder)


def add_mix(styles: Styles, name: str, weights: Mapping[str, float], *, force: bool) -> Path:
    """Write a mix as styles/NAME.toml -> that file. The same mix may exist already. Raises K2Error."""
    same = styles.is_mix(name, weights)  # saved before its preview failed
    file = styles.new_file(name, force=force or same)
    if name in styles.reached(weights, "k2 mix-styles"):
        raise K2Error(f"{name} is itself part of the mix.", hint="Save it under another name.")
    with writing(file):
        file.parent.mkdir(exist_ok=True)
    put(file, dump({"mix": weights}), name, force=force or same)
    return file


def put(file: Path, data: bytes, name: str, *, force: bool) -> None:
    """Write a style's file; unless forced, replace none, not even one created since `new_file` looked."""
    try:
        write_files({file: data}, new=not force)
    except Exists:
        raise taken(name) from None


def reference(image: str, weight: float) -> bytes:
    """A [[reference]] as a user would write it."""
    return b"[[reference]]\n" + dump({"image": image, "weight": weight})


def check_words(texts: Sequence[str], what: str) -> list[str]:
    """Words as a style file stores them."""
    words = [plain(text, what) for text in texts]
    if not all(words):
        raise K2Error(f"{what} is empty.", hint="Omit it, or write a word.")
    return words


def free_name(folder: Path, stem: str, kind: str) -> Path:
    """An unused path in the folder, numbered if necessary."""
    stem = as_name(stem, besides=".").strip("-.") or "picture"
    path, number = folder / f"{stem}.{kind}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.{kind}"
    return path
