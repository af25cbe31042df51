"""Reproducing recorded pictures, and comparing them with the originals."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops

from k2cli import history, metadata, records
from k2cli.commands import as_user_error
from k2cli.console import for_shell, print_result, say, short_path, show_error, to_json
from k2cli.disk import Exists, write_files
from k2cli.fast_toml import dump
from k2cli.folder import Folder
from k2cli.formats import SUFFIXES, encode, format_of
from k2cli.outputs import BLOCKED_SUFFIX, PLAN_FILE, Run, picture_for
from k2cli.runs import Saved, read_plan
from k2cli.toml_tables import MAX_FILE_BYTES, Toml
from k2cli.workers import OnStep, load_pipeline, wanted_groups
from model import picture_file
from model.errors import K2Error
from model.spec import Picture, RenderSpec

if TYPE_CHECKING:
    from model.pipeline import Pipeline


MAX_JPEG_DIFFERENCE = 16  # levels, at most, between two encoders' results for a picture; an edited one is further off
MISSING = {  # why there is no original to compare with
    "gone": "is gone",
    "barred": "may not be read",
    "broken": "is no longer a readable picture",
}


@dataclass(frozen=True)
class Reproduction:
    """A reproduced picture, and how it compares."""

    saved: Saved
    levels_off: int | None  # largest difference from the recorded pixels, of 255; None if unknown
    original: str  # of the recorded picture since: "changed", one of MISSING, or ""
    checked: bool  # the recorded picture itself is being checked, not only its record
    other: Path | None = None  # the record beside it, if that differs from the one inside

    @property
    def identical(self) -> bool:
        return self.levels_off == 0 and not (self.checked and self.original)


class RerunFolders(ExitStack):
    """The runs that reproduced pictures go to: one per project, and another if a name occurs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def run_for(self, home: Folder, name: str, stem: str) -> Run:
        """A run of this project, newly claimed or an earlier one here, without such a picture yet. Raises K2Error."""
        self.drop_empty()
        for run in self.runs:
            if run.folder.parent == home.outputs and not run.is_done(stem):
                return run
        self.runs.append(self.enter_context(Run.claim(home.outputs, name)))
        return self.runs[-1]

    def drop_empty(self) -> None:
        """Remove runs that were claimed for a picture that then failed."""
        for run in [run for run in self.runs if not run.has_results]:
            run.discard()
            self.runs.remove(run)

    def __exit__(self, *error: Any) -> bool | None:
        self.drop_empty()
        return super().__exit__(*error)


Found = tuple[Path, K2Error | OSError | None]  # a picture or a record; or a folder, and why none were found in it


def pictures_in(files: Iterable[Path], orphans: list[Path] | None = None) -> list[Found]:
    """Pictures and records as named; for a run's folder all its pictures, also those without a record. Records whose
    pictures are gone go to `orphans`, or into the result if that is None. If a folder is unreadable or empty, its error
    is returned in its place."""
    found: list[Found] = []
    for file in files:
        try:
            found += [(each, None) for each in (run_pictures(file, orphans) if file.is_dir() else [file])]
        except (K2Error, OSError) as error:
            found.append((file, error))
    return found


def run_pictures(folder: Path, orphans: list[Path] | None) -> list[Path]:
    """The pictures in a run's folder. Raises K2Error if it has none, and OSError."""
    unknown: list[Path] = []
    pictures = history.read_run(folder, on_skipped=unknown.append)
    unpictured = sorted(each for each in folder.glob("*.toml") if is_orphan(each))
    if not (pictures or unknown or unpictured):
        raise K2Error(f"There are no k2 pictures in {folder}.", hint="Name a picture, a record, or a run.")
    existing = [*(each.path for each in pictures), *sorted(unknown)]
    if orphans is None:
        return [*existing, *unpictured]
    if not existing:
        raise K2Error(f"All pictures in {folder} are gone.", hint=how_to_reproduce(unpictured))
    orphans += unpictured
    return existing


def how_to_reproduce(orphans: Sequence[Path]) -> str:
    """How to reproduce pictures that are gone: only on request, as somebody may have deleted them."""
    return f"To reproduce one, name its record: k2 rerun {for_shell(orphans[0])}"


def is_orphan(record: Path) -> bool:
    """Whether a file is the record, perhaps a damaged one, of a picture that is gone; not a run's plan, a blocked
    picture's record, or something else: a project, a style, somebody's notes."""
    if (
        record.name == PLAN_FILE
        or record.name.endswith(BLOCKED_SUFFIX)
        or picture_for(record).is_file()
        or not record.is_file()
    ):
        return False
    if history.load_record(record) is not None:
        return True
    with suppress(OSError), record.open("rb") as file:
        lines = b"\n" + file.read(MAX_FILE_BYTES)
        return b"\nschema = " in lines and b"\n[prompt]" in lines
    return False


def reproduce(
    file: Path,
    home: Folder | None,
    folders: RerunFolders,
    output: Path | None,
    device: str | None,
    *,
    check: bool = False,
    embed: bool,
    on_step: OnStep | None = None,
) -> Reproduction:
    """Reproduce a picture, and compare. Hashes are verified first. With `check` nothing is written, and the result's
    path is the original's. Raises K2Error.
    """
    inside = home.recorded_path if home else None
    toml = records.read(file)
    record, other = records.parse(toml, inside), differing_record(file, toml)
    if "seed" not in record.table["settings"]:
        raise K2Error(f"The record of {file} has no seed.", hint="Without it the picture cannot be reproduced.")
    model = records.locate_model(record, inside)
    if output is not None:
        check_output(output)
    elif home is None and not check:
        raise K2Error(f"There is no project around {file} to write to.", hint="Name a file to write: --output FILE.png")
    format = format_of((output or picture_for(file)).name) or "png"
    run = None
    if home is not None and output is None and not check:  # before it is rendered: if it cannot be kept, say so now
        run = folders.run_for(home, record.shot.name, record.shot.stem)
    pipeline = load_pipeline(replace(record.model, name=model, device=device or record.model.device))
    picture, new_record = render_again(pipeline, record, file, home, on_step)
    if blocked := new_record["blocked"]:
        raise K2Error(f'The output filter "{blocked["filter"]}" blocked the picture: {blocked["reason"]}.')
    compared = compare(picture_for(file), record, picture.image, new_record)
    if check:
        return Reproduction(
            Saved(picture_for(file), new_record, record.shot.stem), *compared, checked=True, other=other
        )
    encoded, text = metadata.encode(picture.image, new_record, embed=embed, format=format), dump(new_record)
    if run is not None:
        path = run.save(record.shot.stem, encoded, text, SUFFIXES[format])
    else:
        assert output is not None
        path = output
        try:
            write_files({output.with_suffix(".toml"): text, output: encoded}, new=True)
        except Exists as error:  # created since the check above
            raise exists_error(error.path) from None
    return Reproduction(Saved(path, new_record, record.shot.stem), *compared, checked=False, other=other)


def differing_record(file: Path, read: Toml) -> Path | None:
    """The record beside a picture, if it differs from the one that was read; else None."""
    beside = file.with_suffix(".toml")
    table = None if beside == file else history.load_record(beside)
    return beside if table is not None and table != read.table else None


def check_output(output: Path) -> None:
    """Refuse a file whose name is not a picture's, that exists already, or that has no folder."""
    if format_of(output.name) is None:
        raise K2Error(f"{output} is not a name for a picture.", hint="Pictures are written as .png, .webp or .jpg.")
    for path in (output, output.with_suffix(".toml")):
        if path.exists():
            raise exists_error(path)
    if not output.parent.is_dir():
        raise K2Error(f"There is no folder {output.parent}.", hint="Create it first, or choose another.")


def render_again(
    pipeline: Pipeline, record: records.Record, file: Path, home: Folder | None, on_step: OnStep | None
) -> tuple[Picture, dict[str, Any]]:
    """A recorded picture reproduced, and its new record: rendered alone or, if only that gives the same pixels, in its
    original batch, where numbers round as they did then."""
    if record.threads and str(pipeline.device) == "cpu":
        use_threads(record.threads)
    root = home.root if home else Path.cwd()
    (picture,) = pipeline.stream([record.shot.spec], on_step=on_step)
    new_record = records.finished_record(record.shot, picture, root)
    if new_record["pixels"] == record.pixels or new_record["blocked"]:
        return picture, new_record
    specs, position = specs_of_run(file, home, record.shot.stem)
    (group,) = wanted_groups(pipeline.batches(specs), {position}) or [()]
    if len(group) > 1:
        pictures = pipeline.stream([specs[index] for index in group], on_step=on_step)
        in_batch = next(each for index, each in zip(group, pictures, strict=True) if index == position)
        batch_record = records.finished_record(record.shot, in_batch, root)
        if batch_record["pixels"] == record.pixels:
            return in_batch, batch_record
    return picture, new_record


def specs_of_run(file: Path, home: Folder | None, stem: str) -> tuple[list[RenderSpec], int]:
    """The specs of a picture's whole run, and its index there; empty if the plan is not beside the picture."""
    folder = file.absolute().parent
    if home is not None and (folder / PLAN_FILE).is_file():
        with suppress(K2Error):  # a run that can no longer be resumed
            shots = [shot for shot, _ in read_plan(home, Run(folder))[1]]
            position = next((index for index, shot in enumerate(shots) if shot.stem == stem), None)
            return ([shot.spec for shot in shots], position) if position is not None else ([], 0)
    return [], 0


def use_threads(count: int) -> None:
    """Use as many CPU threads as when a picture was made: the last bits depend on it."""
    import torch

    torch.set_num_threads(count)


def exists_error(path: Path) -> K2Error:
    return K2Error(f"{path} exists already.", hint="Choose another name; each picture gets a record beside it.")


def verdict(levels_off: int | None) -> str:
    """What it means that a picture is at most so many levels off, as a sentence."""
    if levels_off == 0:
        return "Identical, pixel for pixel."
    amount = "" if levels_off is None else f", by at most {levels_off} of 255 levels"
    rounding = " That is rounding, as on another machine or in another batch." if levels_off == 1 else ""
    return f"The pixels differ from the recorded ones{amount}.{rounding}"


def report(reproduction: Reproduction, file: Path, *, several: bool, as_json: bool, quiet: bool) -> None:
    """Print a reproduced picture's line of results, and what the comparison found: if `quiet` only differences, as
    errors. If there are `several`, the caller counts the identical ones and reports them once."""
    path, levels_off = reproduction.saved.path, reproduction.levels_off
    gone, changed = (reproduction.original == fate for fate in ("gone", "changed"))
    unreadable = reproduction.original in ("barred", "broken")
    if as_json:
        comparison = {"identical": reproduction.identical, "levels_off": levels_off}
        comparison |= {"gone": gone, "unreadable": unreadable, "changed": changed}
        print_result(
            to_json({"file": short_path(path), "from": short_path(file), **comparison, **reproduction.saved.record})
        )
    elif not (gone and reproduction.checked):
        print_result(short_path(path))
    if quiet and reproduction.identical:
        return
    if reproduction.other:
        note = f"{short_path(reproduction.other)} differs from the picture's own record, which was used."
        say(f"{note} To use it instead: k2 rerun {for_shell(reproduction.other)}", "yellow")
    if levels_off != 0 or (reproduction.identical and not several):
        say(
            f"{short_path(file)}: {verdict(levels_off)}" if several else verdict(levels_off),
            "yellow" if levels_off != 0 else "green",
        )
    if unreadable or (gone and reproduction.checked):
        say(
            f"{short_path(picture_for(file))} {MISSING[reproduction.original]}: only its record was compared.", "yellow"
        )
    if changed:
        say(f"{short_path(picture_for(file))} was changed after it was made: its own pixels differ.", "yellow")


def report_refusal(error: Exception, file: Path, refused: list[str], *, several: bool, as_json: bool) -> None:
    """Report why a picture is not reproduced: with JSON also as an object, one per file. A message that is the same for
    several is shown once and added to `refused`. Raises the error if it is the only file, or if it is a bug."""
    problem = as_user_error(error)
    if problem is None:
        raise error
    if as_json:
        print_result(to_json({"file": None, "from": short_path(file), "error": str(problem), "hint": problem.hint}))
    if not several:
        raise error
    if str(problem) not in refused:
        show_error(problem)
    refused.append(str(problem))


def summary(identical: int, refused: int, total: int) -> str:
    """The summary for several pictures."""
    if refused == total:
        return f"None of {total} could be reproduced."
    rest = f", and {refused} could not be reproduced" if refused else ""
    return f"{identical} of {total} are identical, pixel for pixel{rest}."


def compare(
    path: Path, record: records.Record, image: Image.Image, new_record: Mapping[str, Any]
) -> tuple[int | None, str]:
    """The largest difference between a reproduced picture and the recorded one, None if unknown; and what has become of
    the recorded one: "changed", one of MISSING, or "". A JPEG's pixels are never those recorded, so a change shows only
    if the reproduction is identical: as a JPEG it gives the same pixels, or with another Pillow nearly the same.

    path        of the recorded picture
    image       the reproduction
    new_record  the reproduction's record
    """
    levels_off = 0 if new_record["pixels"] == record.pixels else None
    if not path.is_file():
        return levels_off, "gone"
    try:
        found = read_pixels(path)
    except PermissionError:
        return levels_off, "barred"
    except Exception:  # Pillow raises anything over a broken file
        return levels_off, "broken"
    if records.pixel_hash(found) == record.pixels:
        return (difference(found, image) if found.size == image.size else levels_off), ""  # else its record was changed
    if format_of(path.name) == "jpeg":
        same_encoder = record.table.get("versions", {}).get("pillow") == version("pillow")  # and so the same encoder
        encoded = as_jpeg(image)
        unchanged = levels_off is None or (
            found.size == encoded.size and difference(found, encoded) <= (0 if same_encoder else MAX_JPEG_DIFFERENCE)
        )
    else:
        unchanged = records.pixel_hash(found) == new_record["pixels"]
    return levels_off, "" if unchanged else "changed"  # if the picture is unchanged, its record was changed


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference, in levels of 255, between two pictures of one size."""
    counts = ImageChops.difference(one, other).histogram()  # 256 per channel
    return max(level % 256 for level, count in enumerate(counts) if count)


def as_jpeg(image: Image.Image) -> Image.Image:
    """A picture after encoding as a JPEG."""
    return Image.open(io.BytesIO(encode(image, "jpeg")))


def read_pixels(path: Path) -> Image.Image:
    """A picture's pixels. Raises whatever Pillow does, and ValueError if there are too many."""
    with picture_file.open_picture(path) as found:
        if found.width * found.height > picture_file.MAX_PIXELS:
            raise ValueError("it is too large")
        return found.convert("RGB")
