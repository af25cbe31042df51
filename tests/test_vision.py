"""Qwen3-VL reads references: as transformers does, in one span, with strengths, and with or without vision rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_text_encoder import TAPS, qwen_tokenizer
from tiny import random_state, tiny, tiny_box  # noqa: F401

from model import vision
from model.checkpoint import open_checkpoint, save
from model.errors import K2Error
from model.language_model import LanguageModel
from model.pipeline import Pipeline
from model.reference_weights import MAX_REFERENCES
from model.spec import Reference, RenderSpec, Style
from model.text_encoder import TextEncoder
from model.vision import (
    VisionConfig,
    VisionReader,
    VisionTower,
    WeightedPicture,
    encode_picture,
    find_tower,
    load_tower,
    positions,
    quantise_rows,
    read_picture_tokens,
    shuffle_tiles,
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A small random Qwen3-VL with three deepstack layers, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {
        "vocab_size": 151_646 + 6,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 5e6,  # as transformers 4 writes it and 5 still reads it
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 49, "deepstack_visual_indexes": [0, 1, 3], "patch_size": 4}
    ids = {f"{name}_token_id": 151_646 + i for i, name in enumerate(("vision_start", "image", "vision_end", "video"))}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            weight.uniform_(0.5, 1.5)
        elif weight.ndim == 1 or "layers" in name or "visual" in name:
            weight.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder, max_shard_size="150KB")
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    encoder = TextEncoder.load(folder, taps=TAPS)
    return SimpleNamespace(
        folder=folder,
        model=model.model,
        encoder=encoder,
        reader=VisionReader(encoder, open_checkpoint(folder)),
        ids=ids,
    )


@pytest.fixture
def pictures():
    torch.manual_seed(1)
    return [torch.rand(1, 3, 16, 24) * 2 - 1, torch.rand(1, 3, 32, 16) * 2 - 1, torch.rand(1, 3, 8, 8) * 2 - 1]


def patches(pixels: torch.Tensor, side: int = 4, merge: int = 2) -> torch.Tensor:
    """Patches in the order of Qwen's image processor, arranged step by step as it does."""
    rows, columns = pixels.shape[2] // side, pixels.shape[3] // side
    twice = pixels.expand(2, -1, -1, -1)
    cells = twice.reshape(1, 2, 3, rows // merge, merge, side, columns // merge, merge, side)
    return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(rows * columns, -1)


def grid(pixels: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[1, pixels.shape[2] // 4, pixels.shape[3] // 4]])


def test_vision_tower_matches_transformers(qwen, pictures):
    for pixels in pictures:
        expected = qwen.model.visual(patches(pixels), grid_thw=grid(pixels))
        rows, deep = qwen.reader.tower(pixels)

        torch.testing.assert_close(rows, expected.pooler_output, atol=2e-5, rtol=2e-4)
        for got, other in zip(deep, expected.deepstack_features, strict=True):
            torch.testing.assert_close(got, other, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_prompt_with_a_picture_matches_transformers(qwen, pictures, which):
    """The whole forward pass: placeholders, three rotary axes, deepstack, taps; our prefix comes from the cache."""
    pixels, prompt = pictures[which], "a red fox in the snow"
    count = pixels.shape[2] * pixels.shape[3] // 64
    words = qwen.encoder.token_ids(prompt)
    start, pad, end = (qwen.ids[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end"))
    ids = [*qwen.encoder.prefix_ids[0].tolist(), start, *[pad] * count, end, *words]
    states = qwen.model(
        input_ids=torch.tensor([ids]),
        pixel_values=patches(pixels),
        image_grid_thw=grid(pixels),
        mm_token_type_ids=(torch.tensor([ids]) == pad).int(),
        output_hidden_states=True,
    ).hidden_states
    expected = torch.stack([states[tap] for tap in TAPS], 2)

    read, seen, counts = qwen.reader.read_with_pictures(prompt, [encode_picture(qwen.reader.tower, pixels)])

    assert counts == [count]
    torch.testing.assert_close(read, expected[:, -len(words) :], atol=5e-5, rtol=5e-4)
    torch.testing.assert_close(seen, expected[:, 35 : 35 + count], atol=5e-5, rtol=5e-4)


def test_several_pictures_share_one_span(qwen, pictures):
    """With explicit positions for transformers' language model, which knows only one picture per span."""
    words = qwen.encoder.token_ids("an owl")
    looked = [qwen.model.visual(patches(each), grid_thw=grid(each)) for each in pictures]
    rows = torch.cat([each.pooler_output for each in looked])
    deep = [torch.cat(parts) for parts in zip(*(each.deepstack_features for each in looked), strict=True)]
    start, pad, end = (qwen.ids[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end"))
    ids = torch.tensor([[*qwen.encoder.prefix_ids[0].tolist(), start, *[pad] * len(rows), end, *words]])
    embeds = qwen.model.language_model.embed_tokens(ids)
    where = ids == pad
    embeds[where] = rows
    grids = [(each.shape[2] // 8, each.shape[3] // 8) for each in pictures]
    place = torch.cat((torch.arange(34).expand(3, -1), positions(34, [1, *grids, 1 + len(words)])), 1)[:, None]
    states = qwen.model.language_model(
        inputs_embeds=embeds,
        position_ids=place,
        visual_pos_masks=where,
        deepstack_visual_embeds=deep,
        output_hidden_states=True,
    ).hidden_states

    read, _, counts = qwen.reader.read_with_pictures(
        "an owl", [encode_picture(qwen.reader.tower, each) for each in pictures]
    )

    assert counts == [6, 8, 1]
    expected = torch.stack([states[tap] for tap in TAPS], 2)[:, -len(words) :]
    torch.testing.assert_close(read, expected, atol=5e-5, rtol=5e-4)


def test_pictures_follow_one_another():
    place = positions(3, [1, (2, 3), (1, 1), 2]).T.tolist()

    assert place == [
        [3, 3, 3],
        *([4, 4 + row, 4 + column] for row in range(2) for column in range(3)),
        [7, 7, 7],
        [8, 8, 8],
        [9, 9, 9],
    ]


# ---- strength ---------------------------------------------------------------------------------------------------


def test_strength_moves_prompt_rows_linearly(qwen, pictures):
    """No change at zero, the prompt as read at one, mirrored below zero; vision rows are added only if allowed."""
    pictures = [encode_picture(qwen.reader.tower, each) for each in pictures]
    plain = qwen.encoder.encode(["an owl"])[0]
    read, _, (count,) = qwen.reader.read_with_pictures("an owl", pictures[:1])

    def encode(weight: float, keep_rows: bool = False) -> torch.Tensor:
        return qwen.reader.encode("an owl", [WeightedPicture(pictures[0], weight)], keep_rows=keep_rows)

    assert torch.equal(qwen.reader.encode("an owl", [], keep_rows=True), plain)
    torch.testing.assert_close(encode(1.0), read)
    torch.testing.assert_close(encode(0.5) - plain, plain - encode(-0.5))
    far = [(encode(weight) - plain).norm().item() for weight in (0.25, 0.5, 1.0, 1.5)]
    assert far == sorted(far)
    words = plain.shape[1]
    assert encode(1.0, keep_rows=True).shape[1] == words + count
    assert encode(-1.0, keep_rows=True).shape[1] == words


@pytest.mark.parametrize("side", [1, -1])
def test_several_pictures_count_by_their_weights(qwen, pictures, side):
    """Equal weights are one reading; others mix readings of fewer pictures, so that none starts with a jump."""
    pictures = [encode_picture(qwen.reader.tower, each) for each in pictures]
    plain = qwen.encoder.encode(["an owl"])[0]

    def moved(*weights: float) -> torch.Tensor:
        shown = [WeightedPicture(picture, side * weight) for picture, weight in zip(pictures, weights, strict=False)]
        return side * (qwen.reader.encode("an owl", shown, keep_rows=False) - plain)

    both = qwen.reader.read_with_pictures("an owl", pictures[:2])[0] - plain
    torch.testing.assert_close(moved(0.5, 0.5), both)
    torch.testing.assert_close(moved(0.2, 0.8), 0.4 * both + 0.6 * moved(0, 1))
    assert (moved(0.2, 0.8) - moved(0.8, 0.2)).norm() > 0.1 * both.norm()
    torch.testing.assert_close(moved(1e-6, 1), moved(0, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved(1e-12, 1), moved(0, 1))


def test_picture_rows_are_added_one_by_one(qwen, pictures):
    pictures = [encode_picture(qwen.reader.tower, each) for each in pictures]

    def rows(*weights: float) -> torch.Tensor:
        shown = [WeightedPicture(picture, weight) for picture, weight in zip(pictures, weights, strict=False)]
        return qwen.reader.encode("an owl", shown, keep_rows=True)[0, len(qwen.encoder.token_ids("an owl")) :]

    assert [len(rows(at, 0.7)) for at in (0, 0.001, 0.02, 0.04, 0.07, 0.7)] == [8, 8, 10, 11, 14, 14]
    torch.testing.assert_close(rows(1e-6, 0.7), rows(0, 0.7), atol=1e-4, rtol=1e-4)


def test_less_information_reduces_rows_to_a_few_values():
    rows = torch.randn(40, 3, 32)

    assert torch.equal(quantise_rows(rows, torch.ones(40)), rows)
    nothing = quantise_rows(rows, torch.zeros(40))
    assert all(len(nothing[:, tap].unique(dim=0)) <= 3 for tap in range(3))
    far = [(quantise_rows(rows, torch.full((40,), known)) - nothing).norm().item() for known in (0.0, 0.3, 0.7, 1.0)]
    assert far == sorted(far) and far[0] == 0
    some = quantise_rows(rows, torch.tensor([0.0] * 20 + [1.0] * 20))
    assert torch.equal(some[20:], rows[20:]) and torch.equal(some[:20], nothing[:20])


@pytest.mark.parametrize("tiles", [2, 4])
def test_shuffling_moves_every_tile_and_loses_none(tiles):
    pixels = torch.arange(3 * 16 * 32.0).view(1, 3, 16, 32)

    moved = shuffle_tiles(pixels, tiles)

    torch.testing.assert_close(moved.flatten().sort().values, pixels.flatten())
    height, width = 16 // tiles, 32 // tiles
    for row in range(0, 16, height):
        for column in range(0, 32, width):
            here = (..., slice(row, row + height), slice(column, column + width))
            assert not torch.equal(moved[here], pixels[here])
    assert torch.equal(shuffle_tiles(pixels, tiles), moved) and shuffle_tiles(pixels, 1) is pixels


# ---- files ------------------------------------------------------------------------------------------------------


def test_vision_tower_is_loaded_on_demand(qwen, tmp_path):
    assert find_tower(qwen.folder) is not None
    assert find_tower(tmp_path / "mini-text.safetensors") is None
    assert not any("visual" in name for name in qwen.encoder.tower.state_dict())


def test_tower_not_matching_its_config_is_refused(qwen):
    checkpoint = open_checkpoint(qwen.folder)
    checkpoint.config["vision_config"] = checkpoint.config["vision_config"] | {"depth": 5}
    with pytest.raises(K2Error, match=r"do not fit the network: .* missing"):
        load_tower(checkpoint, torch.device("cpu"), torch.float32)
    whole = open_checkpoint(qwen.folder).config["vision_config"]
    for wrong in (
        {"deepstack_visual_indexes": [whole["depth"]]},
        {"num_position_embeddings": 15},
        {"num_heads": whole["hidden_size"] // 2},
    ):
        checkpoint.config["vision_config"] = whole | wrong
        with pytest.raises(K2Error, match="config cannot be used"):
            load_tower(checkpoint, torch.device("cpu"), torch.float32)
    checkpoint.config["vision_config"] = {"depth": 4}
    with pytest.raises(K2Error, match="config cannot be used"):
        load_tower(checkpoint, torch.device("cpu"), torch.float32)


# ---- in the pipeline --------------------------------------------------------------------------------------------

FOX = RenderSpec("a red fox", seed=7, steps=2, guidance=1.0)


@pytest.fixture
def seeing(tiny, tmp_path) -> Pipeline:  # noqa: F811
    """The tiny model in diffusers' layout, its text encoder completed by a random vision tower."""
    Pipeline.load("tiny", device="cpu").export(tmp_path / "model")
    folder = tmp_path / "model" / "text_encoder"
    config = VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=(0, 1),
    )
    torch.manual_seed(0)
    tower = VisionTower(config)
    torch.nn.init.normal_(tower.pos_embed.weight)
    file = folder / "model.safetensors"
    state = {name: tensor for name, tensor in open_checkpoint(file).read() if not name.startswith("visual.")}
    save(file, state | {f"visual.{name}": tensor for name, tensor in random_state(tower).items()}, {})
    table = json.loads((folder / "config.json").read_text())
    table["vision_config"] = asdict(config)
    table |= {"vision_start_token_id": 10, "image_token_id": 11, "vision_end_token_id": 12}
    (folder / "config.json").write_text(json.dumps(table))
    return Pipeline.load(str(tmp_path / "model"), device="cpu")


@pytest.fixture
def refs(tmp_path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.linear_gradient("L").convert("RGB").save(paths[0])
    Image.effect_noise((90, 70), 80).convert("RGB").save(paths[1])
    return paths


def looking(*weights: tuple[Path, float], **changes) -> RenderSpec:
    styles = tuple(Style(path.stem, weight, (Reference(path),), method="vision") for path, weight in weights)
    return replace(FOX, styles=styles, **changes)


def pixels_of(pipeline: Pipeline, spec: RenderSpec) -> str:
    return pipeline.render([spec])[0].record["pixels"]


def test_vision_as_a_style_method(seeing, refs, monkeypatch):
    """Zero changes not a bit and loads nothing; the order does not matter; every setting gives its own picture."""
    monkeypatch.setattr(vision, "PIXELS", 128 * 128)
    plain = pixels_of(seeing, FOX)
    assert pixels_of(seeing, looking((refs[0], 0.0))) == plain
    assert "_vision_reader" not in vars(seeing.conditioning)  # the tower is still on disk

    weights = [(refs[0], 0.8), (refs[1], -0.5)]
    assert len({pixels_of(seeing, looking(*order)) for order in itertools.permutations(weights)}) == 1
    made = [
        looking((refs[0], 1.0), **options)
        for options in ({}, {"vision_tiles": 1}, {"vision_tiles": 4}, {"vision_rows": False}, {"style_guidance": 2.0})
    ]
    assert len({plain, *(pixels_of(seeing, spec) for spec in made)}) == 6
    record = seeing.render([made[0]])[0].record
    assert (record["vision_tiles"], record["vision_rows"]) == (2, True)
    assert record["styles"][0]["method"] == "vision"


def test_picture_is_seen_once_for_all_prompts_and_weights(seeing, refs, monkeypatch):
    monkeypatch.setattr(vision, "PIXELS", 128 * 128)
    passes, forward = [], VisionTower.forward
    monkeypatch.setattr(VisionTower, "forward", lambda self, pixels: passes.append(1) or forward(self, pixels))

    seeing.render([looking((refs[0], a), (refs[1], b), prompt=f"{a} foxes") for a, b in ((0.5, 1.0), (0.9, 0.4))])

    assert len(passes) == 2


@pytest.mark.parametrize("rows", [True, False])
def test_vision_strength_starts_continuously(seeing, refs, monkeypatch, rows):
    monkeypatch.setattr(vision, "PIXELS", 128 * 128)

    def off(one: float, other: float) -> float:
        pictures = seeing.render([looking((refs[0], each), vision_rows=rows) for each in (one, other)])
        first, second = (np.asarray(picture.image, np.float32) for picture in pictures)
        return float(np.abs(first - second).mean())

    assert off(0.0, 1e-6) < 0.01 and off(0.0, -1e-6) < 0.01
    assert off(0.05, 0.0501) < 0.02 < off(0.0, 0.1)


@pytest.mark.parametrize("rows", [True, False])
def test_second_picture_starts_continuously(seeing, refs, monkeypatch, rows):
    monkeypatch.setattr(vision, "PIXELS", 128 * 128)

    def made(*weights: float) -> np.ndarray:
        spec = looking(*zip(refs, weights, strict=True), vision_rows=rows)
        return np.asarray(seeing.render([spec])[0].image, np.float32)

    alone = made(0.0, 1.0)
    assert np.abs(alone - made(1e-6, 1.0)).mean() < 0.01 < np.abs(made(0.9, 0.1) - made(0.1, 0.9)).mean()


def test_negative_picture_is_unaffected_by_a_fading_one(seeing, refs, monkeypatch):
    """Rows of a picture with little weight are faded in; a negative weight has no rows, and keeps its full effect."""
    monkeypatch.setattr(vision, "PIXELS", 128 * 128)

    def made(strength: float) -> np.ndarray:
        return np.asarray(seeing.render([looking((refs[0], strength), (refs[1], -1.0))])[0].image, np.float32)

    assert np.abs(made(0.0) - made(1e-6)).mean() < 0.01 < np.abs(made(0.0) - made(0.1)).mean()


def test_avoids_move_prompt_rows_not_picture_rows(seeing, refs, monkeypatch):
    monkeypatch.setattr(vision, "PIXELS", 128 * 128)
    heard, encode_text = [], seeing.dit.encode_text
    monkeypatch.setattr(seeing.dit, "encode_text", lambda embeds: heard.append(embeds) or encode_text(embeds))
    for negative in ("", "fog"):
        seeing.render([looking((refs[0], 1.0), guidance=0.0, negative=negative)])
    plain, led = heard

    moved = (plain != led).flatten(2).any(-1)[0]
    words = len(seeing.text.token_ids(FOX.prompt))
    assert moved[:words].all() and len(moved) > words and not moved[words:].any()


def test_vision_needs_an_encoder_that_can_see(tiny, seeing, refs, tmp_path):  # noqa: F811
    """What k2 exports itself contains a vision tower for the class to load, but a blind one."""
    Pipeline.load("tiny", device="cpu").export(tmp_path / "blind")
    for name in ("tiny", str(tmp_path / "blind")):
        with pytest.raises(K2Error, match="cannot read pictures"):
            Pipeline.load(name, device="cpu").render([looking((refs[0], 1.0))])
    with pytest.raises(K2Error, match="vision_tiles cannot be 3"):
        seeing.render([looking((refs[0], 1.0), vision_tiles=3)])


def test_too_many_vision_references_are_refused(seeing, tmp_path):
    many = [tmp_path / f"{index}.png" for index in range(MAX_REFERENCES["vision"] + 1)]
    for index, path in enumerate(many):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(path)

    with pytest.raises(K2Error, match="17 reference pictures are read by vision, but at most 16 can be") as error:
        seeing.render([looking(*((path, 0.1) for path in many))])
    assert error.value.hint


@pytest.mark.parametrize("stated", [{}, {"image_token_id": None}, {"image_token_id": "<|image_pad|>"}])
def test_config_without_picture_tokens_is_refused(qwen, stated):
    known = {"vision_start_token_id": 10, "vision_end_token_id": 12}
    checkpoint = replace(open_checkpoint(qwen.folder), config=known | stated)
    with pytest.raises(K2Error, match="does not say which tokens stand for pictures"):
        read_picture_tokens(checkpoint)


def test_answer_about_pictures_matches_transformers(qwen, pictures):
    """Each picture in its own span, twelve times the likeliest token; positions advance less than the tokens."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(qwen.folder, dtype=torch.float32).eval()
    speaker = LanguageModel.load(qwen.folder, "cpu")
    ids, seen = speaker.user_turn("What are they drawn with?", pictures)
    start, pad, end = (qwen.ids[f"{name}_token_id"] for name in ("vision_start", "image", "vision_end"))

    made = theirs.generate(
        input_ids=torch.tensor([ids]),
        pixel_values=torch.cat([patches(pixels) for pixels in pictures]),
        image_grid_thw=torch.cat([grid(pixels) for pixels in pictures]),
        mm_token_type_ids=(torch.tensor([ids]) == pad).int(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=-1,
        pad_token_id=0,
    )

    assert (ids.count(start), ids.count(end)) == (3, 3) and ids.count(pad) == int(seen.mask.sum()) == 15
    answer = speaker.answer("What are they drawn with?", 0, pictures, max_tokens=12, temperature=0)
    assert answer == speaker.tokenizer.decode(made[0, len(ids) :].tolist())
    assert answer != speaker.answer("What are they drawn with?", 0, pictures[:1], max_tokens=12, temperature=0)
