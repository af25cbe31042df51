"""Reading pictures: whatever a png, jpg or webp holds becomes plain colour, or is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from model import picture_file
from model.errors import K2Error
from model.picture_file import MAX_PIXELS, MIN_SIDE, USE_OTHER_SIZE
from model.region import Region

STRIP_ROWS = 512  # rows


def to_pixels(path: Path, width: int, height: int, background: str = "white") -> Tensor:
    """A picture, centre-cropped to fill width x height -> [1, 3, height, width] in −1 … 1. Raises K2Error.

    EXIF rotation is applied, transparency laid on `background`, and an animation gives its first frame. Colour
    profiles, CMYK and 16-bit greys are converted.
    """
    opaque = composite_on(background, to_rgba(decode_picture(path))).convert("RGB")
    return from_bytes(np.array(ImageOps.fit(opaque, (width, height)))[None])


def from_bytes(pictures: NDArray[np.uint8] | NDArray[np.float32]) -> Tensor:
    """RGB of 0 … 255 [B, H, W, 3] -> [B, 3, H, W] in −1 … 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_mask(mask: Path | str, width: int, height: int) -> Tensor:
    """What to repaint of a picture, 1, and what stays, 0 -> [1, 1, height, width]. Raises K2Error.

    A picture counts by the mean of its channels, transparency as black, and fills width x height as in `to_pixels`; a
    string is a region.
    """
    if isinstance(mask, Path):
        return (to_pixels(mask, width, height, "black").mean(1, keepdim=True) + 1) / 2
    region = Region.parse(mask)
    assert region is not None  # or settling would have refused
    found = torch.zeros(1, 1, height, width)
    found[..., region.top : region.top + region.height, region.left : region.left + region.width] = 1
    return found


def feather(mask: Tensor, radius: int) -> Tensor:
    """A mask [1, 1, H, W] feathered over `radius` pixels inside its edge, never beyond it.

    Greys lighter than half fade in like an edge; darker ones become 0, even beside white.
    """
    around = F.pad(mask, [radius] * 4, mode="replicate")  # the picture's border is not an edge of the mask
    mean = F.avg_pool2d(around, 2 * radius + 1, stride=1)
    return (2 * torch.minimum(mask, mean) - 1).clamp(0, 1)


def fit_size(path: Path, pixels: int, unit: int) -> tuple[int, int]:
    """Width and height of at most `pixels`, multiples of `unit`, about in the picture's proportions. Raises K2Error."""
    width, height = picture_size(path)
    ratio = min(max(width / height, 1 / 4), 4)
    sides = ((pixels * ratio) ** 0.5, (pixels / ratio) ** 0.5)
    return max(unit, int(sides[0] / unit) * unit), max(unit, int(sides[1] / unit) * unit)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as displayed. Raises K2Error."""
    with open_picture(path) as image:
        return picture_file.displayed_size(image)


def decode_picture(path: Path) -> Image.Image:
    """A picture in memory, with EXIF rotation applied. Raises K2Error."""
    with open_picture(path) as image:
        if image.width * image.height > MAX_PIXELS or min(image.size) < MIN_SIDE:
            raise K2Error(f"{path} has {image.width} x {image.height} pixels.", hint=USE_OTHER_SIZE)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
        return image.convert("RGBA") if image.mode == "P" else image  # only this reveals a broken palette


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """An opened picture, for reading its file only: whatever goes wrong within the context is raised as K2Error, since
    Pillow may raise anything for a broken file."""
    try:
        with picture_file.open_picture(path) as image:
            yield image
    except K2Error:
        raise
    except FileNotFoundError:
        raise K2Error(f"There is no {path}.", hint="Keep pictures where they are until the run is done.") from None
    except Exception as error:
        hint = picture_file.truncation_hint(error) or "Use png, jpg or webp."
        raise K2Error(f"{path} cannot be read as a picture: {error}.", hint=hint) from None


def composite_on(background: str, rgba: Image.Image) -> Image.Image:
    """The picture, opaque, on `background`. In place and in strips, as it may be large."""
    for top in range(0, rgba.height, STRIP_ROWS):
        strip = rgba.crop((0, top, rgba.width, min(top + STRIP_ROWS, rgba.height)))
        rgba.paste(Image.alpha_composite(Image.new("RGBA", strip.size, background), strip), (0, top))
    return rgba


def to_rgba(image: Image.Image) -> Image.Image:
    """The picture in 8-bit sRGB with transparency. Its colour profile is applied: without it, a phone's Display P3
    would look dull. An unreadable profile is ignored, as in browsers.
    """
    profile, image = image.info.get("icc_profile"), picture_file.to_eight_bits(image)
    if profile and image.mode in ("L", "CMYK"):
        with suppress(ImageCms.PyCMSError):  # an RGB profile on greys
            return to_srgb(image, profile, "RGB").convert("RGBA")
    rgba = image.convert("RGBA")
    if profile:
        with suppress(ImageCms.PyCMSError):
            return to_srgb(rgba, profile, "RGBA")
    return rgba


def to_srgb(image: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """Convert a picture's colours from a profile to sRGB; in place if it has this mode already. Raises PyCMSError."""
    srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    changed = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, intent, mode, inPlace=image.mode == mode)
    return changed or image
