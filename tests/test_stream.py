"""`k2 render --stream`: each line is rendered before the next is read, and a wrong line does not end the stream."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_weights
from typer.main import get_command

from k2cli import stdin_prompts
from k2cli.app import app
from k2cli.prompts import Prompt
from model import library
from model.errors import K2Error


@pytest.fixture
def asks(monkeypatch, fake):
    """Sends the next line once the last picture is finished; returns the prompts rendered before each line."""
    painted = []

    def say(*wishes):
        def lines():
            for wish in wishes:
                painted.append([spec.prompt for spec in fake.seen])
                yield wish.encode()

        monkeypatch.setattr(stdin_prompts, "input_lines", lines)
        return painted

    return say


@pytest.fixture
def dusky(moody):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["film grain"]\n')
    return moody


def test_line_is_rendered_before_the_next_is_read(moody, k2, asks, fake):
    painted = asks("a pear", "a {red|green} plum", "tea")

    made = k2("render", "--stream", "--seed", "3").stdout.splitlines()

    assert painted == [[], ["a pear"], ["a pear", "a red plum", "a green plum"]]
    assert made == [
        "outputs/0001-a-pear/a-pear-3.png",
        "outputs/0002-a-red-plum-and-1-more/a-red-plum-3.png",
        "outputs/0002-a-red-plum-and-1-more/a-green-plum-3.png",
        "outputs/0003-tea/tea-3.png",
    ]
    assert len(fake.loaded) == 1


def test_weights_are_loaded_before_the_first_line(moody, k2, monkeypatch, fake):
    seen = []
    monkeypatch.setattr(stdin_prompts, "input_lines", lambda: seen.append(len(fake.loaded)) or iter([]))

    k2("render", "--stream")
    k2("render", "--stream", "--dry-run", "--turbo", code=1)  # which is not bundled
    assert seen == [1] and not (moody / "outputs").exists()
    k2("render", "--stream", "--dry-run", "--size", "64x64")
    assert len(fake.loaded) == 1


def test_failing_line_is_reported_and_the_next_is_read(moody, k2, asks, fake):
    def fail(index: int) -> None:
        if len(fake.seen) == 1:
            fake.stop = staticmethod(lambda index: None)
            raise K2Error("The plum cannot be drawn.", hint="Ask for a pear.")

    fake.stop = staticmethod(fail)
    asks("a pear", "a plum", "{|}", "tea")

    done = k2("render", "--stream", "--json", code=1)

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"]["text"] for answer in answers] == ["a pear", "a plum", "{|}", "tea"]
    assert [answer.get("error") for answer in answers] == [
        None, "The plum cannot be drawn.", 'A reading of "{|}" is empty.', None
    ]  # fmt: skip
    assert answers[1] == {
        "file": None, "error": "The plum cannot be drawn.", "hint": "Ask for a pear.", "prompt": {"text": "a plum"}
    }  # fmt: skip
    assert "The plum cannot be drawn." in done.stderr and "Ask for a pear." in done.stderr


def test_project_changes_apply_from_the_next_line_on(moody, k2, monkeypatch, fake):
    """A mistake in the project file fails the lines read while it is there; the weights stay loaded."""
    toml = moody / "k2.toml"
    whole = toml.read_text()

    def lines():
        yield b"a pear"
        toml.write_text(whole.replace("seed = 7", "seed = 40"))
        yield b"tea"
        toml.write_text(whole.replace("seed = 7", "sed = 40"))
        yield b"a plum"
        (moody / "styles").mkdir()
        (moody / "styles" / "dusk.toml").write_text('keywords = ["film grain"]\n')
        toml.write_text(whole + "\n[style]\ndusk = 1\n")
        yield b"a fig"

    monkeypatch.setattr(stdin_prompts, "input_lines", lines)

    done = k2("render", "--stream", code=1)

    assert [spec.prompt for spec in fake.seen] == ["a pear", "tea", "a fig, film grain"]
    assert [spec.seed for spec in fake.seen] == [7, 40, 7]
    assert 'unknown key "sed" in [render].' in done.stderr and len(fake.loaded) == 1


def test_model_change_loads_it_for_the_next_line(moody, k2, monkeypatch, fake):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    toml = moody / "k2.toml"

    def lines():
        yield b"a pear"
        toml.write_text(toml.read_text().replace("seed = 7", 'variant = "turbo"'))
        yield b"tea"

    monkeypatch.setattr(stdin_prompts, "input_lines", lines)
    k2("render", "--stream")

    assert [variant for _, variant, *_ in fake.loaded] == [None, "turbo"]


def test_lines_of_a_run_may_be_json_objects(dusky, k2, fake):
    """Each has its own settings, which override the command line, as in a stream."""
    said = '{"prompt": "a pear", "seed": 40, "styles": {"dusk": -1}}\n\ntea\n{"prompt": "a fig", "size": "64x96"}\n'
    typed = ("--seed", "3", "--size", "96x64", "--style", "dusk=1")

    made = k2("render", "-", *typed, "-p", "a plum", input=said).stdout.splitlines()

    assert [(spec.prompt, spec.seed, spec.width, spec.negative) for spec in fake.seen] == [
        ("a plum, film grain", 3, 96, ""),
        ("a pear", 40, 96, "film grain"),
        ("tea, film grain", 3, 96, ""),
        ("a fig, film grain", 3, 64, ""),
    ]
    assert {Path(path).parent.name for path in made} == {"0001-a-plum-and-3-more"}


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ('tea\n\n{"prompt": "a pear", "sed": 1}', 'Line 3: unknown key "sed".'),
        ('{"prompt": "a pear"', "Line 1 is not JSON"),
        ('{"prompt": "a pear", "name": "a"}\n{"prompt": "a fig", "name": "A"}', 'Line 2: another prompt is named "a".'),
        ('{"prompt": "a pear", "size": "3x3"}', "Line 1: 3x3 is out of range"),
    ],
)
def test_errors_name_the_line_of_a_run(moody, k2, fake, said, error):
    assert error in k2("render", "-", input=said, code=1).stderr and fake.seen == []


def test_line_may_set_what_a_project_prompt_may(dusky, k2, asks, fake):
    """It comes last, so it overrides the command line."""
    asks(
        '{"prompt": "a {red|green} pear", "seed": 40, "batch": 2, "avoid": "snow", "styles": {"dusk": -1}}',
        '{"text": "tea", "name": "cup", "aspect": "1:1", "guidance": 1}',
        "a fig",
    )

    typed = ("--seed", "3", "--batch", "1", "--size", "64x96", "--style", "dusk=1", "--avoid", "fog")
    made = k2("render", "--stream", *typed).stdout.splitlines()

    assert [(spec.prompt, spec.seed, spec.negative) for spec in fake.seen] == [
        *((f"a {colour} pear", seed, "snow, fog, film grain") for colour in ("red", "green") for seed in (40, 41)),
        ("tea, film grain", 3, "fog"),
        ("a fig, film grain", 3, "fog"),
    ]
    assert [(spec.width, spec.height, spec.guidance) for spec in fake.seen[-2:]] == [(128, 128, 1), (64, 96, None)]
    assert made[-2] == "outputs/0002-cup/cup-3.png"


@pytest.mark.parametrize(
    ("line", "said", "hint"),
    [
        ('{"prompt": "tea", "sed": 4}', 'The line: unknown key "sed".', 'Did you mean "seed"?'),
        ('{"prompt": "tea", "foo": 4}', 'The line: unknown key "foo".', "Known: prompt, styles, name, avoid, batch"),
        ('{"prompt": "tea", "version": 2}', 'The line: unknown key "version".', "Known: prompt, styles, name"),
        ('{"prompt": "tea", "cfg": 4}', 'The line: unknown key "cfg".', "It is called guidance, and is 1 less"),
        ('{"prompt": "tea", "seed": -4}', 'The line: "seed" must be between', 'Or "random"'),
        ('{"prompt": "tea", "seed": 1e999}', 'The line: "seed" must be a whole number', ""),
        ('{"prompt": "tea", "steps": ' + "9" * 500 + "}", 'The line is not JSON: "steps" has more than 64', "Like"),
        ('{"prompt": "tea", "size": "3x3"}', "The line: 3x3 is out of range", ""),
        ('{"prompt": "tea", "init_image": "../a.png"}', "The line: ../a.png lies outside the project.", ""),
        ('{"prompt": "tea", "init_image": "none", "mask": "8x8+0+0"}', "The line: there is no init_image to", "Name"),
        ('{"prompt": "tea", "styles": {"dusky": 1}}', 'The line: there is no style "dusky"', ""),
        ('{"prompt": "tea", "seed": 1, "seed": 2}', 'The line: the key "seed" appears more than once.', "Keep one."),
        ('{"prompt": "tea", "styles": {"dusk": 1, "dusk": 0}}', 'The line: the key "dusk" appears more', "Keep one."),
        ('{"prompt": "tea", "text": "a fig"}', 'The line: "prompt" and "text" are the same.', "Keep one"),
        ('{"seed": 4}', "The line: the prompt is empty.", ""),
        ('{"prompt": 4}', 'The line: "prompt" must be a string in quotes, not 4.', ""),
        ('{"prompt": {"text": "tea"}}', 'The line: "prompt" cannot be an object.', 'Like {"prompt": "a red fox"'),
        ('{"prompt": "tea", "seed": {}}', 'The line: "seed" cannot be an object.', "Like {"),
        ('{"prompt": null}', "The line: the prompt is empty.", ""),
        ('{"text": 4}', 'The line: "text" must be a string in quotes, not 4.', ""),
        ('{"prompt": "tea", "styles": ["dusk"]}', 'The line: "styles" must be an object, not a list.', 'Like "styles"'),
        ('{"prompt": "tea", "style": 1}', 'The line: "style" must be an object, not 1.', 'Like "style": {"dusk": 0.6}'),
        (
            '{"prompt": "tea", "cohesion": 1}',
            'The line: unknown key "cohesion".',
            ": set --cohesion on the command line.",
        ),
        ('{"prompt": "tea", "turbo": true}', 'The line: unknown key "turbo".', ": set --turbo on the command line."),
        ('{"prompt": "tea", "mu": 1}', 'The line: unknown key "mu".', "It belongs under [render]."),
        ('{"prompt": "\\ud83e"}', "The line: ", ""),
        ('{"prompt": "tea"', "The line is not JSON: Expecting", 'Like {"prompt": "a red fox", "seed": 4}.'),
        ('{"a":' * 100_000, "The line is not JSON", "Like"),
    ],
)
def test_errors_in_an_object_read_like_those_of_a_project(moody, k2, asks, line, said, hint):
    asks(line, "a pear")

    answer, pear = map(json.loads, k2("render", "--stream", "--json", code=1).stdout.splitlines())

    assert answer["error"].startswith(said) and hint in answer["hint"]
    assert answer["prompt"]["text"] == ("tea" if line.startswith('{"prompt": "tea",') else line)
    assert pear["prompt"]["text"] == "a pear"


def test_null_values_are_ignored():
    line = '{"prompt": "tea", "text": null, "seed": null, "avoid": null, "styles": {"dusk": null, "ink": 1}}'
    asked = stdin_prompts.parse_line(line)
    assert (asked.text, asked.settings, asked.avoid, asked.style) == ("tea", {}, "", {"ink": 1})


@pytest.mark.parametrize(
    "line",
    [
        "{red|blue} fox", '{|"} tea', "{a fox|a cat}", "{photo: a fox|ink: a cat}", "{iso: 100|iso: 3200} grain",
        "{sign: \"a\"|sign: 'b'}", "{night: dark} and {red|blue}", "[red] fox", "[{red|blue}] fox", "{red} fox",
        '"a red fox"', '"a red fox",', '"Hope": a painting', '"Tea": {red|blue} cups', "a fox: {", "7", "null",
        "'Hope': a painting", "'Tea': '{red|blue}' cups", "'Hope', and 'Tea': two signs", "'a', 'b'", "'\\d': a fox",
        '"hello": a sign', '"Wow!" says the fox: "I\'m red"', '"Fox": "red" or {blue|green}',
        "{'a'|'b'} fox", "['red'] fox", "'a': " + "-" * 9999, "'a': " + "[" * 9999,
    ],
)  # fmt: skip
def test_braces_brackets_and_quotes_may_be_part_of_a_prompt(line):
    assert stdin_prompts.parse_line(line) == Prompt(line)


@pytest.mark.parametrize(
    "line",
    [
        '[{"prompt": "a red fox", "seed": 3}, {"prompt": "a cat", "seed": 4}]', '["a red fox"]', "[]", "{}", "[1, 2]",
        '[{"prompt": "a red fox", "seed": 3},', "{", "[", "}", "]", "},", "],", "[{", "}, {", "[" * 9999,
        '"prompt": "a red fox",', '"seed": 3', '"styles": {', '"steps": null,', '"prompt": "a cat", "seed": 4,',
        '"styles": { "sticker": 0.5 }', '"styles": {"sticker": 0.5}},', '"styles": {"sticker": 0.5,', '"seed": [1, 2],',
        '"style": [{"name": "dusk"}],', '"seed": 3}]', "'prompt': 'a {red|blue} cat',", "'seed': 4}", "'seed': None},",
        "'styles': {'dusk': 1.0}}]", "'prompt': \"a cat's\"", "['a red fox']", "'\\d': '\\d'",
        "{'prompt': 'a red fox', 'seed': 3}", "{'prompt': 'a {red|blue} fox | ink'}", "[{'prompt': 'a red fox'}]",
        '{prompt: "a red fox"}', "{ prompt: 'a {red|blue} fox', seed: 3 }", "{prompt: a red fox, seed: 3}",
        '[{prompt: "a red fox"}]', '{prompt: "a red fox",', '"prompt": "a "red" fox",', r'"path": "C:\x\y",',
        r'"prompt": "a \x fox",', r'"prompt": "a \x fox"}]', '"seed": 04,', '"prompt": "a fox"}, {"prompt": "b"',
    ],
)  # fmt: skip
def test_broken_json_is_not_rendered_as_a_prompt(moody, k2, fake, line):
    """None of its settings would apply, above all not its seed."""
    done = k2("render", "--stream", "--json", input=f"{line}\ntea\n", code=1)

    wrong, tea = map(json.loads, done.stdout.splitlines())
    assert wrong["error"] == "The line is neither a prompt nor a JSON object that holds one."
    assert "One object per line" in wrong["hint"] and "jq -c" in wrong["hint"] and wrong["prompt"]["text"] == line
    assert tea["prompt"]["text"] == "tea"
    assert "Line 2 is neither a prompt" in k2("render", "-", input=f"tea\n{line}\n", code=1).stderr
    assert len(fake.seen) == 1


def test_json_spread_over_lines_renders_nothing(moody, k2, fake):
    said = json.dumps([{"prompt": "a fox", "seed": 3, "batch": 1, "styles": {"dusk": -1e-3}, "avoid": ""}], indent=2)

    for text in (said, said.replace('"', "'"), '{\n"prompt": "a cat", "seed": 4,\n"styles": { "sticker": 0.5 }\n}'):
        assert k2("render", "--stream", input=text, code=1).stdout == "" and fake.seen == []


def test_options_named_in_hints_exist():
    named = {word for hint in stdin_prompts.MISPLACED.values() for word in re.findall(r"--[\w-]+", hint)}
    options = {option for each in get_command(app).commands["render"].params for option in each.opts}
    assert "--style-guidance" in named and named - options == set()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_answers_number_the_pictures_of_their_line(moody, k2, asks, tmp_path, dry):
    """The caller then knows when to stop reading; with several projects, the count spans all of them."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k2.toml").write_text("")
    asks("a {red|green} pear", "tea")

    said = k2("render", "--stream", "--json", moody, tmp_path / "other", *dry).stdout.splitlines()

    assert [json.loads(answer)["of"] for answer in said] == [[1, 4], [2, 4], [3, 4], [4, 4], [1, 2], [2, 2]]


@pytest.mark.parametrize("how", [("--stream",), ("--stream", "--dry-run"), ("-",), ("-", "--dry-run")])
def test_warnings_about_a_prompt_are_in_its_object(moody, k2, how):
    """A program that ignores standard error gets them too, each for its own prompt."""
    said = k2("render", *how, "--json", "--quiet", input="a fox\na ((red)) fox\na zebu\n")

    fox, red, zebu = (json.loads(answer)["warnings"] for answer in said.stdout.splitlines())
    assert fox == [] and said.stderr == "" and zebu[0].startswith('mini can draw nothing in "a zebu";')
    assert red == ["Read as words: ((red)) (words have no weights, styles do: --style NAME=0.6)."]
    assert not any("warnings" in path.read_text() for path in moody.glob("outputs/*/*.toml"))


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_warnings_about_settings_are_in_the_objects_concerned(moody, k2, dry):
    about = {"kind": "dit", "variant": "raw", "native": 128, "recommended": {"steps": 8, "guidance": 0, "mu": 1.15}}
    write_weights(library.BUNDLED / "mini-raw.safetensors", about)
    lines = '{"prompt": "a fox", "size": "64x64"}\n{"prompt": "a fox"}\n{"prompt": "a fox", "guidance": 1}\n'
    quiet = ("--json", "--quiet", "--size", "128x128", *dry)

    said = k2("render", "-", *quiet, "--guidance-until", 0.5, input=lines)
    compared = k2("render", "-p", "a fox", *quiet, "--matrix", "guidance_until=0.25,0.5")

    small, fine, guided = (json.loads(answer)["warnings"] for answer in said.stdout.splitlines())
    sooner, later = (json.loads(answer)["warnings"] for answer in compared.stdout.splitlines())
    far = "64x64 is far from the model's native 128x128: expect broken pictures."
    never = "Guidance is off, so guidance_until = 0.5 has no effect."
    assert (small, fine, guided) == ([far, never], [never], [])
    assert (sooner, later) == ([never.replace("0.5", "0.25")], [never])


def test_standard_output_has_only_pictures(moody, k2, asks):
    asks("{|}", "tea")

    assert k2("render", "--stream", code=1).stdout == "outputs/0001-tea/tea-7.png\n"


def test_unexpected_errors_end_the_stream(moody, k2, asks, fake):
    def fail(index: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    fake.stop = staticmethod(fail)
    asks("tea")

    with pytest.raises(OSError, match="Input/output"):
        k2("render", "--stream")


def test_terminal_input_explains_how_to_end(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"tea\n")))
    assert [*stdin_prompts.input_lines()] == [b"tea\n"] and capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"tea\n")))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert [*stdin_prompts.input_lines()] == [b"tea\n"]
    assert capsys.readouterr() == ("", "One prompt per line, rendered as it arrives; Ctrl-D ends.\n")


def test_line_breaks_separate_lines_and_empty_ones_get_an_answer(moody, k2):
    """Otherwise whoever sent it would wait forever."""
    said = "\ufeffa pear\r\n\n  a plum of\u2028glass \n"
    done = k2("render", "--stream", "--dry-run", "--json", input=said, code=1)

    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"]["text"] for answer in answers] == ["a pear", "", "a plum of glass"]
    assert [answer.get("error") for answer in answers] == [None, "A prompt is empty.", None]
    assert not (moody / "outputs").exists()


@pytest.mark.parametrize("said", ["a café", '{"prompt": "a café"}'])
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_input_is_utf_8_or_else_in_the_locale_encoding(moody, said, encoding):
    """Windows uses cp1252 for pipes, but programs at the other end write UTF-8."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    for how in ("--stream", "-"):
        line = [sys.executable, "-m", "k2cli", "render", how, "--dry-run", "--json"]
        done = subprocess.run(line, input=said.encode(encoding), capture_output=True, check=True, env=environment)

        assert {json.loads(each)["prompt"]["text"] for each in done.stdout.splitlines()} == {"a café"}


def test_unencodable_path_is_reported_and_the_next_line_is_read(moody):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-m", "k2cli", "render", "--stream", "--dry-run", "--json"]
    said = '{"prompt": "tea", "init_image": "ä.png"}\na pear\n'.encode()

    done = subprocess.run(line, input=said, capture_output=True, env=environment)

    wrong, pear = map(json.loads, done.stdout.splitlines())
    assert wrong["error"].startswith('No file name can contain "') and pear["prompt"]["text"] == "a pear"
    assert done.returncode == 1


def test_line_is_answered_before_the_next_is_written(moody):
    line = [sys.executable, "-m", "k2cli", "render", "--stream", "--dry-run", "--json"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as asked:
        for wish in ("a pear", "a plum"):
            asked.stdin.write(f"{wish}\n")
            assert json.loads(asked.stdout.readline())["prompt"]["text"] == wish
        asked.stdin.close()


def test_every_line_follows_the_like_picture(moody, k2, asks):
    made = k2("render", "--only", "fox").stdout.strip()
    asks("tea", "a pear")

    answers = k2("render", "--stream", "--like", made, "--cohesion", "0.5", "--json").stdout.splitlines()

    leaders = [json.loads(answer)["leader"] for answer in answers]
    assert [(leader["prompt"], leader["seed"]) for leader in leaders] == [("a red fox", 7)] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--style", "dusky=1"), 2, 'there is no style "dusky"'),
        (("--size", "3x3"), 2, "3x3 is out of range"),
        (("-p", "tea"), 2, "no others can be given"),
        (("--only", "fox"), 2, "no others can be given"),
        (("--resume",), 2, "no other setting can be given"),
    ],
)
def test_wrong_options_are_refused_before_the_first_line(moody, k2, asks, arguments, code, said):
    painted = asks("a pear")

    assert said in k2("render", "--stream", *arguments, code=code).stderr
    assert painted == []


@pytest.mark.parametrize("spoilt", [b"ein L\xf6we", b'{"prompt": "ein L\xf6we"}', b"\xef\xbb\xbf\xff\xfe"])
def test_undecodable_line_is_reported_and_the_next_is_read(moody, k2, spoilt):
    done = k2("render", "--stream", "--json", input=b"a pear\n" + spoilt + b"\na plum\n", code=1)

    pear, wrong, plum = map(json.loads, done.stdout.splitlines())
    assert (pear["prompt"]["text"], plum["prompt"]["text"]) == ("a pear", "a plum")
    assert wrong["file"] is None and wrong["error"].startswith("Standard input is not text in the encoding here")
    assert "\ufffd" in wrong["prompt"]["text"] and "Standard input is not text" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
@pytest.mark.parametrize("how", [(), ("--json",)])
def test_unwritable_standard_output_ends_the_stream(moody, how):
    line = [sys.executable, "-m", "k2cli", "render", "--stream", "--dry-run", *how]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, input="a pear\na plum\n", stdout=full, stderr=subprocess.PIPE, text=True)

    assert done.returncode == 1 and done.stderr.count("Error: Standard output cannot be written") == 1
    assert len(done.stderr.splitlines()) == 2
