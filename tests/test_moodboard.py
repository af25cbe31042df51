"""Moodboards: looks, colours, words, analysis and its styles, and bad boards."""

from __future__ import annotations

import io
import json
import shutil
import tomllib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, tiny_box  # noqa: F401

from k2cli import moodboard, workers
from k2cli.project import Project
from k2cli.toml_tables import Toml
from model import library
from model.board_pictures import StyleReader
from model.checkpoint import save
from model.clusters import MIN_SILHOUETTE, find_looks, silhouette, spherical_kmeans
from model.colours import colour_name, colour_words, find_palette, named_colours, oklab, swatches
from model.errors import K2Error
from model.hashes import cache_folder, sha256
from model.moodboard import analyse, same_detail
from model.words import WordTable, read_words

K2 = """\
[render]
model = "tiny"

[[prompt]]
name = "fox"
text = "a red fox"

[moodboard]
images = ["refs/board/*"]
"""


def unit(*rows: list[float]) -> np.ndarray:
    made = np.array(rows, float)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def blobs(*sizes: int, spread: float = 0.15) -> np.ndarray:
    """Unit vectors in clusters of these sizes, one axis each."""
    rng = np.random.default_rng(0)
    axes = np.eye(8)[: len(sizes)]
    return unit(
        *(axis + spread * rng.standard_normal(8) for axis, size in zip(axes, sizes, strict=True) for _ in range(size))
    )


# ---- looks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12,), (15, 15), (20, 8), (9, 7, 5), (40, 30, 20, 10)])
def test_finds_as_many_looks_as_there_are(sizes):
    looks = find_looks(blobs(*sizes))

    assert [len(look) for look in looks] == sorted(sizes, reverse=True)
    for look in looks:
        starts = np.cumsum((0, *sizes))
        assert len({int(np.searchsorted(starts, i, "right")) for i in look}) == 1


def test_one_picture_or_identical_ones_are_one_look():
    assert find_looks(unit([1, 0])) == [[0]]
    assert find_looks(unit(*[[1, 0]] * 6)) == [[0, 1, 2, 3, 4, 5]]


def test_central_picture_of_a_look_comes_first():
    (look,) = find_looks(unit([1, 0.5], [1, 0], [1, -0.5]))

    assert look[0] == 1


def test_silhouette_matches_its_definition():
    """Two pairs: a is the distance within a pair, b the mean distance to the other pair."""
    vectors = unit([1, 0], [1, 0.1], [0, 1], [0.1, 1])
    distances = 1 - vectors @ vectors.T
    a, b = distances[0, 1], distances[0, 2:].mean()
    c = distances[1, 2:].mean()

    found = silhouette(vectors, np.array([0, 0, 1, 1]))

    assert found == pytest.approx((1 - a / b + 1 - a / c) / 2)
    assert found > MIN_SILHOUETTE > silhouette(vectors, np.array([0, 1, 0, 1]))
    assert (spherical_kmeans(vectors, 2) == spherical_kmeans(vectors, 2)).all()


# ---- colours ------------------------------------------------------------------------------------


def test_oklab_of_white_black_and_grey():
    np.testing.assert_allclose(oklab(np.array([[1.0, 1, 1], [0, 0, 0]])), [[1, 0, 0], [0, 0, 0]], atol=1e-4)
    assert abs(oklab(np.array([0.5, 0.5, 0.5]))[1:]).max() < 1e-4


def test_palette_has_the_colours_of_the_picture():
    picture = np.full((40, 40, 3), (92, 188, 184), np.uint8)
    picture[:, :10] = (206, 96, 80)

    teal, brick = find_palette([picture])

    assert (teal.name, teal.hex, teal.share) == ("teal", "#5cbcb8", 0.75)
    assert (brick.name, brick.share) == ("brick red", 0.25)
    wanted, foreign = colour_words((teal, brick))
    assert wanted == ["teal"] and foreign and foreign[0] not in ("teal", "brick red")
    strip = swatches((teal, brick))
    assert strip.getpixel((0, 0)) == teal.rgb and strip.getpixel((479, 95)) == brick.rgb


def test_colours_have_plain_names():
    assert [colour_name(rgb) for rgb in ((255, 255, 255), (0, 0, 0), (38, 54, 96))] == ["white", "black", "night blue"]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("5a141e", "brick red"), ("8b0000", "brick red"), ("50271d", "brown"), ("3d2b1f", "brown"), ("14501e", "green"),
        ("355e3b", "green"), ("4b0082", "purple"), ("191970", "night blue"), ("1c1c1c", "black"),
        ("0dcef0", "sky blue"), ("008080", "teal"), ("4682b4", "blue"),
        ("d2691e", "orange"), ("808080", "grey"), ("404040", "dark grey"), ("2d2d2d", "dark grey"),
        ("757c5f", "green"), ("797963", "grey"), ("737265", "grey"), ("6a6a6a", "grey"), ("eaeaea", "white"),
    ],
)  # fmt: skip
def test_colours_are_named_after_their_hue_however_dark_or_muted(code, name):
    assert colour_name(bytes.fromhex(code)) == name


def test_no_colour_is_named_after_a_distant_hue():
    """Across the whole RGB cube: near-greys are called grey, all others by a nearby hue."""

    def chroma(rgb: tuple[int, ...]) -> complex:
        return complex(*oklab(np.array(rgb) / 255)[1:])

    known = {name: [chroma(rgb) for rgb in rgbs] for name, rgbs in named_colours().items()}
    for rgb in product(range(8, 256, 24), repeat=3):
        name, own = colour_name(rgb), chroma(rgb)
        if name not in ("white", "grey", "dark grey", "black", "cream"):
            turns = [abs(np.angle(each / own, deg=True)) for each in known[name]]
            assert abs(own) > 0.015 and min(turns) < 60, (rgb, name)


def test_dark_red_board_gets_a_red_keyword():
    picture = np.full((64, 64, 3), (90, 20, 30), np.uint8)
    picture[20:40, 20:40] = (150, 40, 50)

    wanted, _ = colour_words(find_palette([picture]))

    assert wanted == ["brick red"]


# ---- words --------------------------------------------------------------------------------------


def table(unseen: float) -> WordTable:
    """Two media from two features: the first stands for film, the second for neon."""
    x = torch.eye(2, dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    return WordTable(
        {"medium": ("film", "neon")}, {"medium": 20 * x}, {"medium": zero}, zero, one, x, x, 1.0, {"medium": unseen}, {}
    )


def test_words_are_read_only_from_pictures_near_the_training_data():
    words = table(0.9)
    chances, known = words.predict(torch.tensor([[1.0, 0.0], [0.9, 0.1], [9.0, 9.0]]))

    assert known.tolist() == [True, True, False]
    keywords, avoids, told = read_words(words, chances, known)
    assert keywords == ["grainy film"] and avoids == ["neon on black"]
    assert told["medium"][0] == "film" and told["medium"][1] > 0.99


def test_bundled_word_table_fits_the_bundled_style_encoder():
    """New weights need new words: python -m model.train.words."""
    eye = StyleReader.load("mini")

    assert eye.words is not None, eye.words_problem


def test_words_that_were_unreliable_on_unseen_looks_are_omitted():
    chances, known = table(0.3).predict(torch.tensor([[1.0, 0.0]]))

    assert read_words(table(0.3), chances, known) == ([], [], {})
    assert read_words(None, {}, known) == ([], [], {})
    assert read_words(table(0.9), chances, np.array([False])) == ([], [], {})


# ---- boards -------------------------------------------------------------------------------------


@pytest.fixture
def den(tiny, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A project with a board of two looks, six pictures each: dark stripes and bright squares."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    workers.load_pipeline.cache_clear()
    folder = tmp_path / "den"
    (folder / "refs" / "board").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(6):
        for name, low, high in (("dark", 0, 60), ("light", 190, 255)):
            size = 4 if name == "dark" else 16
            cells = rng.integers(low, high, (size, size, 3)).astype(np.uint8)
            picture = Image.fromarray(cells).resize((64, 64), Image.Resampling.NEAREST)
            picture.save(folder / "refs" / "board" / f"{name}-{index}.png")
    (folder / "k2.toml").write_text(K2)
    monkeypatch.chdir(folder)
    return folder


def board(folder: Path, *names: str):
    paths = [folder / "refs" / "board" / name for name in names] or sorted((folder / "refs" / "board").iterdir())
    return analyse(paths, StyleReader.load("tiny"))


def test_analysis_is_deterministic(den):
    first, again = board(den), board(den)

    assert first == again
    assert sum(weight for _, weight in first.representatives) == pytest.approx(1, abs=1e-3)
    assert sum(len(look.pictures) for look in first.looks) == 12
    assert "No keywords" in first.notes[0] and "python -m model.train.words" in first.notes[0]


def test_bad_boards_get_one_sentence_each(den):
    with pytest.raises(K2Error, match="holds no picture"):
        analyse([], StyleReader.load("tiny"))
    pictures = den / "refs" / "board"
    assert any("thin moodboard" in note for note in board(den, "dark-0.png").notes)
    for name in ("a.png", "b.png"):
        shutil.copy(pictures / "dark-0.png", pictures / name)
    assert any("All 3 pictures are the same" in note for note in board(den, "dark-0.png", "a.png", "b.png").notes)
    (pictures / "c.png").write_text("no picture")
    (pictures / "d.png").write_bytes((pictures / "a.png").read_bytes()[:-40])
    whole = board(den)
    assert "Left out: c.png cannot be read as a picture." in whole.notes
    assert any("d.png cannot be read as a picture. The file is truncated" in note for note in whole.notes)
    assert any("2 of them are copies" in note for note in whole.notes)
    assert sum(len(look.pictures) for look in whole.looks) == 12
    with pytest.raises(K2Error, match="No picture of the moodboard can be read"):
        board(den, "c.png")


def test_same_picture_in_another_format_or_size_is_a_copy(den):
    pictures = den / "refs" / "board"
    with Image.open(pictures / "dark-0.png") as image:
        image.save(pictures / "dark-0.jpg", quality=90)
        image.resize((150, 150)).save(pictures / "dark-0.webp")

    found = board(den)

    assert "2 of them are copies of others and count once." in found.notes
    assert sum(len(look.pictures) for look in found.looks) == 12


def test_patterns_of_the_same_colour_are_not_copies(den):
    """Hatching, halftone and grain do not show in the colours of areas; copies of each count once."""
    folder = den / "refs" / "patterns"
    folder.mkdir()
    across, down = np.meshgrid(*(np.arange(256),) * 2)
    grain = np.random.default_rng(0).normal(128, 80, (256, 256)).clip(0, 255)
    striped = ((across // 16 % 2), (down // 16 % 2), ((across // 16 + down // 16) % 2))
    for index, pattern in enumerate([*(which * 255 for which in striped), grain, np.full_like(grain, 128)]):
        image = Image.fromarray(pattern.astype(np.uint8))
        image.save(folder / f"{index}.png")
        image.save(folder / f"{index}.jpg", quality=60)

    found = analyse(sorted(folder.iterdir()), StyleReader.load("tiny"))

    assert "5 of them are copies of others and count once." in found.notes
    assert sum(len(look.pictures) for look in found.looks) == 5


@pytest.mark.parametrize("much", [8, 16, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_copies_keep_their_grain_and_other_pictures_differ_in_it(much, channels):
    rng = np.random.default_rng(0)
    ground = np.linspace(60, 190, 256)[:, None, None] + np.zeros((256, 256, 3))

    def grainy() -> np.ndarray:
        return (ground + rng.normal(0, much, (256, 256, channels))).clip(0, 255).astype(np.uint8)

    def kept(picture: np.ndarray, size: int, **how: object) -> np.ndarray:
        Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS).save(file := io.BytesIO(), **how)
        return np.asarray(Image.open(file).convert("RGB").resize((256, 256), Image.Resampling.BICUBIC))

    picture = grainy()
    for copy in (kept(picture, 256, format="JPEG", quality=60), kept(picture, 128, format="WEBP", quality=90)):
        assert same_detail(picture, copy)
    assert not same_detail(picture, grainy())


def test_word_table_for_another_encoder_is_not_used(den, monkeypatch, tmp_path):
    shutil.copytree(library.BUNDLED, tmp_path / "box")
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "box")
    state = {"medium.weight": torch.zeros(1, 32), "medium.offset": torch.zeros(1)}
    state |= {
        "mean": torch.zeros(32),
        "deviation": torch.ones(32),
        "middle": torch.zeros(1, 32),
        "precision": torch.eye(32),
    }
    about = {"kind": "words", "names": {"medium": ["film"]}, "furthest": 1e9, "unseen": {"medium": 0.9}}
    hashes = {part: sha256(library.BUNDLED / f"tiny-{part}.safetensors") for part in ("style", "vae")}
    for made_for, keywords in ((hashes, ("grainy film",)), (hashes | {"vae": "other"}, ())):
        save(library.BUNDLED / "tiny-words.safetensors", state, about | {"made_for": made_for})
        found = board(den)
        assert found.keywords[:1] == keywords or (not keywords and "grainy film" not in found.keywords)
        assert any("another style encoder" in note for note in found.notes) == (not keywords)


def test_analyze_writes_a_style_that_renders(den, k2):
    made = k2("moodboard", "analyze")

    assert made.stdout == "styles/board.toml\n" and "12 pictures in" in made.stderr
    style = tomllib.loads((den / "styles" / "board.toml").read_text())
    assert all((den / entry["image"]).is_file() for entry in style["reference"])
    assert Image.open(den / "styles" / "board.png").size == (480, 96)
    assert "exists already" in k2("moodboard", "analyze", code=1).stderr
    assert k2("moodboard", "analyze", "refs/board", "--force", "--quiet").stdout == "styles/board.toml\n"
    (den / "k2.toml").write_text(K2.partition("[moodboard]")[0])
    assert "There is no moodboard" in k2("moodboard", "analyze", "--force", code=1).stderr
    (shot,) = Project.open(den).shots(Project.open(den).resolve_settings(), None, {"board": 0.35})
    assert shot.spec.styles[0].strength == 0.35 and shot.spec.styles[0].references


def test_board_style_outlives_the_outputs(den, k2):
    """Its pictures are copied, into a folder beside one that may have the style's name; others stay in place."""
    (den / "outputs").mkdir()
    (den / "refs" / "board").rename(den / "outputs" / "0001-fox")
    lying = den / "refs" / "board" / "lone.png"
    lying.parent.mkdir()
    Image.new("RGB", (64, 64), "teal").save(lying)

    made = json.loads(k2("moodboard", "analyze", "outputs/0001-fox", "refs/board", "--json").stdout)
    shutil.rmtree(den / "outputs")

    named = [entry["image"] for entry in tomllib.loads((den / "styles" / "board.toml").read_text())["reference"]]
    assert named == [each["image"] for look in made["looks"] for each in look["representatives"]]
    assert {str(Path(image).parent) for image in named} == {"refs/board", "refs/board-looks"}
    (shot,) = Project.open(den).shots(Project.open(den).resolve_settings(), None, {"board": 0.35})
    assert len(shot.spec.styles[0].references) == len(named)
    assert list(lying.parent.iterdir()) == [lying]


def test_board_may_be_outside_the_project(den, k2, tmp_path):
    """A typed path may be read from anywhere; the project may not, so the style takes copies unless that is allowed."""
    (den / "refs" / "board").rename(tmp_path / "mine")
    (den / "k2.toml").write_text(K2.partition("[moodboard]")[0])
    for name, folder in (("one", "../mine"), ("two", tmp_path / "mine" / "*")):
        named = [folder] if name == "one" else sorted(folder.parent.glob("*.png"))
        k2("moodboard", "analyze", *named, "--name", name)
        (shot,) = Project.open(den).shots(Project.open(den).resolve_settings(), None, {name: 0.35})
        parents = {reference.image.parent for reference in shot.spec.styles[0].references}
        assert parents == {den / "refs" / f"{name}-looks"}

    k2("moodboard", "analyze", "../mine", "--name", "three", "--allow-outside")
    assert 'image = "../mine/' in (den / "styles" / "three.toml").read_text()
    assert not (den / "refs" / "three-looks").exists()


def test_board_may_have_file_names_that_style_files_cannot(den, k2, tmp_path):
    """Copies get other names; names under [moodboard] go into records unchanged, so they are refused."""
    shutil.copytree(den / "refs" / "board", tmp_path / "mine")
    (den / "k2.toml").write_text(K2.partition("[moodboard]")[0])
    for folder in (tmp_path / "mine", den / "refs" / "board"):
        for path in sorted(folder.iterdir()):
            path.rename(path.with_name(path.name.replace("-", "\n")))
        (folder / "bro\tken.png").write_bytes(b"")
        told = k2("moodboard", "analyze", folder, "--name", folder.name).stderr
        assert "Left out: bro?ken.png" in told and "12 pictures in" in told
        (shot,) = Project.open(den).shots(Project.open(den).resolve_settings(), None, {folder.name: 0.35})
        assert all(each.image.parent.name == f"{folder.name}-looks" for each in shot.spec.styles[0].references)

    (den / "k2.toml").write_text(K2)
    refused = k2("moodboard", "analyze", "--force", code=1).stderr
    assert "the name of refs/board/bro?ken.png contains a control character.\nHint:  Rename the file." in refused


def test_analysis_mentions_unreadable_formats(den, k2):
    for name in ("IMG_1.HEIC", "notes.txt"):
        (den / "refs" / "board" / name).write_bytes(b"")

    for images in ((), ("refs/board",)):
        told = k2("moodboard", "analyze", *images, "--force").stderr
        assert "Passed over: 1 picture (heic); k2 reads png, jpg and webp." in told and "12 pictures in" in told


def test_contact_sheets_matched_by_a_glob_are_skipped(den, k2):
    board = den / "refs" / "board"
    (board / "run.toml").write_bytes(b"")
    (board / "dark-0.png").rename(board / "sheet.png")

    told = k2("moodboard", "analyze", *board.glob("*.png")).stderr
    assert "Passed over: 1 contact sheet.\n" in told and "11 pictures in" in told
    refused = k2("moodboard", "analyze", "refs/board/sheet.png", "--name", "sheet", code=1)
    assert "refs/board/sheet.png is a contact sheet." in refused.stderr


def test_render_mentions_unreadable_formats_on_its_board(den, k2):
    (den / "refs" / "board" / "IMG_1.HEIC").write_bytes(b"")
    over = "Passed over: 1 picture (heic); k2 reads png, jpg and webp.\n"

    assert k2("render", "--dry-run").stderr.count(over) == 1
    for picture in (den / "refs" / "board").glob("*.png"):
        picture.unlink()
    assert f"refs/board/* matches no picture.\nHint:  {over}" in k2("render", code=1).stderr


def test_render_mentions_broken_pictures_on_its_board(den, k2):
    """Also when the board's analysis is cached; the names are the current ones."""
    broken = den / "refs" / "board" / "broken.png"
    broken.write_bytes(b"x")
    left_out = "Left out of the moodboard because they cannot be read: {}.\n"

    assert left_out.format("broken.png") in k2("render", "--dry-run").stderr
    broken.rename(broken.with_name("z.png"))
    again = [k2("render", "--dry-run", *more).stderr for more in ((), (), ("--moodboard", "0"), ("--quiet",))]
    assert [said.count(left_out.format("z.png")) for said in again] == [1, 1, 0, 0]


def test_folders_and_broken_links_are_not_on_the_board(den, k2):
    """Even if they are named like pictures. Broken links are mentioned."""
    (den / "refs" / "board" / "final.png").mkdir()
    (den / "refs" / "board" / "gone.png").symlink_to("elsewhere.png")
    over = "Passed over: broken links (gone.png).\n"

    for images in ((), ("refs/board",)):
        told = k2("moodboard", "analyze", *images, "--force").stderr
        assert over in told and "12 pictures in" in told
    assert k2("render", "--dry-run").stderr.count(over) == 1


def test_subfolders_named_by_the_board_are_not_reported_as_skipped(den, k2):
    """Not even if the board cannot use the only picture in one."""
    shutil.copy(den / "refs" / "board" / "dark-0.png", den / "refs" / "own.png")
    (den / "refs" / "more").mkdir()
    (den / "refs" / "more" / "broken.png").write_bytes(b"x")
    (den / "styles").mkdir()
    (den / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "refs"\n')
    over = "Passed over: pictures in subfolders (more); name those folders too."

    assert over in k2("render", "--dry-run", "--style", "dusk=0.5").stderr
    (den / "k2.toml").write_text(K2.replace('"refs/board/*"', '"refs/board/*", "refs/more"'))
    assert over not in k2("render", "--dry-run", "--style", "dusk=0.5").stderr


def test_style_created_during_analysis_is_not_overwritten(den, k2, monkeypatch):
    look, style = moodboard.analyse_board, den / "styles" / "dusk.toml"

    def slowly(*arguments):
        style.parent.mkdir(exist_ok=True)
        style.write_text('keywords = ["mine"]\n')
        return look(*arguments)

    monkeypatch.setattr(moodboard, "analyse_board", slowly)

    said = k2("moodboard", "analyze", "--name", "dusk", code=1).stderr

    assert "styles/dusk.toml exists already." in said and "--force" in said
    assert style.read_text() == 'keywords = ["mine"]\n' and not style.with_suffix(".png").exists()


def test_language_model_describes_the_board(den, k2, monkeypatch):
    """In whole sentences, from the first picture of each look. Refusals and failures are left out."""
    heard = []

    class Speaking:
        vision_checkpoint = True
        said = "Taste profile: Quiet flat colour, much air. Night hues over bla"

        def load_picture(self, path):
            return path.name

        def answer(self, text, seed, pictures):
            heard.append((text, pictures))
            if isinstance(self.said, Exception):
                raise self.said
            return self.said

    monkeypatch.setattr(moodboard, "language_model_path", lambda model: Path("somewhere"))
    monkeypatch.setattr(moodboard, "load_language_model", lambda text, device: Speaking())
    told = json.loads(k2("moodboard", "analyze", "--json").stdout)
    looks = [look["representatives"] for look in told["looks"]]

    assert told["told"] == "Quiet flat colour, much air." and told["profile"].startswith("12 pictures in")
    assert (den / "styles" / "board.toml").read_text().startswith("# Quiet flat colour, much air.\n# 12 pictures in")
    ((asked, shown),) = heard
    assert told["profile"] in asked and [f"refs/board/{name}" for name in shown[: len(looks)]] == [
        look[0]["image"] for look in looks
    ]
    assert len(shown) == min(4, sum(map(len, looks)))
    for said, note in (
        ("I'm sorry, but I can't.", ""),
        (K2Error("It lacks a tensor."), "did not describe the moodboard: It lacks a tensor."),
        (MemoryError(), "did not describe the moodboard: There is not enough memory for its language side."),
    ):
        Speaking.said = said
        again = k2("moodboard", "analyze", "--json", "--force")
        assert json.loads(again.stdout)["told"] is None and note in again.stderr


def test_moodboard_table_renders_and_reruns(den, k2):
    with_board = k2("render", "--quiet").stdout.strip()
    record = Toml.read(Path(with_board).with_suffix(".toml"), "record").table

    (style,) = record["style"]
    assert (style["name"], style["strength"]) == ("moodboard", 0.35) and style["reference"]
    assert "Identical, pixel for pixel." in k2("rerun", with_board).stderr
    (den / "k2.toml").write_text(K2 + "strength = 0\n")
    off = k2("render", "--quiet").stdout.strip()
    (den / "k2.toml").write_text(K2.partition("[moodboard]")[0])
    without = k2("render", "--quiet").stdout.strip()
    pixels = [Toml.read(Path(path).with_suffix(".toml"), "record").table["pixels"] for path in (off, without)]
    assert pixels[0] == pixels[1] != record["pixels"]


def test_style_cannot_be_named_moodboard(den, k2):
    """Records distinguish styles by name."""
    (den / "styles").mkdir(exist_ok=True)
    (den / "styles" / "moodboard.toml").write_text('keywords = ["ink"]\n')
    refused = k2("render", "--dry-run", "--style", "moodboard=0.5", code=1)
    assert "The style name moodboard is taken" in refused.stderr and "Rename styles/moodboard.toml" in refused.stderr


def test_moodboard_strength_is_an_option(den, k2):
    def strength(*options: str) -> list[float]:
        import json

        line = k2("render", "--dry-run", "--json", *options).stdout.splitlines()[0]
        return [style["strength"] for style in json.loads(line)["style"] or []]

    assert strength() == [0.35] and strength("--moodboard", "1.2") == [1.2] and strength("--moodboard", "0") == []
    assert "must be between −0.5 and 1.5" in k2("render", "--moodboard", "2", code=2).stderr
    (den / "k2.toml").write_text(K2.partition("[moodboard]")[0])
    assert "has no moodboard" in k2("render", "--moodboard", "1", code=1).stderr
    assert strength("--moodboard", "0") == []


def test_board_is_analysed_once(den, monkeypatch):
    def style():
        project = Project.open(den)
        return project.shots(project.resolve_settings())[0].spec.styles

    first = style()
    monkeypatch.setattr(moodboard, "analyse_board", None)
    assert style() == first
    for kept in (cache_folder() / "boards").iterdir():
        kept.write_text("nonsense")
    with pytest.raises(TypeError):  # analyses again
        style()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('images = ["refs/none/*"]', "k2.toml, line 2: refs/none/* matches no picture"),
        ('images = ["refs/board/*", "refs/none/*"]', "k2.toml, line 2: refs/none/* matches no picture"),
        ('images = ["refs/none.png"]', "k2.toml, line 2: there is no refs/none.png"),
        ('images = ["../*"]', "lies outside the project"),
        ("images = []", "the moodboard holds no picture"),
        ('image = ["refs/*/*"]', 'Did you mean "images"?'),
        ("strength = 1", '"images" is missing in [moodboard]'),
        ('images = ["refs/*/*"]\nstrength = 1.6', '"strength" must be between −0.5 and 1.5'),
        ('images = ["refs/*/*"]\nstrenght = 1', 'unknown key "strenght" in [moodboard]'),
    ],
)
def test_wrong_moodboard_tables_are_refused(den, k2, text, message):
    (den / "k2.toml").write_text(f'[moodboard]\n{text}\n[render]\nmodel = "tiny"\n')

    assert message in k2("render", "-p", "a fox", "--dry-run", code=1).stderr
