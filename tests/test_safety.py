"""Output filters: nobody sees what they block, and a filter that fails blocks everything."""

from __future__ import annotations

import json
import tomllib
from types import SimpleNamespace

import pytest
from conftest import tree
from PIL import Image
from tiny import tiny, tiny_box  # noqa: F401

from model import safety
from model.errors import K2Error
from model.pipeline import Pipeline
from model.safety import Verdict, installed_filters, review
from model.spec import Picture, RenderSpec

RED = Picture(Image.new("RGB", (8, 4), "red"), {"prompt": "a rose", "seed": 7})


def allow(image, record):
    return Verdict(True)


def no_roses(image, record):
    return Verdict("rose" not in record["prompt"], "roses are forbidden")


def test_pictures_that_every_filter_allows_pass_unchanged():
    def vandal(image, record):
        image.paste("black", (0, 0, 8, 4))
        return Verdict(True)

    picture = review(RED, [allow, vandal])

    assert picture is RED and picture.image.getpixel((0, 0)) == (255, 0, 0)


def test_blocked_picture_is_black_and_its_record_says_why():
    picture = review(RED, {"first": allow, "botany": no_roses})

    assert picture.image.size == RED.image.size and picture.image.getextrema() == ((0, 0),) * 3
    assert picture.record == {**RED.record, "blocked": {"filter": "botany", "reason": "roses are forbidden"}}


def test_filters_with_the_same_name_are_all_applied():
    def made(word):
        def check(image, record):
            return Verdict(word != "roses", word)

        return check

    for words in (("roses", "tulips"), ("tulips", "roses")):
        assert review(RED, map(made, words)).record["blocked"] == {"filter": "check", "reason": "roses"}


def test_filters_from_an_iterator_see_every_picture(tiny):  # noqa: F811
    pipeline = Pipeline.load("tiny", device="cpu", filters=iter([no_roses]))
    made = []
    for _ in range(2):
        made += pipeline.render([RenderSpec("a rose", width=64, height=64, steps=1)])

    assert [picture.record["blocked"]["reason"] for picture in made] == ["roses are forbidden"] * 2


@pytest.mark.parametrize("filters", [no_roses, "no_roses", [no_roses, None], {"botany": 1}, 5])
def test_invalid_filters_are_refused(tiny, filters):  # noqa: F811
    with pytest.raises(K2Error, match="a list of functions"):
        Pipeline.load("tiny", device="cpu", filters=filters)


@pytest.mark.parametrize("result", [None, True, "yes"])
def test_filters_must_return_a_verdict(result):
    with pytest.raises(K2Error, match="not a Verdict"):
        review(RED, {"vague": lambda image, record: result})


def test_failing_filter_lets_nothing_through():
    def broken(image, record):
        raise RuntimeError("no weights")

    with pytest.raises(K2Error, match='"broken" failed: no weights'):
        review(RED, [allow, broken])


def test_installed_packages_bring_filters(monkeypatch):
    points = [
        SimpleNamespace(name="roses", value="a:no_roses", load=lambda: no_roses),
        SimpleNamespace(name="all", value="a:allow", load=lambda: allow),
    ]
    monkeypatch.setattr(safety, "entry_points", lambda group: points if group == "k2.filters" else [])
    assert list(installed_filters()) == ["all", "roses"]

    def missing():
        raise ImportError("no module named nudity")

    points.append(SimpleNamespace(name="all", value="b:no_roses", load=lambda: no_roses))
    assert installed_filters() == {
        "all": allow,
        "all of b:no_roses": no_roses,
        "roses": no_roses,
    }  # the same name in two packages: both

    points.append(SimpleNamespace(name="nudity", value="c:check", load=missing))
    with pytest.raises(K2Error, match='"nudity" failed: no module named nudity'):
        installed_filters()


@pytest.fixture
def strict(fake, monkeypatch):
    """The fake pipeline with a filter that follows a script: one character per picture, + allows and - blocks."""

    def use(answers: str) -> None:
        stream, left = fake.stream, iter(answers)
        checks = {"eyes": lambda image, record: Verdict(next(left) == "+", "looks odd")}
        painted = lambda self, specs, on_step=None: (review(each, checks) for each in stream(self, specs, on_step))  # noqa: E731
        monkeypatch.setattr(fake, "stream", painted)

    return use


def test_blocked_picture_is_recorded_but_not_saved(moody, k2, strict):
    strict("+-")

    result = k2("render")

    folder = moody / "outputs/0001-fox-and-1-more"
    assert result.stdout == "outputs/0001-fox-and-1-more/fox-7.png\n"
    assert 'Blocked by the output filter "eyes"' in result.stderr
    files = {path.name for path in folder.iterdir()} - {"run.toml", "sheet.png"}
    assert files == {"fox-7.png", "fox-7.toml", "an-owl-at-night-7.blocked.toml"}
    record = tomllib.loads((folder / "an-owl-at-night-7.blocked.toml").read_text("utf-8"))
    assert record["blocked"] == {"filter": "eyes", "reason": "looks odd"} and record["settings"]["seed"] == 7
    assert "by eyes: looks odd" in k2("show", folder / "an-owl-at-night-7.blocked.toml").stdout
    assert json.loads(k2("show", folder / "an-owl-at-night-7.blocked.toml", "--json").stdout)["file"] is None
    assert "the run is complete" in k2("render", "--resume").stderr


def test_run_whose_first_picture_was_blocked_can_be_resumed(moody, k2, strict):
    strict("-+")
    assert "contact sheet" not in k2("render").stderr  # a sheet of one picture is not mentioned
    folder = moody / "outputs/0001-fox-and-1-more"
    whole = tree(folder)
    (folder / "sheet.png").unlink()

    k2("render", "--resume")

    assert tree(folder) == whole


def test_run_may_be_blocked_entirely(moody, k2, strict):
    strict("--")

    lines = [json.loads(line) for line in k2("render", "--json").stdout.splitlines()]

    assert [line["file"] for line in lines] == [None, None]
    assert not list(moody.rglob("*.png"))


def test_rerun_is_filtered_too(moody, k2, strict):
    strict("++-")
    path = k2("render").stdout.splitlines()[0]

    assert 'The output filter "eyes" blocked the picture: looks odd.' in k2("rerun", path, code=1).stderr
    assert not (moody / "outputs/0002-fox").exists()
