"""Pictures as WebP and JPEG: their metadata, and how they are reproduced from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib

import pytest
from PIL import ExifTags, Image

from k2cli import formats, origins, records


@pytest.mark.parametrize(("format", "suffix"), [("webp", ".webp"), ("jpeg", ".jpg")])
def test_metadata_for_other_tools(moody, k2, format, suffix):
    made = k2("render", "--only", "fox", "--format", format).stdout.strip()

    assert made == f"outputs/0001-fox/fox-7{suffix}"
    with Image.open(made) as image:
        assert image.format == format.upper()
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
        packet = image.info["xmp"].decode()
        record = tomllib.loads((moody / "outputs/0001-fox/fox-7.toml").read_text())
        if format == "webp":
            assert records.pixel_hash(image) == record["pixels"]
    assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be").startswith("a red fox\nSteps: 28,")
    assert "trainedAlgorithmicMedia" in packet
    assert records.read(moody / made).table == record
    found = origins.read_origin(moody / made)
    assert (found.tool, found.prompt, found.seed) == ("k2", "a red fox", 7)


def test_jpg_means_jpeg(moody, k2):
    (moody / "k2.toml").write_text((moody / "k2.toml").read_text().replace("seed = 7", 'seed = 7\nformat = "jpg"'))

    made = k2("render", "--only", "fox").stdout.strip(), k2("render", "--only", "fox", "--format", "jpg").stdout.strip()

    assert [records.read(moody / each).table["prompt"]["name"] for each in made] == ["fox", "fox"]
    assert made == ("outputs/0001-fox/fox-7.jpg", "outputs/0002-fox/fox-7.jpg")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="there is no exiftool on this machine")
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_exiftool_reads_the_metadata(moody, k2, format):
    made = k2("render", "--only", "fox", "--format", format).stdout.strip()
    asked = ["exiftool", "-j", "-Parameters", "-UserComment", "-DigitalSourceType", "-Warning", made]

    (said,) = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)

    assert said["DigitalSourceType"].endswith("/trainedAlgorithmicMedia") and "Warning" not in said
    assert said["Parameters" if format == "png" else "UserComment"].startswith("a red fox")


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_runs_in_other_formats_resume_and_rerun(moody, k2, format, tmp_path):
    (moody / "k2.toml").write_text(
        (moody / "k2.toml").read_text().replace("seed = 7", f'seed = 7\nformat = "{format}"')
    )
    first, second = k2("render", "--json").stdout.splitlines()
    folder = moody / "outputs" / "0001-fox-and-1-more"
    assert (folder / "sheet.png").exists()
    second = json.loads(second)["file"]
    (moody / second).unlink()
    (folder / "sheet.png").unlink()

    assert k2("render", "--resume").stdout == f"{second}\n" and (folder / "sheet.png").exists()
    assert "the run is complete" in k2("render", "--resume").stderr
    again = k2("rerun", json.loads(first)["file"])
    assert "Identical" in again.stderr and again.stdout.strip().endswith(second[-4:])
    moved = tmp_path / f"moved{second[second.rindex('.') :]}"
    (moody / second).rename(moved)
    assert "Identical" in k2("rerun", moved, "--output", tmp_path / "again.png").stderr
    assert len(k2("log").stdout.splitlines()) == 2  # the one that remains, and the rerun
    assert json.loads(k2("gallery", "--json").stdout)["pictures"] == 2


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_no_embed_leaves_no_metadata(moody, k2, format):
    made = k2("render", "--only", "fox", "--format", format, "--no-embed").stdout.strip()

    with Image.open(made) as image:
        assert not image.getexif() and not {"xmp", "exif", "comment", "parameters", "k2"} & set(image.info)
    assert "fox" not in (moody / made).read_bytes().decode("latin-1")


def test_record_too_long_for_a_jpeg_stays_beside_it(moody, k2):
    prompt = "狐狐 " * 6_000
    made = moody / k2("render", "--format", "jpeg", "-", input=prompt).stdout.strip()

    with Image.open(made) as image:
        assert formats.record_from_xmp(image.info) is None
    assert "Identical" in k2("rerun", made).stderr


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"<x",
        b"\xff\xfe",
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><x>&b;</x>',
        b"<x xmlns:k2='urn:k2:record' k2:record='not where it belongs'/>",
    ],
)
def test_foreign_xmp_is_no_record(packet):
    assert formats.record_from_xmp({"xmp": packet}) is None


def test_unknown_formats_are_refused(moody, k2):
    assert 'Did you mean "webp"?' in k2("render", "--format", "wepb", code=2).stderr
    made = k2("render", "--only", "fox").stdout.strip()
    assert ".png, .webp or .jpg" in k2("rerun", made, "-o", "x.gif", code=1).stderr
