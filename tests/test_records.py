"""Records: written and read back, inside pictures and beside them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tomllib
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import PROJECT, tree, write_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from k2cli import history, metadata, models, records, rerun, runs
from k2cli.fast_toml import dump
from k2cli.project import Project, Shot
from k2cli.texts import relative_path
from k2cli.toml_tables import MAX_FILE_BYTES, Toml
from model.errors import K2Error
from model.hashes import identity, sha256
from model.spec import Leader, Picture, Reference, RenderSpec, Style

MADE = {
    "seed": 7,
    "width": 64,
    "height": 96,
    "steps": 8,
    "guidance": 2.5,
    "mu": -0.25,
    "device": "cpu",
    "dtype": "float32",
    "precision": "int8",
    "offload": "text",
    "seconds": 0.5,
    "model": {"name": "mini", "variant": "raw", "files": {"mini-raw.safetensors": "ab" * 32}},
}


HASH = f'"mini-raw.safetensors" = "{"ab" * 32}"'


def picture() -> Picture:
    image = Image.linear_gradient("L").resize((64, 96)).convert("RGB")
    return Picture(image, MADE)


def shot(**changes) -> Shot:
    spec = RenderSpec("a red fox, film", 64, 96, 7, "snow", 8, 2.5, -0.25)
    return Shot("fox-7", "fox", "a red fox", replace(spec, **changes))


def test_record_leads_back_to_its_spec(moody):
    reference = moody / "refs" / "a.png"
    reference.parent.mkdir()
    picture().image.save(reference)
    picture().image.resize((8, 8)).save(reference.with_name("sketch.png"))
    lora = moody / "ink.safetensors"
    lora.touch()
    looks = (
        Style("dusk", -0.6, (Reference(reference, 0.5),), ("film",), ("gloss",), method="splice"),
        Style("ink", 0.5, lora=lora, triggers=("inkk",)),
    )
    read = {
        "guidance_until": 0.6,
        "sampler": "ab2",
        "init_image": reference.with_name("sketch.png"),
        "denoise": 0.4,
        "mask": "8x8+0+0",
        "style_guidance": 1.5,
        "leak_guard": "shift",
        "vision_tiles": 4,
        "vision_rows": False,
    }
    asked = shot(styles=looks, cohesion=0.5, leader=Leader("tea", 3, "milk"), **read)
    asked = replace(asked, row="a row", caption="a caption", creativity="high")
    text = dump(records.finished_record(asked, picture(), moody)).decode()

    read = records.parse(Toml(text, "fox-7.toml"), Project.open(moody).path_inside)

    assert read.shot == asked
    assert read.model == models.ModelSpec("mini", "raw", "cpu", "float32", "int8", "text")
    assert read.pixels == records.pixel_hash(picture().image)
    assert read.files == {"mini-raw.safetensors": "ab" * 32}
    assert list(read.references) == [reference, lora, reference.with_name("sketch.png")]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8")))
def test_any_prompt_survives_record_and_picture(fake, tmp_path, prompt, avoid):
    asked = Shot("x-7", "x", prompt, RenderSpec(prompt, 64, 96, 7, avoid, 8, 2.5, 0.5))
    record = records.finished_record(asked, picture(), tmp_path)
    path = tmp_path / "x.png"
    path.write_bytes(metadata.encode(picture().image, record))

    table = records.read(path).table

    assert (table["prompt"]["expanded"], table["prompt"]["avoid"]) == (prompt, avoid)


def test_record_holds_hashes_of_deleted_references(tmp_path):
    asked = shot(styles=(Style("dusk", 1.0, (Reference(tmp_path / "a.png"),), lora=tmp_path / "b.safetensors"),))
    made = MADE | {
        "styles": [
            {"name": "dusk", "method": "tokens", "references": [{"image": str(tmp_path / "a.png"), "sha256": "aa"}]}
        ],
        "loras": [{"path": str(tmp_path / "b.safetensors"), "sha256": "bb"}],
    }
    (style,) = records.finished_record(asked, Picture(picture().image, made), tmp_path)["style"]
    assert style["reference"][0]["sha256"] == "aa" and style["lora"]["sha256"] == "bb"


def test_metadata_for_other_tools(tmp_path):
    record = records.finished_record(shot(), picture(), tmp_path)
    path = tmp_path / "fox-7.png"
    path.write_bytes(metadata.encode(picture().image, record))

    with Image.open(path) as image:
        text, pixels = dict(image.text), image.tobytes()

    assert pixels == picture().image.tobytes()
    assert text["parameters"].splitlines()[:2] == ["a red fox, film", "Negative prompt: snow"]
    assert text["parameters"].splitlines()[2:] == [
        "Steps: 8, Sampler: Euler, CFG scale: 3.5, Seed: 7, Size: 64x96, Model hash: ababababab, Model: mini-raw, "
        f"Version: k2 {version('k2')}"
    ]
    elsewhere = record | {"model": record["model"] | {"name": "models/ink.safetensors"}}
    assert ", Model: ink-raw, " in metadata.a1111_parameters(elsewhere)
    assert Toml(text["k2"], "chunk").table == Toml(dump(record).decode(), "file").table
    (description,) = ElementTree.fromstring(text["XML:com.adobe.xmp"]).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    assert description.attrib[iptc + "DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert description.attrib[iptc + "AISystemUsed"] == "k2, mini raw"
    assert description.attrib[iptc + "AISystemVersionUsed"] == version("k2")
    assert description.attrib[iptc + "AIPromptInformation"] == "a red fox, film"


def test_record_after_the_image_data_is_found(tmp_path):
    """Some tools put text there."""
    record = records.finished_record(shot(), picture(), tmp_path)
    path = tmp_path / "fox-7.png"
    bare = metadata.encode(picture().image, record, embed=False)
    chunk = b"iTXtk2\0\0\0\0\0" + dump(record)
    end = bare.index(b"IEND") - 4
    text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(bare[:end] + text + bare[end:])

    assert records.read(path).table["prompt"]["text"] == "a red fox"


def test_overlong_embedded_record_is_not_read(tmp_path):
    record = records.finished_record(shot(), picture(), tmp_path)
    path = tmp_path / "fox-7.png"
    path.write_bytes(metadata.encode(picture().image, record | {"more": "x" * MAX_FILE_BYTES}))

    with pytest.raises(K2Error, match="has no record"):
        records.read(path)


def test_model_inside_the_project_moves_with_it(tmp_path):
    assert records.portable_name(str(tmp_path / "models" / "ink.safetensors"), tmp_path) == "models/ink.safetensors"
    assert records.portable_name("/else/where.safetensors", tmp_path) == "/else/where.safetensors"
    assert records.portable_name("mini", tmp_path) == "mini"


def test_plans_and_records_name_the_projects_model_relatively(moody):
    write_weights(moody / "ink.safetensors", {"kind": "dit", "native": 128})
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", 'model = "ink.safetensors"'))
    project = Project.open(moody)
    chosen = project.resolve_settings()
    made = MADE | {"model": MADE["model"] | {"name": chosen.model}}

    assert Path(chosen.model).is_absolute()
    assert (
        runs.plan_table(runs.Job(project, project.shots(chosen), chosen.model_spec()))["model"]["name"]
        == "ink.safetensors"
    )
    assert records.finished_record(shot(), Picture(picture().image, made), moody)["model"]["name"] == "ink.safetensors"


def test_old_record_without_sampler_means_euler_guided_to_the_end(moody):
    table = records.finished_record(shot(), picture(), moody)
    assert {table["settings"]["sampler"], table["settings"]["guidance_until"]} == {None}

    spec = records.parse(Toml(dump(table).decode(), "fox-7.toml"), None).shot.spec
    assert (spec.sampler, spec.guidance_until) == ("euler", 1.0)


def test_unguided_picture_has_no_guidance_until(moody):
    """Neither has its rerun."""
    made = Picture(picture().image, MADE | {"guidance": 0.0})
    table = records.finished_record(shot(guidance=0.0), made, moody)
    assert records.parse(Toml(dump(table).decode(), "fox-7.toml"), None).shot.spec.guidance_until is None


def test_no_embed_leaves_no_metadata(tmp_path):
    record = records.finished_record(shot(), picture(), tmp_path)
    path = tmp_path / "fox-7.png"
    path.write_bytes(metadata.encode(picture().image, record, embed=False))

    with Image.open(path) as image:
        assert image.text == {}
    with pytest.raises(K2Error, match="has no record"):
        records.read(path)
    path.with_suffix(".toml").write_bytes(dump(record))
    assert records.read(path).table["prompt"]["text"] == "a red fox"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 2", "not a record that this version"),
        ("seed = 7", "seed = -7", r'line \d+: "seed" must be between'),
        ("seed = 7", 'seed = "7"', '"seed" must be a whole number'),
        ('precision = "int8"', 'precision = "int3"', r'line \d+: "precision" cannot be "int3"'),
        ("[settings]", "[settinsg]", r"the table \[settings\] is missing"),
        ('name = "mini"', 'name = "/etc/passwd"', "lies outside the project"),
        (HASH, "", "expected a table of file = sha256"),
        (HASH, '"mini-raw.safetensors" = 3', "expected a table of file = sha256"),
        ('"mini-raw.safetensors"', '"../mini-raw.safetensors"', "names a file outside its model"),
        ('"mini-raw.safetensors"', f'"{"9" * 300}"', "no file can have a name that long"),
        ('variant = "raw"', f'variant = "{"9" * 300}"', "no bundled 9+ checkpoint"),
        ('name = "fox"', 'name = "../fox"', "cannot be a file name"),
    ],
)
def test_altered_record_is_refused(moody, old, new, message):
    text = dump(records.finished_record(shot(), picture(), moody)).decode()
    assert old in text

    with pytest.raises(K2Error, match=message):
        inside = Project.open(moody).path_inside
        records.locate_model(records.parse(Toml(text.replace(old, new), "fox-7.toml"), inside), inside)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_non_picture_is_one_sentence(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)

    with pytest.raises(K2Error, match="not a readable picture"):
        records.read(tmp_path / "x.png")


def test_show_reads_records_and_pictures_alike(moody, k2):
    k2("render", "-p", "tea")
    made = moody / "outputs" / "0001-tea" / "tea-7.png"
    bare = Path(shutil.copy(made, moody / "bare.png"))

    shown = [k2("show", path).stdout for path in (made, made.with_suffix(".toml"), bare)]

    assert shown[0] == shown[1] == shown[2]
    for fact in ("prompt      tea", "seed        7", "mu          0.5", "seconds     0.25"):
        assert f"{fact}\n" in shown[0]
    as_usual = ("blocked", "expanded", "creativity", "avoid", "cohesion", "style", "leak", "weights", "offload")
    assert not {*as_usual} & {line.split(" ")[0] for line in shown[0].splitlines()}


def test_show_names_style_settings(moody, k2):
    k2("render", "-p", "tea")
    record = moody / "outputs" / "0001-tea" / "tea-7.toml"
    text = record.read_text()
    record.write_text(text.replace("[settings]", '[settings]\nstyle_guidance = 1.5\nleak_guard = "shift"'))

    shown = k2("show", record).stdout

    assert "style guidance  1.5\nleak guard      shift\n" in shown and "seed            7\n" in shown


def test_show_names_loras_and_their_weights(moody, k2):
    k2("render", "-p", "tea")
    record = moody / "outputs" / "0001-tea" / "tea-7.toml"
    record.write_text(record.read_text() + '[[lora]]\nfile = "loras/ink.safetensors"\nweight = -0.6\nmatched = 8\n')

    assert "loras       loras/ink.safetensors -0.6\n" in k2("show", record).stdout
    record.write_text(record.read_text() + '[[lora]]\nfile = "loras/ink.safetensors"\nweight = 1.0\nmatched = 8\n')
    assert "loras       loras/ink.safetensors -0.6, 1\n" in k2("show", record).stdout, "two styles may share one"


@pytest.mark.parametrize("command", ["show", "rerun"])
def test_picture_path_may_be_relative_to_the_project(moody, k2, tmp_path, monkeypatch, command):
    """A path that exists from the current folder comes first."""
    file = k2("render", "-p", "tea", "--quiet").stdout.strip()
    monkeypatch.chdir(tmp_path)

    assert k2(command, file, "--project", "moody").stdout == k2(command, f"moody/{file}").stdout.replace("0003", "0002")
    assert f"There is no {file}." in k2(command, file, code=1).stderr
    assert f"There is no other-{file}." in k2(command, f"other-{file}", "--project", "moody", code=1).stderr
    assert "There is no folder gone." in k2(command, f"moody/{file}", "--project", "gone", code=1).stderr
    (cup,) = k2("render", "-p", "a cup", "--project", "moody").stdout.split()
    Path(file).parent.mkdir(parents=True)
    shutil.copy(cup, file)
    assert "cup" in k2(command, file, "--project", "moody").stdout


def test_show_of_a_style_file_names_the_command_for_styles(moody, k2):
    (moody / "styles").mkdir()
    (moody / "styles/late dusk.toml").write_text('keywords = ["film grain"]\n')

    told = k2("show", "styles/late dusk.toml", code=1).stderr

    assert "is not the record of a picture.\nHint:  For a style: k2 style show 'late dusk'\n" in told


@pytest.mark.parametrize("file", ["k2.toml", "outputs/0001-tea/run.toml"])
def test_non_records_are_refused(moody, k2, file):
    k2("render", "-p", "tea")
    (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")

    for command in ("show", "rerun"):
        told = k2(command, file, code=1).stderr
        if file == "k2.toml":
            assert "k2.toml is not the record of a picture.\nHint:  Name a picture that k2 made, or its record." in told
        else:
            assert "run.toml is the plan of a run, not the record of a picture.\n" in told
            assert "Hint:  Name a picture of the run, or its record; k2 render --resume resumes a run.\n" in told


class TestRerun:
    """`k2 rerun`: the same pixels, or a reason why not."""

    @pytest.fixture
    def made(self, moody, k2) -> Path:
        (moody / "refs").mkdir()
        (moody / "styles").mkdir()
        Image.new("RGB", (64, 64), "navy").save(moody / "refs" / "a.png")
        (moody / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "refs/a.png"\n')
        k2("render", "--only", "fox", "--style", "dusk=0.5")
        return moody / "outputs" / "0001-fox" / "fox-7.png"

    @pytest.mark.parametrize("suffix", [".png", ".toml"])
    def test_same_pixels_from_picture_or_record(self, made, k2, suffix):
        result = k2("rerun", made.with_suffix(suffix))

        assert result.stdout == "outputs/0002-fox/fox-7.png\n"
        assert "Identical, pixel for pixel." in result.stderr
        assert Path("outputs/0002-fox/fox-7.png").read_bytes()[:4] == b"\x89PNG"

    def test_current_project_settings_do_not_matter(self, made, k2):
        Path("k2.toml").write_text("[render\n")

        assert "Identical, pixel for pixel." in k2("rerun", made).stderr

    @pytest.mark.parametrize(("kind", "suffix"), [("webp", "webp"), ("jpeg", "jpg")])
    def test_rerun_keeps_the_pictures_format(self, moody, k2, kind, suffix):
        (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", f'seed = 7\nformat = "{kind}"'))
        k2("render", "--only", "fox")

        assert k2("rerun", "outputs/0001-fox/fox-7.toml").stdout == f"outputs/0002-fox/fox-7.{suffix}\n"

    def test_jpeg_suffixes_of_browsers_are_accepted(self, moody, k2):
        k2("render", "--only", "fox", "--format", "jpeg")
        Path("outputs/0001-fox/fox-7.jpg").rename("saved.jfif")

        assert k2("rerun", "saved.jfif").stdout == "outputs/0002-fox/fox-7.jpg\n"
        assert k2("rerun", "saved.jfif", "-o", "again.jfif").stdout == "again.jfif\n"
        assert Image.open("again.jfif").format == "JPEG"

    @pytest.mark.parametrize(("kind", "suffix"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
    def test_edited_picture_is_reported(self, moody, k2, kind, suffix):
        k2("render", "--only", "fox", "--format", kind)
        file = Path(f"outputs/0001-fox/fox-7.{suffix}")
        assert "was changed" not in k2("rerun", file).stderr

        Image.new("RGB", (64, 64), "white").save(file)
        said = k2("rerun", file).stderr
        assert "Identical, pixel for pixel." in said and f"{file} was changed after it" in said
        assert f"{file} was changed after it" in k2("rerun", file.with_suffix(".toml")).stderr

    def test_jpeg_is_compared_after_encoding(self, moody, k2):
        """Its pixels are never the recorded ones, yet another or a smaller picture with its record is still reported as
        changed; if the reproduction itself differs, nobody can say."""
        k2("render", "--only", "fox", "--format", "jpeg")
        file, record = Path("outputs/0001-fox/fox-7.jpg"), Path("outputs/0001-fox/fox-7.toml")
        (whole,) = map(json.loads, k2("rerun", file, "--check", "--json").stdout.splitlines())
        assert (whole["identical"], whole["changed"]) == (True, False)

        with Image.open(file) as made:
            xmp, smaller = made.info["xmp"], made.resize((32, 32))
        for other in (Image.new("RGB", (64, 64), "red"), smaller):
            other.save(file, "JPEG", quality=95, subsampling=0, xmp=xmp)
            told = json.loads(k2("rerun", file, "--check", "--json", code=1).stdout)
            assert (told["identical"], told["levels_off"], told["changed"]) == (False, 0, True)

        record.write_text(record.read_text().replace(told["pixels"], "0" * 64))
        differs = json.loads(k2("rerun", record, "--check", "--json", code=1).stdout)
        assert (differs["levels_off"], differs["changed"]) == (None, False)

    def test_jpeg_of_another_encoder_may_differ_slightly(self, moody, k2, fake, monkeypatch):
        k2("render", "--only", "fox", "--format", "jpeg")
        file = Path("outputs/0001-fox/fox-7.jpg")
        with Image.open(file) as made:
            xmp, alike = made.info["xmp"], made.point(lambda level: min(level + 3, 255))
        painted = alike.copy()
        painted.paste("black", (8, 8, 24, 24))

        def check(picture: Image.Image, code: int) -> None:
            picture.save(file, "JPEG", quality=95, subsampling=0, xmp=xmp)
            told = json.loads(k2("rerun", file, "--check", "--json", code=code).stdout)
            assert told["changed"] == bool(code)

        check(alike, 1)  # by this Pillow
        monkeypatch.setattr("k2cli.rerun.version", lambda name: "1.0")
        check(alike, 0)
        check(painted, 1)

    @pytest.mark.parametrize(("kind", "suffix"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
    def test_record_differing_from_its_picture_is_reported(self, moody, k2, fake, kind, suffix):
        """The embedded one is used; only the user knows which of them is right."""
        k2("render", "--only", "fox", "--format", kind)
        file = Path(f"outputs/0001-fox/fox-7.{suffix}")
        record = file.with_suffix(".toml")
        assert "differs from" not in k2("rerun", file).stderr
        record.write_text("# seen\n" + record.read_text())
        assert "differs from" not in k2("rerun", file).stderr

        record.write_text(record.read_text().replace("seed = 7", "seed = 8"))
        told = k2("rerun", file).stderr
        assert f"{record} differs from" in told and f"instead: k2 rerun {record}\n" in told
        assert f"{record} differs from" in k2("rerun", file, "--check").stderr
        assert "Identical, pixel for pixel." in told and fake.seen[-1].seed == 7
        assert "differs from" not in k2("rerun", record, code=1).stderr and fake.seen[-1].seed == 8

    def test_recorded_device_is_used_unless_another_is_given(self, made, k2, fake, monkeypatch):
        """On a CPU there are also as many threads as then, since only there does rounding depend on them."""
        counts: list[int] = []
        monkeypatch.setattr(rerun, "use_threads", counts.append)
        record = made.with_suffix(".toml")
        record.write_text(record.read_text().replace('device = "cpu"', 'device = "cuda:9"\nthreads = 3'))

        assert 'no device "cuda:9"' in k2("rerun", record, code=1).stderr
        assert "Identical" in k2("rerun", record, "--device", "cpu").stderr and counts == [3]
        card = fake.load()
        card.device = "cuda"
        monkeypatch.setattr(rerun, "load_pipeline", lambda held: card)
        assert "Identical" in k2("rerun", record).stderr and counts == [3]

    def test_picture_alone_is_enough(self, made, k2, tmp_path, fake):
        """Moved out of the project, without its record: --project names the project, the picture says the rest."""
        bare = Path(shutil.copy(made, tmp_path / "moved.png"))

        assert "identical" in k2("rerun", bare, "--project", ".", "--json").stdout
        asked, again = fake.seen
        assert replace(again, **{key: getattr(asked, key) for key in records.SPEC_KEYS}) == asked

    def test_several_pictures_are_reproduced_in_one_run(self, moody, k2):
        """A run folder stands for all its pictures; a name that occurs twice goes into another run."""
        k2("render", "--only", "fox", "--batch", "2")
        k2("render", "--only", "fox", "--batch", "1")

        result = k2("rerun", "outputs/0001-fox", "outputs/0002-fox/fox-7.toml")
        assert result.stdout.split() == [
            *("outputs/0003-fox/fox-7.png", "outputs/0003-fox/fox-8.png"),
            "outputs/0004-fox/fox-7.png",
        ]
        assert result.stderr == "3 of 3 are identical, pixel for pixel.\n"
        objects = [
            json.loads(line) for line in k2("rerun", "outputs/0001-fox", "--json", "--quiet").stdout.splitlines()
        ]
        assert [(each["file"], each["identical"]) for each in objects] == [
            ("outputs/0005-fox/fox-7.png", True),
            ("outputs/0005-fox/fox-8.png", True),
        ]

    def test_check_compares_and_writes_nothing(self, moody, k2, tmp_path, monkeypatch):
        """It works even without a project to write into."""
        k2("render", "--only", "fox", "--batch", "2")
        before = tree(moody)

        lines = k2("rerun", "outputs/0001-fox", "--check", "--json").stdout.splitlines()
        assert [(each["file"], each["identical"], each["levels_off"]) for each in map(json.loads, lines)] == [
            ("outputs/0001-fox/fox-7.png", True, 0),
            ("outputs/0001-fox/fox-8.png", True, 0),
        ]
        assert tree(moody) == before
        for option, *value in (("--output", "x.png"), ("--no-embed",)):
            refused = k2("rerun", "outputs/0001-fox/fox-7.png", "--check", option, *value, code=2).stderr
            assert f"it writes nothing, so it cannot be combined with {option}" in refused

        bare = shutil.copy("outputs/0001-fox/fox-7.png", tmp_path / "bare.png")
        record = Path("outputs/0001-fox/fox-7.toml")
        record.write_text(record.read_text().replace(tomllib.loads(record.read_text())["pixels"], "0" * 64))
        result = k2("rerun", record, "--check", code=1)
        assert result.stdout == "outputs/0001-fox/fox-7.png\n" and "The pixels differ" in result.stderr
        assert "was changed" not in result.stderr  # only its record was
        monkeypatch.chdir(tmp_path)
        assert k2("rerun", bare, "--check").stdout == "bare.png\n"

    @pytest.mark.parametrize(
        ("named", "by"),
        [("png", "white"), ("folder", "white"), *(("toml", by) for by in ("white", "another", "smaller"))],
    )
    def test_check_of_an_edited_picture_fails(self, moody, k2, named, by):
        """Even if it is another one of k2's, which brings along a record that agrees with it."""
        k2("render", "--only", "fox", "--batch", "2")
        file, other = Path("outputs/0001-fox/fox-7.png"), Path("outputs/0001-fox/fox-8.png")
        if by == "another":
            shutil.copy(other, file)
        else:
            Image.new("RGB", (64, 64) if by == "white" else (32, 32), "white").save(file)

        asked = file.parent if named == "folder" else file.with_suffix(f".{named}")
        result = k2("rerun", asked, "--check", code=1)
        assert str(file) in result.stdout.split() and "Identical" not in result.stderr
        assert f"{file} was changed after it was made" in result.stderr
        assert named != "folder" or "1 of 2 are identical, pixel for pixel." in result.stderr
        first = json.loads(k2("rerun", asked, "--check", "--json", "--quiet", code=1).stdout.splitlines()[0])
        assert [first[key] for key in ("identical", "changed", "gone", "unreadable")] == [False, True, False, False]

    @pytest.mark.parametrize(
        ("by", "said"),
        [
            ("end", "is no longer a readable picture"),
            ("text", "is no longer a readable picture"),
            ("owner", "may not be read"),
        ],
    )
    def test_check_of_an_unreadable_picture_says_so(self, moody, k2, monkeypatch, by, said):
        """Whether its pixels have changed is unknown."""
        k2("render", "--only", "fox")
        file = Path("outputs/0001-fox/fox-7.png")
        if by == "owner":

            def barred(path: Path) -> Image.Image:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

            monkeypatch.setattr(rerun, "read_pixels", barred)
        else:
            file.write_bytes(file.read_bytes()[:60] if by == "end" else b"a text")

        checked = ("rerun", file.with_suffix(".toml"), "--check")
        told = k2(*checked, code=1).stderr
        found = json.loads(k2(*checked, "--json", "--quiet", code=1).stdout)

        assert f"{file} {said}" in told and "only its record was compared." in told and "was changed" not in told
        assert [found[key] for key in ("identical", "changed", "gone", "unreadable")] == [False, False, False, True]

    def test_check_of_another_recorded_size_fails(self, made, k2):
        """The record asks for another size by now; the reproduction has the same single colour as the picture."""
        record = made.with_suffix(".toml")
        record.write_text(record.read_text().replace("width = 64", "width = 96"))

        assert "The pixels differ from the recorded ones.\n" in k2("rerun", record, "--check", code=1).stderr

    def test_check_of_a_missing_picture_fails(self, made, k2):
        """Without --check, a missing picture is reproduced from its record."""
        made.unlink()
        record, picture = "outputs/0001-fox/fox-7.toml", "outputs/0001-fox/fox-7.png"

        result = k2("rerun", record, "--check", code=1)
        assert not result.stdout and result.stderr == f"{picture} is gone: only its record was compared.\n"
        told = json.loads(k2("rerun", record, "--check", "--json", code=1).stdout)
        assert (told["file"], told["identical"], told["gone"], told["changed"]) == (picture, False, True, False)
        assert k2("rerun", record).stderr == "Identical, pixel for pixel.\n"

    def test_check_of_a_run_includes_missing_pictures(self, moody, k2):
        """Without --check, deleted pictures are reproduced only if named, and a message says so."""
        k2("render", "--only", "fox", "--batch", "2")
        Path("outputs/0001-fox/fox-7.png").unlink()

        said = k2("rerun", "outputs/0001-fox", "--check", code=1).stderr
        assert "outputs/0001-fox/fox-7.png is gone" in said and "1 of 2 are identical" in said
        again = "To reproduce one, name its record: k2 rerun outputs/0001-fox/fox-7.toml"
        said = k2("rerun", "outputs/0001-fox").stderr
        assert said == f"1 record left out, since its picture is gone. {again}\nIdentical, pixel for pixel.\n"
        assert k2("rerun", "outputs/0001-fox", "--quiet").stderr == ""
        shutil.copytree("outputs/0001-fox", "empty")
        Path("empty/fox-8.png").unlink()
        said = k2("rerun", "empty", code=1).stderr
        assert said.startswith("Error: All pictures in empty are gone.\nHint:  To reproduce one")

        record = Path("outputs/0001-fox/fox-7.toml")
        record.write_text(record.read_text() + "[settings\n")
        assert "fox-7.toml is not valid TOML" in k2("rerun", "outputs/0001-fox", "--check", code=1).stderr

    def test_check_ignores_files_that_are_no_records(self, made, k2):
        """Notes beside pictures, a copy of a run's plan, the record of a blocked picture, a project, styles."""
        shutil.copy(made.with_name("run.toml"), made.with_name("run-old.toml"))
        shutil.copy(made.with_suffix(".toml"), made.with_name("fox-8.blocked.toml"))
        made.with_name("notes.toml").write_text('[[prompt]]\ntext = "tea"\n')
        made.with_name("ideas.toml").write_text("tea, or coffee\n")
        made.with_name("later.toml").mkdir()

        assert k2("rerun", made.parent, "--check").stderr == "Identical, pixel for pixel.\n"
        for folder in (".", "styles"):
            assert "There are no k2 pictures in" in k2("rerun", folder, "--check", code=1).stderr

    def test_every_picture_of_a_run_folder_is_included(self, moody, k2):
        """If the record beside one is gone, the embedded one says the same; a picture without any is reported."""
        k2("render", "--only", "fox", "--batch", "2")
        Path("outputs/0001-fox/fox-7.toml").unlink()
        assert k2("log").stdout.count("outputs/0001-fox/fox-") == 2
        assert k2("rerun", "outputs/0001-fox").stderr == "2 of 2 are identical, pixel for pixel.\n"

        k2("render", "--only", "fox", "--batch", "2", "--no-embed")
        Path("outputs/0003-fox/fox-7.toml").unlink()
        said = k2("rerun", "outputs/0003-fox", code=1).stderr
        assert "fox-7.png has no record" in said and "1 of 2 are identical" in said

    def test_each_picture_is_reproduced_in_its_own_project(self, moody, k2, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "k2.toml").write_text('[[prompt]]\ntext = "tea"\n')
        made = k2("render", "../other", moody).stdout.split()

        again = k2("rerun", *made).stdout.split()
        assert again == [
            *(str(tmp_path / "other/outputs/0002-tea/tea-0.png"), "outputs/0002-fox/fox-7.png"),
            "outputs/0002-fox/an-owl-at-night-7.png",
        ]

    def test_each_of_several_is_reported(self, moody, k2):
        """One that differs, one that does not exist and one that is identical; none is left out."""
        k2("render", "--only", "fox", "--batch", "2")
        record = Path("outputs/0001-fox/fox-7.toml")
        pixels = tomllib.loads(record.read_text())["pixels"]
        record.write_text(record.read_text().replace(pixels, "0" * 64))

        result = k2("rerun", record, "gone.png", "outputs/0001-fox/fox-8.png", code=1)
        assert result.stdout.split() == ["outputs/0002-fox/fox-7.png", "outputs/0002-fox/fox-8.png"]
        said = result.stderr.splitlines()
        assert said[0] == "outputs/0001-fox/fox-7.toml: The pixels differ from the recorded ones."
        assert "There is no gone.png." in said[1]
        assert said[-1] == "1 of 3 are identical, pixel for pixel, and 1 could not be reproduced."

        quiet = k2("rerun", record, "gone.png", "outputs/0001-fox/fox-8.png", "--json", "--quiet", code=1)
        told = [json.loads(line) for line in quiet.stdout.splitlines()]
        assert [(each["from"], each.get("identical"), "error" in each) for each in told] == [
            ("outputs/0001-fox/fox-7.toml", False, False),
            ("gone.png", None, True),
            ("outputs/0001-fox/fox-8.png", True, False),
        ]
        assert quiet.stderr.splitlines()[0] == said[0] and "fox-8" not in quiet.stderr  # differences are still reported

        both = ("outputs/0001-fox", "-o", "one.png")
        assert "one file cannot hold 2 pictures" in k2("rerun", *both, code=2).stderr and not Path("one.png").exists()
        Path("empty").mkdir()
        assert "There are no k2 pictures in empty." in k2("rerun", "empty", code=1).stderr

    @pytest.mark.parametrize("check", [[], ["--check"]])
    def test_json_reports_every_failing_file(self, made, k2, monkeypatch, check):
        """A name that no file can have, a folder without pictures, and a folder that may not be read."""
        long = f"{'x' * 300}.png"
        for folder in ("empty", "shut"):
            Path(folder).mkdir()
        read_run = history.read_run

        def refusing(run, **settings):
            if run.name == "shut":
                raise PermissionError(errno.EACCES, "Permission denied", str(run))
            return read_run(run, **settings)

        monkeypatch.setattr(history, "read_run", refusing)
        named = (long, "empty", "shut", made)

        result = k2("rerun", *named, *check, "--json", code=1)
        *wrong, right = map(json.loads, result.stdout.splitlines())
        assert [(each["file"], each["from"]) for each in wrong] == [(None, str(name)) for name in named[:3]]
        assert [each["error"].rpartition(": ")[2] for each in wrong] == [
            "File name too long.",
            "There are no k2 pictures in empty.",
            "Permission denied.",
        ]
        assert right["identical"] and all(each["hint"] for each in wrong)
        assert result.stderr.count("Error: ") == 3
        assert result.stderr.endswith("1 of 4 are identical, pixel for pixel, and 3 could not be reproduced.\n")

        alone = k2("rerun", "empty", *check, "--json", code=1)
        assert json.loads(alone.stdout) == wrong[1] and alone.stderr.count("Error: ") == 1

    def test_common_error_is_shown_once(self, moody, k2, monkeypatch):
        """But with --json for each picture; and what was not compared is not said to differ."""
        k2("render", "--only", "fox", "--batch", "3")

        def refused(*of: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(os, "mkdir", refused)
        result = k2("rerun", "outputs/0001-fox", "--json", code=1)
        assert len(result.stdout.splitlines()) == 3
        first, hint, last = result.stderr.splitlines()
        assert first.endswith("outputs cannot be written: the file system is read-only.") and "another disk" in hint
        assert last == "None of 3 could be reproduced."

    def test_project_may_have_moved_on(self, made, k2, moody):
        (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", "seed = 99"))

        assert "Identical" in k2("rerun", made).stderr

    def test_output_goes_to_the_given_file(self, made, k2, tmp_path):
        k2("rerun", made, "--output", tmp_path / "again.png")

        assert (tmp_path / "again.png").exists() and (tmp_path / "again.toml").exists()
        k2("rerun", made, "--output", tmp_path / "again.png", code=1)

    def test_output_does_not_replace_a_file_created_meanwhile(self, made, k2, tmp_path, fake, monkeypatch):
        monkeypatch.setattr(fake, "stop", lambda index: (tmp_path / "again.png").write_bytes(b"another's"))

        assert "again.png exists already." in k2("rerun", made, "--output", tmp_path / "again.png", code=1).stderr
        assert (tmp_path / "again.png").read_bytes() == b"another's" and not (tmp_path / "again.toml").exists()

    @pytest.mark.parametrize("victim", ["refs/a.png", "../box/mini-vae.safetensors"])
    @pytest.mark.parametrize("gone", [True, False])
    def test_changed_files_are_refused(self, made, k2, moody, victim, gone):
        (moody / victim).unlink() if gone else (moody / victim).write_bytes((moody / victim).read_bytes() + b" ")
        before = tree(moody)

        result = k2("rerun", made, code=1)

        assert Path(victim).name in result.stderr and ("is gone" if gone else "has changed since") in result.stderr
        assert tree(moody) == before

    def test_different_pixels_exit_with_1(self, made, k2):
        record = made.with_suffix(".toml")
        record.write_text(record.read_text().replace("a red fox", "a blue fox"))

        result = k2("rerun", record, code=1)

        assert "The pixels differ" in result.stderr
        assert result.stdout == "outputs/0002-fox/fox-7.png\n"

    def test_picture_moved_into_another_run_is_rendered_alone(self, made, k2, fake):
        """It was moved by hand, so the plan of that run does not mention it."""
        k2("render", "--only", "an-owl-at-night", "--batch", "2")
        record = made.with_suffix(".toml")
        moved = Path("outputs/0002-an-owl-at-night/fox-7.toml")
        moved.write_text(record.read_text().replace("a red fox", "a blue fox"))

        assert "The pixels differ" in k2("rerun", moved, code=1).stderr
        assert [spec.prompt for spec in fake.seen[3:]] == ["a blue fox"]

    def test_non_picture_original_is_not_compared(self, made, k2, monkeypatch):
        """Pillow would hand PostScript to Ghostscript, whatever the file is named."""
        record = made.with_suffix(".toml")
        record.write_text(record.read_text().replace("a red fox", "a blue fox"))
        Image.new("RGB", (64, 64)).save(made, "EPS")
        started = []
        monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(1))

        result = k2("rerun", record, code=1)

        assert "The pixels differ from the recorded ones." in result.stderr and not started

    @pytest.mark.parametrize("beside", [True, False])
    def test_batch_is_reproduced_if_rounding_depends_on_it(self, moody, k2, fake, tmp_path, monkeypatch, beside):
        """A batch may round differently from a single picture, here by one level."""
        alone = fake.stream

        def stream(self, specs, on_step=None):
            for picture in alone(self, specs, on_step):
                lighter = picture.image.point(lambda level: min(255, level + (len(specs) > 1)))
                yield replace(picture, image=lighter)

        monkeypatch.setattr(fake, "stream", stream)
        monkeypatch.setattr(fake, "batches", lambda self, specs: [2] * (len(specs) // 2))
        k2("render", "--only", "fox", "--batch", "4")
        made = moody / "outputs" / "0001-fox" / "fox-9.png"
        if beside:
            monkeypatch.chdir(made.parent)
            result = k2("rerun", "../0001-fox/fox-9.png", "--json")
            assert json.loads(result.stdout)["identical"] and [spec.seed for spec in fake.seen[-2:]] == [9, 9]
            return
        result = k2("rerun", shutil.copy(made, tmp_path / "moved.png"), "--project", ".", code=1)
        assert "by at most 1 of 255 levels. That is rounding" in result.stderr

    def test_recorded_threads_and_a_given_device_are_used(self, made, k2, monkeypatch):
        used = []
        monkeypatch.setattr("k2cli.rerun.use_threads", used.append)
        record = made.with_suffix(".toml")
        record.write_text(record.read_text().replace("[settings]\n", "[settings]\nthreads = 3\n"))

        k2("rerun", record)
        assert used == [3]
        assert 'There is no device "tpu".' in k2("rerun", record, "--device", "tpu", code=1).stderr

    def test_no_embed_applies_to_reruns(self, made, k2, tmp_path):
        k2("rerun", made, "--no-embed", "--output", tmp_path / "again.png")

        with Image.open(tmp_path / "again.png") as image:
            assert image.text == {}

    def test_record_without_a_seed_is_refused(self, made, k2, fake):
        record = made.with_suffix(".toml")
        record.write_text(record.read_text().replace("seed = 7\n", ""))

        refused = k2("rerun", record, "--check", code=1)
        assert f"The record of {record} has no seed." in refused.stderr and len(fake.seen) == 1

    def test_nothing_is_rendered_if_nothing_can_be_written(self, made, k2, moody, fake):
        picture = made.rename(moody / made.name)
        shutil.rmtree(moody / "outputs")
        (moody / "outputs").write_text("a file")

        k2("rerun", picture, code=1)

        assert len(fake.seen) == 1

    def test_failed_reproduction_leaves_no_run(self, moody, k2, fake, monkeypatch):
        """Alone or with others: the run is named after the first picture that is rendered."""
        k2("render")
        fox, owl = (
            moody / "outputs" / "0001-fox-and-1-more" / f"{name}.png" for name in ("fox-7", "an-owl-at-night-7")
        )
        before = tree(moody)
        stream = fake.stream

        def fail(self, specs, on_step=None):
            if "owl" in next(iter(specs)).prompt:
                raise K2Error("No.")
            yield from stream(self, specs, on_step=on_step)

        monkeypatch.setattr(fake, "stream", fail)
        k2("rerun", owl, code=1)
        k2("rerun", owl, owl, code=1)
        assert tree(moody) == before

        assert k2("rerun", owl, fox, code=1).stdout == "outputs/0002-fox/fox-7.png\n"

    def test_references_need_their_project(self, made, k2, tmp_path, monkeypatch):
        bare = Path(shutil.copy(made, tmp_path / "moved.png"))
        monkeypatch.chdir(tmp_path)

        result = k2("rerun", bare, "--output", "x.png", code=1)

        assert "refs/a.png from its project" in result.stderr and "--project" in result.stderr


def test_adapter_is_verified_with_its_settings(tmp_path):
    """Older records, which hash only the weights, still verify."""
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    weights.write_text("weights")
    alone = identity(weights)
    settings.write_text("4")
    both = identity(weights)

    records.verify_files({weights: alone})
    records.verify_files({weights: both})
    settings.write_text("32")
    with pytest.raises(K2Error, match="has changed since"):
        records.verify_files({weights: both})
    assert alone == sha256(weights) != both


def test_recorded_paths_are_relative_with_slashes(tmp_path, monkeypatch):
    assert relative_path(tmp_path / "moody" / "refs" / "a.png", tmp_path / "moody") == "refs/a.png"
    assert relative_path(tmp_path / "a.png", tmp_path / "moody") == "../a.png"

    def other_drive(path: Path, start: Path) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")  # as on Windows

    monkeypatch.setattr("os.path.relpath", other_drive)
    assert relative_path(tmp_path / "a.png", tmp_path / "moody") == (tmp_path / "a.png").as_posix()
