"""The key/value splice, on random weights in the open weights' layout: strength, order, mathematics, cache."""

from __future__ import annotations

import itertools
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import DIT, difference, pixels, tiny, tiny_box  # noqa: F401

from model import splice as module
from model.attention import attention
from model.dit import Krea2, rotate
from model.errors import K2Error
from model.latents import patchify
from model.pipeline import Pipeline
from model.reference_weights import WeightedReference
from model.spec import LEAK_GUARDS, Lora, Picture, Reference, RenderSpec, Style
from model.splice import (
    KEY_GAIN,
    MIN_FREE_BYTES,
    PULL,
    Capture,
    CaptureCache,
    Splice,
    add_noise,
    capture,
    damping_factors,
    first_block,
    guard_keys,
    mix_moments,
    moments,
    pull_statistics,
    shift_keys,
    spliced_attention,
)

FOX = RenderSpec("a red fox", seed=7, steps=3, guidance=0.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "k2" / "splice"


@pytest.fixture(scope="module")
def folder(tiny_box, tmp_path_factory) -> Path:  # noqa: F811
    """The tiny model in the form of the open weights: a diffusers folder without a style encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.library.BUNDLED", tiny_box)
        Pipeline.load("tiny", device="cpu").export(made := tmp_path_factory.mktemp("open") / "model")
    return made


@pytest.fixture
def pipeline(folder) -> Pipeline:
    return Pipeline.load(str(folder), device="cpu")


@pytest.fixture
def refs(tmp_path) -> list[Path]:
    """Three pictures that have nothing in common."""
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    Image.linear_gradient("L").convert("RGB").save(paths[0])
    Image.effect_noise((90, 70), 80).convert("RGB").save(paths[1])
    Image.new("RGB", (64, 64), "orange").save(paths[2])
    return paths


def styled(*weights: tuple[Path, float], **changes) -> RenderSpec:
    styles = tuple(Style(path.stem, weight, (Reference(path),)) for path, weight in weights)
    return replace(FOX, styles=styles, **changes)


def latents(pipeline: Pipeline, spec: RenderSpec) -> torch.Tensor:
    with torch.inference_mode():
        return pipeline._latents([pipeline.resolve(spec)], (), None)


# ---- strength, order, batches ---------------------------------------------------------------------------------


def test_strength_zero_is_the_plain_picture_bit_for_bit(pipeline, refs):
    plain = pipeline.render([FOX])[0]
    for spec in (
        styled((refs[0], 0.0)),
        replace(FOX, styles=(Style("x", 1.0, (Reference(refs[0], 0.0),)),)),
        styled((refs[0], 0.7), (refs[0], -0.7)),
        styled((refs[0], 0.7), (refs[0], -0.7), style_guidance=2.0),
    ):
        assert pixels(pipeline.render([spec])[0]) == pixels(plain)
    assert pixels(pipeline.render([styled((refs[0], 1.0))])[0]) != pixels(plain)


def test_order_of_references_never_matters(pipeline, refs):
    weights = list(zip(refs, (0.6, 0.3, -0.5), strict=True))
    made = {pixels(pipeline.render([styled(*order)])[0]) for order in itertools.permutations(weights)}
    assert len(made) == 1


def test_weights_of_the_same_picture_add_up(pipeline, refs, tmp_path):
    """Whether it is given several times or stored under two names."""
    (tmp_path / "copy.png").write_bytes(refs[0].read_bytes())
    one = pipeline.render([styled((refs[0], 0.9))])[0]
    for spec in (
        styled((refs[0], 0.3), (tmp_path / "copy.png", 0.6)),
        replace(FOX, styles=(Style("x", 0.9, (Reference(refs[0]), Reference(refs[0]), Reference(refs[0]))),)),
    ):
        assert pixels(pipeline.render([spec])[0]) == pixels(one)


def test_influence_rises_with_strength(pipeline, refs):
    plain = latents(pipeline, FOX)
    strengths = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    far = [(latents(pipeline, styled((refs[0], s))) - plain).norm().item() for s in strengths]
    assert far == sorted(far) and far[0] > 0


def test_negative_weight_pushes_the_opposite_way(pipeline, refs):
    """Over a whole picture it points away; from the same state it is the exact mirror image."""
    plain, toward, away = (latents(pipeline, styled((refs[0], s))) for s in (0.0, 1.0, -1.0))
    assert torch.cosine_similarity((toward - plain).flatten(), (away - plain).flatten(), dim=0) < -0.8

    one_step = {"steps": 2, "mu": -8.0}  # the second step is practically the end
    plain, toward, away = (latents(pipeline, styled((refs[0], s), **one_step)) for s in (0.0, 1.0, -1.0))
    torch.testing.assert_close(toward - plain, plain - away, rtol=1e-3, atol=1e-5)


def test_positive_and_negative_references_combine(pipeline, refs):
    both = pipeline.render([styled((refs[0], 1.0), (refs[1], -1.0))])[0]
    apart = [pipeline.render([styled(pair)])[0] for pair in ((refs[0], 1.0), (refs[1], -1.0))]
    assert len({pixels(picture) for picture in (both, *apart)}) == 3


def test_pictures_do_not_depend_on_their_batch(pipeline, refs):
    specs = [
        styled((refs[0], 1.0)),
        styled((refs[0], 1.0), prompt="an owl in flight over a dark forest", seed=9),
        FOX,
        styled((refs[1], -0.5), guidance=2.0),
    ]
    for spec, picture in zip(specs, pipeline.render(specs), strict=True):
        assert difference(pipeline.render([spec])[0], picture) <= 1


def test_negative_references_mix_at_total_strength_one(monkeypatch):
    """So the push is the sum of the weights, counted once."""
    asked = []

    def attends(self: Splice, references: list[WeightedReference], step: int) -> list[None]:
        asked.append([reference.weight for reference in references])
        return [None]

    monkeypatch.setattr(Splice, "_attention", attends)
    away = [WeightedReference(str(weight), Path(f"{weight}.png"), weight) for weight in (-0.5, -1.0)]
    splice = Splice(None, away, None, [1.0, 0.5, 0.0], 4)

    assert splice.velocity(lambda attend: torch.tensor(0.0 if attend is None else 1.0), 1) == -1.5
    assert asked == [pytest.approx([1 / 3, 2 / 3])]


def test_push_away_is_measured_from_the_native_velocity(monkeypatch):
    """v = v_toward − s (v_away − v_native): positive references do not affect how far negative ones push."""
    native, near, far = torch.randn(3, 1, 4, 8)
    monkeypatch.setattr(Splice, "_attention", lambda self, references, step: [references[0].sha256])
    both = WeightedReference("near", Path("a.png"), 1.0), WeightedReference("far", Path("b.png"), -0.4)
    answers = {None: native, "near": near, "far": far}
    splice = Splice(None, both, None, [1.0, 0.5, 0.0], 4)

    velocity = splice.velocity(lambda attend: answers[attend and attend[0]], 1)

    torch.testing.assert_close(velocity, near - 0.4 * (far - native))


# ---- guidance ---------------------------------------------------------------------------------------------------


def test_splice_enters_both_guidance_branches(pipeline, refs):
    """Guiding a prompt away from itself changes nothing, with a style as without."""
    off = pipeline.render([styled((refs[0], 1.0))])[0]
    on = pipeline.render([styled((refs[0], 1.0), guidance=4.0, negative="a red fox")])[0]
    assert difference(on, off) <= 1


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_style_guidance_adds_to_the_style(pipeline, refs, guidance):
    """At 0 the style counts once, and more from there on; without a style it costs and changes nothing."""
    plain = latents(pipeline, replace(FOX, guidance=guidance))
    far = [
        (latents(pipeline, styled((refs[0], 1.0), guidance=guidance, style_guidance=g)) - plain).norm().item()
        for g in (0.0, 0.5, 1.0)
    ]
    assert far == sorted(far)
    without = replace(FOX, guidance=guidance, style_guidance=2.0)
    assert torch.equal(latents(pipeline, without), plain) and pipeline.resolve(without).style_guidance is None
    if not guidance:
        once = latents(pipeline, styled((refs[0], 1.0), style_guidance=0.0))
        torch.testing.assert_close(once, latents(pipeline, styled((refs[0], 1.0))), rtol=1e-4, atol=1e-5)


def test_cached_style_costs_no_extra_network_evaluations(pipeline, refs, monkeypatch):
    """With cached references, a step is one evaluation of as many rows as without a style."""
    rows: Counter[int] = Counter()
    velocity = pipeline.dit.velocity

    def counted(tokens, *args, **kwargs):
        rows[len(tokens)] += 1
        return velocity(tokens, *args, **kwargs)

    def count(spec: RenderSpec) -> dict[int, int]:
        pipeline.render([spec])
        rows.clear()
        monkeypatch.setattr(pipeline.dit, "velocity", counted)
        pipeline.render([spec])
        monkeypatch.undo()
        return dict(rows)

    monkeypatch.setenv("XDG_CACHE_HOME", str(refs[0].parent / "counting"))
    once = count(FOX)
    assert count(styled((refs[0], 1.0), (refs[1], 0.5))) == once == {1: 3}


# ---- leak guards -----------------------------------------------------------------------------------------------


def test_every_guard_renders_a_different_picture(pipeline, refs):
    made = [pipeline.render([styled((refs[0], 1.0), leak_guard=guard)])[0] for guard in LEAK_GUARDS]
    assert len({pixels(picture) for picture in made}) == len(LEAK_GUARDS)
    default = pipeline.render([styled((refs[0], 1.0))])[0]
    assert default.record["leak_guard"] == module.LEAK_GUARD
    assert pixels(default) == pixels(made[LEAK_GUARDS.index(module.LEAK_GUARD)])


def test_damping_spares_slowly_rotating_pairs():
    frame, side, _ = DIT.rope_axes
    early, late = damping_factors(DIT, 0.99), damping_factors(DIT, 0.01)

    assert early.shape == (DIT.head_dim,) and torch.equal(late[:frame], torch.ones(frame))
    rows, columns = late[frame : frame + side], late[frame + side :]
    assert torch.equal(rows, columns) and torch.equal(rows[0::2], rows[1::2])  # both of a pair rotate together
    assert rows[0] < 0.05 and 1.05 < rows[-1] < 1.15 and rows.tolist() == sorted(rows.tolist())
    assert early[frame:].min() > 0.98 and early[-1] < late[-1]


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.1])
def test_damping_matches_its_formula(sigma):
    """From noise to picture, fast-rotating pairs go from 1.04 to 0 and slow ones from 1 to 1.10; those in between are
    weighted by x^2.5 along the axis."""
    done, pairs = 1 - sigma, DIT.rope_axes[1] // 2
    fast, slow = 1.04 * (1 - done), 1 + 0.10 * done
    along = [(pair / (pairs - 1)) ** 2.5 for pair in range(pairs)]
    side = [(1 - x) * fast + x * slow for x in along for _ in range(2)]

    expected = torch.tensor([1.0] * DIT.rope_axes[0] + 2 * side)
    torch.testing.assert_close(damping_factors(DIT, sigma), expected)


def test_shifted_keys_match_a_picture_to_the_right():
    torch.manual_seed(0)
    dit = Krea2(DIT)
    k = torch.randn(DIT.kv_heads, 12, DIT.head_dim)  # before rotation; a grid of 3 x 4
    wide = dit.rope(0, (3, 8)).view(3, 8, -1, 2)
    here, there = (wide[:, part].reshape(12, 1, -1, 2) for part in (slice(4), slice(4, 8)))

    turned = [rotate(k.transpose(0, 1)[None], rope)[0].transpose(0, 1) for rope in (here, there)]

    torch.testing.assert_close(shift_keys(turned[0], DIT, 4), turned[1])


@pytest.mark.parametrize("grid", [(8, 8), (12, 12), (6, 10), (32, 32), (4, 1)])
def test_picture_to_the_right_is_one_column_gap_away(grid):
    """Also where columns are placed closer together, around the middle of the square used in training."""
    dit = Krea2(DIT)
    for side in (None, 8):
        dit.side = side
        columns = dit.grid_positions(grid)[: grid[1], 1]
        gaps = torch.cat((columns, columns[:1] + dit.column_offset(grid))).diff()
        between = gaps[:-1].mean() if grid[1] > 1 else 1.0
        assert gaps[-1] == pytest.approx(between) and (side or dit.column_offset(grid) == grid[1])
        assert dit.column_offset((8, 8)) == 8


def test_guards_do_what_their_names_say():
    k = torch.randn(1, DIT.kv_heads, 12, DIT.head_dim)
    damped = k * damping_factors(DIT, 0.4)
    expected = {"none": k, "damping": damped, "shift": shift_keys(k, DIT, 4), "both": shift_keys(damped, DIT, 4)}
    assert expected.keys() == set(LEAK_GUARDS)
    for guard, keys in expected.items():
        torch.testing.assert_close(guard_keys(k, DIT, guard, 0.4, 4), KEY_GAIN * keys)


# ---- the mathematics --------------------------------------------------------------------------------------------


def take(keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> Capture:
    """A capture of one block."""
    return Capture(keys[None], values[None], *(m[None] for m in (*moments(queries), *moments(keys))))


@pytest.fixture
def scene():
    """A stream of 5 text and 12 image tokens, and two references: 4 query heads, 2 key-value heads of 16."""
    torch.manual_seed(0)
    stream = torch.randn(1, 4, 17, 16), torch.randn(1, 2, 17, 16), torch.randn(1, 2, 17, 16)
    references = [
        take(i + torch.randn(2, 12, 16), i + torch.randn(2, 12, 16), 2 * torch.randn(4, 12, 16) - i) for i in (1, 2)
    ]
    return stream, references


def test_capture_has_image_tokens_of_the_deeper_blocks():
    """It has the inputs of their attention, with keys already rotated, and nothing of the text tokens."""
    torch.manual_seed(0)
    (dit := Krea2(replace(DIT, blocks=8)).eval()).initialise()
    tokens, context = torch.randn(1, 12, DIT.token_dim), torch.randn(1, 5, DIT.width)
    given = (tokens, context, dit.modulate(torch.tensor([0.4])), dit.rope(5, (3, 4)))
    seen = []

    def look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append([x[0, :, 5:] for x in (q, k, v)])
        return attention(q, k, v)

    with torch.no_grad():
        dit.velocity(*given, attend=[look] * 8)
        found = capture(dit, *given)

    assert [first_block(blocks) for blocks in (8, 28)] == [2, 7]
    q, k, v = (torch.stack(each) for each in zip(*seen[2:], strict=True))
    for got, expected in zip(found, (k, v, *moments(q), *moments(k)), strict=True):
        assert torch.equal(got, expected)


def test_reference_is_noised_on_the_line_from_noise_to_picture():
    latents, noise = torch.randn(2, 1, 4, 6, 8)
    for sigma in (0.0, 0.3, 1.0):
        expected = patchify(latents + sigma * (noise - latents), 2)
        torch.testing.assert_close(add_noise(latents, noise, sigma, 2), expected)


def test_mixture_has_the_moments_of_all_its_tokens():
    torch.manual_seed(0)
    a, b = torch.randn(2, 12, 16), 3 + 2 * torch.randn(2, 12, 16)
    mean, variance = mix_moments(*zip(moments(a), moments(b), strict=True), [0.5, 0.5])
    for got, expected in zip((mean, variance), moments(torch.cat((a, b), 1)), strict=True):
        torch.testing.assert_close(got, expected)


def test_full_pull_gives_the_references_statistics():
    x, reference = torch.randn(2, 4, 50, 16), 3 + 2 * torch.randn(4, 50, 16)
    for got, expected in zip(moments(pull_statistics(x, *moments(reference), 1.0)), moments(reference), strict=True):
        torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pull_statistics(x, *moments(reference), 0.0), x)
    flat = torch.ones(2, 4, 50, 16)  # no deviation to stretch
    mean = moments(reference)[0].expand_as(flat)
    torch.testing.assert_close(pull_statistics(flat, *moments(reference), 1.0), mean)


def test_text_tokens_never_see_the_reference(scene):
    stream, references = scene
    for strength in (0.5, 1.0, 2.0):
        (attend,) = spliced_attention(references, [r.k[0][None] for r in references], [strength / 2] * 2)
        answer = attend(*stream)
        assert torch.equal(answer[:, :, :5], attention(*stream)[:, :, :5])
        assert not torch.allclose(answer[:, :, 5:], attention(*stream)[:, :, 5:])


def test_equal_references_count_as_one(scene):
    stream, (one, _) = scene
    (alone,) = spliced_attention([one], [one.k], [1.0])
    (thrice,) = spliced_attention([one] * 3, [one.k] * 3, [0.2, 0.3, 0.5])
    torch.testing.assert_close(thrice(*stream), alone(*stream), rtol=1e-4, atol=1e-5)


def test_reference_of_little_weight_hardly_counts(scene):
    stream, (one, other) = scene
    (alone,) = spliced_attention([one], [one.k], [1.0])
    far = []
    for weight in (1e-6, 0.1, 0.5, 0.9):
        (mixed,) = spliced_attention([one, other], [one.k, other.k], [1 - weight, weight])
        far.append((mixed(*stream) - alone(*stream)).norm().item())
    assert far == sorted(far) and far[0] < 1e-3


@pytest.mark.parametrize(("strength", "pull"), [(0.6, PULL), (1.0, PULL), (1.5, (1 + PULL) / 2), (2.0, 1.0)])
def test_strength_matches_its_formula(scene, strength, pull):
    """Up to 1, answers are blended; beyond, references count that often in the softmax, and statistics pull harder."""
    (q, k, v), references = scene
    shares = (0.25, 0.75)
    (attend,) = spliced_attention(references, [r.k for r in references], [strength * share for share in shares])

    of_queries, of_keys = (
        mix_moments([r[at][0] for r in references], [r[at + 1][0] for r in references], shares) for at in (2, 4)
    )
    queries = pull_statistics(q[:, :, 5:], *of_queries, pull)
    own = torch.cat((k[:, :, :5], pull_statistics(k[:, :, 5:], *of_keys, pull)), 2)
    keys, values = (
        torch.cat((mine[0], *theirs), 1).repeat_interleave(2, 0)
        for mine, theirs in ((own, [r.k[0] for r in references]), (v, [r.v[0] for r in references]))
    )
    often = torch.cat((torch.ones(17), *(torch.full((12,), share * max(strength, 1.0)) for share in shares)))
    weights = often * (queries[0] @ keys.transpose(1, 2) / 4).exp()  # 4 is √16
    spliced = (weights / weights.sum(-1, keepdim=True)) @ values
    expected = attention(q, k, v)[0, :, 5:].lerp(spliced, min(strength, 1.0))

    torch.testing.assert_close(attend(q, k, v)[0, :, 5:], expected, rtol=1e-4, atol=1e-5)


def test_strength_has_no_jumps(scene):
    stream, references = scene

    def answer(strength: float) -> torch.Tensor:
        (attend,) = spliced_attention(references, [r.k for r in references], [strength / 2] * 2)
        return attend(*stream)

    native = torch.cat((attention(*stream)[:, :, :5], attention(*stream)[:, :, 5:]), 2)
    torch.testing.assert_close(answer(1e-6), native, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer(1 - 1e-6), answer(1.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer(1 + 1e-6), answer(1.0), rtol=1e-4, atol=1e-4)


# ---- the cache --------------------------------------------------------------------------------------------------


def test_cache_hit_gives_the_same_picture_as_a_miss(folder, pipeline, refs, cache, monkeypatch):
    first = pipeline.render([styled((refs[0], 0.8))])[0]
    assert len(list(cache.iterdir())) == 2  # the first of three steps is pure noise

    anew = Pipeline.load(str(folder), device="cpu")
    monkeypatch.setattr("model.pipeline.capture", None)  # would fail if it were called
    again = anew.render([styled((refs[0], 0.8))])[0]
    assert pixels(again) == pixels(first)
    assert anew.render([styled((refs[0], -1.5), seed=9, prompt="an owl", leak_guard="shift")])


def test_captures_are_keyed_by_what_they_depend_on(folder, pipeline, refs, cache):
    """Another size, schedule, picture, number format or number of threads is another capture; the reference's path is
    not part of the key."""
    steps = 2
    known = 0
    for spec in (
        styled((refs[0], 1.0), steps=steps),
        styled((refs[0], 1.0), steps=steps, width=80),
        styled((refs[0], 1.0), steps=steps, mu=0.2),
        styled((refs[1], 1.0), steps=steps),
    ):
        pipeline.render([spec])
        assert len(list(cache.iterdir())) == known + 1
        known += 1
    Pipeline.load(str(folder), device="cpu", dtype="bfloat16").render([styled((refs[0], 1.0), steps=steps)])
    known += 1
    assert len(list(cache.iterdir())) == known

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        pipeline.render([styled((refs[0], 1.0), steps=steps)])
    finally:
        torch.set_num_threads(threads)
    assert len(list(cache.iterdir())) == known + 1

    refs[0].rename(moved := refs[0].with_name("moved.png"))
    pipeline.render([styled((moved, 1.0), steps=steps)])
    assert len(list(cache.iterdir())) == known + 1


def test_adapter_gets_its_own_captures(folder, pipeline, refs, tmp_path, monkeypatch):
    path = tmp_path / "ink.safetensors"
    layers = {name: layer for name, layer in pipeline.dit.named_modules() if isinstance(layer, torch.nn.Linear)}
    pairs = {
        f"{name}.lora_{half}.weight": torch.randn(*((2, layer.in_features) if half == "A" else (layer.out_features, 2)))
        for name, layer in layers.items()
        for half in "AB"
    }
    save_file(pairs, path)
    spec = replace(styled((refs[0], 1.0)), loras=(Lora(path, 0.1),))
    pipeline.render([styled((refs[0], 1.0))])
    after = pixels(pipeline.render([spec])[0])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert after == pixels(Pipeline.load(str(folder), device="cpu").render([spec])[0])


def test_pictures_of_one_batch_keep_their_own_guards(pipeline, refs):
    specs = [styled((refs[0], 1.0), leak_guard=guard) for guard in LEAK_GUARDS]
    together = [pixels(picture) for picture in pipeline.render(specs)]
    assert together == [pixels(pipeline.render([spec])[0]) for spec in specs]


def test_order_of_cache_keys_does_not_matter(tmp_path):
    cache, made = CaptureCache(tmp_path), Capture(*torch.randn(6, 1, 1, 4, 16))
    cache.put({"step": 0, "guard": "shift"}, made)
    found = cache.get({"guard": "shift", "step": 0}, CPU)
    assert found is not None and torch.equal(found.k, made.k)


def test_broken_capture_is_made_again(pipeline, refs, cache):
    first = pipeline.render([styled((refs[0], 1.0))])[0]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert pixels(pipeline.render([styled((refs[0], 1.0))])[0]) == pixels(first)
    assert all(file.stat().st_size > 100 for file in cache.iterdir())


def test_unwritable_cache_is_ignored(pipeline, refs, cache):
    first = pipeline.render([styled((refs[0], 1.0))])[0]
    cache.rename(cache.with_name("old"))
    cache.write_text("in the way")
    assert pixels(pipeline.render([styled((refs[0], 1.0))])[0]) == pixels(first)


def test_least_recently_used_capture_is_dropped_first(tmp_path):
    made = Capture(*torch.randn(6, 1, 1, 4, 16))
    cache = CaptureCache(tmp_path / "captures")
    cache.put({"step": 0}, made)
    cache.limit = 3 * next(cache.folder.iterdir()).stat().st_size
    for step in range(3):
        cache.put({"step": step}, made)
        assert cache.get({"step": 0}, CPU) is not None  # which uses it
    cache.put({"step": 3}, made)

    found = [cache.get({"step": step}, CPU) is not None for step in range(4)]
    assert found[0] and found[3] and not all(found)
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= cache.limit

    cache.put({"step": 4}, made, count=100)  # they cannot all be kept, so none is written
    assert cache.get({"step": 4}, CPU) is None


def test_run_whose_captures_do_not_all_fit_keeps_none(pipeline, refs, cache, monkeypatch):
    """They would push out each other, and other captures, before anything is read again."""
    spec = styled((refs[0], 0.5), (refs[1], 0.5))
    pipeline.render([spec])
    (size,) = {file.stat().st_size for file in cache.iterdir()}
    shutil.rmtree(cache)

    monkeypatch.setattr(pipeline._captures, "limit", 3 * size)  # too few for two references at two steps each
    pipeline.render([spec])
    assert not cache.exists()


def test_capture_of_another_format_is_not_used(tmp_path, monkeypatch):
    cache, made = CaptureCache(tmp_path), Capture(*torch.randn(6, 1, 1, 4, 16))
    cache.put({"step": 0}, made)
    monkeypatch.setattr(module, "CACHE_VERSION", module.CACHE_VERSION + 1)
    assert cache.get({"step": 0}, CPU) is None


def test_nearly_full_disk_is_not_filled(tmp_path, monkeypatch):
    cache, made = CaptureCache(tmp_path), Capture(*torch.randn(6, 1, 1, 4, 16))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=MIN_FREE_BYTES))
    cache.put({"step": 0}, made)
    assert cache.get({"step": 0}, CPU) is None


def test_drafts_of_killed_processes_are_removed(tmp_path):
    cache, made = CaptureCache(tmp_path), Capture(*torch.randn(6, 1, 1, 4, 16))
    old, new = tmp_path / ".a.safetensors.17.draft", tmp_path / ".b.safetensors.18.draft"
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.put({"step": 0}, made)
    assert not old.exists() and new.exists()


# ---- refusals ---------------------------------------------------------------------------------------------------


def test_splice_errors_are_one_sentence_and_a_hint(pipeline, refs, tmp_path):
    many = []
    for index in range(17):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
        many.append(Reference(tmp_path / f"{index}.png"))
    style = Style("x", 1.0, (Reference(refs[0]),))
    for styles, changes, message in (
        ((replace(style, method="tokens"),), {}, "has no style encoder"),
        ((replace(style, method="magic"),), {}, 'no style method "magic"'),
        ((replace(style, references=tuple(many)),), {}, "17 reference pictures are spliced, but at most 16 can be"),
        ((style,), {"steps": 1}, "needs two steps"),
        ((style,), {"leak_guard": "luck"}, 'no leak guard "luck"'),
        ((style,), {"style_guidance": -1.0}, "is out of range"),
        ((style,), {"style_guidance": float("nan")}, "is out of range"),
    ):
        with pytest.raises(K2Error, match=message) as error:
            pipeline.render([replace(FOX, styles=styles, **changes)])
        assert error.value.hint


def test_tokens_and_splice_in_one_picture(tiny, refs):  # noqa: F811
    """With a style encoder, auto uses it, and a style may still ask for the splice."""
    pipeline = Pipeline.load("tiny", device="cpu")

    def mixed(*pairs: tuple[Path, str]) -> Picture:
        styles = tuple(Style(path.stem, 0.5, (Reference(path),), method=method) for path, method in pairs)
        return pipeline.render([replace(FOX, styles=styles)])[0]

    ways = [
        mixed(*pairs)
        for pairs in (
            [(refs[0], "auto")],
            [(refs[0], "tokens")],
            [(refs[0], "splice")],
            [(refs[0], "tokens"), (refs[1], "splice")],
            [(refs[1], "splice"), (refs[0], "auto")],
        )
    ]
    assert pixels(ways[0]) == pixels(ways[1]) and pixels(ways[3]) == pixels(ways[4])
    assert len({pixels(picture) for picture in ways}) == 3
    assert [style["method"] for style in ways[3].record["styles"]] == ["tokens", "splice"]
    assert ways[0].record["styles"][0]["method"] == "tokens"


@pytest.mark.parametrize("style_guidance", [None, 0.0, 1.5])
@pytest.mark.parametrize("spliced", [1.0, -1.0])
def test_weak_token_style_does_not_weaken_a_spliced_one(tiny, refs, style_guidance, spliced):  # noqa: F811
    """Style rows of almost no strength are faded in; a style without rows is not faded with them."""
    pipeline = Pipeline.load("tiny", device="cpu")

    def made(strength: float) -> np.ndarray:
        styles = (
            Style("a", spliced, (Reference(refs[0]),), method="splice"),
            Style("b", strength, (Reference(refs[1]),), method="tokens"),
        )
        spec = replace(FOX, styles=styles, style_guidance=style_guidance)
        return np.asarray(pipeline.render([spec])[0].image, np.float32)

    assert np.abs(made(0.0) - made(1e-6)).mean() < 0.01 < np.abs(made(0.0) - made(0.1)).mean()
