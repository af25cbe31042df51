"""Choices in prompts, and matrices: which pictures they make, with which seeds, under which names."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from conftest import PROJECT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from k2cli import runs
from k2cli.matrix import escape_braces, read_axes, text_readings
from model.errors import K2Error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a fox", ["a fox"]),
        ("a {red|blue} fox", ["a red fox", "a blue fox"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("a {|very } red fox", ["a red fox", "a very red fox"]),
        ("a {red|{pale|deep} blue} fox", ["a red fox", "a pale blue fox", "a deep blue fox"]),
        ("a {curly} brace | bar", ["a {curly} brace | bar"]),
        ("{a {b} c|d}", ["a {b} c", "d"]),
        (r"\{a\|b\}", ["{a|b}"]),
        (r"{a\}|b\|c}", ["a}", "b|c"]),
        ("an {open|brace", ["an {open|brace"]),
        ("a closed} one", ["a closed} one"]),
        ("{{a|b}|c", ["{a|c", "{b|c"]),
    ],
)
def test_readings_of_choices(text, said):
    assert [each for each, _ in text_readings(text)] == said


@given(st.text(alphabet="{|}\\ ab"))
def test_escaped_text_is_read_literally(text):
    assert text_readings(escape_braces(text)) == [(" ".join(text.split()), ())]


@given(st.text(alphabet="{|}\\ ab", max_size=30))
def test_any_text_has_a_reading(text):
    assert text_readings(text)


def test_too_many_readings_are_refused():
    with pytest.raises(K2Error, match="makes 1,048,576 prompts"):
        text_readings("{a|b|c|d}" * 10)


def test_too_many_nested_braces_are_refused():
    deep = "{a|" * 32 + "b" + "}" * 32
    assert len(text_readings(deep)) == 33
    with pytest.raises(K2Error, match="more than 32 nested braces"):
        text_readings(f"{{a|{deep}}}")


def test_too_many_characters_are_refused():
    with pytest.raises(K2Error, match="adds up to 12,533,760 characters"):
        text_readings("{a|b}" * 12 + "x" * 3000)


def test_empty_readings_are_refused(moody, k2):
    refused = k2("render", "--dry-run", "-p", "a fox", "-p", "{|red}", code=1)
    assert 'A reading of "{|red}" is empty.' in refused.stderr and "outside the choices" in refused.stderr


def plan(k2, *arguments: str) -> list[dict]:
    return [json.loads(line) for line in k2("render", "--dry-run", "--json", *arguments).stdout.splitlines()]


def test_choices_are_prompts_with_the_same_seeds(moody, k2):
    (moody / "k2.toml").write_text(PROJECT.replace("a red fox", "a {red|blue} fox"))

    assert [(each["file"], each["prompt"]["text"]) for each in plan(k2, "--batch", "2")] == [
        ("fox-red-7.png", "a red fox"),
        ("fox-red-8.png", "a red fox"),
        ("fox-blue-7.png", "a blue fox"),
        ("fox-blue-8.png", "a blue fox"),
        ("an-owl-at-night-7.png", "an owl at night"),
        ("an-owl-at-night-8.png", "an owl at night"),
    ]
    assert [each["file"] for each in plan(k2, "--only", "fox")] == ["fox-red-7.png", "fox-blue-7.png"]
    assert [each["file"] for each in plan(k2, "--only", "fox-blue")] == ["fox-blue-7.png"]
    assert [each["file"] for each in plan(k2, "-p", "{a|the} cat", "-p", "a cat")] == [
        "a-cat-2-7.png",
        "the-cat-7.png",
        "a-cat-7.png",
    ]


def test_names_of_long_choices_stay_short_and_unique(moody, k2):
    """Names that are the same once cut are numbered, so nothing is overwritten."""
    long, name = "very " * 12, "a-fox-of-a-certain-age"
    text = PROJECT.replace("a red fox", f"a {{{long}red|{long}blue|{long}teal}} fox")
    (moody / "k2.toml").write_text(text.replace('"fox"', f'"{name}"'))

    stem = f"{name}-very-very-very-very-very-ve"
    files = [each["file"] for each in plan(k2, "--only", name)]
    assert len(stem) == 50 and files == [f"{stem}-7.png", f"{stem}-2-7.png", f"{stem}-3-7.png"]


def test_a_mix_takes_the_first_choice(moody, k2):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')

    told = k2("mix-styles", "dusk=1", "-p", "a {red|blue} fox").stderr
    assert "The prompt has 2 choices; only the first is used." in told
    assert "choices" not in k2("mix-styles", "dusk=1", "-p", "a red fox").stderr

    texts = {tomllib.loads(path.read_text())["prompt"]["text"] for path in moody.glob("outputs/*/*-7.toml")}
    assert texts == {"a red fox"}


MATRIX = (
    PROJECT
    + """
[[matrix]]
prompt = ["fox"]
size = ["64x64", "96x64"]
style.dusk = [0, 0.5, 1]
"""
)


@pytest.fixture
def dusky(moody):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["dusk"]\n')
    (moody / "k2.toml").write_text(MATRIX)
    return moody


def test_a_matrix_covers_every_combination_with_the_same_seed(dusky, k2):
    cells = plan(k2)

    assert [each["file"] for each in cells] == [f"fox-{i:02}-7.png" for i in range(1, 7)]
    assert [(each["settings"]["width"], each["prompt"]["caption"]) for each in cells] == [
        (width, f"dusk {weight}") for width in (64, 96) for weight in ("0", "0.5", "1")
    ]
    assert {each["settings"]["seed"] for each in cells} == {7}
    assert [[style["strength"] for style in each.get("style") or []] for each in cells[:3]] == [[], [0.5], [1.0]]
    assert cells[0]["prompt"]["row"] == "size 64x64"


def test_files_sort_by_their_numbers(dusky, k2):
    values = ",".join(map(str, range(1, 101)))

    files = [each["file"] for each in plan(k2, "-p", "tea", "--matrix", f"steps={values}")]
    assert files == [f"tea-{i:03}-7.png" for i in range(1, 101)] == sorted(files)


def test_cells_of_prompts_with_long_names_never_collide(moody, k2):
    """Long names are cut, and those that are then the same share one numbering."""
    long = "a-fox-of-a-certain-age-that-lives-in-a-wood-far-away"
    (moody / "k2.toml").write_text("".join(f'[[prompt]]\nname = "{long}-{i}"\ntext = "fox {i}"\n' for i in "ab"))

    files = [each["file"] for each in plan(k2, "--matrix", "steps=4,8")]
    assert files == [f"{long[:50]}-{i:02}-0.png" for i in range(1, 5)]


def test_a_matrix_gets_a_sheet_and_can_be_resumed(dusky, k2):
    k2("render")
    folder = dusky / "outputs" / "0001-matrix-fox"
    with Image.open(folder / "sheet.png") as sheet:
        size = sheet.size
        assert sheet.height > sheet.width * 0.6  # two strips of three, one below the other
    (folder / "fox-06-7.png").unlink()
    (folder / "sheet.png").unlink()

    assert k2("render", "--resume").stdout == "outputs/0001-matrix-fox/fox-06-7.png\n"
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size == size
    assert "Identical" in k2("rerun", folder / "fox-06-7.png").stderr


def test_options_fix_an_axis(dusky, k2):
    assert len(plan(k2, "--size", "64x64")) == 3
    assert len(plan(k2, "--style", "dusk=0.7")) == 2
    assert [each["file"] for each in plan(k2, "-p", "tea")] == ["tea-7.png"]
    assert [each["settings"]["width"] for each in plan(k2, "--aspect", "2:1", "--style", "dusk=1")] == [176]


def test_an_option_fixes_an_axis_even_at_the_projects_value(moody, k2):
    """PROJECT's [render] has seed 7."""
    (moody / "k2.toml").write_text(PROJECT + "[[matrix]]\nseed = [1, 2]\nsteps = [3, 4]\n")

    seeds = [each["settings"]["seed"] for each in plan(k2, "--seed", "7", "--only", "fox")]
    assert seeds == [7, 7] and len(plan(k2)) == 8


def test_uncovered_prompts_are_reported_and_rendered_by_name(dusky, k2):
    def told() -> str:
        return " ".join(k2("render", "--dry-run").stderr.split())

    alone = "it is rendered only by name: --only an-owl-at-night"
    assert f"moody: no [[matrix]] covers an-owl-at-night, so {alone}" in told()
    (dusky / "k2.toml").write_text(f'{MATRIX}[[prompt]]\nname = "hen"\ntext = "a hen"\n')
    assert "an-owl-at-night, hen, so they are rendered only by name: --only NAME" in told()
    (dusky / "k2.toml").write_text(MATRIX)
    assert "covers" not in k2("render", "--dry-run", "--only", "fox").stderr
    (dusky / "k2.toml").write_text(f'{MATRIX}[[matrix]]\nprompt = ["an-owl-at-night"]\nsteps = [4, 8]\n')
    assert "covers" not in k2("render", "--dry-run").stderr
    (dusky / "k2.toml").write_text(MATRIX)

    assert "covers" not in k2("render", "--dry-run", "--only", "an-owl-at-night", "--batch", "3").stderr
    (alone,) = plan(k2, "--only", "an-owl-at-night")
    assert alone["file"] == "an-owl-at-night-7.png" and alone["prompt"]["row"] is None
    assert len(plan(k2, "--only", "an-owl-at-night", "--batch", "3")) == 3
    both = plan(k2, "--only", "an-owl-at-night", "--only", "fox")
    assert {each["prompt"]["name"].rpartition("-")[0] for each in both} == {"fox"}


def test_a_matrix_replaces_the_batch(dusky, k2):
    """That of [render] and that of a prompt, but not one on the command line."""
    text = MATRIX.replace('text = "a red fox"', 'text = "a red fox"\nbatch = 3')
    (dusky / "k2.toml").write_text(text.replace("seed = 7", "seed = 7\nbatch = 2"))

    assert len(plan(k2)) == 6 and len(plan(k2, "--batch", "2")) == 12
    captions = [each["prompt"]["caption"] for each in plan(k2, "--batch", "2")[:3]]
    assert captions == ["dusk 0 · seed 7", "dusk 0 · seed 8", "dusk 0.5 · seed 7"]
    assert len(plan(k2, "-p", "tea", "--matrix", "steps=4,8")) == 2 and len(plan(k2, "-p", "tea")) == 2


def test_a_stdin_line_fixes_its_axes_and_batch(dusky, k2):
    """An object on standard input takes precedence over the command line, which does over a matrix."""
    axes = ("--matrix", "steps=1,2", "--matrix", "style.dusk=0,1")
    (dusky / "k2.toml").write_text((dusky / "k2.toml").read_text().replace("seed = 7", "seed = 7\nbatch = 2"))

    def cells(said: str, *options: str) -> list[tuple[int, float, int]]:
        told = map(json.loads, k2("render", "-", "--dry-run", "--json", *options, input=said).stdout.splitlines())
        made = [(each["settings"], each["style"] or ()) for each in told]
        return [(its["steps"], sum(style["strength"] for style in styles), its["seed"]) for its, styles in made]

    assert cells('{"prompt": "tea"}', *axes) == [(1, 0, 7), (1, 1, 7), (2, 0, 7), (2, 1, 7)]
    assert cells('{"prompt": "tea", "steps": 3}', *axes) == [(3, 0, 7), (3, 1, 7)]
    assert cells('{"prompt": "tea", "steps": 3, "styles": {"dusk": 0.5}}', *axes) == [(3, 0.5, 7)]
    assert cells('{"prompt": "tea", "batch": 3}', *axes[:2]) == [(n, 0, seed) for n in (1, 2) for seed in (7, 8, 9)]
    assert len(cells('{"prompt": "tea", "batch": 3}\ntea', *axes[:2], "--batch", "2")) == 6 + 4
    assert [seed for *_, seed in cells('{"prompt": "tea", "seed": 3}', "--matrix", "seed=1,2")] == [3]
    seeds = k2("render", "-", "--matrix", "seed=1,2", input='{"prompt": "tea", "batch": 3}', code=2)
    assert "--matrix lists the seeds" in seeds.stderr


def test_a_missing_style_is_blamed_on_its_matrix(dusky, k2):
    assert '--matrix: there is no style "dsuk".' in k2("render", "--matrix", "style.dsuk=1", code=2).stderr
    (dusky / "k2.toml").write_text(MATRIX.replace("dusk", "dsuk"))
    assert 'k2.toml, line 14: there is no style "dsuk".' in k2("render", code=1).stderr


def test_a_matrix_on_the_command_line(dusky, k2):
    seeds = ["-p", "tea", "--matrix", "seed=1,2"]
    cells = plan(k2, *seeds, "--matrix", "guidance=0,2.5", "--matrix", "steps=4")

    assert [(each["settings"]["seed"], each["settings"]["guidance"]) for each in cells] == [
        (1, 0.0),
        (1, 2.5),
        (2, 0.0),
        (2, 2.5),
    ]
    assert {each["settings"]["steps"] for each in cells} == {4}
    ends = plan(k2, "-p", "tea", "--matrix", "guidance_until=0.5,1")
    assert [each["settings"]["guidance_until"] for each in ends] == [0.5, 1.0]
    assert "--matrix lists the seeds" in k2("render", "--dry-run", *seeds, "--batch", "9", code=2).stderr


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("seed = 7", '"seed" must be a list of values', "Like seed = [1, 2]."),
        ("seed.low = [7]", '"seed" must be a list of values', "Like seed = [1, 2]."),
        ("seed = []", '"seed" must be a list of values', ""),
        ("seed = [1, 1]", '"seed" lists a value twice', ""),
        ("seed = [-1]", '"seed" must be between', ""),
        ("sede = [1]", 'unknown key "sede"', 'Did you mean "seed"?'),
        ('size = ["100x100"]', "not multiples of 16", ""),
        ('creativity = ["lots"]', '"creativity" cannot be "lots"', ""),
        ("style = [1]", "expected a table of styles", "style.dusk"),
        ("style.dusk = [3]", "must be between", ""),
        ("style.dsuk = [1]", 'there is no style "dsuk"', 'Did you mean "dusk"?'),
        ('prompt = ["fx"]\nseed = [1]', 'there is no prompt named "fx"', 'Did you mean "fox"?'),
        ('prompt = ["fox"]', "the matrix compares nothing", ""),
    ],
)
def test_an_invalid_matrix_gives_one_error_message(dusky, k2, text, message, hint):
    (dusky / "k2.toml").write_text(f"{PROJECT}\n[[matrix]]\n{text}\n")

    said = k2("render", code=1).stderr

    assert message in said and hint in said and len(said.splitlines()) <= 2


def test_spaces_around_axis_values_are_ignored():
    assert read_axes(["creativity = raw, high"]).axes == {"creativity": ["raw", "high"]}


@pytest.mark.parametrize("text", ["sede=1", "seed", "seed=x", "style.=1", "size=1x1", "steps="])
def test_invalid_axes_are_refused(text):
    with pytest.raises(K2Error, match="--matrix"):
        read_axes([text])


def test_a_matrix_has_a_size_limit(dusky, k2):
    many = ",".join(map(str, range(200)))

    assert (
        "more than 10,000 pictures"
        in k2("render", "--matrix", f"seed={many}", "--matrix", f"steps={many[2:]}", code=1).stderr
    )


@pytest.fixture
def labels(monkeypatch):
    """Labels of the pictures on contact sheets."""
    found: set[str] = set()
    monkeypatch.setattr(runs, "contact_sheets", lambda entries, *_, **__: found.update(e.label for e in entries) or [])
    return found


def resume(k2, old: str = "", new: str = "") -> None:
    """Resume the run, which has no sheet yet, from a plan that says `new` in place of `old`."""
    (folder,) = Path("outputs").iterdir()
    plan = (folder / "run.toml").read_text()
    assert old in plan
    (folder / "run.toml").write_text(plan.replace(old, new))
    k2("render", "--resume")


def test_rows_of_older_plans_show_their_prompt_once(moody, k2, labels):
    """Those rows began with it."""
    k2("render", "--only", "fox", "--matrix", "steps=1,2", "--matrix", "seed=1,2", "--quiet")
    labels.clear()

    resume(k2, 'row = "steps', 'row = "a red fox · steps')

    assert labels == {"steps 1 · a red fox", "steps 2 · a red fox"}


def test_rows_of_older_plans_may_be_the_prompt_alone(moody, k2, labels):
    k2("render", "--only", "fox", "--matrix", "seed=1,2", "--quiet")
    labels.clear()

    resume(k2, 'caption = "seed', 'row = "a red fox"\ncaption = "seed')

    assert labels == {"a red fox"}


def test_a_style_may_have_the_prompts_name(dusky, k2, labels):
    """Rows then begin with it, and keep it."""
    k2("render", "-p", "dusk", "--matrix", "style.dusk=0,1", "--matrix", "seed=1,2", "--quiet")
    labels.clear()

    resume(k2)

    assert labels == {"dusk 0 · dusk", "dusk 1 · dusk"}
