"""Making recorded pictures again, and how far they are from what they were."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops

from k2cli import embedded, history, records
from k2cli.dialect import dump
from k2cli.disk import Exists, write
from k2cli.folder import Folder
from k2cli.formats import SUFFIXES, format_of
from k2cli.hands import OnStep, groups_of, load
from k2cli.outputs import RUN, Run, picture_of
from k2cli.runs import Saved, read_plan
from model import picture_file
from model.errors import K2Error
from model.spec import Picture, RenderSpec

if TYPE_CHECKING:
    from model.pipeline import Pipeline


class Shelf(ExitStack):
    """The runs that pictures made again lie in: one for each project, and another where a name comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[Run] = []

    def room(self, home: Folder, name: str, stem: str) -> Run:
        """A run of this project, newly claimed or of before, that has no such picture yet. Raises K2Error."""
        for run in self.runs:
            if run.folder.parent == home.outputs and not run.has(stem):
                return run
        self.runs.append(self.enter_context(Run.claim(home.outputs, name)))
        return self.runs[-1]


def pictures_in(files: Iterable[Path]) -> list[Path]:
    """Pictures and records as they are named, and for a run's folder all its pictures, also those that nothing is known
    of. Raises K2Error where it has none."""
    found: list[Path] = []
    for file in files:
        if file.is_dir():
            unknown: list[Path] = []
            made = history.read_run(file, skipped=unknown.append)
            if not (made or unknown):
                raise K2Error(f"There are no pictures of k2 in {file}.", hint="Name a picture, a record, or a run.")
            found += [*(each.path for each in made), *sorted(unknown)]
        else:
            found.append(file)
    return found


def repeat(
    file: Path,
    home: Folder | None,
    shelf: Shelf,
    output: Path | None,
    device: str | None,
    *,
    check: bool = False,
    embed: bool,
    on_step: OnStep | None = None,
) -> tuple[Saved, int | None]:
    """Make a picture again -> where it is, how many levels of 255 it is off at most; None where that is not known.
    Hashes are verified before. To `check` it alone nothing is written, and it is where it was. Raises K2Error.
    """
    inside = home.inside if home else None
    record = records.parse(records.read(file), inside)
    model = records.locate(record, inside)
    if output is not None:
        check_output(output)
    elif home is None and not check:
        raise K2Error(f"There is no project around {file} to write into.", hint="Say where to write: --output FILE.png")
    kept = format_of((output or picture_of(file)).name) or "png"
    pipeline = load(replace(record.model, name=model, device=device or record.model.device))
    picture, again = make_again(pipeline, record, file, home, on_step)
    if blocked := again["blocked"]:
        raise K2Error(f'The output filter "{blocked["filter"]}" blocked the picture: {blocked["reason"]}.')
    off = 0 if again["pixels"] == record.pixels else levels_off(file, record, picture.image)
    if check:
        return Saved(picture_of(file), again, record.shot.stem), off
    encoded, text = embedded.encode(picture.image, again, embed=embed, format=kept), dump(again)
    if output is not None:
        path = output
        try:
            write({output.with_suffix(".toml"): text, output: encoded}, new=True)
        except Exists as error:  # only since it was asked
            raise taken(error.path) from None
    else:
        assert home is not None
        run = shelf.room(home, record.shot.name, record.shot.stem)
        path = run.save(record.shot.stem, encoded, text, SUFFIXES[kept])
    return Saved(path, again, record.shot.stem), off


def check_output(output: Path) -> None:
    """Refuse a file that is no picture's, that is there already, or that has no folder."""
    if format_of(output.name) is None:
        raise K2Error(f"{output} is no name for a picture.", hint="Pictures are written as .png, .webp or .jpg.")
    for path in (output, output.with_suffix(".toml")):
        if path.exists():
            raise taken(path)
    if not output.parent.is_dir():
        raise K2Error(f"There is no folder {output.parent}.", hint="Make it first, or choose another.")


def make_again(
    pipeline: Pipeline, record: records.Record, file: Path, home: Folder | None, on_step: OnStep | None
) -> tuple[Picture, dict[str, Any]]:
    """A recorded picture and its new record: made by itself or, where only so it is the same, in the company that it
    was made in, as numbers round as they did then."""
    if record.threads and str(pipeline.device) == "cpu":
        use_threads(record.threads)
    root = home.root if home else Path.cwd()
    (picture,) = pipeline.stream([record.shot.spec], on_step=on_step)
    again = records.compose(record.shot, picture, root)
    if again["pixels"] == record.pixels or again["blocked"]:
        return picture, again
    specs, place = company(file, home, record.shot.stem)
    (group,) = groups_of(pipeline.batches(specs), {place}) or [()]
    if len(group) > 1:
        pictures = pipeline.stream([specs[index] for index in group], on_step=on_step)
        beside = next(each for index, each in zip(group, pictures, strict=True) if index == place)
        composed = records.compose(record.shot, beside, root)
        if composed["pixels"] == record.pixels:
            return beside, composed
    return picture, again


def company(file: Path, home: Folder | None, stem: str) -> tuple[list[RenderSpec], int]:
    """All that was to be made in a picture's run, and its place in it; nothing where its plan is not beside it."""
    folder = file.absolute().parent
    if home is not None and (folder / RUN).is_file():
        with suppress(K2Error):  # a run that can no longer be gone on with
            shots = [shot for shot, _ in read_plan(home, Run(folder))[1]]
            place = next((index for index, shot in enumerate(shots) if shot.stem == stem), None)
            return ([shot.spec for shot in shots], place) if place is not None else ([], 0)
    return [], 0


def use_threads(count: int) -> None:
    """Share work out on a CPU as it was when a picture was made: the last bits depend on it."""
    import torch

    torch.set_num_threads(count)


def taken(path: Path) -> K2Error:
    return K2Error(f"{path} exists already.", hint="Choose another name: a record stands beside each picture.")


def verdict(off: int | None) -> str:
    """What it means for people that a picture is so many levels off at most."""
    if off == 0:
        return "Identical, pixel for pixel."
    by = "" if off is None else f", by {off} of 255 levels at most"
    rounding = " That is rounding, as on another machine or in other company." if off == 1 else ""
    return f"The pixels differ from the recorded ones{by}.{rounding}"


def was_changed(file: Path) -> bool:
    """Whether a picture that is kept without loss has other pixels than its record says."""
    with suppress(Exception), picture_file.opened(file) as found:  # of a record, which is no picture, too
        lossless = found.format in ("PNG", "WEBP")
        return lossless and records.read(file).table.get("pixels") != records.pixel_hash(found)
    return False


def levels_off(file: Path, record: records.Record, image: Image.Image) -> int | None:
    """The largest difference between a picture and the recorded one; None where that is gone, cannot be read, or was
    lossily kept."""
    path = picture_of(file)
    with suppress(Exception), picture_file.opened(path) as found:  # Pillow raises anything over a broken file
        if found.size == image.size and records.pixel_hash(found) == record.pixels:
            counts = ImageChops.difference(found.convert("RGB"), image).histogram()  # 256 a channel
            return max(level % 256 for level, count in enumerate(counts) if count)
    return None
