"""The gallery: its files, and the page as a person uses it, clicked through in Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import many_pictures, tree
from PIL import Image

from k2cli import gallery, history, metadata
from k2cli.fast_toml import dump

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = (
    """</script><script>document.title = "taken"</script><img src=x onerror="document.title='taken'"> "a" & 'b' <!--"""
)
ARABIC = "ثعلب أحمر صغير يجلس تحت الثلج مع زهور كثيرة"
LED = '\n[leader]\nprompt = "an owl"\nseed = 12\n'


def data_of(folder: Path) -> dict:
    page = (folder / "index.html").read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_gallery_survives_an_unmounted_drive(moody, k2, tmp_path, monkeypatch):
    """An unmounted drive drops nothing from it, and no command takes what is on that drive for never rendered."""
    monkeypatch.setenv("K2_ALLOW_OUTSIDE", "1")
    drive = tmp_path / "drive"
    drive.mkdir()
    (moody / "outputs").symlink_to(drive)
    k2("render")
    k2("gallery")
    before = tree(moody / "gallery")
    drive.rename(tmp_path / "away")

    for command in (["gallery"], ["log"], ["render", "--resume"]):
        result = k2(*command, code=1)
        assert f"links to {drive}, which does not exist." in " ".join(result.stderr.split())
        assert "No pictures yet" not in result.stderr
    here = k2().stdout
    assert "fox, an-owl-at-night" in here and f"links to {drive}, which does not exist." in " ".join(here.split())

    assert tree(moody / "gallery") == before


def test_the_gallery_folder_is_self_contained(moody, k2, tmp_path):
    k2("render", "--batch", "2")
    result = k2("gallery", "-o", tmp_path / "site")

    assert result.stdout == f"{tmp_path}/site/index.html\n" and "4 pictures" in result.stderr
    run = "0001-fox-and-1-more"
    made = tree(tmp_path / "site")
    assert made[f"pictures/{run}/fox-7.png"] == (moody / "outputs" / run / "fox-7.png").read_bytes()
    assert made[f"pictures/{run}/fox-7.toml"] == (moody / "outputs" / run / "fox-7.toml").read_bytes()
    assert len([name for name in made if name.endswith(".png")]) == 4  # no contact sheet among them
    assert not any(b"://" in text for name, text in made.items() if name.endswith(".html"))


def test_the_gallery_goes_into_the_named_project(moody, k2, tmp_path, monkeypatch):
    """Wherever the command is run."""
    k2("render")
    monkeypatch.chdir(tmp_path)

    assert k2("gallery", "moody").stdout == k2("gallery", "--project", "moody").stdout == "moody/gallery/index.html\n"
    assert not (tmp_path / "gallery").exists()
    assert "not both" in k2("gallery", "moody", "--project", "moody", code=2).stderr
    assert "gallery in the project" in " ".join(k2("gallery", "--help").stdout.split())


def test_the_gallery_tolerates_an_invalid_project_file(moody, k2):
    """Pictures can be viewed all the same; only the project's name is unknown."""
    k2("render")
    (moody / "k2.toml").write_text("[project]\nname = ")

    result = k2("gallery")

    assert "The page is named after the folder." in result.stderr and "not valid TOML" in result.stderr
    assert len(data_of(moody / "gallery")["pictures"]) == 2 and data_of(moody / "gallery")["project"] == "moody"
    assert "after the folder" not in k2("gallery", "--quiet").stderr


def test_a_selection_goes_into_a_folder_of_its_own(moody, k2):
    """Chosen as by `k2 log`; in the project's own gallery all other pictures would be dropped."""
    k2("render")
    k2("render", "-p", "tea")
    for options, names in (
        (("--run", "1"), ["fox-7.png", "an-owl-at-night-7.png"]),
        (("-p", "owl ni"), ["an-owl-at-night-7.png"]),
        (("--since", "1d", "--run", "tea"), ["tea-7.png"]),
    ):
        k2("gallery", "-o", "some", *options)
        assert [each[1] for each in data_of(moody / "some")["pictures"]] == names

    before = tree(moody / "some")
    assert "No picture that can be shown matches" in k2("gallery", "-o", "some", "--style", "dusk", code=1).stderr
    assert tree(moody / "some") == before
    assert "a folder of its own" in k2("gallery", "--run", "1", code=2).stderr
    assert "is not a time" in k2("gallery", "--since", "soon", "-o", "some", code=2).stderr
    assert not (moody / "gallery").exists()


def test_a_run_folder_given_as_a_project_is_recognised(moody, k2):
    k2("render")
    for command in ("gallery", "log"):
        told = k2(command, "outputs/0001-fox-and-1-more", code=1).stderr
        assert "is not a project" in told and "--run 1" in told and "k2 new" not in told


def test_another_build_brings_it_up_to_date(moody, k2):
    k2("render")
    k2("gallery")
    first = moody / "gallery" / "pictures" / "0001-fox-and-1-more"
    (first / "notes.txt").write_text("mine")
    kept = os.stat(first / "an-owl-at-night-7.png")
    (moody / "outputs" / first.name / "fox-7.png").unlink()
    k2("render", "-p", "tea")

    assert json.loads(k2("gallery", "--json").stdout) == {"file": "gallery/index.html", "pictures": 2}
    assert [each[1] for each in data_of(moody / "gallery")["pictures"]] == ["an-owl-at-night-7.png", "tea-7.png"]
    assert sorted(path.name for path in first.iterdir()) == [
        "an-owl-at-night-7.png",
        "an-owl-at-night-7.toml",
        "notes.txt",
    ]
    assert os.stat(first / "an-owl-at-night-7.png").st_mtime_ns == kept.st_mtime_ns


def test_a_rerendered_picture_of_the_same_length_is_updated(moody, k2):
    k2("render", "-p", "tea")
    k2("gallery")
    made = moody / "outputs" / "0001-tea" / "tea-7.png"
    other = made.read_bytes()[:-1] + b"\0"
    made.unlink()
    made.write_bytes(other)
    os.utime(made, (1, 1))

    k2("gallery")

    assert (moody / "gallery" / "pictures" / "0001-tea" / "tea-7.png").read_bytes() == other


def test_old_pictures_of_any_format_and_empty_runs_are_removed(moody, k2):
    k2("render")
    k2("gallery")
    (first,) = (moody / "gallery" / "pictures").iterdir()
    for name in ("a.webp", "b.jpg", "b.toml", "notes.txt"):
        (first / name).write_text("old")
    gone = first.with_name("0009-gone")
    gone.mkdir()
    (gone / "a.png").write_text("old")

    k2("gallery")

    made = {f"{stem}.{kind}" for stem in ("fox-7", "an-owl-at-night-7") for kind in ("png", "toml")}
    assert {path.name for path in first.iterdir()} == made | {"notes.txt"} and not gone.exists()


@pytest.mark.parametrize("run", ["0001-fox-and-1-more", "0009-gone"])
def test_links_out_of_the_gallery_are_not_followed(moody, k2, tmp_path, run):
    k2("render")
    k2("gallery")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.png").write_bytes(b"mine")
    pictures = moody / "gallery" / "pictures"
    shutil.rmtree(pictures / run, ignore_errors=True)
    (pictures / run).symlink_to(tmp_path / "precious")

    k2("gallery")

    assert tree(tmp_path / "precious") == {"a.png": b"mine"}
    assert (pictures / "0001-fox-and-1-more" / "fox-7.png").exists()


@pytest.mark.parametrize("holds", ["notes.txt", "index.html", ".hidden", "mine.draft", "a link out of it"])
def test_only_galleries_are_overwritten(moody, k2, tmp_path, holds):
    k2("render")
    if holds == "a link out of it":
        k2("gallery")
        shutil.rmtree("gallery/pictures")
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "a.png").write_bytes(b"mine")
        Path("gallery/pictures").symlink_to(tmp_path / "precious")
    else:
        Path("gallery").mkdir()
        Path("gallery", holds).write_text("mine")
    before = tree(tmp_path)

    assert "holds something other than a k2 gallery" in k2("gallery", code=1).stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stopped", ["scandir", "replace"])
def test_an_interrupted_first_build_can_be_started_again(moody, k2, monkeypatch, stopped):
    """Interrupted at its pictures, or at its page."""
    k2("render")
    real = getattr(os, stopped)

    def stop(path, *rest):
        if "gallery" in str(path):
            raise KeyboardInterrupt
        return real(path, *rest)

    monkeypatch.setattr(os, stopped, stop)
    k2("gallery", code=130)
    monkeypatch.undo()
    monkeypatch.chdir(moody)
    (moody / "gallery" / ".1-0abc.draft").write_text("half a page, of a process that was killed")

    assert json.loads(k2("gallery", "--json").stdout)["pictures"] == 2


def test_pictures_are_copied_where_hard_links_fail(moody, k2, monkeypatch):
    """On another disk, or where the file system has no hard links."""
    k2("render")
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError("no links")))
    k2("gallery")

    copies = list(moody.glob("gallery/pictures/*/*.png"))
    assert len(copies) == 2
    for copy in copies:  # so that they are recognised the next time
        assert copy.stat().st_mtime_ns == (moody / "outputs" / copy.parent.name / copy.name).stat().st_mtime_ns


@pytest.mark.parametrize("again", [False, True])
def test_a_concurrent_build_may_be_faster(moody, k2, monkeypatch, again):
    """By a moment, at every file, whether new or changed."""
    k2("render")
    if again:
        k2("gallery")
        for path in moody.glob("gallery/pictures/*/*"):
            path.unlink()
            path.write_bytes(b"older")
    link, unlink = os.link, Path.unlink

    def sooner(*paths, **options):
        link(*paths, **options)
        link(*paths, **options)

    def twice(path, missing_ok=False):
        unlink(path, missing_ok)
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "link", sooner)
    monkeypatch.setattr(Path, "unlink", twice)
    k2("gallery")

    (run,) = moody.glob("gallery/pictures/*")
    assert {name: (moody / "outputs" / run.name / name).read_bytes() for name in os.listdir(run)} == tree(run)
    assert len(tree(run)) == 4


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_pictures_are_left_out(moody, k2, content):
    k2("render")
    run = moody / "outputs" / "0001-fox-and-1-more"
    (run / "fox-7.png").write_bytes(content)

    result = k2("gallery")

    assert f"1 left out, picture or record unreadable: outputs/{run.name}/fox-7.png" in result.stderr
    assert "1 picture. Open the page in a browser." in result.stderr
    assert [each[1] for each in data_of(moody / "gallery")["pictures"]] == ["an-owl-at-night-7.png"]
    assert not (moody / "gallery" / "pictures" / run.name / "fox-7.png").exists()


@pytest.mark.parametrize("beside", ["nothing", "a folder", "a link"])
def test_a_picture_with_only_an_embedded_record_is_shown(moody, k2, tmp_path, beside):
    """The page has no link to its record then."""
    k2("render")
    k2("gallery")
    record = moody / "outputs" / "0001-fox-and-1-more" / "fox-7.toml"
    record.unlink()
    if beside == "a folder":
        record.mkdir()
    if beside == "a link":
        (tmp_path / "other.toml").write_text("mine")
        record.symlink_to(tmp_path / "other.toml")

    assert json.loads(k2("gallery", "--json").stdout)["pictures"] == 2

    data = data_of(moody / "gallery")
    assert [data["pictures"][at][1] for at in data["within"]] == ["fox-7.png"]
    assert {path.name for path in (moody / "gallery" / "pictures" / record.parent.name).iterdir()} == {
        *("fox-7.png", "an-owl-at-night-7.png", "an-owl-at-night-7.toml"),
    }


def test_a_project_without_pictures(moody, k2):
    assert k2("gallery").stderr == "No pictures yet. Make some: k2 render\n"
    assert data_of(moody / "gallery")["pictures"] == []


def test_a_project_with_only_unreadable_pictures(moody, k2):
    k2("render")
    for path in moody.glob("outputs/*/*.png"):
        path.write_bytes(b"no picture")

    said = k2("gallery").stderr

    assert "2 left out" in said and "No pictures yet" not in said and "Open the page" not in said
    some = k2("gallery", "--run", "1", "-o", "some", code=1).stderr
    assert "2 left out" in some and "No picture that can be shown matches" in some and not (moody / "some").exists()


def test_markup_in_a_prompt_stays_inside_the_data(tmp_path):
    many_pictures(tmp_path, 1, text=EVIL)
    page = gallery.page_html(EVIL, history.read(tmp_path))

    assert page.count("<script") == 2 and page.count("<!--") == 0 and "<img src=x" not in page
    (tmp_path / "index.html").write_text(page, "utf-8")
    assert data_of(tmp_path)["strings"][0] == " ".join(EVIL.split())


def test_content_policy_allows_only_the_pages_own_script():
    page = gallery.page_html("moody", [])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]

    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        body = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        assert f"{tag}-src '{gallery.csp_hash(body)}'" in policy


def test_facts_leave_out_what_says_nothing(tmp_path):
    many_pictures(tmp_path, 1)
    data = gallery.page_data("x", history.read(tmp_path))
    facts = dict(data["facts"])

    assert data["strings"] == ["a red fox", "fox"]
    assert list(facts) == [
        *("expanded", "size", "seed", "steps", "guidance", "mu", "model", "device", "created", "seconds", "pixels"),
    ]
    told = [facts[key] for key in ("expanded", "size", "guidance", "mu", "model", "pixels")]
    assert told == ["a red fox, film grain", "64 × 64", "2.5", "0.5", "mini raw", "0" * 16]

    assert data["runs"][0]["about"].endswith(" · 28 steps")

    (path,) = tmp_path.glob("*/*.toml")
    path.write_text(path.read_text().replace("steps = 28", "steps = 1"))
    assert gallery.page_data("x", history.read(tmp_path))["runs"][0]["about"].endswith(" · 1 step")
    text = path.read_text().replace(", film grain", "").replace('"raw"\n\n[settings]', '"high"\n\n[settings]')
    text += '[[style]]\nname = "dusk"\nstrength = 0.5\n[[style.reference]]\nimage = "refs/a.png"\n'
    path.write_text(text.replace('"native"', '"int8"'))
    facts = dict(gallery.page_data("x", history.read(tmp_path))["facts"])

    assert "expanded" not in facts
    told = [facts[key] for key in ("styles", "references", "creativity", "weights")]
    assert told == ["dusk 0.5", "refs/a.png", "high", "int8"]


def test_facts_name_cohesion_and_lead_picture(tmp_path):
    many_pictures(tmp_path, 1)
    (path,) = tmp_path.glob("*/*.toml")
    text = path.read_text().replace('offload = "none"', 'offload = "all"\ncohesion = 0.9\nleak_guard = "shift"')
    path.write_text(text + '[leader]\nprompt = "an owl"\nseed = 7\n')

    facts = dict(gallery.page_data("x", history.read(tmp_path))["facts"])

    assert facts["cohesion"] == "0.9, follows seed 7 of: an owl"
    assert (facts["leak guard"], facts["offload"]) == ("shift", "all")


def test_matrix_cells_belong_to_their_prompt(moody, k2):
    (moody / "k2.toml").write_text(
        '[[prompt]]\nname = "fox"\ntext = "a fox"\n[[prompt]]\nname = "fox-02"\ntext = "two"\n'
    )
    k2("render")
    k2("render", "--only", "fox", "--matrix", "steps=4,8", "--matrix", "guidance=0,1")
    k2("gallery")

    data = data_of(moody / "gallery")
    assert [data["strings"][each[3]] for each in data["pictures"]] == ["fox", "fox-02", *["fox"] * 4]


def test_pictures_of_a_comparison_can_be_told_apart(moody, k2):
    """A run's heading used to give all of them the first one's steps, and the lines below them were the same."""
    k2("render", "--only", "fox", "--matrix", "steps=4,8")
    k2("render", "--only", "fox", "--steps", "4")
    k2("render", "--only", "fox", "--matrix", "sampler=euler,ab2", "--matrix", "guidance_until=0.5,1")
    k2("gallery")

    compared, alike, ways = data_of(moody / "gallery")["runs"]
    assert ways["apart"] == ["guidance_until", "sampler"]
    assert compared["about"].endswith(" · mini raw") and compared["apart"] == ["steps"]
    assert alike["about"].endswith(" · 4 steps") and alike["apart"] == []


def test_loras_are_among_the_facts(tmp_path):
    many_pictures(tmp_path, 1)
    (path,) = tmp_path.glob("*/*.toml")
    path.write_text(path.read_text() + '[[lora]]\nfile = "loras/ink.safetensors"\nweight = -0.6\n[[lora]]\nfile = 1\n')

    assert ("loras", "loras/ink.safetensors -0.6") in gallery.page_data("x", history.read(tmp_path))["facts"]


def test_a_record_with_wrong_types_is_still_shown(tmp_path):
    many_pictures(tmp_path, 1)
    (path,) = tmp_path.glob("*/*.toml")
    path.write_bytes(
        dump({"prompt": {"text": [1]}, "settings": {"seed": 2**63 - 1, "mu": "high"}, "style": {"name": 1}, "model": 2})
    )
    ((*_, seed, width, _, _, facts),) = gallery.page_data("x", history.read(tmp_path))["pictures"]

    assert seed is None and width is None and facts


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=[*switches, "--disable-component-update"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """80 pictures in 4 runs, the second with a prompt that would take over the page.

    One has only its embedded record.
    """
    root = tmp_path_factory.mktemp("project")
    many_pictures(root / "outputs", 80, per_run=20)
    for path in root.glob("outputs/0002-*/*.toml"):
        table = history.load_record(path)
        table["prompt"]["text"] = EVIL
        path.write_bytes(dump(table))
    (root / "outputs" / "0002-owl").rename(root / "outputs" / "0002-owl-and-2-more")
    other = root / "outputs" / "0004-lighthouse" / "lighthouse-79.toml"
    other.write_text(other.read_text().replace("steps = 28", "steps = 4") + LED)
    other = other.with_name("lighthouse-60.toml")
    other.write_text(other.read_text().replace("a red lighthouse", ARABIC))
    other = other.with_name("lighthouse-61.toml")
    other.write_text(
        other.read_text().replace("a red lighthouse", unicodedata.normalize("NFD", "École, Straße, за\u0301мок"))
    )
    odd = root / "outputs" / "0001-fox"
    for path in odd.glob("fox-0.*"):
        path.rename(odd / f"it's #1 100% fox{path.suffix}")
    record = root / "outputs" / "0003-teapot" / "teapot-40.toml"
    record.with_suffix(".png").write_bytes(metadata.encode(Image.new("RGB", (64, 64)), history.load_record(record)))
    record.unlink()
    gallery.build_gallery(root / "outputs", root / "gallery", "moody <b>")
    return root / "gallery"


def test_very_long_style_names_do_not_break_the_page(chromium, tmp_path):
    """Browsers refuse a pattern that is too large."""
    many_pictures(tmp_path / "outputs", 400)  # their facts outnumber the names that are looked for
    record = tmp_path / "outputs" / "0001-fox" / "fox-0.toml"
    record.write_text(record.read_text() + f'\n[[style]]\nname = "{"x" * 100_000}"\nstrength = 1.0\n')
    gallery.build_gallery(tmp_path / "outputs", tmp_path / "gallery", "moody")
    page = chromium.new_page()
    page.goto((tmp_path / "gallery" / "index.html").as_uri())

    assert page.locator(".tile").count() and page.evaluate("pictures[0].styles[0].length") == 100_000
    assert page.evaluate("names.includes('steps') && names.includes('dusk') && names.length < 100")
    page.close()


class TestInABrowser:
    """Needs Playwright and the system's Chromium; every request that the page makes is noted."""

    @pytest.fixture
    def page(self, chromium, folder):
        page = chromium.new_page(viewport={"width": 1200, "height": 800})
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
        page.goto((folder / "index.html").as_uri())
        yield page
        assert page.wrong == []
        assert all(url.startswith((folder.as_uri(), "data:")) for url in page.asked)
        page.close()

    def test_filters_and_search(self, page):
        def count() -> str:
            return page.locator("#count").inner_text()

        assert page.title() == "moody <b>" and page.locator("h1").inner_text() == "moody <b>"
        assert count() == "80 pictures in 4 runs" and page.locator(".tile").count() == 80
        page.locator("#styles").get_by_role("button", name="dusk").click()
        assert count() == "40 of 80 pictures in 2 runs"
        page.locator("#styles").get_by_role("button", name="dusk").click()
        page.get_by_label("Prompt", exact=True).select_option(label="owl (20)")
        assert count() == "20 of 80 pictures in 1 run"
        page.get_by_label("Prompt", exact=True).select_option(label="All prompts")
        page.get_by_label("Run").select_option(label="0003-teapot")
        assert count() == "20 of 80 pictures in 1 run"
        page.keyboard.press("/")
        page.keyboard.type("teapot 41")
        page.get_by_text("1 of 80 pictures in 1 run").wait_for()
        page.keyboard.press("Escape")
        page.get_by_label("Run").select_option(label="All runs")
        assert count() == "80 pictures in 4 runs" and not page.locator("#all").is_visible()

    def test_search_matches_whole_numbers(self, page):
        searches = {
            "9": [9],
            "seed 9": [9],
            "SEED   8": [8],
            "seed 12": [12],  # and not the one that follows it
            "steps 4": [79],
            "4": [4, 79],
            "steps 4 seed 79": [79],
            "fox 7": [7],
            "fox-7": [7],
            "dusk 0.6 20": [20],
            "dusk 0.5": [],
            "guidance 2.5 64x64 64 × 64 teapot": [*range(40, 60)],
            "0003": [*range(40, 60)],
            "0003-tea": [*range(40, 60)],
            "owl": [*range(20, 40)],  # and not what follows one
            "more": [],  # only in a run's name, which comes from its first prompt
            "lighthouse dusk": [*range(60, 80)],
            "lighth 60": [60],
            "100% (": [],
            "seed": [*range(80)],
            "école": [61],  # its accent is decomposed
            "E\u0301COLE STRASSE": [61],
            "STRA\u1e9eE": [61],
            "замок": [61],
            "ЗА\u0301МОК": [61],
        }
        page.get_by_label("Order").select_option(label="Oldest first")
        for words, found in searches.items():
            page.evaluate("words => { $('search').value = words; filter(); }", words)
            assert page.evaluate("shown.map(picture => picture.index)") == found, words

    def test_all_weights_of_a_mix_fit_below_its_picture(self, page):
        cut = """() => { const below = document.querySelector(".tile .faint");
          below.textContent = "seed 20 \u00b7 night 0.5 \u00b7 warm 0.25 \u00b7 a-style-of-a-longer-name 0.25";
          return below.scrollWidth > below.clientWidth; }"""
        assert not page.evaluate(cut)

    def test_search_finds_what_was_made_on_a_day(self, page):
        """By the clock of whoever built the page; numbers do not match inside a date."""
        day = f"{datetime(2026, 1, 2, 0, 0, 10, tzinfo=UTC).astimezone():%Y-%m-%d}"

        def found(words: str) -> list[int]:
            page.evaluate("words => { $('search').value = words; filter(); }", words)
            return page.evaluate("shown.map(picture => picture.index).sort((a, b) => a - b)")

        assert found(day) == found(f"created {day}") == [*range(20, 40)]
        assert found(f"seed 21 {day}") == [21] and found(f"seed 1 {day}") == []
        assert found(day[:4]) == found(f"{day}x") == found("1999-01-02") == found(day[:-1]) == []
        months = {f"{datetime(2026, 1, each, tzinfo=UTC).astimezone():%Y-%m}" for each in range(1, 5)}
        assert sorted(index for month in months for index in found(month)) == [*range(80)]

    def test_what_a_run_compares_is_shown_below_its_pictures(self, page):
        under = " ".join(page.locator(".tile").all_inner_texts())

        assert "seed 79 · steps 4 · dusk 0.6" in under and "seed 78 · steps 28 · dusk 0.6" in under
        assert "seed 40 · steps" not in under  # all pictures of that run have the same
        told = "a red lighthouse, seed 79, steps 4, dusk 0.6"
        assert page.get_by_alt_text(told).count() == page.get_by_label(f"Pick: {told}").count() == 1

    def test_pictures_are_picked_for_a_command(self, page):
        """By mouse and by key; the page gives the command, with the pictures in the order in which they were made."""

        def line() -> str:
            return page.locator("#line").inner_text()

        picks, choice = page.locator("#picks"), page.get_by_label("What to do with them")
        assert not picks.is_visible()
        page.get_by_label("Order").select_option(label="Oldest first")
        page.locator(".cell").nth(2).hover()
        page.locator(".pick").nth(2).click()
        page.locator(".tile").nth(0).focus()
        page.keyboard.press("P")  # as with Caps Lock on
        assert page.locator("#picked").inner_text() == "2 picked" and not page.locator("#view").is_visible()
        odd = """'outputs/0001-fox/it'"'"'s #1 100% fox.png'"""
        assert line() == f"k2 style add picked {odd} outputs/0001-fox/fox-2.png"
        choice.select_option(label="Start a project")
        assert line() == f"k2 new picked --from {odd} --from outputs/0001-fox/fox-2.png"
        choice.select_option(label="List the files")
        assert line() == f"{odd} outputs/0001-fox/fox-2.png"

        page.locator(".tile").nth(0).click()
        page.keyboard.press("Shift+P")
        assert page.locator("#choose").get_attribute("aria-pressed") == "false"
        page.keyboard.press("ArrowRight")
        page.get_by_role("button", name="Pick", exact=True).click()
        page.keyboard.press("Escape")
        choice.select_option(label="Make a moodboard")
        assert line() == "k2 moodboard analyze outputs/0001-fox/fox-1.png outputs/0001-fox/fox-2.png"
        page.locator("#drop").click()
        assert not picks.is_visible() and "pick" not in page.url

    def test_picks_are_kept_in_the_address_and_can_be_shown_alone(self, page):
        page.get_by_label("Order").select_option(label="Oldest first")
        for at in (5, 7):
            page.locator(".tile").nth(at).focus()
            page.keyboard.press("p")
        page.get_by_label("Run").select_option(label="0003-teapot")
        page.locator(".pick").first.click(force=True)
        page.get_by_role("button", name="Show all").click()
        page.get_by_role("button", name="Only these").click()
        assert page.locator("#count").inner_text() == "3 of 80 pictures in 2 runs"
        page.reload()
        assert page.locator("#count").inner_text() == "3 of 80 pictures in 2 runs"
        assert page.locator("#picked").inner_text() == "3 picked" and page.locator(".tile").count() == 3
        assert page.locator(".pick[aria-pressed=true]").count() == 3

        page.locator(".tile").nth(1).click()
        page.keyboard.press("p")
        assert page.locator("#place").inner_text() == "2 of 3"  # it stays while the view is open
        page.keyboard.press("Escape")
        assert page.locator("#count").inner_text() == "2 of 80 pictures in 2 runs"
        for _ in range(2):
            page.locator(".tile").first.focus()
            page.keyboard.press("p")
        assert (
            page.locator("#count").inner_text() == "80 pictures in 4 runs" and not page.locator("#picks").is_visible()
        )

    def test_no_match_offers_a_way_back(self, page):
        page.locator("#styles").get_by_role("button", name="dusk").click()
        page.get_by_label("Prompt", exact=True).select_option(label="owl (20)")
        page.get_by_label("Search").fill("no such words")
        page.get_by_text("Nothing matches.").wait_for()

        assert page.locator("#count").inner_text() == "none of 80 pictures" and page.locator(".tile").count() == 0
        page.locator("#nothing").get_by_role("button", name="Show all").click()
        assert page.locator("#count").inner_text() == "80 pictures in 4 runs"
        assert page.locator("#styles button").first.get_attribute("aria-pressed") == "false"

    def test_the_newest_run_comes_first_unless_told_otherwise(self, page):
        def runs() -> list[str]:
            return [text[:4] for text in page.locator("h2:visible").all_inner_texts()]

        assert runs() == ["0004", "0003", "0002", "0001"]
        assert [page.locator(".tile").nth(i).locator("span").nth(1).inner_text()[:7] for i in (0, 1)] == [
            "seed 60",
            "seed 61",
        ]
        page.get_by_label("Order").select_option(label="Oldest first")
        assert runs() == ["0001", "0002", "0003", "0004"]
        page.reload()
        assert runs() == ["0001", "0002", "0003", "0004"]

    def test_markup_in_a_prompt_is_shown_as_text(self, page):
        page.get_by_label("Run").select_option(label="0002-owl-and-2-more")
        tile = page.locator(".tile").first

        assert tile.locator("span").first.inner_text() == " ".join(EVIL.split())
        assert tile.locator("img").get_attribute("alt").startswith("</script><script>")
        tile.click()
        assert page.locator("#prompt").inner_text() == " ".join(EVIL.split())
        assert page.title() == "moody <b>" and page.locator("script").count() == 2

    def test_right_to_left_prompts_are_set_right_to_left(self, page):
        page.get_by_label("Run").select_option(label="0004-lighthouse")
        tile, told = page.locator(".tile").first, [page.locator("#prompt"), page.locator("#facts dd").first]

        def directions() -> list[str]:
            return [each.evaluate("element => getComputedStyle(element).direction") for each in said]

        said = [tile.locator("span").first, *told]
        assert ARABIC in tile.inner_text() and tile.locator("span").last.inner_text().startswith("seed 60")
        tile.click()
        assert directions() == ["rtl"] * 3
        page.keyboard.press("ArrowRight")
        assert directions() == ["rtl", "ltr", "ltr"]

    def test_a_single_picture_by_mouse_and_keyboard(self, page):
        page.get_by_label("Order").select_option(label="Oldest first")
        page.locator(".tile").nth(1).click()
        view, picture = page.locator("#view"), page.locator("#picture")

        assert view.is_visible() and page.locator("#place").inner_text() == "2 of 80"
        assert page.locator("#command").inner_text() == "k2 rerun outputs/0001-fox/fox-1.png"
        assert "28" in page.locator("dt:text-is('steps') + dd").inner_text()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#place").inner_text() == "1 of 80" and page.locator("#back").is_disabled()
        assert page.locator("#command").inner_text() == ("""k2 rerun 'outputs/0001-fox/it'"'"'s #1 100% fox.png'""")
        page.evaluate("Object.defineProperty(navigator, 'platform', {get: () => 'Win32'})")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        assert page.locator("#command").inner_text() == """k2 rerun "outputs/0001-fox/it's #1 100% fox.png\""""
        assert page.evaluate("quoted('a$(b)\u201d;`c\"')") == '"a?(b)?;?c?"'  # as PowerShell reads it
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
        fit = picture.bounding_box()["width"]
        page.keyboard.press("+")
        assert picture.bounding_box()["width"] == pytest.approx(1.5 * fit, rel=0.02)
        page.keyboard.press("0")
        assert picture.bounding_box()["width"] == pytest.approx(fit, rel=0.02)
        picture.click()
        assert picture.bounding_box()["width"] > 2 * fit
        page.keyboard.press("Escape")
        assert not view.is_visible()
        page.keyboard.press("ArrowRight")  # the tile has the focus again
        page.keyboard.press("Enter")
        assert page.locator("#place").inner_text() == "2 of 80"
        address = page.url
        page.goto("about:blank")
        page.goto(address)
        assert page.locator("#place").inner_text() == "2 of 80"

    def test_focused_tiles_are_never_under_the_bars(self, page):
        page.locator(".tile").last.focus()
        page.keyboard.press("p")
        bars = "['header', '#picks'].map(bar => document.querySelector(bar).getBoundingClientRect())"
        for key in ["ArrowUp"] * 6 + ["ArrowDown"] * 4:
            page.keyboard.press(key)
            tile = page.evaluate("document.activeElement.getBoundingClientRect()")
            header, picks = page.evaluate(bars)
            assert header["bottom"] < tile["top"] and tile["bottom"] < picks["top"]

    def test_a_record_is_linked_only_if_it_is_beside_its_picture(self, page):
        page.get_by_label("Run").select_option(label="0003-teapot")
        page.locator(".tile").first.click()
        assert page.locator("#file").is_visible() and not page.locator("#record").is_visible()
        page.keyboard.press("ArrowRight")
        assert page.locator("#record").get_attribute("href") == "pictures/0003-teapot/teapot-41.toml"
        assert page.locator("#record").is_visible()

    def test_focus_stays_put_at_the_first_and_the_last_picture(self, page):
        place = page.locator("#place")
        for at, way, ends in ((1, "Previous picture", "1 of 80"), (78, "Next picture", "80 of 80")):
            page.locator(".tile").nth(at).click()
            button = page.get_by_role("button", name=way)
            button.focus()
            page.keyboard.press("Enter")
            page.keyboard.press("Enter")
            assert place.inner_text() == ends and button.get_attribute("aria-disabled") == "true"
            assert button.evaluate("button => button === document.activeElement")
            page.keyboard.press("Escape")

    def test_picks_are_marked_by_more_than_colour(self, page):
        """Under forced colours, by the system's colour for that, too."""
        page.emulate_media(forced_colors="active")
        page.locator(".tile").first.focus()
        page.keyboard.press("p")

        def looks(selector: str, name: str, part: str = "") -> list[str]:
            told = f"all => all.slice(0, 2).map(each => getComputedStyle(each, '{part}').{name})"
            return page.locator(selector).evaluate_all(told)

        assert looks(".pick", "content", "::before") == ['"✓"', '"+"']
        page.locator("#styles button").first.click()
        pressed, other = looks("#styles button", "backgroundColor")
        assert pressed != other

    def test_filters_and_view_are_kept_in_the_address(self, page):
        """Loaded again, the page is as it was; an address pasted into it is followed; an invalid one is ignored."""

        def again(address: str) -> None:
            page.goto("about:blank")
            page.goto(address)

        plain = page.url
        page.locator("#styles").get_by_role("button", name="dusk").click()
        page.get_by_label("Search").fill("lighthouse red")
        page.get_by_label("Run").select_option(label="0004-lighthouse")
        page.get_by_label("Prompt", exact=True).select_option(label="lighthouse (20)")
        page.wait_for_url("**search=lighthouse+red**")
        asked = page.url
        count = page.locator("#count").inner_text()
        page.locator(".tile").nth(1).click()
        shown = page.url
        assert len({plain, asked, shown}) == 3 and count != "80 pictures in 4 runs"

        again(asked)
        assert page.locator("#count").inner_text() == count and not page.locator("#view").is_visible()
        assert page.get_by_label("Search").input_value() == "lighthouse red"
        assert page.locator("#styles").get_by_role("button", name="dusk").get_attribute("aria-pressed") == "true"
        again(shown)
        assert page.locator("#place").inner_text().startswith("2 of ")
        page.keyboard.press("Escape")
        assert page.url == asked
        page.get_by_role("button", name="Show all").click()
        assert page.url.rstrip("#") == plain
        page.evaluate("address => { location.href = address }", shown)
        page.wait_for_function("document.getElementById('view').open")
        again(f"{plain}#%E0%A4%A?style=none&run=none&name=none&search=")
        assert page.locator("#count").inner_text() == "80 pictures in 4 runs"

    def test_the_copy_button_copies_the_command(self, page):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_label("Run").select_option(label="0001-fox")
        page.locator(".tile").nth(2).click()
        page.get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()

        assert page.evaluate("navigator.clipboard.readText()") == "k2 rerun outputs/0001-fox/fox-2.png"

    def test_every_picture_has_alt_text_and_loads(self, page):
        alts = page.locator(".tile img").evaluate_all("images => images.map(image => image.alt)")

        assert len(alts) == 80 and all(alts)
        page.locator(".tile img").last.scroll_into_view_if_needed()
        assert page.locator(".tile img").last.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64

    def test_light_and_dark(self, page):
        def paper() -> str:
            return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

        page.emulate_media(color_scheme="dark")
        assert paper() == "rgb(25, 24, 23)"
        page.locator("#theme").click()
        assert page.locator("#theme").inner_text() == "◐ Light" and paper() == "rgb(250, 248, 244)"
        page.reload()
        assert paper() == "rgb(250, 248, 244)"
        page.emulate_media(color_scheme="light")
        page.locator("#theme").click()
        assert paper() == "rgb(25, 24, 23)"

    def test_without_scripts_pictures_are_linked_and_controls_hidden(self, chromium, folder):
        page = chromium.new_page(java_script_enabled=False)
        page.goto((folder / "index.html").as_uri())

        assert not any(each.is_visible() for each in page.locator("button, input, select").all())
        page.get_by_role("link", name="pictures").click()
        assert page.url == f"{folder.as_uri()}/pictures/"
        page.close()

    def test_printing_covers_all_pictures_and_no_controls(self, chromium, tmp_path):
        """In dark ink, whatever colours were chosen for the screen."""
        many_pictures(tmp_path / "outputs", 260)
        gallery.build_gallery(tmp_path / "outputs", tmp_path / "gallery", "moody")
        page = chromium.new_page(color_scheme="dark")
        page.goto((tmp_path / "gallery" / "index.html").as_uri())
        page.locator("#theme").click(click_count=2)
        assert page.locator("#theme").inner_text() == "◐ Dark" and page.locator(".tile").count() < 260

        page.pdf()
        page.emulate_media(media="print")

        assert page.locator(".tile").count() == page.locator(".tile img[loading=eager]").count() == 260
        assert not any(each.is_visible() for each in page.locator("button:not(.tile), input, select").all())
        assert page.locator("h1").evaluate("element => getComputedStyle(element).color") == "rgb(38, 36, 34)"
        page.close()

    def test_printing_a_single_picture_takes_one_page(self, page):
        page.locator(".tile").first.click()
        pages = re.findall(rb"/Type\s*/Page\b", page.pdf())
        page.emulate_media(media="print")

        assert len(pages) == 1 and not page.locator("h1").is_visible() and page.locator("#facts").is_visible()
        assert not page.locator("#copy").is_visible()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_the_search_placeholder_has_enough_contrast(self, page, scheme):
        """A contrast of at least 4.5, by WCAG 2.2."""

        def light(colour: str) -> float:
            parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return 0.05 + 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        page.emulate_media(color_scheme=scheme)
        search = page.locator("#search")
        ink = light(search.evaluate("element => getComputedStyle(element, '::placeholder').color"))
        card = light(search.evaluate("element => getComputedStyle(element).backgroundColor"))

        assert max(ink, card) / min(ink, card) >= 4.5

    @pytest.mark.parametrize("width", [360, 1200])
    def test_nothing_is_wider_than_the_window(self, page, width):
        page.set_viewport_size({"width": width, "height": 740})
        order, theme = (page.locator(f"#{each}").bounding_box() for each in ("order", "theme"))
        assert order["y"] == pytest.approx(theme["y"], abs=2)  # neither has a line of its own
        widest = "document.documentElement.scrollWidth"

        assert page.evaluate(widest) <= width
        page.get_by_label("Run").select_option(label="0002-owl-and-2-more")
        page.locator(".tile").first.click()
        assert page.evaluate(widest) <= width and page.locator("#copy").is_visible()
