"""The text encoder's training: start, order of batches, and going on after a break."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer

from model.text_encoder import TextConfig, TextEncoder
from model.train.text import TOKENIZER, Corpus, Recipe, batches, build, export, train

TINY = TextConfig(8192, 16, 24, 2, 2, 1, 8, 1e4, 1e-6, (1, 2))


def start() -> tuple[TextEncoder, torch.nn.ModuleDict, Corpus]:
    """A tiny tower over random "teacher" words, and twelve phrases."""
    torch.manual_seed(1)
    tower, heads = build(0, torch.randn(8192, 20), TINY)
    encoder = TextEncoder(tower, Tokenizer.from_file(str(TOKENIZER)))
    rows = [encoder.token_ids(f"a {' '.join(['red'] * (i % 3))} fox") for i in range(12)]
    return encoder, heads, Corpus(rows, torch.nn.functional.normalize(torch.randn(12, 20), dim=-1), held_out=2)


@pytest.fixture
def one_thread():
    """Several threads add gradients up in any order, and Adam turns noise in a gradient near zero into a whole step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_broken_off_run_goes_on_as_if_it_had_not(tmp_path):
    towers = []
    for stops in ([4], [2, 4]):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        for stop in stops:
            encoder, heads, corpus = start()
            minutes = 1e9 if stop == 4 else -1
            recipe = Recipe(steps=4, decay=2, batch=3)
            train(encoder, heads, corpus, recipe, folder, minutes)
        towers.append(encoder.tower.state_dict())

    for name, unbroken in towers[0].items():
        assert (towers[1][name] - unbroken).norm() < 1e-5 * unbroken.norm(), name  # two unbroken runs differ by 1e-7


def test_every_step_of_an_epoch_brings_other_phrases_and_none_held_out():
    corpus = start()[2]

    first = [i for _, batch in zip(range(3), batches(corpus, 3, 0, 0), strict=False) for i in batch]

    assert len(set(first)) == 9
    assert min(first) >= corpus.held_out


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_step_has_its_batch_wherever_one_starts(step):
    corpus = start()[2]
    order = [batch for _, batch in zip(range(9), batches(corpus, 3, 0, 0), strict=False)]

    assert next(batches(corpus, 3, step, 0)) == order[step]


def test_words_start_as_the_teacher_sees_them():
    """Projected to fewer dimensions, rows keep unit RMS and the neighbourhoods of the teacher."""
    words = torch.randn(8192, 20)
    words[7] = words[5] + 0.1 * torch.randn(20)
    rows = build(0, words, TINY)[0].embed_tokens.weight

    torch.testing.assert_close(rows.square().mean(1), torch.ones(8192))
    assert (rows @ rows[5]).topk(2).indices.tolist() == [5, 7]


def test_the_8_bit_file_and_the_wide_one_load_alike(tmp_path):
    encoder, _, _ = start()
    export(encoder.tower, tmp_path, dataclasses.asdict(Recipe()))
    for name in ("tokenizer.json", "mini-tokenizer.json"):
        (tmp_path / name).write_bytes(TOKENIZER.read_bytes())

    wide, small = (TextEncoder.load(tmp_path / name) for name in ("text.safetensors", "mini-text.safetensors"))

    assert torch.equal(wide.encode(["a red fox"])[0], small.encode(["a red fox"])[0])
