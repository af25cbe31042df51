"""The hearing stage: what captions are wrapped in, which weights learn from it, and how Turbo gets them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_stages import base, quiet, run
from workshop import NETWORK, workshop  # noqa: F401

from model.dit import PRESETS, DiTConfig
from model.errors import K2Error
from model.train import merge, recipe, states
from model.train.data import read_subjects
from model.train.hearing import TRAINED_PREFIXES, HearingStage, Recipe, align
from model.train.pretrain import Recipe as PretrainRecipe
from model.train.pretrain import TrainedModel
from model.train.strangers import RELATIONS, StrangeWords, look_words
from model.train.thesaurus import Thesaurus
from model.train.training_set import load_training_set
from model.train.turbo import Recipe as TurboRecipe

TINY = DiTConfig(width=32, heads=2, kv_heads=1, blocks=2, text_width=32, text_taps=2, text_heads=2)


@pytest.fixture(scope="module")
def wilderness():
    return StrangeWords({subject.name: subject for subject in read_subjects()}, Thesaurus())


def test_captions_keep_their_words_among_strange_ones(wilderness):
    rng = np.random.default_rng(0)
    made = [
        wilderness.wrap("a red fox on a teal background, pencil drawing", ("fox", "red fox"), rng) for _ in range(200)
    ]

    for caption in made:
        assert "red fox" in caption and "on a teal background" in caption and "pencil drawing" in caption
    assert len(set(made)) > 150 and np.mean([len(caption.split()) for caption in made]) > 13


def test_strange_words_name_neither_looks_nor_subjects(wilderness):
    looks = look_words()
    names = {word for subject in read_subjects() for word in subject.name.split() if len(word) > 2}

    assert {"watercolour", "halftone", "stencil", "teal"} <= looks
    assert len(wilderness.words) > 3000 and not looks & set(wilderness.words) and not names & set(wilderness.words)


def test_second_subject_follows_the_first(wilderness):
    rng, fox = np.random.default_rng(0), ("fox", "red fox")
    made = [wilderness.surround("a red fox, pencil drawing", fox, rng) for _ in range(200)]

    for caption in made:
        assert caption.startswith(tuple(f"a red fox {relation} " for relation in RELATIONS))
        assert caption.removesuffix(", pencil drawing").endswith(tuple(wilderness.things))
    assert len(set(made)) > 190
    assert wilderness.surround("", fox, rng) == ""


def test_strange_words_are_inserted_in_one_place(wilderness):
    rng, plain = np.random.default_rng(0), "an owl, pencil drawing"
    before = behind = 0
    for _ in range(200):
        made = wilderness.insert(plain, ("owl",), rng)
        head = made.removesuffix(", pencil drawing")
        assert head != made and len(made) > len(plain)
        behind += head.startswith("an owl ")
        before += head.endswith(" owl") and head.startswith(("a ", "an "))
    assert before + behind == 200 and 25 < before < 80
    assert wilderness.insert("", ("owl",), rng) == ""


def test_some_strange_words_are_made_of_pieces(wilderness):
    rng = np.random.default_rng(0)
    words = [wilderness.strange(rng) for _ in range(1000)]
    pieces = [word for word in words if word not in wilderness.vocabulary]

    assert 120 < len(pieces) < 280 and all(word in wilderness.words for word in words if word not in pieces)


def test_empty_caption_stays_empty(wilderness):
    assert wilderness.wrap("", ("fox",), np.random.default_rng(0)) == ""


def test_only_text_input_layers_learn_and_turbo_merges_the_change(workshop):  # noqa: F811
    base()
    run("student", "turbo", 'method = "guidance"\nteacher = "base"\n')
    run("heard", "hearing", 'teacher = "base"\nstrangers = 1.0\nreferences = 1.0\nswapped = 16\n')
    Path("both.toml").write_text(
        'name = "both"\nstage = "merge"\nruns = ["student", "heard", "base"]\nweights = [1.0, 1.0, -1.0]\n'
    )
    merge.main(recipe.load("both.toml"), report=quiet)

    before, heard, student, both = (averages(name) for name in ("base", "heard", "student", "both"))
    moved = {name for name in heard if not torch.equal(heard[name], before[name])}
    assert moved and all(name.startswith(TRAINED_PREFIXES) for name in moved)
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, student[name] + heard[name] - before[name], msg=name)


def test_refuses_keys_without_meaning_for_the_stage():
    for stage, cls, more in (("hearing", Recipe, {}), ("turbo", TurboRecipe, {"method": "guidance"})):
        shared = {"name": "x", "size": 64, "steps": 4, "batch": 4, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}
        for key, value in {
            "style_loss": 0.2,
            "align": 0.5,
            "recompute": True,
            "products": "int8",
            "repeats": 3,
        }.items():
            with pytest.raises(K2Error, match=f'{key} has no meaning for the stage "{stage}"'):
                cls(**shared, **more, **{key: value})


def averages(name):
    return states.averaged_weights(Path(".runs") / name / "state.safetensors")


def test_pretraining_can_wrap_captions_too(workshop):  # noqa: F811
    settings = {"name": "tiny", "size": 64, "steps": 4, "batch": 16, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}

    def words(strangers):
        wrapped = PretrainRecipe(**settings, repeats=1, strangers=strangers)
        return np.mean([len(each.split()) for each in load_training_set(wrapped, "cpu").batch(wrapped, 0)["captions"]])

    assert words(1.0) > words(0.0) + 3


def test_plain_captions_cause_no_loss(monkeypatch):
    """A student equal to its teacher answers as the teacher does; only strange rows leave something to learn."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    torch.manual_seed(0)
    teacher = TrainedModel(TINY, 3)
    torch.nn.init.normal_(teacher.dit.last.linear.weight, std=0.1)
    settings = {"name": "tiny", "size": 64, "steps": 4, "batch": 4, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}
    hearing = HearingStage(Recipe(**settings, preset="tiny"), None, teacher, 3)

    def share(wild, mask, name="share"):
        batch = {"latents": torch.randn(4, 16, 4, 4), "embeds": plain, "mask": whole, "references": None}
        meant = teacher.dit.encode_text(plain, whole)
        batch |= {"said": wild, "said_mask": mask, "meant": F.pad(meant, (0, 0, 0, wild.shape[1] - 5))}
        batch |= {"wild": wild, "wild_mask": mask, "generator": torch.Generator().manual_seed(0)}
        return hearing.loss(batch)[1][name].item()

    plain, whole = torch.randn(4, 5, 2, 32), torch.ones(4, 5, dtype=torch.bool)
    longer, padded = torch.cat((plain, torch.randn(4, 3, 2, 32)), 1), torch.ones(4, 8, dtype=torch.bool)
    assert share(plain, whole) == pytest.approx(0, abs=1e-10)
    assert share(longer, padded) > 1e-4
    assert share(plain, whole, "swapped") == 0 and share(longer, padded, "swapped") > 1e-4
    padded[:, 5:] = False  # masked rows have no influence
    assert share(longer, padded) == pytest.approx(0, abs=1e-8)


def test_rows_of_other_words_align_with_the_plain_ones():
    """What both captions share is aligned row by row; where they differ, each row goes to the mean."""
    end = [90, 91, 92, 93, 94]  # the template's ending

    def rows(said, meant):
        """Which rows become which, without the end, whose rows become themselves."""
        maps = align([*said, *end], [*meant, *end])
        assert torch.equal(maps[len(said) :, len(meant) :], torch.eye(5)) and (maps.sum(1) - 1).abs().max() < 1e-6
        return [row.nonzero().flatten().tolist() for row in maps[: len(said)]]

    assert rows([7, 1, 8], [7, 2, 8]) == [[0], [1], [2]]
    assert rows([7, 1, 2, 8], [7, 3, 8]) == [[0], [1], [1], [2]]  # two tokens for one
    assert rows([7, 1, 8], [7, 2, 3, 4, 8]) == [[0], [1, 2, 3], [4]]
    assert rows([1, 1, 2], [1, 1, 2]) == [[0], [1], [2]]
    assert rows([7, 8], [7, 5, 8]) == [[0], [2]]  # no row stands for an omitted word
    assert rows([7, 4, 5, 8], [7, 8]) == [[0], [1], [1], [1]]  # a love heart becomes a heart
    assert rows([7, 8, 5], [7, 8]) == [[0], [1], [1]]


def test_most_captions_pass_only_the_text_input_layers(workshop):  # noqa: F811
    settings = {"name": "tiny", "size": 64, "steps": 4, "batch": 2, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}
    hears = Recipe(**settings, network=NETWORK, swapped=40, whole=4, pool=8)
    data = load_training_set(hears, "cpu")
    hearing = HearingStage(hears, data, TrainedModel(hears.config, len(data.looks)), len(data.looks))

    whole, other = hearing.batch(0), hearing.batch(1)
    assert "latents" in whole and "latents" not in other
    assert hearing.loss(whole)[1].keys() - hearing.loss(other)[1].keys() == {"share", "high"}
    assert len(other["said"]) == len(other["meant"]) == 40
    assert hearing.model.dit.side == hearing.teacher.dit.side == data.side
    assert not torch.equal(whole["said"], other["said"])
    assert hearing.batch(8)["said"] is whole["said"]  # the text encoder runs only once
    drawn = [len(batch["latents"]) for batch in map(hearing.batch, range(8)) if "latents" in batch]
    assert drawn == [2, 2] and sum(drawn) == 8 * hearing.pictures()

    real = other["said_mask"]
    assert other["meant"][real].square().sum(-1).min() > 0  # every real row has a target
    assert not other["meant"][~real].any()
    before = hearing.loss(other)[1]["swapped"]
    plain = other | {"said": other["said"].roll(1, 0), "said_mask": real.roll(1, 0)}
    assert 0 < before < hearing.loss(plain)[1]["swapped"]  # other rows' captions are further off


def test_plain_captions_pass_the_text_input_layers_too(workshop):  # noqa: F811
    settings = {"name": "tiny", "size": 64, "steps": 4, "batch": 2, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}

    def off(**more):
        hears = Recipe(**settings, network=NETWORK, swapped=40, **more)
        data = load_training_set(hears, "cpu")
        hearing = HearingStage(hears, data, TrainedModel(hears.config, len(data.looks)), len(data.looks))
        batch = hearing.batch(1)
        with torch.no_grad():
            rows = hearing.model.dit.encode_text(batch["said"], batch["said_mask"])
        return ((rows - batch["meant"]).abs().amax(2) * batch["said_mask"]).amax(1) > 1e-4

    assert not off(plain=1.0).any()
    assert 8 < off(plain=0.5).sum() < 32 < off().sum()


def test_caption_features_do_not_depend_on_the_batch(workshop):  # noqa: F811
    """A resumed run starts with an empty cache, so other captions are encoded together."""
    shared = {"name": "tiny", "size": 64, "steps": 4, "batch": 16, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}
    wrapped = PretrainRecipe(**shared, repeats=1, strangers=0.9)
    data = load_training_set(wrapped, "cpu")
    captions = sorted({caption for step in range(2) for caption in data.batch(wrapped, step)["captions"]})
    together = data.embed(captions)[0]
    for start in range(0, len(captions), 7):
        data.features.clear()
        some, mask = data.embed(captions[start : start + 7])
        assert torch.equal(some[mask], together[start : start + 7, : mask.shape[1]][mask])
