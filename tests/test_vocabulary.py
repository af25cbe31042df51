"""What the bundled model can draw, in the words that people use."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from k2cli.job_warnings import names_nothing
from k2cli.models import ModelSpec
from k2cli.models_app import show_vocabulary
from k2cli.project import Project, Shot
from k2cli.runs import Job
from model.spec import Lora, RenderSpec
from model.vocabulary import vocabulary


@pytest.mark.parametrize(
    "prompt", ["a red fox", "KITTEN, film grain", "two foxes by the sea", "my old cottage", "a bird's nest", "Santa"]
)
def test_prompt_with_a_subject_can_be_drawn(prompt):
    assert vocabulary().can_draw(prompt)


@pytest.mark.parametrize("prompt", ["a zebu", "scatter", "film grain on a teal background", "doghouse9", ""])
def test_prompt_without_a_subject_cannot(prompt):
    assert not vocabulary().can_draw(prompt)


def test_words_mean_what_the_training_lists_say():
    def meaning(words):
        return [(entry.kind, entry.name) for entry in vocabulary().look_up(words)]

    assert meaning("Kitten") == meaning("cat") == [("subject", "cat")]
    assert meaning("8-bit") == [("look", "pixel art")] and meaning("navy") == [("colour", "night blue")]
    assert meaning("orange") == [("subject", "orange"), ("colour", "orange")]
    assert meaning("watercolour") == meaning("gouache") == [("look", "watercolour painting")]
    assert meaning("grainy film") == meaning("film grain") == [("look", "film grain")]
    assert meaning("zebu") == []


@pytest.mark.parametrize("plural", ["foxes", "Kittens", "red  apples", "zebus", "navys"])
def test_plurals_of_subjects_are_understood(plural):
    """Looks and colours have no plurals."""
    assert all(entry.kind == "subject" for entry in vocabulary().look_up(plural))
    assert bool(vocabulary().look_up(plural)) == vocabulary().can_draw(plural)


def test_word_with_its_own_entry_is_no_plural():
    assert [entry.name for entry in vocabulary().look_up("books")] == ["books"]


def test_vocabulary_imports_nothing_heavy():
    code = "import sys, model.vocabulary as v; v.vocabulary(); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command_lists_all_or_explains_words(k2):
    lines = k2("models", "vocabulary").stdout.splitlines()
    assert len(lines) == len(vocabulary().entries) > 550
    assert any(line.startswith("subject\tcat\t") and "kitten" in line for line in lines)

    assert k2("models", "vocabulary", "navy", "--json").stdout.count("\n") == 1
    found = json.loads(k2("models", "vocabulary", "navy", "--json").stdout)
    assert found["name"] == "night blue" and "navy" in found["others"]

    unknown = k2("models", "vocabulary", "zebu", code=1)
    assert 'do not know "zebu"' in unknown.stderr and "k2 models vocabulary" in unknown.stderr

    some = k2("models", "vocabulary", "kitten", "zebu", "FOXES", "nope", code=1)
    assert [line.split("\t")[1] for line in some.stdout.splitlines()] == ["cat", "fox"]
    assert 'do not know "zebu", "nope".' in some.stderr


def test_meanings_are_a_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")

    show_vocabulary(["8-bit", "kitten"])

    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("look     pixel art  8-bit, ") and lines[1].startswith(" " * 20)
    assert any(line.startswith("subject  cat        kitt") for line in lines)


def test_full_list_is_a_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")

    show_vocabulary()

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > len(vocabulary().entries) and max(map(len, lines)) <= 100
    assert not any("\t" in line for line in lines)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_render_warns_if_nothing_can_be_drawn(fake, k2, tmp_path, monkeypatch, dry):
    monkeypatch.chdir(tmp_path)
    k2("new", "moody")
    monkeypatch.chdir(tmp_path / "moody")

    said = k2("render", *dry, "-p", "a zebu", "-p", "zilch", "-p", "a fox", "--batch", "2").stderr
    assert 'mini can draw nothing in "a zebu" and 1 more; to list what it can: k2 models vocabulary' in said
    assert said.count("nothing") == 1
    assert f'"{"zilch " * 6}zilc…"; to list what' in k2("render", *dry, "-p", "zilch " * 99).stderr
    assert "nothing" not in k2("render", *dry, "-p", "a fox").stderr
    assert "nothing" not in k2("render", *dry, "-p", "a zebu", "--quiet").stderr


@pytest.mark.parametrize(
    "prompt, named",
    [
        ("a cat sitting on a red sofa", ["cat", "sofa"]),
        ("A Castle at night under the moon", ["Castle", "moon"]),
        ("a dog and two very small cats", ["dog", "cats"]),
        ("a cat and a kitten", ["cat"]),  # two names of one subject
        ("two cats and a cat", ["cats"]),
        ("a cup of coffee with a cup of coffee", ["cup of coffee"]),
        ("an orange fox", ["fox"]),  # a colour here, not the fruit
        ("a toy car", ["car"]),
        ("a basket of apples", ["apples"]),
        ("a heart-shaped balloon", ["balloon"]),
        ("a fox on a brown table, pencil drawing", ["fox"]),  # words of a ground and of a look
        ("a zebu", []),
    ],
)
def test_subjects_have_noun_phrases_of_their_own(prompt, named):
    assert vocabulary().subjects(prompt) == named


def test_no_single_subject_counts_twice_in_any_look_or_ground():
    kinds = {
        kind: [words for entry in vocabulary().entries if entry.kind == kind for words in entry.words]
        for kind in ("subject", "look", "ground")
    }
    for number, name in enumerate(kinds["subject"]):
        ground = kinds["ground"][number % len(kinds["ground"])].replace("COLOUR", "sky blue")
        look = kinds["look"][number % len(kinds["look"])]
        assert len(vocabulary().subjects(f"a picture of a {name} {ground}, made as {look}")) <= 1, (name, ground, look)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_render_warns_of_several_subjects(fake, k2, tmp_path, monkeypatch, dry):
    monkeypatch.chdir(tmp_path)
    k2("new", "moody")
    monkeypatch.chdir(tmp_path / "moody")
    warning = 'mini paints one subject per picture; several are named in "a dog and a cat" (dog, cat)'

    assert f"{warning} and 1 more\n" in k2("render", *dry, "-p", "a dog and a cat", "-p", "a fox in a car").stderr
    assert "several" not in k2("render", *dry, "-p", "a fox", "-p", "a zebu").stderr
    lines = k2("render", *dry, "-p", "a dog and a cat", "-p", "a fox", "--batch", "1", "--json").stdout.splitlines()
    assert [json.loads(line)["warnings"] for line in lines] == [[warning], []]


def test_no_warning_for_adapters_and_other_models(moody):
    spec = RenderSpec("a zebu")

    def doubted(spec: RenderSpec, model: str) -> bool:
        shot = Shot("x-7", "x", spec.prompt, spec)
        return names_nothing(shot, Job(Project.open(moody), [shot], ModelSpec(model)))

    assert doubted(spec, "mini")
    assert not doubted(replace(spec, loras=(Lora(moody / "zebu.safetensors", 0.5),)), "mini")
    assert not doubted(spec, str(moody / "other.safetensors"))
