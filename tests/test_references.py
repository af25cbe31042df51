"""Reference pictures of every kind: read as the eye would see them, or refused with one error message."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageCms

from model.board_pictures import read_picture
from model.errors import K2Error
from model.references import fit_size, to_pixels

Light = tuple[float, float, float]


def colour(path: Path) -> list[int]:
    """The colour of the picture's middle, 0 … 255."""
    pixels = to_pixels(path, 32, 16)
    assert pixels.shape == (1, 3, 16, 32) and pixels.min() >= -1 and pixels.max() <= 1
    return ((pixels[0, :, 8, 16] + 1) * 127.5).round().int().tolist()


def near(a: list[int], b: tuple[int, int, int]) -> bool:
    return all(abs(x - y) <= 3 for x, y in zip(a, b, strict=True))


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path: Path, width: int, height: int, depth: int, kind: int, rows: bytes) -> Path:
    """A PNG of a kind that Pillow cannot write. kind 0 is grey, 2 is colour."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def profile(red: Light, green: Light, blue: Light, gamma: float) -> bytes:
    """An ICC profile (version 2.4) of three lights, in XYZ under D50, and a power."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    curve = b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)
    lights = zip((b"rXYZ", b"gXYZ", b"bXYZ"), (red, green, blue), strict=True)
    tags = {b"desc": b"desc" + bytes(8) + bytes(84), b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)}
    tags |= {name: b"XYZ " + bytes(4) + fixed(*light) for name, light in lights}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body, place = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", place + len(body), len(tag))
        body += tag
    head = struct.pack(">I4xI", place + len(body), 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + fixed(*D50)).ljust(128, b"\0") + table + body


D50 = (0.9642, 1.0, 0.8249)
ADOBE = profile((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446), 2.2)  # RGB (1998)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_transparency_is_filled_with_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True)
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=0)

    assert colour(tmp_path / "clear.png") == [255, 255, 255]
    assert near(colour(tmp_path / "half.webp"), (255, 127, 127))
    assert colour(tmp_path / "palette.png") == [255, 255, 255]


def test_moodboards_read_transparent_colours_as_references_do(tmp_path):
    noisy = Image.effect_noise((40, 40), 90)
    picture = Image.composite(
        Image.new("RGB", noisy.size, "red"), noisy.convert("RGB"), noisy.point(lambda v: v % 2 * 255)
    )
    picture.save(tmp_path / "key.png", transparency=(255, 0, 0))

    read = torch.from_numpy(read_picture(tmp_path / "key.png", 10).copy()).permute(2, 0, 1)
    assert (read / 127.5 - 1 - to_pixels(tmp_path / "key.png", 10, 10)[0]).abs().max() < 0.2


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_only_the_first_frame_of_an_animation_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 20), name) for name in ("red", "blue")]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)

    assert near(colour(tmp_path / f"moving.{suffix}"), (255, 0, 0))


def test_print_colours_of_jpegs(tmp_path):
    """As Adobe's programs write them, inverted: as CMYK, or as brightness and colour, as one byte says."""
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.new("CMYK", (20, 20), (76, 84, 254, 0)).save(tmp_path / "ycck.jpg", quality=100)
    ycck = bytearray((tmp_path / "ycck.jpg").read_bytes())
    ycck[ycck.index(b"Adobe") + 11] = 2
    (tmp_path / "ycck.jpg").write_bytes(ycck)

    for name in ("print.jpg", "ycck.jpg"):
        assert near(colour(tmp_path / name), (255, 0, 0))
        assert near(read_picture(tmp_path / name, 10)[5, 5].tolist(), (255, 0, 0))


def test_colour_profiles_are_applied(tmp_path):
    """By the formulas of both spaces: (200, 128, 60) in Adobe RGB is a stronger orange than in sRGB."""
    image = Image.new("RGB", (20, 20), (200, 128, 60))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "adobe.png", icc_profile=ADOBE)
    image.save(tmp_path / "adobe.jpg", icc_profile=ADOBE, quality=100)
    image.save(tmp_path / "adobe.webp", icc_profile=ADOBE, lossless=True)
    image.quantize(4).save(tmp_path / "palette.png", icc_profile=ADOBE)
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png", icc_profile=ADOBE)

    assert near(colour(tmp_path / "plain.png"), (200, 128, 60))
    for name in ("adobe.png", "adobe.jpg", "adobe.webp", "palette.png"):
        assert near(colour(tmp_path / name), (223, 128, 51))
        assert near(read_picture(tmp_path / name, 10)[5, 5].tolist(), (223, 128, 51))
    assert colour(tmp_path / "clear.png") == [255, 255, 255]


def test_profiles_that_do_not_apply_change_nothing(tmp_path):
    for mode, fill, profile, expected in (
        ("RGB", (200, 128, 60), b"no profile", (200, 128, 60)),
        ("RGB", (200, 128, 60), ADOBE[:200], (200, 128, 60)),
        ("RGB", (200, 128, 60), SRGB, (200, 128, 60)),
        ("L", 128, SRGB, (128, 128, 128)),
    ):
        Image.new(mode, (20, 20), fill).save(tmp_path / "a.png", icc_profile=profile)
        assert near(colour(tmp_path / "a.png"), expected)


def test_pngs_of_sixteen_bits(tmp_path):
    """Middle grey is grey, not white."""
    grey = b"".join(b"\0" + struct.pack(">H", 0x8080) * 20 for _ in range(20))
    orange = b"".join(b"\0" + struct.pack(">HHH", 0xFFFF, 0x8080, 0) * 20 for _ in range(20))

    assert near(colour(png(tmp_path / "grey.png", 20, 20, 16, 0, grey)), (128, 128, 128))
    assert near(colour(png(tmp_path / "orange.png", 20, 20, 16, 2, orange)), (255, 128, 0))


def test_other_modes(tmp_path):
    for mode, fill, expected in (("L", 128, (128,) * 3), ("1", 1, (255,) * 3), ("LA", (0, 255), (0,) * 3)):
        Image.new(mode, (20, 20), fill).save(tmp_path / f"{mode}.png")
        assert near(colour(tmp_path / f"{mode}.png"), expected)


def test_exif_orientation_is_applied(tmp_path):
    """Stored lying on its side: what is left in the file is the top."""
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    picture.save(tmp_path / "turned.png", exif=exif)

    pixels = to_pixels(tmp_path / "turned.png", 20, 40)

    assert pixels[0, 0, :18].min() > 0.9 and pixels[0, 2, 22:].min() > 0.9


def test_sizes_that_fit_a_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size, options in (
        ("wide", (400, 200), {}),
        ("lying", (400, 200), {"exif": exif}),
        ("thin", (1000, 10), {}),
        ("tall", (10, 1000), {}),
    ):
        Image.new("RGB", size).save(tmp_path / f"{name}.png", **options)

    sizes = {name: fit_size(tmp_path / f"{name}.png", 512 * 512, 32) for name in ("wide", "lying", "thin", "tall")}

    assert sizes == {"wide": (704, 352), "lying": (352, 704), "thin": (1024, 256), "tall": (256, 1024)}
    with pytest.raises(K2Error, match="There is no"):
        fit_size(tmp_path / "none.png", 4096, 32)


def test_long_pictures_are_cropped_not_squeezed(tmp_path):
    picture = Image.new("RGB", (300, 20), "black")
    picture.paste("white", (140, 0, 160, 20))
    picture.save(tmp_path / "long.png")

    assert to_pixels(tmp_path / "long.png", 16, 16).min() > 0.9


@pytest.mark.parametrize(("suffix", "left"), [("jpg", 0.05), ("jpg", 0.99), ("png", 0.5)])
def test_truncated_pictures_get_a_hint_to_fetch_them_again(tmp_path, suffix, left):
    Image.effect_noise((64, 64), 80).save(whole := tmp_path / f"whole.{suffix}")
    content = whole.read_bytes()
    (cut := tmp_path / f"cut.{suffix}").write_bytes(content[: int(len(content) * left)])

    for read in (lambda: to_pixels(cut, 32, 32), lambda: read_picture(cut, 32)):
        with pytest.raises(K2Error) as error:
            read()
        assert error.value.hint == "The file is truncated: fetch or export it again."


def test_a_palette_with_more_transparencies_than_colours(tmp_path):
    """It is decoded without complaint: the problem only shows when its palette is looked up."""
    Image.new("RGB", (20, 20), "blue").quantize(4).save(path := tmp_path / "a.png")
    content = path.read_bytes()
    place = content.index(b"IDAT") - 4
    path.write_bytes(content[:place] + chunk(b"tRNS", bytes(256)) + content[place:])
    assert colour(path) == [255, 255, 255]

    path.write_bytes(content[:place] + chunk(b"tRNS", bytes(257)) + content[place:])
    for read in (lambda: to_pixels(path, 32, 32), lambda: read_picture(path, 32)):
        with pytest.raises(K2Error, match="cannot be read as a picture"):
            read()


def test_our_own_errors_are_not_blamed_on_the_picture(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr("model.picture_file.to_eight_bits", lambda image: image.no_such_thing)
    with pytest.raises(AttributeError):
        to_pixels(tmp_path / "a.png", 16, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "cannot be read as a picture"),
        ("missing.png", r"There is no .*missing\.png"),
        ("empty.png", "cannot be read as a picture"),
        ("cut.png", "cannot be read as a picture"),
        ("a.gif", "cannot be read as a picture"),
        ("dot.png", "has 1 x 1 pixels"),
        ("bomb.png", "has 20000 x 20000 pixels|cannot be read"),
        (".", "cannot be read as a picture"),
    ],
)
def test_unusable_references_are_refused(tmp_path, name, message):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    Image.effect_noise((64, 64), 80).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    Image.new("RGB", (20, 20)).save(tmp_path / "a.gif")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    png(tmp_path / "bomb.png", 20_000, 20_000, 8, 0, b"")

    with pytest.raises(K2Error, match=message) as error:
        to_pixels(tmp_path / name, 64, 64)
    assert error.value.hint and "eference" not in error.value.hint  # it may be an init image or a mask
    assert "\n" not in str(error.value)
