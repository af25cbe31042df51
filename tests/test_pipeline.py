"""From specs to pictures: reproducible, independent of the batch, and impossible requests refused in one sentence."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import difference, pixels, tiny, tiny_box  # noqa: F401

from k2cli import models
from model import library
from model.attention import attention
from model.branches import GuidedVelocity, PromptContexts, WeightedContexts
from model.checkpoint import read, save
from model.conditioning import MAX_CONTEXTS
from model.errors import K2Error
from model.flux_vae import FluxVAE, FluxVAEConfig
from model.hashes import sha256
from model.latents import draw_noise, patchify, unpatchify
from model.layouts import load_dit
from model.pipeline import Pipeline, to_image
from model.reference_weights import weigh
from model.resolve import evaluations, weighted_negatives, weighted_prompts
from model.safety import Verdict
from model.sampler import adams_bashforth, apply_guidance, shifted_sigmas
from model.spec import SIDES, Picture, Reference, RenderSpec, Style, raw_mu, tie_to_lead
from model.style import StyleEncoder
from model.text_encoder import MAX_PROMPT_TOKENS
from model.train.rollout import conditioned_velocity

FOX = RenderSpec("a red fox", seed=7)


@pytest.fixture
def pipeline(tiny):  # noqa: F811
    return Pipeline.load("tiny", device="cpu")


@pytest.fixture
def red(tmp_path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_rendering_twice_is_bit_identical(tiny, pipeline):  # noqa: F811
    first, again = pipeline.render([FOX])[0], pipeline.render([FOX])[0]
    anew = Pipeline.load("tiny", device="cpu").render([FOX])[0]

    assert pixels(first) == pixels(again) == pixels(anew)
    assert pixels(pipeline.render([replace(FOX, seed=8)])[0]) != pixels(first)
    assert pixels(pipeline.render([replace(FOX, prompt="a blue owl")])[0]) != pixels(first)


def test_picture_does_not_depend_on_its_batch(pipeline):
    """Different prompt lengths, seeds and negatives in one batch."""
    specs = [
        FOX,
        replace(FOX, seed=8),
        replace(FOX, prompt="an owl in flight over a dark forest at night"),
        replace(FOX, negative="blue", seed=9),
        replace(FOX, prompt="owl"),
    ]
    together = pipeline.render(specs)
    for spec, picture in zip(specs, together, strict=True):
        assert difference(pipeline.render([spec])[0], picture) <= 1
    assert len({pixels(picture) for picture in together}) == len(specs)


@pytest.mark.parametrize("cohesion", [0.0, 0.6])
def test_prompts_of_several_lengths_run_as_one_stream(pipeline, monkeypatch, cohesion):
    """One stream while it is small, with or without a lead picture; separate groups give the same."""
    specs = [FOX, replace(FOX, prompt="an owl in flight over a dark forest at night", seed=8)]
    specs = tie_to_lead(specs, cohesion)
    streams = []
    velocities = pipeline.dit.velocities
    monkeypatch.setattr(
        pipeline.dit, "velocities", lambda groups, *more: streams.append(groups) or velocities(groups, *more)
    )
    together = pipeline.render(specs)
    assert len(streams) == pipeline.resolve(FOX).steps
    monkeypatch.setattr("model.pipeline.ONE_STREAM_TOKENS", 1)
    for ours, one in zip(together, pipeline.render(specs), strict=True):
        assert difference(ours, one) <= 1
    assert len(streams) == pipeline.resolve(FOX).steps


def test_order_is_kept_across_batches(pipeline):
    sizes, steps = [(64, 64), (80, 64)], [1, 2]
    specs = [
        replace(FOX, width=w, height=h, steps=s, seed=i)
        for i, ((w, h), s) in enumerate(itertools.product(sizes, steps))
    ] * 3
    for spec, picture in zip(specs, pipeline.render(specs), strict=True):
        assert (picture.image.size, picture.record["steps"]) == ((spec.width, spec.height), spec.steps)
        assert picture.record["seed"] == spec.seed


def test_prompts_are_encoded_once_and_evicted(pipeline, monkeypatch):
    encoded = []
    encode = pipeline.text.encode

    def watched(prompts):
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(pipeline.text, "encode", watched)

    for _ in pipeline.stream(replace(FOX, seed=i, steps=1) for i in range(40)):
        pass
    assert encoded == ["a red fox", ""]

    for _ in pipeline.stream(replace(FOX, prompt=f"fox {i}", steps=1) for i in range(100)):
        assert len(pipeline.conditioning._contexts.values) <= MAX_CONTEXTS
    assert encoded.count("") == 1  # the negative prompt stays, as it is always in use

    encoded.clear()
    pipeline.render([replace(FOX, prompt=f"{what} fox", guidance=0.0, negative="fog, ink") for what in ("an", "one")])
    assert len(encoded) == len(set(encoded)) == 9  # each prompt, with either phrase, the phrases, the neutral one

    encoded.clear()
    avoided = ", ".join(f"fault {i}" for i in range(12))
    pipeline.render([replace(FOX, prompt=f"{i} foxes", guidance=0.0, negative=avoided) for i in range(3)])
    assert len(encoded) == len(set(encoded)) == 3 * 13 + 12  # the neutral prompt is cached


def test_reference_is_read_once(pipeline, red, monkeypatch):
    read, seen = StyleEncoder.encode_reference, []
    monkeypatch.setattr(StyleEncoder, "encode_reference", lambda self, latents: seen.append(1) or read(self, latents))
    styles = [(Style("look", strength=s, references=(Reference(red),)),) for s in (0.5, 1.0)]

    several = [replace(FOX, prompt=f"{i} foxes", styles=each) for i in range(3) for each in styles]
    together = pipeline.render(several)

    assert len(seen) == 1
    pipeline.forget()
    assert pixels(pipeline.render([several[3]])[0]) == pixels(together[3]) and len(seen) == 2


def test_style_with_many_references_is_read_once(pipeline, tmp_path, monkeypatch):
    read, seen = StyleEncoder.encode_reference, []
    monkeypatch.setattr(StyleEncoder, "encode_reference", lambda self, latents: seen.append(1) or read(self, latents))
    for shade in range(MAX_CONTEXTS + 6):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    style = Style("look", 1.0, tuple(Reference(tmp_path / f"{shade}.png") for shade in range(MAX_CONTEXTS + 6)))

    pipeline.render([replace(FOX, prompt=f"{i} foxes", steps=1, styles=(style,)) for i in range(2)])

    assert len(seen) == MAX_CONTEXTS + 6


def test_stream_consumes_specs_lazily(pipeline):
    """Memory cannot grow with the number of prompts, which need not even be finite."""
    count = itertools.count()
    pictures = list(itertools.islice(pipeline.stream(replace(FOX, seed=i, steps=1) for i in count), 3))
    assert len(pictures) == 3
    assert next(count) < 64


def test_steps_are_reported(pipeline):
    seen = []
    pipeline.render([replace(FOX, steps=3)], on_step=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_checkpoint_defaults_are_used(tiny, pipeline):  # noqa: F811
    record = pipeline.render([FOX])[0].record
    assert (record["steps"], record["guidance"], record["width"], record["height"]) == (4, 2.0, 64, 64)
    assert record["mu"] == raw_mu(16)

    turbo = Pipeline.load("tiny", variant="turbo", device="cpu").render([FOX])[0].record
    assert (turbo["steps"], turbo["guidance"], turbo["mu"]) == (2, 0.0, 1.15)
    assert turbo["model"]["variant"] == "turbo"

    given = pipeline.render([replace(FOX, steps=1, guidance=0.0, mu=0.3, width=80)])[0].record
    assert [given[k] for k in ("steps", "guidance", "mu", "width", "height")] == [1, 0.0, 0.3, 80, 64]


def test_guidance(pipeline):
    """The negative prompt counts, and in another way when guidance is off (tests/test_avoid.py)."""
    off = [pipeline.render([replace(FOX, guidance=0.0, negative=n)])[0] for n in ("", "blue")]
    on = [pipeline.render([replace(FOX, guidance=4.0, negative=n)])[0] for n in ("", "blue", "a red fox")]
    assert len({pixels(picture) for picture in (*off, *on[:2])}) == 4
    assert difference(on[2], off[0]) <= 1  # guiding away from itself changes nothing


def test_record_is_complete(tiny, pipeline, red):  # noqa: F811
    style = Style("dusk", 0.6, (Reference(red),), keywords=("warm",))
    record = pipeline.render([replace(FOX, styles=(style,))])[0].record

    assert record["prompt"] == "a red fox" and record["seed"] == 7
    assert record["device"] == "cpu" and record["dtype"] == "float32"
    assert record["model"]["name"] == "tiny" and record["model"]["variant"] == "raw"
    weights = [f"tiny-{part}.safetensors" for part in ("raw", "text", "vae", "style")]
    assert record["model"]["files"] == {name: sha256(tiny / name) for name in (*weights, "tiny-tokenizer.json")}
    assert record["styles"] == [
        {
            "name": "dusk",
            "strength": 0.6,
            "keywords": ["warm"],
            "avoids": [],
            "method": "tokens",
            "references": [{"image": str(red), "weight": 1.0, "sha256": sha256(red)}],
        }
    ]
    assert record["versions"]["torch"] == torch.__version__


def test_unpickling_a_record_imports_nothing(pipeline):
    class Plain(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            raise AssertionError(f"{name} of {module}")

    record = pipeline.render([FOX])[0].record

    assert Plain(io.BytesIO(pickle.dumps(record))).load() == record


def test_styles(pipeline, red, tmp_path):
    """Strength 0 is the picture without the style; order never matters; a changed file is read again."""
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "blue.png")

    def render(*styles: tuple[Path, float]) -> Picture:
        made = tuple(Style(path.stem, strength, (Reference(path),)) for path, strength in styles)
        return pipeline.render([replace(FOX, styles=made)])[0]

    blue = tmp_path / "blue.png"
    assert pixels(render((red, 0.0))) == pixels(render())
    assert len({pixels(render((red, strength))) for strength in (-1.0, 0.0, 0.5, 1.0, 2.0)}) == 5
    assert pixels(render((red, 0.7), (blue, 0.3))) == pixels(render((blue, 0.3), (red, 0.7)))
    before = render((red, 1.0))
    shutil.copy(blue, red)
    assert pixels(render((red, 1.0))) == pixels(render((blue, 1.0))) != pixels(before)


@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 0.0}, {"style_guidance": 1.5}, {"guidance_until": 0.5, "sampler": "ab2"}], ids=str
)
def test_style_strength_starts_continuously(pipeline, red, settings):
    """Neutral rows are still rows: near strength 0 they must count for next to nothing."""

    def made(strength: float) -> np.ndarray:
        spec = replace(FOX, styles=(Style("red", strength, (Reference(red),)),), **settings)
        return np.asarray(pipeline.render([spec])[0].image, np.float32)

    def off(one: float, other: float) -> float:
        return float(np.abs(made(one) - made(other)).mean())

    for sign in (1, -1):
        assert off(0.0, sign * 1e-6) < 0.01 < off(0.0, sign * 0.1)
        steps = [off(sign * at / 100, sign * (at + 2) / 100) for at in range(0, 16, 2)]
        assert max(steps) < 0.5 * off(0.0, sign * 0.16)


def test_guidance_may_end_before_the_last_step(pipeline, monkeypatch):
    """The steps after it use only the prompt's own branch: half the work."""
    spec = replace(FOX, steps=5, guidance=3.0)
    rows = []
    velocity = pipeline.dit.velocity

    def watched(tokens, *args, **more):
        rows.append(len(tokens))
        return velocity(tokens, *args, **more)

    monkeypatch.setattr(pipeline.dit, "velocity", watched)
    monkeypatch.setattr(Pipeline, "_one_stream_tokens", property(lambda self: 0))

    def made(**changes: float) -> Picture:
        rows.clear()
        return pipeline.render([replace(spec, **changes)])[0]

    whole = made()
    assert (sum(rows), whole.record["guidance_until"]) == (10, 1.0)
    assert evaluations(pipeline.resolve(spec)) == 2
    assert pixels(made(guidance_until=1.0)) == pixels(whole)
    for until, guided_steps in ((0.4, 2), (0.41, 3), (0.8, 4), (0.01, 1)):
        picture = made(guidance_until=until)
        assert (sum(rows), picture.record["guidance_until"]) == (5 + guided_steps, until)
    rest = made(guidance=0.0, guidance_until=0.4)
    assert sum(rows) == 5 and "guidance_until" not in rest.record

    settled, config = pipeline.resolve(spec), pipeline.dit.config
    cells = settled.width // pipeline.vae.factor
    grid = (cells // config.patch, cells // config.patch)
    tokens = patchify(draw_noise(FOX.seed, config.channels, cells, cells), config.patch)
    sigmas = shifted_sigmas(5, settled.mu)
    with torch.inference_mode():
        said, unsaid = (
            conditioned_velocity(pipeline.dit, pipeline.text.encode([text])[0], None, grid) for text in (FOX.prompt, "")
        )
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            level = torch.tensor([sigma])
            v = said(tokens, level)
            v = apply_guidance(v, unsaid(tokens, level), 3.0) if step < 2 else v
            tokens = tokens + (following - sigma) * v
        expected = pipeline.vae.decode(unpatchify(tokens, config.patch, cells, cells))[0]
    assert np.abs(np.asarray(to_image(expected), int) - np.asarray(made(guidance_until=0.4).image, int)).max() <= 1


class Talker:
    """A network whose velocity is the number its context consists of, plus 100 if a splice takes part."""

    def rope(self, text_tokens: int, grid: tuple[int, int]) -> torch.Tensor:
        return torch.zeros(text_tokens)

    def velocity(self, tokens, context, mods, rope, attend=None):
        return (context.mean((1, 2), keepdim=True) + (100 if attend else 0)).expand_as(tokens)


@pytest.mark.parametrize("style_guidance", [None, 1.5])
@pytest.mark.parametrize("presence", [1.0, 0.25])
@pytest.mark.parametrize("spliced", [True, False])
def test_branches_follow_the_guidance_formulas(style_guidance, presence, spliced):
    """For two pictures with prompts of different lengths, two wordings each and two negative ones. A splice enters
    every branch; if styles have a guidance of their own, only those with the style."""
    ways = ("styled", "lasting", *(("plain",) if style_guidance is not None else ()))
    shares, against, guidance = (0.7, 0.3), (0.4, 0.6), 3.0
    numbers = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0, 6.0, 5.0]).view(4, 2)  # of each branch, the negative one last
    told = [
        [
            WeightedContexts(share, [torch.full((1, 3 + p, 2), row[w] + 10 * p) for p in (0, 1)])
            for w, share in enumerate(parts)
        ]
        for row, parts in zip(numbers, (shares, shares, shares, against), strict=True)
    ]
    said = PromptContexts(dict(zip(ways, told, strict=False)), told[-1])
    splice = SimpleNamespace(velocity=lambda evaluate, step: evaluate([attention])) if spliced else None
    velocity = GuidedVelocity(
        Talker(), said, torch.zeros(1, 1, 7), (2, 2), guidance=guidance, style_guidance=style_guidance,
        fade=presence, splice=splice,
    )  # fmt: skip

    found = velocity(torch.zeros(2, 4, 3), 0)

    (styled, lasting, plain), negative = numbers[:3] @ torch.tensor(shares), numbers[3] @ torch.tensor(against)
    styled = lasting + presence * (styled - lasting) + 100 * spliced
    if style_guidance is None:
        expected = styled + guidance * (styled - negative - 100 * spliced)
    else:
        expected = plain + guidance * (plain - negative) + (1 + style_guidance) * (styled - plain)
    for picture, more in zip(found, (0, 10), strict=True):
        torch.testing.assert_close(picture, (expected + more).expand(4, 3))


def test_ab2_restarts_where_the_field_changes(pipeline, red, tmp_path, monkeypatch):
    """Where guidance ends, and after pure noise, which contains nothing of a spliced reference."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes = []

    def watched(velocity, tokens, sigmas, on_step, anew, first):
        changes.append(set(anew))
        return adams_bashforth(velocity, tokens, sigmas, on_step, anew, first)

    monkeypatch.setattr("model.pipeline.adams_bashforth", watched)
    spec = replace(FOX, steps=6, guidance_until=0.5, sampler="ab2")
    spliced = (Style("red", 0.7, (Reference(red),), method="splice"),)
    pipeline.render([spec, replace(spec, styles=spliced)])
    assert changes == [{3}, {3, 1}]


def test_sampler_is_recorded_and_unknown_ones_refused(pipeline):
    first, second = (pipeline.render([replace(FOX, sampler=sampler)])[0] for sampler in (None, "ab2"))
    assert (first.record["sampler"], second.record["sampler"]) == ("euler", "ab2")
    once = [pixels(pipeline.render([replace(FOX, sampler=sampler, steps=1)])[0]) for sampler in ("euler", "ab2")]
    assert pixels(first) != pixels(second) and once[0] == once[1]
    with pytest.raises(K2Error, match='no sampler "heun"'):
        pipeline.resolve(replace(FOX, sampler="heun"))


@pytest.mark.parametrize("until", [0.0, 0.009, -0.5, 1.01, float("nan")])
def test_guidance_until_is_validated(pipeline, until):
    with pytest.raises(K2Error, match="Guidance cannot end after"):
        pipeline.resolve(replace(FOX, guidance_until=until))


def worded(*styles: tuple[str, float, tuple[str, ...]], **changes) -> RenderSpec:
    """FOX in keyword styles, whose words join as on the command line."""
    made = tuple(Style(name, strength, keywords=words) for name, strength, words in styles)
    said = dict.fromkeys(word for style in made if style.strength > 0 for word in style.keywords)
    return replace(FOX, prompt=", ".join((FOX.prompt, *said)), styles=made, **changes)


def test_keyword_style_counts_by_its_strength():
    def found(*styles: tuple[str, float, tuple[str, ...]]) -> list[tuple[str, float]]:
        return [
            (prompt.removeprefix(FOX.prompt), pytest.approx(share))
            for prompt, share in weighted_prompts(worded(*styles))
        ]

    wet, two = ("wet", 0.7, ("watercolour", "soft light")), ("two", 0.3, ("riso, two inks",))
    assert found() == [("", 1)] == found(("wet", -1.0, ("watercolour",)))
    assert found((*wet[:1], 1.0, wet[2])) == [(", watercolour, soft light", 1)]
    assert found(wet) == [(", watercolour, soft light", 0.7), ("", 0.3)]
    assert found(wet, two) == [
        (", watercolour, soft light, riso, two inks", 0.3),
        (", watercolour, soft light", 0.4),
        ("", 0.3),
    ]
    halves = [(name, 0.5, ("watercolour",)) for name in "ab"]
    assert found(*halves) == found(("whole", 1.0, ("watercolour",)))  # as with pictures
    assert len(found(("a", 0.1, ("wet",)), ("b", 0.2, ("wet",)), ("c", 0.3, ("dry",)))) == 2  # 0.1 + 0.2 is 0.3
    assert found(wet, ("like", 0.7, ("soft light",))) == [(", watercolour, soft light", 0.7), (", soft light", 0.3)]
    assert found(wet, ("less", 0.2, ("soft light", "grain"))) == [
        (", watercolour, soft light, grain", 0.2),
        (", watercolour, soft light", 0.5),
        (", soft light", 0.2),
        ("", pytest.approx(0.1)),
    ]
    assert found(("wet", 2.0, ("watercolour",))) == [(", watercolour", 1.5), ("", -0.5)]  # beyond 1, half as fast
    unsaid = replace(FOX, styles=(Style("wet", 0.5, keywords=("watercolour",)),))
    assert weighted_prompts(unsaid) == [(FOX.prompt, 0.5), (FOX.prompt, 0.5)]  # nothing to take away


def test_references_and_loras_carry_the_strength():
    for carried in ({"references": (Reference(Path("a.png")),)}, {"lora": Path("a.safetensors")}):
        style = Style("wet", 0.5, keywords=("watercolour",), **carried)
        spec = replace(FOX, prompt=f"{FOX.prompt}, watercolour", styles=(style,))
        assert weighted_prompts(spec) == [(spec.prompt, 1.0)]


@pytest.mark.parametrize(
    "other",
    [
        Style("red", 0.5, (Reference(Path("a.png")),), keywords=("grain",)),
        Style("film", 0.5, lora=Path("a.safetensors"), triggers=("grain",)),
        Style("red", -0.5, (Reference(Path("a.png")),), avoids=("grain",)),
    ],
    ids=["pictures", "LoRA", "negative"],
)
def test_shared_words_join_in_full(other):
    """The command line adds shared words once: turning one style up from zero must not turn the other down."""
    spec = worded(("wet", 0.2, ("grain", "soft light")))
    said = weighted_prompts(replace(spec, styles=(*spec.styles, other)))
    assert [prompt for prompt, _ in said] == [f"{FOX.prompt}, grain, soft light", f"{FOX.prompt}, grain"]


def test_negative_keyword_style_swaps_its_words():
    """Its avoids join the prompt and its keywords the negative one; avoided words weigh as much as their style."""
    turned = Style("wet", -0.3, keywords=("watercolour, wet",), avoids=("grain",))
    spec = replace(FOX, prompt=f"{FOX.prompt}, grain", negative="rain, watercolour, wet", styles=(turned,))
    assert weighted_prompts(spec) == [(f"{FOX.prompt}, grain", 0.3), (FOX.prompt, 0.7)]
    assert weighted_negatives(spec) == [("rain, watercolour, wet", 0.3), ("rain", 0.7)]

    clean, twice = Style("clean", 0.25, avoids=("grain",)), Style("again", 0.5, avoids=("grain",))
    assert weighted_negatives(replace(FOX, negative="grain, grain", styles=(clean, twice))) == [
        ("grain, grain", 0.75),
        ("grain", 0.25),
    ]
    assert weighted_negatives(replace(FOX, negative="a,b", styles=(replace(clean, strength=1.0),))) == [
        ("a,b, grain", 1.0)
    ]
    carried = replace(clean, lora=Path("a.safetensors"))
    assert weighted_negatives(replace(FOX, styles=(carried, twice))) == [("grain", 1.0)]
    faint, both = replace(twice, strength=0.125), replace(clean, strength=0.375)
    assert weighted_negatives(replace(FOX, styles=(faint, clean))) == weighted_negatives(replace(FOX, styles=(both,)))
    assert weighted_negatives(replace(FOX, negative="rain", styles=(carried,))) == [("rain, grain", 1.0)]


@pytest.mark.parametrize("side", ["keywords", "avoids"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("settings", [{"guidance": 2.0}, {"guidance": 0.0}, {"style_guidance": 1.5}], ids=str)
def test_keywords_and_avoids_start_continuously(pipeline, red, settings, side, sign):
    def made(strength: float) -> np.ndarray:
        style = Style("wet", sign * strength, **{side: ("watercolour",)})
        wanted, against = (("keywords", "avoids") if sign > 0 else ("avoids", "keywords")) if strength else ("", "")
        said = ", ".join((FOX.prompt, *getattr(style, wanted, ())))
        spec = replace(FOX, prompt=said, negative=", ".join(getattr(style, against, ())), steps=3, **settings)
        look = Style("red", 0.7, (Reference(red),))
        return np.asarray(pipeline.render([replace(spec, styles=(style, look))])[0].image, np.float32)

    def off(one: float, other: float) -> float:
        return float(np.abs(made(one) - made(other)).mean())

    assert off(0.0, 1e-6) < 0.01 and off(1.0, 1 + 1e-6) < 0.01
    assert 0.01 < off(0.0, 0.2) < off(0.0, 0.5) < off(0.0, 1.0) < off(0.0, 1.9)


@pytest.mark.parametrize("method", ["tokens", "splice"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 0.0}, {"style_guidance": 1.5}], ids=str)
def test_keyword_strength_is_continuous(pipeline, red, settings, method, tmp_path, monkeypatch):
    """From the picture without the words to the one with them, bit for bit at both ends, beside a style of pictures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    look = Style("red", 0.7, (Reference(red),), method=method)

    def made(strength: float) -> np.ndarray:
        spec = worded(("wet", strength, ("watercolour",)), steps=3, **settings)
        return np.asarray(pipeline.render([replace(spec, styles=(*spec.styles, look))])[0].image, np.float32)

    def off(one: float, other: float) -> float:
        return float(np.abs(made(one) - made(other)).mean())

    assert not off(0.0, -0.0) and off(0.0, 1e-6) < 0.01 and off(1.0, 1 + 1e-6) < 0.01
    assert off(0.0, 0.2) < off(0.0, 0.5) < off(0.0, 1.0) < off(0.0, 2.0)
    said = replace(FOX, prompt=f"{FOX.prompt}, watercolour", steps=3, styles=(look,), **settings)
    assert np.array_equal(made(1.0), np.asarray(pipeline.render([said])[0].image))


def test_single_file_finds_its_other_parts(tiny, tmp_path, pipeline):  # noqa: F811
    """A lone transformer file gets the bundled model's other parts if they fit."""
    for part in ("text", "vae"):
        shutil.copy(tiny / f"tiny-{part}.safetensors", tiny / f"mini-{part}.safetensors")
    shutil.copy(tiny / "tiny-tokenizer.json", tiny / "mini-tokenizer.json")
    shutil.copy(tiny / "tiny-raw.safetensors", tmp_path / "mine.safetensors")
    try:
        mine = Pipeline.load(str(tmp_path / "mine.safetensors"), device="cpu")
    finally:
        for path in tiny.glob("mini-*"):
            path.unlink()
    assert pixels(mine.render([FOX])[0]) == pixels(pipeline.render([FOX])[0])


def test_parts_from_a_release_are_named_and_found_again(tiny, tmp_path, monkeypatch):  # noqa: F811
    """The files of a lone transformer folder and of a pulled release have the same names."""
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--krea--Krea-2-Turbo" / "snapshots" / commit
    Pipeline.load("tiny", "turbo", device="cpu").export(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(snapshot / "transformer", tmp_path / "mine")

    files = Pipeline.load(str(tmp_path / "mine"), device="cpu").hashes()

    weights = "diffusion_pytorch_model.safetensors"
    own = {weights, "config.json"}
    lent = {f"vae/{name}" for name in own} | {f"text_encoder/{name}" for name in ("model.safetensors", "config.json")}
    assert files.keys() == own | lent | {"tokenizer/tokenizer.json", "model_index.json"}
    assert all(sha256(models.recorded_file(str(tmp_path / "mine"), file)) == files[file] for file in files)


def test_bundled_parts_take_precedence_over_a_release(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A checkpoint of the bundled kind keeps rendering after another, larger model is pulled."""
    snapshot = tmp_path / "hub" / "models--krea--Krea-2-Raw" / "snapshots" / ("a" * 40)
    Pipeline.load("tiny", device="cpu").export(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(tiny, tmp_path / "box")
    for file in list((tmp_path / "box").glob("tiny-*")):
        file.rename(file.with_name(file.name.replace("tiny", "mini")))
    shutil.copy(tiny / "tiny-raw.safetensors", tmp_path / "mine.safetensors")

    def lent():
        return Pipeline.load(str(tmp_path / "mine.safetensors"), device="cpu").parts.text

    monkeypatch.setattr(library, "BUNDLED", tmp_path / "box")
    assert lent() == tmp_path / "box" / "mini-text.safetensors"

    file = tmp_path / "box" / "mini-text.safetensors"  # one of another kind comes from the release
    state, about = read(file)
    save(file, state, about | {"config": about["config"] | {"taps": (1, 2)}})
    assert lent() == snapshot


def test_stated_side_centres_other_shapes(tiny, tmp_path):  # noqa: F811
    """The open weights state none: their grids start at the corner, as everywhere."""
    assert Pipeline.load("tiny", device="cpu").dit.side == 4  # 64 px, 16 per token

    state, about = read(tiny / "tiny-raw.safetensors")
    for name, facts, side in (
        ("none", {key: about[key] for key in about if key != "native"}, None),
        ("many", about | {"shapes": ["96x64"]}, 4),
    ):
        save(tmp_path / f"{name}.safetensors", state, facts)
        assert load_dit(tmp_path / f"{name}.safetensors", cell_size=8)[0].side == side
    with pytest.raises(ValueError, match="trained on pictures of 64 pixels"):
        load_dit(tmp_path / "many.safetensors")


def test_references_are_read_at_the_style_encoders_size(tiny, tmp_path, red):  # noqa: F811
    """Whatever size the transformer was made for."""
    shutil.copytree(tiny, tmp_path / "box")
    state, about = read(tiny / "tiny-raw.safetensors")
    save(tmp_path / "box" / "tiny-raw.safetensors", state, about | {"native": 96})
    Image.linear_gradient("L").convert("RGB").save(red)
    spec = replace(FOX, width=64, height=64, styles=(Style("x", 1.0, (Reference(red),)),))
    rows = []
    for box in (tiny, tmp_path / "box"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "BUNDLED", box)
            rows.append(Pipeline.load("tiny", device="cpu").conditioning.style_rows(weigh(spec.styles, "tokens")))
    assert torch.equal(*rows)


def test_record_hashes_the_files_that_were_used(pipeline, red):
    spec, before = replace(FOX, styles=(Style("dusk", 0.6, (Reference(red),)),)), sha256(red)

    (picture,) = pipeline.render([spec], lambda done, steps: red.unlink(missing_ok=True))
    assert picture.record["styles"][0]["references"][0]["sha256"] == before


def test_unavailable_hashes_are_reported(tiny, tmp_path, monkeypatch):  # noqa: F811
    def fails(path):
        raise K2Error(f"{path.name} cannot be read.")

    monkeypatch.setattr("model.hashes.sha256", fails)
    with pytest.raises(K2Error, match=r"tiny-raw\.safetensors cannot be read"):
        Pipeline.load("tiny", device="cpu").render([FOX])


def test_truncated_tokens_are_recorded(pipeline):
    words = " ".join(["fox"] * (MAX_PROMPT_TOKENS + 5))
    long, whole = pipeline.render([replace(FOX, prompt=words), replace(FOX, prompt=words[: -4 * 5])])
    assert long.record["unread"] == 5 and "unread" not in whole.record
    assert pixels(long) == pixels(whole)


def test_flux_latents(tiny, tmp_path, pipeline):  # noqa: F811
    """FLUX.2's autoencoder in place of the other: its packed cells are the transformer's patches."""
    pipeline.export(tmp_path / "model")
    torch.manual_seed(0)
    config = {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    vae = FluxVAE(FluxVAEConfig.from_dict(config)).eval()
    shutil.rmtree(tmp_path / "model" / "vae")
    (tmp_path / "model" / "vae").mkdir()
    (tmp_path / "model" / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLFlux2", **config}))
    save(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors", vae.state_dict(), {})

    flux = Pipeline.load(str(tmp_path / "model"), device="cpu")
    picture = flux.render([replace(FOX, width=80)])[0]

    assert picture.image.size == (80, 64)
    images = torch.rand(1, 3, 64, 80) * 2 - 1
    packed = patchify(flux.vae.encode(images), 2).transpose(1, 2).unflatten(-1, (4, 5))
    torch.testing.assert_close(packed, torch.nn.functional.pixel_unshuffle(vae.encode(images), 2).detach())
    with pytest.raises(K2Error, match="Qwen-Image's autoencoder only"):
        flux.export(tmp_path / "out")


def test_blocked_picture_is_black(tiny):  # noqa: F811
    strict = Pipeline.load("tiny", device="cpu", filters=[lambda image, record: Verdict(record["seed"] != 7, "seven")])
    blocked, passed = strict.render([FOX, replace(FOX, seed=8)])
    assert not any(blocked.image.tobytes()) and blocked.record["blocked"]["reason"] == "seven"
    assert any(passed.image.tobytes()) and "blocked" not in passed.record


def test_rendering_imports_no_heavy_library(tiny):  # noqa: F811
    """Each of them takes as long as the picture."""
    code = """
import sys
from pathlib import Path
from model import library
library.BUNDLED = Path(sys.argv[1])
from model.pipeline import Pipeline
from model.spec import RenderSpec
Pipeline.load("tiny", device="cpu").render([RenderSpec("a red fox", steps=1)])
print(*{"transformers", "diffusers", "sympy", "scipy", "torch._dynamo", "torch._inductor"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


# ---- what must be refused -----------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(100, 64), (63, 130), (0, 5000)])
def test_impossible_size_suggests_the_nearest_one(pipeline, width, height):
    with pytest.raises(K2Error) as error:
        pipeline.resolve(replace(FOX, width=width, height=height))
    sides = [int(side) for side in re.search(r"such as (\d+)x(\d+)", error.value.hint).groups()]
    made = pipeline.resolve(replace(FOX, width=sides[0], height=sides[1]))
    for side, asked in ((made.width, width), (made.height, height)):
        assert abs(side - min(max(asked, SIDES[0]), SIDES[1])) <= 8  # half a token's side


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 100},
        {"width": 0},
        {"height": -64},
        {"width": 48},
        {"width": 8192},
        {"width": 4096, "height": 4096},
        {"steps": 0},
        {"steps": 100_000},
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"mu": float("inf")},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
        {"steps": 2.5},
        {"styles": (Style("x", -500.0),)},
        {"styles": (Style("x", float("nan")),)},
    ],
    ids=str,
)
def test_invalid_specs_are_refused(pipeline, wrong):
    """Refused before anything is rendered, wherever in the list they stand."""
    seen = []
    with pytest.raises(K2Error) as error:
        pipeline.render([FOX, replace(FOX, **wrong)], on_step=lambda *step: seen.append(step))
    assert error.value.hint and not seen


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"name": "nothing"}, 'no model "nothing"'),
        ({"name": "tiny", "variant": "fast"}, 'no variant "fast"'),
        ({"name": "tiny", "device": "tpu"}, 'no device "tpu"'),
        ({"name": "tiny", "device": "cuda:9"}, 'no device "cuda:9"'),
        ({"name": "tiny", "device": "meta"}, 'no device "meta"'),
        ({"name": "tiny", "dtype": "float16"}, '"float16" is not a number format'),
    ],
    ids=str,
)
def test_invalid_models_are_refused(tiny, asked, what):  # noqa: F811
    with pytest.raises(K2Error, match=what) as error:
        Pipeline.load(**asked)
    assert error.value.hint


def test_batch_is_halved_when_memory_is_short(pipeline, monkeypatch):
    """In the same order, and following the same lead picture."""
    specs = tie_to_lead([replace(FOX, seed=seed) for seed in range(5)], 0.5)
    whole, tried, render = pipeline.render(specs), [], pipeline._render

    def short(batch, on_step):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB.")
        return render(batch, on_step)

    monkeypatch.setattr(pipeline, "_render", short)
    parts = pipeline.render(specs)

    assert tried == [5, 2, 3, 1, 2] and [each.record["seed"] for each in parts] == [0, 1, 2, 3, 4]
    assert max(map(difference, parts, whole)) <= 1
    tried.clear()
    pipeline.render(specs)
    assert tried == [2, 1, 2]  # a batch that was too large is not tried again


def test_out_of_memory_is_reported(pipeline, monkeypatch):
    def allocate(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(pipeline.vae, "decode", allocate)
    with pytest.raises(K2Error, match="not enough memory for a picture of 64x64") as error:
        pipeline.render([FOX])
    assert error.value.hint


def test_out_of_memory_while_loading_is_reported(tiny, monkeypatch):  # noqa: F811
    """Memory that was free when checked may since be taken, and what the user chose may never have fitted."""

    def allocate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 72.00 MiB.")

    monkeypatch.setattr("model.pipeline.load_dit", allocate)
    with pytest.raises(K2Error, match="not enough memory for the weights of tiny") as error:
        Pipeline.load("tiny", device="cpu")
    assert error.value.hint


def test_weights_without_recommendations_use_the_open_ones(tiny, tmp_path, monkeypatch):  # noqa: F811
    """A file may also write `null` to state nothing."""
    monkeypatch.setattr(library, "BUNDLED", Path(shutil.copytree(tiny, tmp_path / "box")))
    state, about = read(tiny / "tiny-turbo.safetensors")
    save(library.BUNDLED / "tiny-turbo.safetensors", state, about | {"recommended": None, "native": None})

    pipeline = Pipeline.load("tiny", "turbo", device="cpu")

    assert (pipeline.recommended, pipeline.native) == (library.RECOMMENDED["turbo"], library.OPEN_WEIGHTS_SIDE)
    taken = models.recommended_settings("tiny", "turbo")
    assert taken == {
        "width": library.OPEN_WEIGHTS_SIDE,
        "height": library.OPEN_WEIGHTS_SIDE,
        "steps": 8,
        "guidance": 0.0,
        "mu": 1.15,
    }


def test_weights_without_a_variant_are_what_was_requested(tiny, tmp_path):  # noqa: F811
    state, about = read(tiny / "tiny-turbo.safetensors")
    mine = tmp_path / "mine.safetensors"
    save(mine, state, {key: value for key, value in about.items() if key not in ("variant", "recommended")})
    model = library.find(str(mine), "turbo")
    assert (model.variant, library.find(str(mine)).variant) == ("turbo", None)

    shutil.copy(tiny / "tiny-turbo.safetensors", mine)
    assert library.find(str(mine)).variant == "turbo" and library.find(str(mine), "raw") is None
    with pytest.raises(K2Error, match="has no raw checkpoint here"):
        Pipeline.load(str(mine), variant="raw", device="cpu")
    with pytest.raises(K2Error, match="holds no raw weights"):
        models.resolve(str(mine), variant="raw")

    Pipeline.load("tiny", "turbo", device="cpu").export(tmp_path / "folder")
    assert library.find(str(tmp_path / "folder"), "turbo") and not library.find(str(tmp_path / "folder"), "raw")


def test_missing_variant_is_refused(tiny, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(tiny, tmp_path / "box")
    (tmp_path / "box" / "tiny-turbo.safetensors").unlink()
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "box")
    with pytest.raises(K2Error, match='"tiny" has no turbo checkpoint here'):
        Pipeline.load("tiny", variant="turbo", device="cpu")


@pytest.mark.parametrize(
    ("part", "config", "what"),
    [
        ("text", {"taps": (1, 2)}, "needs 3 text layers of width 32"),
        ("vae", {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}, "do not fit its config"),
        ("vae", {"z_dim": 8}, "not one number per channel"),
        ("raw", {"patch": 2.0}, "has a shape no"),
    ],
)
def test_misfitting_parts_are_refused(tiny, tmp_path, monkeypatch, part, config, what):  # noqa: F811
    shutil.copytree(tiny, tmp_path / "box")
    file = tmp_path / "box" / f"tiny-{part}.safetensors"
    state, about = read(file)
    save(file, state, about | {"config": about["config"] | config})
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "box")
    with pytest.raises(K2Error, match=what) as refused:
        Pipeline.load("tiny", device="cpu")
    assert "models pull" not in refused.value.hint  # it came with its own parts


def test_misfit_with_the_bundled_text_encoder_has_a_hint(tiny, tmp_path, monkeypatch):  # noqa: F811
    box = Path(shutil.copytree(tiny, tmp_path / "box"))
    for file in list(box.glob("tiny-*")):
        file.rename(file.with_name(file.name.replace("tiny", "mini")))
    state, about = read(box / "mini-text.safetensors")
    save(box / "mini-text.safetensors", state, about | {"config": about["config"] | {"taps": (1, 2)}})
    lone = shutil.copy(box / "mini-raw.safetensors", tmp_path / "mine.safetensors")
    monkeypatch.setattr(library, "BUNDLED", box)
    monkeypatch.setattr("model.pipeline.load_dit", lambda *_, **__: pytest.fail("its weights were read"))

    with pytest.raises(K2Error, match="needs 3 text layers") as refused:
        Pipeline.load(str(lone), device="cpu")
    assert "k2 models pull krea-2-turbo" in refused.value.hint


def test_unreadable_references_are_refused(pipeline, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (tmp_path / "text.png", tmp_path / "missing.png"):
        spec = replace(FOX, styles=(Style("x", 1.0, (Reference(path),)),))
        with pytest.raises(K2Error, match="cannot be read"):
            pipeline.render([spec])


def test_overflow_is_an_error_not_a_black_picture(pipeline, red):
    with torch.no_grad():
        pipeline.dit.last.linear.bias.fill_(float("nan"))
    plain = replace(FOX, guidance=0.0)
    lower, fetch = "lower guidance", "hold NaN or infinite numbers: fetch the file again"
    for spec, dtype, hint in (
        (replace(FOX, guidance=2.0), torch.float32, lower),
        (replace(plain, style_guidance=1.0, styles=(Style("x", 1.0, (Reference(red),)),)), torch.float32, lower),
        (plain, torch.bfloat16, lower),
        (plain, torch.float32, fetch),
    ):
        pipeline.dtype = dtype
        with pytest.raises(K2Error, match="NaN or infinite") as raised:
            pipeline.render([spec])
        assert hint in raised.value.hint
