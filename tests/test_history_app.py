"""`k2 log`, `k2 show`, `k2` alone, and shell completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, many_pictures
from PIL import Image

from k2cli import history_app
from k2cli.console import to_json
from k2cli.outputs import Run

K2 = Path(sys.executable).with_name("k2")
ASCII = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
LOCALE = "Use a UTF-8 locale: export LC_ALL=C.UTF-8"


def test_log_in_a_pipe_is_one_line_per_picture(moody, k2):
    many_pictures(moody / "outputs", 4, per_run=2)

    assert k2("log").stdout.splitlines()[1:3] == [
        "outputs/0001-fox/fox-1.png\t2026-01-01T00:00:01Z\t1\t64x64\t\ta red fox",
        "outputs/0002-owl/owl-2.png\t2026-01-02T00:00:00Z\t2\t64x64\tdusk 0.6\ta red owl",
    ]


def test_log_keeps_the_order_of_prompts(moody, k2):
    """With several pictures per second, rendered together and saved one after another."""
    k2("render", "-p", "a whale", "-p", "an apple", "-p", "a boat", "--batch", "3", "--steps", "1", "--size", "64x64")
    names = [Path(line.split("\t")[0]).stem for line in k2("log").stdout.splitlines()]

    assert names == [f"{name}-{seed}" for name in ("a-whale", "an-apple", "a-boat") for seed in (7, 8, 9)]
    shown = k2("show", "outputs/0001-a-whale-and-2-more/a-boat-8.png").stdout
    assert re.search(r"^created +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d$", shown, re.MULTILINE)


@pytest.mark.parametrize("key", ["width", "steps", "guidance", "mu"])
def test_show_omits_settings_missing_from_the_record(moody, k2, key):
    """Records may have been edited by hand."""
    k2("render", "-p", "a boat", "--steps", "1", "--size", "64x64")
    record = Path("outputs/0001-a-boat/a-boat-7.toml")
    record.write_text(re.sub(rf"^{key} = .*\n", "", record.read_text("utf-8"), flags=re.MULTILINE), "utf-8")
    shown = k2("show", record).stdout
    assert "prompt " in shown and "None" not in shown


def test_filtering_by_a_mix_names_its_parts(moody, k2):
    """Records never name a mix, nor a mix of mixes, but do name a style that has words of its own."""
    styles = moody / "styles"
    styles.mkdir()
    for name in ("ink", "riso"):
        (styles / f"{name}.toml").write_text(f'keywords = ["{name}"]\n')
    (styles / "blend.toml").write_text("[mix]\nink = 0.5\nriso = 1\n")
    (styles / "wide.toml").write_text("[mix]\nblend = 1\n")
    (styles / "own.toml").write_text('keywords = ["own"]\n[mix]\nblend = 1\n')
    k2("render", "-p", "tea", "--style", "wide=1", "--steps", "1")

    made_of = "is a mix, and records name its parts: --style riso --style ink\n"
    for name in ("blend", "wide"):
        assert f"No picture matches. {name} {made_of}" in k2("log", "--style", name).stderr
        assert f"Hint:  {name} {made_of}" in k2("gallery", "--style", name, "-o", "page", code=1).stderr
    assert k2("log", "--style", "own").stderr == "No picture matches.\n"
    assert "Hint:  All pictures: k2 log\n" in k2("gallery", "--style", "own", "-o", "page", code=1).stderr
    assert not Path("page").exists()
    assert k2("log", "--style", "riso", "--style", "ink").stdout.count("\n") == 1


def test_filtering_by_an_unknown_run_or_style_says_so(moody, k2):
    """A style is known from its file or, if that is gone, from a record."""
    many_pictures(moody / "outputs", 6, per_run=2)
    (moody / "styles").mkdir()
    (moody / "styles" / "riso.toml").write_text('keywords = ["riso"]\n')
    for options, told in (
        (("--style", "rizo"), 'There is no style "rizo". Did you mean "riso"?'),
        (("--style", "dusk", "--style", "x"), 'There is no style "x". Known: dusk, riso.'),
        (("--run", "99"), 'There is no run "99". The last is 0003-teapot.'),
        (("--run", "0002-oul"), 'There is no run "0002-oul". Did you mean "0002-owl"?'),
        (("--run", "owl", "--style", "riso", "-p", "x"), ""),
        (("--style", "moodboard"), ""),
    ):
        assert k2("log", *options).stderr == f"No picture matches. {told}".rstrip() + "\n"
        hint = told or "All pictures: k2 log"
        assert f"Hint:  {hint}\n" in k2("gallery", *options, "-o", "page", code=1).stderr


def test_log_null_suits_xargs(moody, k2, monkeypatch):
    """Whatever the project folder is called."""
    odd = moody.rename(moody.with_name("two\nlines\t'"))
    many_pictures(odd / "outputs", 2)
    monkeypatch.chdir(odd.parent)
    paths = [str(odd / "outputs" / "0001-fox" / f"fox-{seed}.png") for seed in (0, 1)]

    assert k2("log", "--project", odd, "--null").stdout == "".join(f"{os.path.relpath(path)}\0" for path in paths)
    assert k2("log", odd, "-0", "-n", "1").stdout == f"{os.path.relpath(paths[1])}\0"
    assert k2("log", odd, "-0", "--style", "dusk").stdout == ""
    assert "it cannot be combined with --json" in k2("log", odd, "-0", "--json", code=2).stderr


def test_log_is_in_order_of_creation(moody, k2, tmp_path):
    """Even for a run finished after later ones, and across several projects."""
    for root in (moody, tmp_path / "other"):
        many_pictures(root / "outputs", 6, per_run=2)
    (tmp_path / "other" / "k2.toml").write_text("")
    late = moody / "outputs" / "0001-fox" / "fox-1.toml"
    late.write_text(late.read_text().replace("2026-01-01", "2026-02-01"))

    def files(*arguments: str) -> list[str]:
        return [line.split("\t")[0] for line in k2("log", *arguments).stdout.splitlines()]

    assert files()[-2:] == ["outputs/0003-teapot/teapot-5.png", "outputs/0001-fox/fox-1.png"]
    assert files(".", "../other", "-n", "3") == [
        *("outputs/0003-teapot/teapot-5.png", str(tmp_path / "other/outputs/0003-teapot/teapot-5.png")),
        "outputs/0001-fox/fox-1.png",
    ]


def test_log_filters(moody, k2):
    many_pictures(moody / "outputs", 6, per_run=2)

    def seeds(*arguments: str) -> list[str]:
        return [line.split("\t")[2] for line in k2("log", *arguments).stdout.splitlines()]

    assert seeds("--run", "3") == ["4", "5"]
    assert seeds("-p", "RED owl") == seeds("--style", "dusk") == ["2", "3"]
    assert seeds("-p", "owl", "-p", "red") == seeds("-p", "red", "-p", "owl") == ["2", "3"]  # not only the last option
    assert seeds("--style", "ink", "--style", "dusk") == seeds("--style", "dusk", "--style", "ink") == []
    assert seeds("--since", "2026-01-02T12:00+00:00") == ["4", "5"]
    assert seeds("--last", "3") == ["3", "4", "5"]
    assert "The last 1 of 6 pictures.\n" in k2("log", "--last", "1").stderr  # --all cannot be combined with it
    nothing = k2("log", "--since", "1m")
    assert nothing.stdout == "" and "No picture matches." in nothing.stderr
    soon = k2("log", "--since", "soon", code=2).stderr
    assert "is not a time" in soon and "Hint:  Examples: 30m, 2h, 3d, 1w (minutes, hours, days, weeks), today, " in soon


@pytest.mark.parametrize("moment", ["0001-01-01", "9999-12-31T23:59:59"])
def test_since_accepts_the_first_and_last_date(moody, k2, moment):
    many_pictures(moody / "outputs", 1)

    assert len(k2("log", "--since", moment).stdout.splitlines()) == (moment < "2026")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("words", ["log", "log --json", "models list", "", "--help", "render --help", "--version"])
def test_full_standard_output_is_one_error_with_a_hint(moody, words, buffered):
    many_pictures(moody / "outputs", 1)
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run([K2, *words.split()], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)

    assert done.returncode == 1
    assert done.stderr.startswith("Error: Standard output cannot be written: No space left on device.\nHint: ")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("k2 render - <&-", 1, "Standard input holds no prompt."),
        ("k2 log >&-", 0, ""),
        ("k2 log --since soon 2>&-", 2, ""),
        (
            r"printf '\377\376' | PYTHONIOENCODING=utf-8 k2 render -",
            1,
            "Standard input is not text in the encoding here, utf-8.",
        ),
        (
            r"printf '\377\376' | PYTHONIOENCODING=utf-8:surrogateescape k2 render -",
            1,
            "Standard input is not text in the encoding here, utf-8.",
        ),
        (f"{ASCII} k2 render -p füchse", 1, f"A prompt is not text in the encoding here, ascii.\nHint:  {LOCALE}"),
        (f"{ASCII} k2 new füchse", 1, f"The project's name is not text in the encoding here, ascii.\nHint:  {LOCALE}"),
        (rf"printf '\374' | {ASCII} k2 render -", 1, "not text in the encoding here, ascii.\nHint:  Save it as UTF-8."),
        (r"k2 render -p $'a\377'", 1, "A prompt is not text in the encoding here, utf-8.\nHint:  Type the text again"),
        ("echo 'prompt=[{text=\"狐\"}]' > k2.toml; " + ASCII + " k2 render", 1, "ascii"),
        ("mkdir gone && cd gone && rmdir ../gone && k2", 1, "The current folder is gone."),
        ("mkdir gone && cd gone && rmdir ../gone && k2 models info x", 1, "The current folder is gone."),
        ("mkdir gone && cd gone && rmdir ../gone && k2 doctor", 1, "The current folder is gone."),
        ("mkdir gone && cd gone && rmdir ../gone && k2 log --help", 0, ""),
    ],
)
def test_unusual_environments_get_one_sentence(moody, line, code, said):
    path = os.pathsep.join([str(K2.parent), os.environ["PATH"]])
    many_pictures(moody / "outputs", 1)
    done = subprocess.run(["bash", "-c", line], env=os.environ | {"PATH": path}, capture_output=True, text=True)

    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_letters_are_not_mistaken_for_control_characters(moody, k2, monkeypatch):
    """The second byte of ă in UTF-8 is a control character in Latin-1. Real control characters are still refused."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")

    told = k2("render", "-p", "o c\u00c4\u0083ma\u00c8\u0099\u00c4\u0083", code=1).stderr
    assert told == f"Error: A prompt is not text in the encoding here, iso8859-1.\nHint:  {LOCALE}\n"
    assert "A prompt contains a control character." in k2("render", "-p", "a\x1b[2J", code=1).stderr


def test_characters_outside_the_encoding_are_escaped(moody):
    line = [K2, "render", "-p", "caf\xe9 東京", "--dry-run"]
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True)

    assert b"caf\xe9 \\u6771\\u4eac" in done.stdout


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_json_is_valid_in_any_encoding(moody, encoding):
    """Programs read it, regardless of the terminal's encoding."""
    line = [K2, "render", "-p", "café 東京 🦊", "--dry-run", "--json"]
    done = subprocess.run(line, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True)

    assert json.loads(done.stdout.decode())["prompt"]["text"] == "café 東京 🦊"


@pytest.mark.parametrize("asked", [[], ["--style", "dusk=0.5", "--cohesion", "0.5", "--matrix", "steps=2,3"]])
def test_log_and_show_print_the_same_json_as_render(moody, k2, asked):
    """Including the keys that TOML, which has no null, leaves out. Only the run's output has the position among its
    pictures and the warnings about the prompt."""
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')
    rendered = k2("render", *asked, "--json").stdout

    alone = {"of": None, "warnings": None}

    def objects(text: str) -> list[dict]:
        found = [json.loads(line) for line in text.splitlines()]
        return sorted((each | alone for each in found), key=lambda each: each["file"])

    assert objects(k2("log", "--json").stdout) == objects(rendered)
    first = objects(rendered)[0]
    shown = json.loads(k2("show", first["file"], "--json").stdout)
    assert {"file": first["file"], **alone, **shown} == first


def test_show_of_several_pictures_lists_their_differences(moody, k2):
    """One fact per line, one picture per column, and nothing that they have in common."""
    (moody / "styles").mkdir()
    (moody / "refs").mkdir()
    reference = moody / "refs" / "night.png"
    Image.new("RGB", (64, 64), "navy").save(reference)
    (moody / "styles" / "night.toml").write_text('[[reference]]\nimage = "refs/night.png"\n')
    plain = k2("render", "--only", "fox").stdout.strip()
    worn = k2("render", "--only", "fox", "--style", "night=0.5", "--steps", "3").stdout.strip()
    stronger = k2("render", "--only", "fox", "--style", "night=0.9", "--steps", "3").stdout.strip()
    Image.new("RGB", (64, 64), "black").save(reference)
    other = k2("render", "--only", "fox", "--style", "night=0.9", "--steps", "3").stdout.strip()

    def rows(*files):
        return [line.split("\t") for line in k2("show", *files).stdout.splitlines()]

    head, *facts = rows(plain, worn)
    assert head == ["", plain, worn]  # full paths, as both have the same name
    assert {name for name, *_ in facts} == {"steps", "style night", "file refs/night.png"}
    assert ["style night", "", "0.5, auto"] in facts
    assert rows(worn, stronger)[1:] == [["style night", "0.5, auto", "0.9, auto"]]
    ((name, *hashes),) = rows(stronger, other)[1:]
    assert name == "file refs/night.png" and len({*hashes}) == 2


def test_show_compares_pixels_of_pictures_made_alike(moody, k2):
    first, second = (k2("render", "--only", "fox").stdout.strip() for _ in range(2))
    made = k2("show", first, second)

    assert len(made.stdout.splitlines()) == 1
    assert made.stderr == "All that they were made from is the same, and so are their pixels.\n"
    record = Path(second).with_suffix(".toml")
    changed = re.sub(r'pixels = "\w+"', f'pixels = "{"ab" * 32}"', record.read_text())
    record.write_text(changed)
    assert "yet their pixels differ" in k2("show", first, record).stderr
    record.write_text(Path(first).with_suffix(".toml").read_text().replace("seed = 7", "seed = 8"))
    made = k2("show", first, record)
    assert made.stdout.splitlines()[1:] == ["seed\t7\t8"] and made.stderr == "Their pixels are the same.\n"


def test_show_and_rerun_skip_the_contact_sheet(moody, k2):
    k2("render")
    run = moody / "outputs" / "0001-fox-and-1-more"
    pictures = sorted(run.glob("*.png"))

    assert len(pictures) == 3
    assert k2("show", *pictures).stdout.splitlines()[0] == "\tan-owl-at-night-7.png\tfox-7.png"
    shown = [json.loads(line) for line in k2("show", *pictures, "--json").stdout.splitlines()]
    assert [table["prompt"]["name"] for table in shown] == ["an-owl-at-night", "fox"]
    assert "sheet.png is a contact sheet." in k2("show", run / "sheet.png", run / "sheet.png", code=1).stderr
    told = "Passed over: 1 contact sheet.\n2 of 2 are identical, pixel for pixel.\n"
    assert k2("rerun", *pictures).stderr == told
    assert "sheet.png is a contact sheet." in k2("rerun", run / "sheet.png", code=1).stderr


def test_comparison_of_many_pictures_keeps_words_whole(moody, k2, monkeypatch, capsys):
    animals = ("squirrel", "badger", "hedgehog", "lighthouse", "crocodile", "kingfisher", "dragonfly")
    made = [k2("render", "-p", f"a sleeping {animal}").stdout.strip() for animal in animals]
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("k2cli.preview.preview", lambda paths: print(*paths))

    history_app.show([*map(Path, made)])

    _, *lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert [line.count("a sleeping") for line in lines if "a sleeping" in line] == [3, 3, 1]
    assert all(re.search(rf" {animal}( |$)", "\n".join(lines), re.MULTILINE) for animal in animals)


def test_comparison_on_a_terminal_is_a_table(moody, k2, monkeypatch, capsys):
    made = [k2("render", "-p", "an owl " * 20, "--seed", seed).stdout.strip() for seed in ("3", "4")]
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("k2cli.preview.preview", lambda paths: print(*paths))

    history_app.show([*map(Path, made)])

    pictures, *table = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert pictures.split() == made
    assert max(map(len, table)) <= 60 and table[-1].split() == ["seed", "3", "4"]
    left, right = table[-1].index("3"), table[-1].index("4")
    heads = ["".join(line[start:end].strip() for line in table[:-1]) for start, end in ((left, right), (right, None))]
    assert heads == [Path(each).name for each in made]  # in full, on as many lines as needed


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_and_infinity_become_null_in_json(number):
    assert to_json({"a": [number, 1.5], "b": {"c": number}}) == '{"a": [null, 1.5], "b": {"c": null}}'


def test_log_of_several_projects(moody, k2, tmp_path):
    many_pictures(moody / "outputs", 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k2.toml").write_text("")
    many_pictures(tmp_path / "other" / "outputs", 1)

    lines = k2("log", moody, tmp_path / "other").stdout.splitlines()

    assert [line.split("\t")[0] for line in lines] == [
        "outputs/0001-fox/fox-0.png",
        f"{tmp_path}/other/outputs/0001-fox/fox-0.png",
    ]


def test_log_on_a_terminal_is_a_table_of_one_screenful(moody, monkeypatch, capsys):
    """Prompts are cut to the width; rich markup in them is shown literally."""
    many_pictures(moody / "outputs", 40, per_run=20, text="[bold]a very long prompt[/bold] " + "word " * 40)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")

    history_app.log()
    out, err = capsys.readouterr()

    lines = re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()
    assert "outputs/0001-fox" in lines[0] and "mini raw" in lines[0]
    assert "fox-10.png" in lines[1] and "seed 10" in lines[1] and "[bold]a very long" in lines[1]
    assert max(map(len, lines)) <= 100 and len([line for line in lines if "seed" in line]) == history_app.SCREENFUL
    assert "The last 30 of 40 pictures; --all lists them all." in err


def test_log_on_a_narrow_terminal_keeps_names_and_seeds(moody, monkeypatch, capsys):
    """Once, a long run name took the room of the columns below it and cut seeds to three characters."""
    many_pictures(moody / "outputs", 4, per_run=2)
    (moody / "outputs" / "0002-owl").rename(moody / "outputs" / "0002-a-name-as-long-as-the-prompt-it-is-made-of")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")

    history_app.log()
    lines = re.sub(r"\x1b\[[\d;]*m|\d{4}-\d\d-\d\d \d\d:\d\d", "", capsys.readouterr().out).splitlines()

    assert lines == [
        "outputs/0001-fox   · mini raw",
        "  fox-0.png  seed 0  64x64            a red fox",
        "  fox-1.png  seed 1  64x64            a red fox",
        "",
        "outputs/0002-a-name-as-long-as-the-prompt-it-is-made-of  20…",
        "  owl-2.png  seed 2  64x64  dusk 0.6  a red owl",
        "  owl-3.png  seed 3  64x64  dusk 0.6  a red owl",
    ]

    monkeypatch.setenv("COLUMNS", "40")
    history_app.log(last=3)
    lines = re.sub(r"\x1b\[[\d;]*m|\d{4}-\d\d-\d\d \d\d:\d\d", "", capsys.readouterr().out).splitlines()

    assert [line.rstrip() for line in lines] == [
        "outputs/0001-fox",
        " · mini raw",
        "  fox-1.png  seed 1  64x64",
        "    a red fox",
        "",
        "outputs/0002-a-name-as-long-as-the-prom…",
        " · mini raw",
        "  owl-2.png  seed 2  64x64  dusk 0.6",
        "    a red owl",
        "  owl-3.png  seed 3  64x64  dusk 0.6",
        "    a red owl",
    ]


def test_log_leaves_room_for_prompts_beside_long_names(moody, monkeypatch, capsys):
    many_pictures(moody / "outputs", 1)
    (moody / "outputs" / "0001-fox" / "fox-0.png").rename(moody / "outputs" / "0001-fox" / f"{'owl' * 14}.png")
    (moody / "outputs" / "0001-fox" / "fox-0.toml").rename(moody / "outputs" / "0001-fox" / f"{'owl' * 14}.toml")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")

    history_app.log()

    assert "a red fox" in capsys.readouterr().out


def test_log_tells_matrix_cells_apart(moody, monkeypatch, capsys, k2):
    k2("render", "-p", "a fox", "--matrix", "steps=1,2", "--matrix", "guidance=0,1", "--size", "64x64", "--quiet")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")

    history_app.log()

    rows = [line for line in re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines() if "seed" in line]
    assert len({line.split("seed")[1] for line in rows}) == len(rows) == 4
    assert "steps 2 · guidance 1  a fox" in rows[3]


def test_log_tells_sweep_cells_apart_in_80_columns(moody, monkeypatch, capsys, k2):
    """By the ends of names, and by weights on a line of their own, with as many digits as on sheets."""
    (moody / "styles").mkdir()
    for style in ("night", "warm", "sticker"):
        (moody / "styles" / f"{style}.toml").write_text(f'keywords = ["{style}"]\n')
    prompt = "a very long prompt about a lighthouse that goes on"
    k2("mix-styles", "night=1", "warm=1", "sticker=1", "--sweep", "4", "-p", prompt, "--size", "64x64", "--quiet")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")

    history_app.log()

    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()[1:]
    assert len({line.split("seed")[0] for line in lines[::2]}) == len(lines) / 2 == 10
    told = [line.partition("  a very")[0].strip() for line in lines[1::2]]
    assert told[0] == "night 1" and "night 0.33 · warm 0.33 · sticker 0.33" in told and len({*told}) == 10
    assert "night 0.67" in lines[2] and "666" not in "".join(lines)


def test_log_names_a_style_with_the_name_of_the_prompt(moody, monkeypatch, capsys, k2):
    """Only in older records do rows begin with the prompt; it is not repeated."""
    Path("styles").mkdir()
    Path("styles/fox.toml").write_text('keywords = ["russet"]\n')
    made = k2("render", "-p", "fox", "--matrix", "style.fox=0,1", "--matrix", "seed=1,2", "--quiet").stdout.split()
    older = Path(made[-1]).with_suffix(".toml")
    said = older.read_text()
    older.write_text(said.replace('row = "fox 1"', 'row = "fox · fox 1"'))
    assert older.read_text() != said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")

    history_app.log()

    rows = [line for line in re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines() if "64x64" in line]
    assert [re.split("  +", row.strip())[-2:] for row in rows] == [
        [f"fox {weight} · seed {seed}", "fox"] for weight in (0, 1) for seed in (1, 2)
    ]


def test_show_wraps_long_prompts_between_words(moody, monkeypatch, capsys):
    many_pictures(moody / "outputs", 1, text="evening light over quiet hills " * 8)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("K2_PREVIEW", "off")

    history_app.show([moody / "outputs" / "0001-fox" / "fox-0.png"])

    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "prompt      evening light over quiet hills evening light"
    assert second == " " * 12 + "over quiet hills evening light over quiet hills"


def test_show_prints_dates_in_local_time(moody, monkeypatch, k2):
    import time

    many_pictures(moody / "outputs", 1)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        shown = k2("show", moody / "outputs" / "0001-fox" / "fox-0.png").stdout
    finally:
        monkeypatch.undo()
        time.tzset()

    assert "created     2026-01-01 14:00:00+14:00\n" in shown


def test_log_works_with_a_broken_project_file(moody, k2, tmp_path):
    """It also continues past a folder that is not a project."""
    many_pictures(moody / "outputs", 1)
    (moody / "k2.toml").write_text("[render\n")
    (tmp_path / "other").mkdir()

    assert k2("log").stdout.startswith("outputs/0001-fox/fox-0.png\t")
    result = k2("log", tmp_path / "other", moody, code=1)
    assert result.stdout.startswith("outputs/0001-fox/fox-0.png\t")
    assert "other is not a project: it has no k2.toml." in result.stderr
    assert "other is not a project" in k2("log", tmp_path / "other", code=1).stderr


@pytest.mark.parametrize("record", ["[", None])
def test_damaged_and_lost_records_are_counted(moody, k2, record):
    many_pictures(moody / "outputs", 2)
    run = moody / "outputs" / "0001-fox"
    (run / "run.toml").write_text("")
    (run / "sheet.png").write_bytes(b"")  # has no record
    (run / "fox-0.toml").write_text(record) if record else (run / "fox-0.toml").unlink()

    result = k2("log")

    assert len(result.stdout.splitlines()) == 1
    assert "1 left out, record missing or unreadable: outputs/0001-fox/fox-0.png" in result.stderr


def test_k2_alone_in_a_project_says_where_you_are(moody, k2):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')

    fresh = k2().stdout
    many_pictures(moody / "outputs", 3)
    later = k2().stdout
    (moody / "k2.toml").write_text(PROJECT + "style.dusk = 0.5\n")
    worn = k2().stdout

    assert "dusk (some prompts)" in worn and "off" not in worn
    assert fresh.startswith(f"moody  ({moody})\n") and "fox, an-owl-at-night" in fresh and "dusk (off)" in fresh
    assert "runs      none yet" in fresh and "k2 render --dry-run" in fresh
    assert "runs      1, the last 0001-fox" in later and "k2 show outputs/0001-fox/fox-2.png" in later


def test_k2_alone_shows_settings_of_all_pictures(moody, k2):
    toml = moody / "k2.toml"
    assert "cohesion" not in k2().stdout and "moodboard" not in k2().stdout
    toml.write_text(
        PROJECT.replace("seed = 7", 'seed = 7\nvariant = "turbo"\ncohesion = 0.9\nscope = "run"')
        + '[moodboard]\nimages = ["refs"]\nstrength = 0.5\n'
    )
    said = " ".join(k2().stdout.split())
    assert "styles moodboard 0.5" in said and "model mini turbo" in said
    assert "cohesion 0.9, with the run's first picture" in said

    toml.write_text(PROJECT + "style.badge = 1\n")
    assert 'there is no style "badge"' in k2(code=1).stderr


def test_k2_allow_outside_permits_outputs_elsewhere(moody, k2, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (moody / "outputs").symlink_to(tmp_path / "elsewhere")

    said = k2(code=1).stderr
    assert "outputs lies outside the project." in said and "set K2_ALLOW_OUTSIDE=1" in said

    monkeypatch.setenv("K2_ALLOW_OUTSIDE", "1")
    assert k2("render").stdout and "runs      1" in k2().stdout and k2("log").stdout
    monkeypatch.setenv("K2_ALLOW_OUTSIDE", "0")
    k2(code=1), k2("log", code=1)


def test_k2_alone_mentions_an_unfinished_run(moody, k2, fake):
    def stop(at: int) -> None:
        if at == 1:
            raise KeyboardInterrupt

    k2("render", "--format", "webp")
    fake.stop = staticmethod(stop)
    k2("render", "-p", "owl", "--batch", "3", code=130)
    fake.stop = staticmethod(lambda at: None)

    said = k2().stdout

    assert "0002-owl has 1 of 3 pictures\n" in said
    assert said.partition("\n\n")[2].startswith("  k2 render --resume ")
    with Run(moody / "outputs" / "0002-owl") as run:
        run.lock()
        busy = k2().stdout
    assert "0002-owl has 1 of 3 pictures and is being rendered\n" in busy and "--resume" not in busy
    k2("render", "--resume")
    assert "--resume" not in k2().stdout and " of 3 " not in k2().stdout


def test_log_without_pictures_suggests_resuming_a_stopped_run(moody, k2, fake):
    assert k2("log").stderr == "No pictures yet. Make some: k2 render\n"

    def stop(at: int) -> None:
        raise KeyboardInterrupt

    fake.stop = staticmethod(stop)
    k2("render", code=130)

    for command in ("log", "gallery"):
        assert k2(command).stderr == "No pictures yet. Make some: k2 render --resume\n"


def test_run_with_deleted_pictures_counts_as_complete(moody, k2):
    k2("render")
    (moody / "outputs" / "0001-fox-and-1-more" / "fox-7.png").unlink()

    assert "--resume" not in k2().stdout and " of 2 " not in k2().stdout
    assert "fox-7.png" in k2("render", "--resume").stdout  # still rendered on request


@pytest.mark.parametrize(
    "plan", [b"", b"[", b"\xff", b'[[picture]]\nfile = "\xff.png"\n', b'[[picture]]\nfile = "../x.png"\n']
)
def test_k2_alone_copes_with_a_damaged_plan(moody, k2, plan):
    folder = moody / "outputs" / "0001-fox"
    folder.mkdir(parents=True)
    (folder / "run.toml").write_bytes(plan)

    assert "--resume" not in k2().stdout
    (folder / "run.toml").unlink()
    os.mkfifo(folder / "run.toml")
    assert "--resume" not in k2().stdout


def test_k2_alone_fits_80_columns(moody, k2, fake):
    """Except for a long picture path, whose description goes on the next line."""
    k2("render", "-p", "a quiet evening in the hills above the sea", "-p", "an owl")

    lines = k2().stdout.partition("\n\n")[2].splitlines()

    assert max(len(line) for line in lines if not line.startswith("  k2 show outputs/")) <= 80
    assert " " * 23 + "show what it was made from" in lines


def test_k2_alone_does_not_import_torch(moody, k2, fake):
    k2("render")
    code = """if True:
        import sys
        from k2cli.status import project_status
        assert "0001-fox-and-1-more has 1 of 2 pictures" in project_status()
        heavy = {"torch", "transformers"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    for name in ("fox-7.png", "sheet.png"):
        (moody / "outputs" / "0001-fox-and-1-more" / name).unlink()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_k2_alone_outside_a_project_prints_the_help(k2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert "Usage:" in k2().stdout
    (tmp_path / "k2.toml").write_text("[render]\nsed = 1\n")
    assert 'Did you mean "seed"?' in k2(code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["galery"], "gallery"),
        (["render", "--styel", "dusk=1"], "--style"),
        (["render", "--style", "dsuk=1"], 'Did you mean "dusk"?'),
        (["render", "--only", "fxo"], 'Did you mean "fox"?'),
        (["style", "shwo", "dusk"], "show"),
        (["render", "--model", "mni"], 'Did you mean "mini"?'),
    ],
)
def test_typos_get_the_nearest_name(moody, k2, arguments, hint):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')

    assert hint in k2(*arguments, code=2).stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("render --style d", {"dusk="}),
        ("render --only ", {"fox", "an-owl-at-night"}),
        ("render --model m", {"mini"}),
        ("log --style ", {"dusk", "riso"}),
        ("mix-styles r", {"riso="}),
        ("gal", {"gallery"}),
        ("render --format ", {"png", "webp", "jpeg"}),
        ("render --creativity ", {"raw", "low", "medium", "high"}),
        ("render --scope ", {"prompt", "run"}),
        ("render --precision n", {"native"}),
        ("render --offload ", {"none", "text", "all"}),
        ("style add x y.png --method ", {"auto", "tokens", "splice", "vision"}),
        ("log --run ", {"0001-fox", "0002-owl"}),
        ("gallery --style ", {"dusk", "riso"}),
        ("train s", {"sft-media", "sft-merge", "sft-plain", "sharpen", "sharper", "stpo-256", "styles-256", "styles/"}),
        ("train outputs/", {"outputs/0001-fox/", "outputs/0002-owl/"}),
    ],
)
def test_shell_completes_names(moody, typed, offered):
    """As bash asks, with the real process. Names in someone else's project that a shell would execute are left out."""
    (moody / "styles").mkdir()
    for name in ("dusk", "riso", "d$(touch x)", "riso;x"):
        (moody / "styles" / f"{name}.toml").write_text('keywords = ["x"]\n')
    for run in ("0001-fox", "0002-owl", "0003-$(touch x)", "0004-a b", "0005-`x`", "0006-\\$(x)", "0007-\x1b[31m"):
        (moody / "outputs" / run).mkdir(parents=True)
    words = f"k2 {typed}"

    asked = {"_K2_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run([K2], env={"PATH": "/usr/bin:/bin", **asked, **python_path()}, capture_output=True, text=True)

    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_does_not_import_torch():
    code = """if True:
        import sys
        from k2cli.completion import complete_method, complete_setting
        assert complete_method("") and complete_setting("format")("")
        sys.exit("torch" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def python_path() -> dict[str, str]:
    import os

    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}


def test_selection_never_replaces_the_whole_gallery(moody, k2):
    many_pictures(moody / "outputs", 2)
    k2("gallery")
    before = (moody / "gallery/index.html").read_bytes()

    assert "remove all others" in k2("gallery", "-p", "fox", "-o", "gallery", code=2).stderr
    assert (moody / "gallery/index.html").read_bytes() == before


def test_rerun_check_of_a_record_prints_its_picture(moody, k2):
    k2("render", "-p", "a boat", "--steps", "1", "--size", "64x64")
    made = "outputs/0001-a-boat/a-boat-7"
    assert k2("rerun", f"{made}.toml", "--check").stdout == f"{made}.png\n"


@pytest.mark.parametrize(
    ("lacking", "fact", "told"),
    [
        (["device"], "device", ["device      float32"]),
        (["dtype"], "device", ["device      cpu"]),
        (["device", "dtype"], "device", []),
        (["seed"], "seed", []),
        (["width"], "size", []),
    ],
)
def test_show_omits_lines_without_a_recorded_value(moody, k2, lacking, fact, told):
    record = Path(k2("render", "-p", "tea", "--batch", "1").stdout.strip()).with_suffix(".toml")
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if line.partition(" = ")[0] not in lacking))

    assert [line for line in k2("show", record).stdout.splitlines() if line.startswith(f"{fact} ")] == told
