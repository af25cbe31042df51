"""New styles: from pictures, a LoRA, both, or other styles."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2cli.disk import Exists, remove_dead_drafts, write_files, writing
from k2cli.fast_toml import dump
from k2cli.pictures import check_picture, folder_pictures, picture_hint
from k2cli.styles import MAX_LORA_BYTES, MAX_STYLE_PICTURES, Styles, exists_error
from k2cli.texts import as_name, check_line, display_safe, relative_path
from model import library
from model.errors import K2Error, listed
from model.hashes import identity, peft_settings_file, sha256
from model.lora_file import check_kind, stated_triggers
from model.picture_file import describe_skipped
from model.reference_weights import MAX_REFERENCES

LORA_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class AddedStyle:
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
) -> AddedStyle:
    """Copy pictures into refs/NAME, a LoRA into loras, and write styles/NAME.toml.

    Existing files stay; a file that is there already, under any name, is not copied again. Everything is checked before
    anything is written, and the style file comes last.
    """
    file = styles.new_file(name, force=force)
    table: dict[str, Any] = {"keywords": check_words(keywords, "A keyword"), "avoids": check_words(avoids, "An avoid")}
    loras = [each for each in files if each.suffix.lower() == LORA_SUFFIX]
    if len(loras) > 1:
        raise K2Error(f'Style "{name}" would have {len(loras)} LoRAs.', hint="Give each its own style, and mix them.")
    if triggers and not loras:
        raise K2Error("Triggers need a LoRA, and none was named.", hint="Use keywords instead: -k")
    images = [each for each in files if each not in loras]
    for each in images:
        if each.suffix.lower() in library.WEIGHT_LIKE_SUFFIXES and each.is_file():
            hint = "Rename it." if each.suffix.lower() in (".sft", ".safetensor") else "Fetch it as one, or convert it."
            raise K2Error(f"{display_safe(str(each))}: a LoRA is a {LORA_SUFFIX} file.", hint=hint)
    if method and not images:
        raise K2Error("--method needs pictures, and none was named.", hint="Omit it, or name pictures.")
    lora = lora_path(loras[0], name, styles) if loras else None
    stated, trigger_note = stated_triggers(loras[0]) if loras and not triggers else ([], "")
    stated = [display_safe(each) for each in stated]
    if lora:
        table |= {"lora": relative_path(lora, styles.root), "triggers": check_words(triggers, "A trigger") or stated}
    pictures, patterns, passed_over = add_pictures(styles, name, images, method, loras) if images else ([], [], "")
    if lora and not lora.exists():
        make_folder(lora.parent)
        peft_file = peft_settings_file(loras[0])
        settings = {lora.with_name(peft_file.name): peft_file.read_bytes()} if peft_file else {}
        write_files({**settings, lora: loras[0].read_bytes()})
    make_folder(file.parent)
    blocks = [dump({**table, "method": method}), *(reference_toml(pattern, 1.0) for pattern in patterns)]
    write_style_file(file, b"\n".join(blocks), name, force=force)
    return AddedStyle(file, pictures, lora, " ".join(filter(None, (passed_over, trigger_note))), stated)


def lora_path(file: Path, name: str, styles: Styles) -> Path:
    """Where a style's LoRA is in the project, or will be. Raises K2Error if it is not a LoRA."""
    if not file.is_file():
        raise K2Error(f"There is no {display_safe(str(file))}.", hint="Name a LoRA's .safetensors file.")
    if file.stat().st_size > MAX_LORA_BYTES:
        raise K2Error(
            f"{display_safe(str(file))} is larger than {MAX_LORA_BYTES >> 30} GB.", hint="Is it a model, not a LoRA?"
        )
    check_kind(file)
    folder = styles.path_inside("loras", "")
    if peft_settings_file(file):  # found only by its name, so both get a folder of their own
        path = styles.path_inside(f"loras/{name}/{file.name}", "")
        if path.exists() and identity(path) != identity(file):
            raise K2Error(f"loras/{name} holds a different LoRA.", hint="Choose another name, or remove it.")
        return path
    loras = (each for each in sorted(folder.glob(f"*{LORA_SUFFIX}")) if each.is_file() and not each.is_symlink())
    same = (each for each in loras if sha256(each) == sha256(file))
    return next(same, None) or free_path(folder, file.stem, LORA_SUFFIX.removeprefix("."))


def add_pictures(
    styles: Styles, name: str, images: Sequence[Path], method: str | None, loras: Sequence[Path]
) -> tuple[list[Path], list[str], str]:
    """Copy pictures, and those in folders, into refs/NAME -> their paths there, the patterns that match them, and what
    was passed over. `loras` are those named as well."""
    folder = styles.path_inside(f"refs/{name}", "")
    for image in images:
        if not image.exists():
            hint = picture_hint(image, str(image)) or "Name pictures, or a folder of them."
            raise K2Error(f"There is no {display_safe(str(image))}.", hint=hint)
        if image.is_dir() and not folder_pictures(image):
            hint = describe_skipped(image.iterdir()) or weights_note(image.iterdir(), loras)
            hint = hint or "Name pictures, or a folder of them."
            raise K2Error(f"{display_safe(str(image))} holds no picture.", hint=hint)
    files = [each for image in images for each in (folder_pictures(image) if image.is_dir() else [image])]
    folder_files = {path for image in images if image.is_dir() for path in image.iterdir()}
    extensions: dict[Path, str] = {}
    unusable: list[str] = []
    for each in files:
        try:
            extensions[each] = check_picture(each, f'Style "{name}"', display_safe(str(each)), complete=True)
        except K2Error:
            if each in images or (each == files[-1] and not extensions):
                raise
            unusable.append(display_safe(each.name))  # in a folder the others still count, as on a moodboard
    left_out = f"Left out as unusable: {listed(unusable)}." if unusable else ""
    others = describe_skipped(folder_files - {each.parent for each in files})
    passed_over = " ".join(filter(None, (others, weights_note(folder_files, loras), left_out)))
    count = len({sha256(each) for each in extensions})
    limit, by_method = (
        MAX_REFERENCES.get(method or "", MAX_STYLE_PICTURES),
        f" by {method}" if method in MAX_REFERENCES else "",
    )
    if count > limit:
        raise K2Error(
            f'Style "{name}" would have {count} reference pictures{by_method}.',
            hint=f"Give at most {limit}, those that show the look best.",
        )
    pictures = sorted({*copy_pictures(extensions, folder).values()})
    fills_folder = pictures == folder_pictures(folder)
    patterns = [f"refs/{name}/*"] if fills_folder else [glob.escape(f"refs/{name}/{each.name}") for each in pictures]
    return pictures, patterns, passed_over


def weights_note(paths: Iterable[Path], loras: Sequence[Path]) -> str:
    """A note that a folder holds weights, since a LoRA is used only if named itself; "" if it holds none."""
    named = {path.resolve() for path in loras}
    others = (path for path in paths if path.resolve() not in named and not path.name.startswith("."))
    found = sorted(display_safe(path.name) for path in others if path.suffix.lower() in library.WEIGHT_LIKE_SUFFIXES)
    return f"Passed over: weights ({listed(found)}); to use a LoRA, name its file." if found else ""


def copy_pictures(extensions: Mapping[Path, str], folder: Path) -> dict[Path, Path]:
    """Copy pictures of known kinds into a folder -> where each is there. One that is there already, under any name, is
    not copied again."""
    make_folder(folder)
    by_hash = {sha256(each): each for each in folder_pictures(folder)}
    for image, kind in extensions.items():
        if (key := sha256(image)) not in by_hash:
            by_hash[key] = free_path(folder, image.stem, kind)
            write_files({by_hash[key]: image.read_bytes()})
    return {image: by_hash[sha256(image)] for image in extensions}


def make_folder(folder: Path) -> None:
    """Create a folder, and clear what a killed process left in it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    remove_dead_drafts(folder)


def add_mix(styles: Styles, name: str, weights: Mapping[str, float], *, force: bool) -> Path:
    """Write a mix as styles/NAME.toml -> that file. The same mix may exist already. Raises K2Error."""
    same = styles.is_mix(name, weights)  # saved before its preview failed
    file = styles.new_file(name, force=force or same)
    if name in styles.with_mixed(weights, "k2 mix-styles"):
        raise K2Error(f"{name} is itself part of the mix.", hint="Save it under another name.")
    with writing(file):
        file.parent.mkdir(exist_ok=True)
    write_style_file(file, dump({"mix": weights}), name, force=force or same)
    return file


def write_style_file(file: Path, data: bytes, name: str, *, force: bool) -> None:
    """Write a style's file; unless forced, replace none, not even one created since `new_file` looked."""
    try:
        write_files({file: data}, new=not force)
    except Exists:
        raise exists_error(name) from None


def reference_toml(image: str, weight: float) -> bytes:
    """A [[reference]] as a user would write it."""
    return b"[[reference]]\n" + dump({"image": image, "weight": weight})


def check_words(texts: Sequence[str], what: str) -> list[str]:
    """Words as a style file stores them."""
    words = [check_line(text, what) for text in texts]
    if not all(words):
        raise K2Error(f"{what} is empty.", hint="Omit it, or write a word.")
    return words


def free_path(folder: Path, stem: str, extension: str) -> Path:
    """An unused path in the folder, numbered if necessary."""
    stem = as_name(stem, besides=".").strip("-.") or "picture"
    path, number = folder / f"{stem}.{extension}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.{extension}"
    return path
