"""Speed against diffusers and against the arithmetic limit, and what each exact saving saves.

`python tests/bench/speed.py [--rounds 5] [--device cuda] [--only WORD …] [--out .cache/bench/speed] [--smoke]`. The two
sides of a row take turns in one process; figures are medians, ratios medians of the rounds' ratios (above one: ours is
faster or smaller). A step of the open weights is timed with one and with three blocks of their width and extrapolated
to 28, in the dtype a pipeline would choose: bf16, or fp32 on a processor without it. `--smoke` runs every row once
at toy size, which shows only that the script works.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from math import log10
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from measure import (
    EXTRAPOLATED_BLOCKS,
    HEAD,
    MEDIUM,
    SMALL,
    Row,
    fill_random,
    interleaved,
    low_bit_copy,
    make_row,
    peak_megabytes,
    product_rate,
    random_tensor,
    save,
    small_tower,
    stream_operations,
    tower_operations,
)
from torch import Tensor, nn

from model.branches import GuidedVelocity, PromptContexts, WeightedContexts
from model.cohesion import LeadAttention
from model.dit import Krea2
from model.export import transformer_config
from model.fast import keep_freed_memory
from model.latents import position_ids
from model.layouts import load_dit, to_diffusers
from model.pipeline import Pipeline
from model.plan import default_dtype
from model.spec import RenderSpec
from model.text_encoder import QWEN3_VL_4B, TextTower
from model.upsample import upsample_conv
from model.vae import QwenImageVAE, VAEConfig

PROMPT, PADDED, TEMPLATE = 45, 512, 34  # tokens of the prompt, of diffusers' padded prompt, and ahead of the prompt
PROMPTS = ("a red fox", "an owl on a night blue background", "a sailboat at sunset, paper cut", "a green apple")


class Bench:
    """What the rows need, built on demand; `rows` maps names to functions in the table's order."""

    def __init__(self, rounds: int, device: str, smoke: bool, scratch: Path):
        self.rounds, self.device, self.smoke, self.scratch = rounds, device, smoke, scratch
        self.config = replace(SMALL if smoke else MEDIUM, blocks=3)
        self.dtype_name = default_dtype(device, MEDIUM.width)
        self.dtype = getattr(torch, self.dtype_name)
        self.sides = (128, 256) if smoke else (512, 1024)
        if device == "cpu":
            keep_freed_memory()  # as loading a pipeline does; here it benefits the other side too

    def rows(self) -> dict[str, Callable[[], Iterator[Row]]]:
        return {
            "step": self.step,
            "int8": self.int8,
            "prompt": self.prompt,
            "autoencoder": self.autoencoder,
            "picture": self.picture,
            "turbo": self.turbo,
            "start": self.start,
            "saving": self.savings,
        }

    # ---- a step at full width ---------------------------------------------------------------------------------

    @cached_property
    def dit(self) -> Krea2:
        with torch.device("meta"):
            network = Krea2(self.config)
        fill_random(network, self.device, self.dtype)
        return network

    @cached_property
    def theirs(self) -> nn.Module:
        """diffusers' network on the same tensors, not copies."""
        with torch.device("meta"):
            network = diffusers.Krea2Transformer2DModel(
                **{k: v for k, v in transformer_config(self.config).items() if not k.startswith("_")}
            )
        network.load_state_dict(to_diffusers(self.dit.state_dict(), self.config), strict=True, assign=True)
        return network.requires_grad_(False).eval()

    @cached_property
    def limit(self) -> float:
        """Operations per second in the dtype used."""
        return product_rate(self.dtype, self.device, 512 if self.smoke else 4096)

    def stream(self, side: int, text: int = PROMPT) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a sampler without guidance passes to `velocity`."""
        grid = (side // 16, side // 16)
        tokens = random_tensor((1, grid[0] * grid[1], self.config.token_dim), 1.0, self.dtype, self.device)
        context = random_tensor((1, text, self.config.width), 1.0, self.dtype, self.device)
        mods = self.dit.modulate(torch.tensor([0.5], device=self.device))
        return tokens, context, mods, self.dit.rope(text, grid)

    def step(self) -> Iterator[Row]:
        """Theirs gets the text padded to 512 tokens and runs text fusion at every step, as its pipeline does."""
        for side, aim in zip(self.sides, (1.45, 1.12), strict=True):
            tokens, context, mods, rope = self.stream(side)
            embeds = random_tensor(
                (1, PADDED, self.config.text_taps, self.config.text_width), 1, self.dtype, self.device
            )
            mask = (torch.arange(PADDED) < PROMPT)[None].to(self.device)
            ids = position_ids(PADDED, side // 16, side // 16).to(self.device)
            sigma = torch.tensor([0.5], device=self.device, dtype=self.dtype)

            def ours(count: int, given: tuple = (tokens, context, mods, rope)) -> None:
                with fewer_blocks(self.dit, "blocks", count):
                    self.dit.velocity(*given)

            def other(count: int, given: tuple = (tokens, embeds, sigma, ids, mask)) -> None:
                with fewer_blocks(self.theirs, "transformer_blocks", count):
                    self.theirs(*given)

            one, three, their_one, their_three = interleaved(
                [lambda: ours(1), lambda: ours(3), lambda: other(1), lambda: other(3)], self.rounds
            )
            work = stream_operations(self.config, PROMPT, tokens.shape[1], EXTRAPOLATED_BLOCKS)
            yield make_row(
                f"step at {side} px, {EXTRAPOLATED_BLOCKS} blocks, 45-token prompt",
                extrapolate(one, three),
                extrapolate(their_one, their_three),
                aim=aim,
                limit=work / self.limit,
            )

    def int8(self) -> Iterator[Row]:
        small, smaller, side = low_bit_copy(self.dit, "int8"), low_bit_copy(self.dit, "int4"), self.sides[0]
        given = self.stream(side)

        def run(network: Krea2, count: int) -> None:
            with fewer_blocks(network, "blocks", count):
                network.velocity(*given)

        works = [(net, count) for net in (small, self.dit, smaller) for count in (1, 3)]
        times = interleaved([lambda w=work: run(*w) for work in works], self.rounds)
        eight, wide, four = (extrapolate(*times[i : i + 2]) for i in (0, 2, 4))
        yield make_row(f"step at {side} px, int8 against {self.dtype_name}", eight, wide, aim=1.2)
        yield make_row(f"step at {side} px, int4 against {self.dtype_name}", four, wide)
        yield self.likeness("int8", 35)
        yield self.likeness("int4")

    def likeness(self, precision: str, aim: float | None = None) -> Row:
        """Mini's pictures with few-bit weights and products against those in fp32, in decibels instead of seconds."""
        specs = [RenderSpec(text, seed=seed) for seed, text in enumerate(PROMPTS[: 1 if self.smoke else None])]
        specs = [replace(spec, steps=2, width=64, height=64) for spec in specs] if self.smoke else specs
        plain, small = (
            Pipeline.load("mini", device=self.device, precision=precision, filters=()).render(specs)
            for precision in ("native", precision)
        )
        found = [psnr(a.image, b.image) for a, b in zip(plain, small, strict=True)]
        return Row(
            f"{precision} pictures (mini), mean and worst PSNR{' over the aim' * bool(aim)}", float(np.mean(found)),
            min(found), min(found) / (aim or float(np.mean(found))), "dB", 1.0 if aim else None,
        )  # fmt: skip

    # ---- the other parts --------------------------------------------------------------------------------------

    def prompt(self) -> Iterator[Row]:
        """One and three layers of Qwen3-VL's width, extrapolated to the number each side needs."""
        from diffusers import Krea2Pipeline
        from transformers import Qwen3VLConfig, Qwen3VLModel

        config = replace(small_tower() if self.smoke else QWEN3_VL_4B, num_hidden_layers=3, taps=(1, 2, 3))
        with torch.device("meta"):
            tower = TextTower(config)
        fill_random(tower, self.device, self.dtype)
        half = config.head_dim // 2
        text = {key: value for key, value in vars(config).items() if key not in ("taps", "rope_theta")}
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": config.rope_theta, "mrope_interleaved": True,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        }  # fmt: skip
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
        vision |= {
            "out_hidden_size": config.hidden_size,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        }

        def tower_of(count: int) -> nn.Module:
            """Theirs with `count` layers, on our tensors; its vision part stays empty."""
            short = Qwen3VLConfig(text_config=text | {"num_hidden_layers": count}, vision_config=vision)
            with torch.device("meta"):
                model = Qwen3VLModel(short)
            state = model.language_model.state_dict()
            model.language_model.load_state_dict({name: tower.state_dict()[name] for name in state}, assign=True)
            rotary = type(model.language_model.rotary_emb)(short.text_config)  # its angles are not weights
            model.language_model.rotary_emb = rotary.to(self.device)
            return model.requires_grad_(False).eval()

        others = {count: tower_of(count) for count in (1, 3)}
        ids = torch.arange(PROMPT, device=self.device)[None] % config.vocab_size
        prefix = tower(torch.arange(TEMPLATE, device=self.device)[None])[1]
        padded = torch.zeros(1, TEMPLATE + PADDED, dtype=torch.long, device=self.device)
        stub = SimpleNamespace(
            prompt_template_encode_start_idx=TEMPLATE,
            prompt_template_encode_num_suffix_tokens=5,
            prompt_template_encode_prefix="",
            prompt_template_encode_suffix="",
            tokenizer=lambda text, **how: Tokens(padded[:, :-5] if "padding" in how else padded[:, -5:]),
        )

        def ours(count: int) -> None:
            with fewer_blocks(tower, "layers", count):
                tower(ids, prefix)

        def theirs(count: int) -> None:
            stub.text_encoder, stub.text_encoder_select_layers = others[count], config.taps[:count]
            Krea2Pipeline.get_text_hidden_states(stub, "", device=torch.device(self.device))

        # our tower stacks the layers it taps: with one layer there is only the first
        tower.config = replace(config, taps=(1,))
        one, three, their_one, their_three = interleaved(
            [lambda: ours(1), lambda: ours(3), lambda: theirs(1), lambda: theirs(3)], self.rounds
        )
        work = tower_operations(config, PROMPT, 35, TEMPLATE)
        yield make_row(
            "prompt encoding, 45 tokens, 35 of 36 layers",
            extrapolate(one, three, 35),
            extrapolate(their_one, their_three, 36),
            aim=4.0,
            limit=work / self.limit,
        )

    @cached_property
    def autoencoders(self) -> tuple[QwenImageVAE, nn.Module]:
        config = VAEConfig(base_dim=8 if self.smoke else 96)
        with torch.device("meta"):
            ours = QwenImageVAE(config)
        fill_random(ours, self.device, torch.float32)
        theirs = diffusers.AutoencoderKLQwenImage.from_config(config.to_diffusers())
        theirs.load_state_dict(ours.to_diffusers(), strict=True)
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            setattr(ours, name, torch.tensor(values, device=self.device).view(1, -1, 1, 1))
        return ours.to(self.dtype), theirs.to(device=self.device, dtype=self.dtype).requires_grad_(False).eval()

    def autoencoder(self) -> Iterator[Row]:
        """Qwen-Image's at full size; theirs is the video network as published."""
        ours, theirs = self.autoencoders
        side, dtype = self.sides[0], next(ours.parameters()).dtype
        latents = random_tensor((1, 16, side // 8, side // 8), 1, dtype, self.device)
        images = random_tensor((1, 3, side, side), 0.5, dtype, self.device)
        works: list[Callable[[], Any]] = [lambda: ours.decode(latents), lambda: theirs.decode(latents[:, :, None])]
        yield make_row(f"autoencoder, decode at {side} px", *interleaved(works, self.rounds), aim=2.5)
        megabytes = [[peak_megabytes(work)] for work in works]
        yield make_row("autoencoder, decode, peak memory", *megabytes, unit="MB", aim=2.0)
        works = [lambda: ours.encode(images), lambda: theirs.encode(images[:, :, None])]
        yield make_row(f"autoencoder, encode at {side} px", *interleaved(works, self.rounds))

    @cached_property
    def mini(self) -> Pipeline:
        return Pipeline.load("mini", device=self.device, filters=())

    @cached_property
    def exported(self) -> Path:
        if not (self.scratch / "mini").exists():
            Pipeline.load("mini", device="cpu", filters=()).export(self.scratch / "mini")
        return self.scratch / "mini"

    def picture(self) -> Iterator[Row]:
        other = diffusers.Krea2Pipeline.from_pretrained(self.exported, torch_dtype=self.mini.dtype)
        other.to(self.mini.device).set_progress_bar_config(disable=True)
        for count in (1, 4):
            prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
            few = {"steps": 1, "width": 64, "height": 64} if self.smoke else {}
            specs = [self.mini.resolve(RenderSpec(text, seed=i, **few)) for i, text in enumerate(prompts)]
            first = specs[0]
            assert first.width and first.height and first.steps

            def theirs(first: RenderSpec = first, prompts: list[str] = prompts) -> None:
                other(
                    prompts,
                    height=first.height,
                    width=first.width,
                    num_inference_steps=first.steps,
                    guidance_scale=first.guidance,
                )

            def ours(specs: list[RenderSpec] = specs) -> None:
                self.mini.forget()  # else only the first round would encode
                self.mini.render(specs)

            image = first.height * first.width // (self.mini.vae.factor * self.mini.dit.config.patch) ** 2
            texts = [*prompts, *([""] * count if first.guidance else [])]
            work = sum(
                first.steps * stream_operations(self.mini.dit.config, len(self.mini.text.token_ids(text)), image)
                for text in texts
            )
            limit = work / product_rate(self.mini.dtype, self.device, 512 if self.smoke else 2048)
            name = f"{count} picture{'s' * (count > 1)} of mini, {first.width} px, {first.steps} steps"
            yield make_row(name, *interleaved([ours, theirs], self.rounds), limit=limit)

    def turbo(self) -> Iterator[Row]:
        """Turbo's own settings against Raw's full 52 guided steps, both ours."""
        raw, turbo = (Pipeline.load("mini", variant=variant, device=self.device) for variant in ("raw", "turbo"))
        few = {"width": 64, "height": 64} if self.smoke else {}
        short = [RenderSpec(text, seed=i, **few) for i, text in enumerate(2 * PROMPTS)]
        long = [replace(spec, steps=4 if self.smoke else 52, guidance=3.5) for spec in short]
        for count in (1, 4, 8):  # from one to a full batch
            sides = [partial(turbo.render, short[:count]), partial(raw.render, long[:count])]
            name = f"{count} picture{'s' * (count > 1)}: Turbo / Raw, 52 guided steps"
            yield make_row(name, *interleaved(sides, self.rounds), aim=10.0)

    def start(self) -> Iterator[Row]:
        """From process start to a one-step picture, each in a process of its own."""
        mine = (
            "from model.pipeline import Pipeline; from model.spec import RenderSpec;"
            f"Pipeline.load('mini', device='{self.device}').render([RenderSpec('a red fox', 64, 64, steps=1)])"
        )
        their = (
            "import diffusers;"
            f"p = diffusers.Krea2Pipeline.from_pretrained({str(self.exported)!r}).to('{self.device}');"
            "p.set_progress_bar_config(disable=True);"
            "p('a red fox', height=64, width=64, num_inference_steps=1)"
        )

        def process(code: str) -> None:
            if self.smoke:
                exec(code, {})  # only shows that the code works; no start-up is measured
            else:
                subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)

        yield make_row(
            "cold start to a picture in one step",
            *interleaved([lambda: process(mine), lambda: process(their)], self.rounds),
        )

    # ---- each exact saving by itself --------------------------------------------------------------------------

    def savings(self) -> Iterator[Row]:
        """With and without each saving, all ours: less work for the same result, apart from rounding."""
        side, c = self.sides[0], self.config
        tokens, context, mods, rope = self.stream(side)
        dit, rounds = self.dit, self.rounds

        def compare(name: str, with_it: Callable[[], Any], without: Callable[[], Any]) -> Row:
            return make_row(f"saving: {name}", *interleaved([with_it, without], rounds))

        tower = self.mini.text
        ids = [torch.zeros(1, n, dtype=torch.long, device=self.device) for n in (PROMPT, TEMPLATE + PADDED)]
        yield compare(
            "prompts at natural length (mini)",
            lambda: tower.tower(ids[0], tower.prefix_cache),
            lambda: tower.tower(ids[1]),
        )
        padded = self.stream(side, PADDED)
        mask = (torch.arange(PADDED) < PROMPT)[None].to(self.device)
        with fewer_blocks(dit, "blocks", 1):
            given = (tokens, context, mods, rope)
            yield compare(
                "no padding in the stream (1 block)",
                lambda: dit.velocity(*given),
                lambda: dit.velocity(*padded, prompt_mask=mask),
            )
            full = torch.ones(1, PROMPT, dtype=torch.bool, device=self.device)
            yield compare(
                "no mask where none is needed (1 block)",
                lambda: dit.velocity(*given),
                lambda: dit.velocity(*given, prompt_mask=full),
            )
            embeds = random_tensor((1, PROMPT, c.text_taps, c.text_width), 1, self.dtype, self.device)
            yield compare(
                "text fusion once per prompt (1 block)",
                lambda: dit.velocity(*given),
                lambda: dit.velocity(tokens, dit.encode_text(embeds), mods, rope),
            )
        sigmas = torch.linspace(1, 0.1, 28, device=self.device)
        yield compare(
            "modulation of 28 steps at once",
            lambda: dit.modulate(sigmas),
            lambda: [dit.modulate(each[None]) for each in sigmas],
        )
        q, k, v = (
            random_tensor((1, heads, PROMPT + tokens.shape[1], c.head_dim), 1, self.dtype, self.device)
            for heads in (c.heads, c.kv_heads, c.kv_heads)
        )
        group = c.heads // c.kv_heads
        yield compare(
            "keys and values shared by groups of heads",
            lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            lambda: F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)),
        )
        spec = RenderSpec(PROMPTS[0], steps=2, seed=7, negative=PROMPTS[0])  # prompts of one length make one batch
        spec = self.mini.resolve(replace(spec, width=64, height=64) if self.smoke else spec)
        net, unit = self.mini.dit, self.mini._unit
        grid = ((spec.height or 64) // unit, (spec.width or 64) // unit)
        both = random_tensor((2, grid[0] * grid[1], net.config.token_dim), 1, self.mini.dtype, self.device)
        text = self.mini.conditioning.context(PROMPTS[0], ())
        one_step, turn = net.modulate(torch.tensor([0.5], device=self.device)), net.rope(text.shape[1], grid)
        yield compare(
            "both sides of guidance in one batch (mini)",
            lambda: net.velocity(both, text.expand(2, -1, -1), one_step, turn),
            lambda: [net.velocity(each, text, one_step, turn) for each in both.split(1)],
        )

        embeds = [self.mini.conditioning.context(text, ()) for text in PROMPTS]
        groups = [(both[:1], context, net.rope(context.shape[1], grid)) for context in embeds]
        yield compare(
            "prompts of several lengths as one stream (mini)",
            lambda: net.velocities(groups, one_step),
            lambda: [net.velocity(tokens, context, one_step, turn) for tokens, context, turn in groups],
        )
        tie, said = (
            LeadAttention(net.config, 0.5, [0.5], math.prod(grid), net.column_offset(grid)),
            PromptContexts({"styled": [WeightedContexts(1.0, embeds)]}),
        )
        velocities = [
            GuidedVelocity(net, said, one_step, grid, guidance=0.0, style_guidance=None, cohesion=tie, one_stream=pack)
            for pack in (sys.maxsize, 0)
        ]
        noises = random_tensor((len(embeds), *both.shape[1:]), 1, torch.float32, self.device)
        yield compare(
            "the lead picture in one stream with the others (mini)",
            lambda: velocities[0](noises, 0),
            lambda: velocities[1](noises, 0),
        )
        conv = torch.nn.Conv2d(384, 192, 3, padding=1).to(self.device).requires_grad_(False)
        cells = random_tensor((1, 384, side // 8, side // 8), 1, torch.float32, self.device)
        yield compare(
            "upsampling and convolution in one product",
            lambda: upsample_conv(cells, conv),
            lambda: conv(F.interpolate(cells, scale_factor=2.0, mode="nearest")),
        )

        def encode_again() -> None:
            self.mini.forget()
            self.mini.conditioning.context(PROMPTS[0], ())

        yield compare(
            "repeated prompts are cached (mini)", lambda: self.mini.conditioning.context(PROMPTS[0], ()), encode_again
        )
        file = self.scratch / "transformer"
        if not file.exists():
            self.theirs.save_pretrained(file)
        yield compare(
            "nothing copied at load",
            lambda: load_dit(file, dtype=self.dtype, device=self.device),
            lambda: {
                name: t.clone()
                for name, t in load_dit(file, dtype=self.dtype, device=self.device)[0].state_dict().items()
            },
        )


class Tokens(SimpleNamespace):
    """A tokenizer's output."""

    def __init__(self, ids: Tensor):
        super().__init__(
            input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < TEMPLATE + PROMPT - 5)[None].long()
        )

    def to(self, device: Any) -> Tokens:
        self.attention_mask = self.attention_mask.to(self.input_ids.device)
        if self.input_ids.shape[1] == 5:
            self.attention_mask = torch.ones_like(self.attention_mask)
        return self


class fewer_blocks:
    """A context in which a network has only its first few blocks."""

    def __init__(self, network: nn.Module, stem: str, count: int):
        self.network, self.stem, self.count = network, stem, count

    def __enter__(self) -> None:
        self.all_blocks = self.network.get_submodule(self.stem)
        setattr(self.network, self.stem, nn.ModuleList(list(self.all_blocks)[: self.count]))

    def __exit__(self, *problem: object) -> None:
        setattr(self.network, self.stem, self.all_blocks)


def extrapolate(one: list[float], three: list[float], blocks: int = EXTRAPOLATED_BLOCKS) -> list[float]:
    """Seconds with `blocks` blocks, extrapolated from one and three, round by round."""
    return [a + (blocks - 1) * (b - a) / 2 for a, b in zip(one, three, strict=True)]


def psnr(a: Any, b: Any) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return 99.0 if error == 0 else 10 * log10(255**2 / error)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="step, int8, prompt, autoencoder, picture, start, saving"
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/speed"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()

    found = []
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(1 if options.smoke else options.rounds, options.device, options.smoke, Path(scratch))
        for name, rows in bench.rows().items():
            if not options.only or name in options.only:
                for each in rows():
                    found.append(each)
                    print(each.line(), flush=True)
    missed = [each.name for each in found if each.aim and each.ratio < each.aim]
    facts = {"smoke": options.smoke, "rounds": options.rounds, "device": options.device, "missed": missed}
    save(options.out, f"k2 against diffusers {diffusers.__version__}, {options.device}", found, **facts)
    if found:
        print(f"median ratio {median(each.ratio for each in found):.2f}; {len(missed)} aims missed")


if __name__ == "__main__":
    main()
