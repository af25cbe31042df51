"""A picture on a card: 1024², Turbo, 8 steps, random weights of the true size, whole and part by part.

`python tests/bench/gpu.py [--size 1024] [--steps 8] [--rounds 5] [--out .cache/bench/gpu] [--smoke]`. Ours in bf16 and
fp8, plain and compiled, beside diffusers on the same tensors in the same run; the share of the card's bf16 rate that a
large product reaches. `speed.py --device cuda` has the rows of the other benchmark. `--smoke` also runs without a card.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from measure import (
    HEAD,
    MEDIUM,
    SMALL,
    fill,
    interleaved,
    random,
    rate,
    row,
    save,
    small_tower,
    stream_operations,
)
from torch import Tensor

from model.dit import Krea2
from model.eight_bit import NUMBERS, formats, native, shrink
from model.export import transformer_config
from model.fast import accelerate
from model.latents import noise, patchify, unpatchify
from model.layouts import to_diffusers
from model.quantize import to_rows
from model.sampler import TURBO_MU, euler, shifted_sigmas
from model.text_encoder import QWEN3_VL_4B, TextTower
from model.vae import QwenImageVAE, VAEConfig

PROMPT, PADDED, TEMPLATE = 45, 512, 34


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/gpu"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("there is no CUDA card here; --smoke runs at toy size without one")
    size, steps, rounds = (128, 2, 1) if options.smoke else (options.size, options.steps, options.rounds)
    config, dtype = SMALL if options.smoke else MEDIUM, torch.bfloat16

    with torch.device("meta"):
        dit, tower = Krea2(config), TextTower(small_tower() if options.smoke else QWEN3_VL_4B)
        theirs = diffusers.Krea2Transformer2DModel(
            **{k: v for k, v in transformer_config(config).items() if not k.startswith("_")}
        )
        vae = QwenImageVAE(vae_config := VAEConfig(base_dim=8 if options.smoke else 96))
    for network in (dit, tower, vae):
        fill(network, device, dtype)
    for name, values in (("mean", vae_config.latents_mean), ("std", vae_config.latents_std)):
        setattr(vae, name, torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1))
    theirs.load_state_dict(to_diffusers(dit.state_dict(), config), strict=True, assign=True)
    video = diffusers.AutoencoderKLQwenImage.from_config(vae_config.to_diffusers())
    video.load_state_dict(vae.to_diffusers(), strict=True)

    grid, rows = (size // 16, size // 16), size // 8
    ids, prefix = torch.arange(PROMPT, device=device)[None], tower(torch.arange(TEMPLATE, device=device)[None])[1]
    sigmas = shifted_sigmas(steps, TURBO_MU)

    def text() -> Tensor:
        return (
            random((1, PROMPT, config.text_taps, config.text_width), 1, dtype, device)
            if options.smoke
            else tower(ids, prefix)[0]
        )

    def sample(network: Krea2, embeds: Tensor) -> Tensor:
        context, rope = network.encode_text(embeds), network.rope(PROMPT, grid)
        mods = network.modulate(torch.tensor(sigmas[:-1], device=device))
        start = patchify(noise(0, config.channels, rows, rows).to(device), config.patch)
        tokens = euler(
            lambda x, step: network.velocity(x.to(dtype), context, mods[step : step + 1], rope).float(), start, sigmas
        )
        return unpatchify(tokens, config.patch, rows, rows).to(dtype)

    def picture(network: Krea2) -> Tensor:
        return vae.decode(sample(network, text())[:, :16])

    pipe = diffusers.Krea2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=video.to(device, dtype),
        text_encoder=None,
        tokenizer=None,
        transformer=theirs.requires_grad_(False).eval(),
        is_distilled=True,
        patch_size=config.patch,
        text_encoder_select_layers=tuple(range(config.text_taps)),
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = random((1, PADDED, config.text_taps, config.text_width), 1, dtype, device)
    mask = (torch.arange(PADDED, device=device) < PROMPT)[None]

    def other() -> None:
        """Its text encoding is left out, in diffusers' favour: `speed.py` compares that."""
        pipe(
            prompt_embeds=embeds, prompt_embeds_mask=mask, height=size, width=size,
            num_inference_steps=steps, guidance_scale=0.0,
        )  # fmt: skip

    networks = {"bf16": dit}
    precisions = ["int8"] if options.smoke else ["fp8"] if native(torch.float8_e4m3fn, device) else []
    for precision in precisions:
        with torch.device("meta"):
            small = Krea2(replace(config))
        shrink(small.blocks, NUMBERS[precision])
        state = dict(dit.state_dict())
        for name in formats(small):
            state[name], state[f"{name}_scale"] = to_rows(state[name], NUMBERS[precision])
        small.load_state_dict(state, strict=True, assign=True)
        networks[precision] = small

    work = steps * stream_operations(config, PROMPT, grid[0] * grid[1])
    limit = work / rate(dtype, device, 512 if options.smoke else 8192)
    found = []
    print(HEAD)

    def compare(name: str, *works: Callable[[], Any], **more: Any) -> None:
        found.append(row(name, *interleaved(works, rounds), **more))
        print(found[-1].line(), flush=True)

    latents = sample(dit, text())[:, :16]
    for compiled in (False, True) if device == "cuda" else (False,):
        for name, network in networks.items():
            if compiled:
                accelerate(network)
            label = f"{name}{', compiled' * compiled}"
            compare(
                f"picture, {size} px, {steps} steps, {label}", lambda n=network: picture(n), other, aim=1.3, limit=limit
            )
            embedded = text()
            whole = interleaved([lambda n=network, e=embedded: sample(n, e), lambda n=network: picture(n)], rounds)
            found.append(row(f"  of it the sampling, {label}", *whole, limit=limit))
            print(found[-1].line(), flush=True)
    compare("decode", lambda: vae.decode(latents), lambda: video.decode(latents[:, :, None]))
    if not options.smoke:
        compare("  encoding the prompt, of a picture", text, lambda: picture(dit))
    save(options.out, f"{size} px, {steps} steps on {device}", found, smoke=options.smoke, steps=steps, size=size)


if __name__ == "__main__":
    main()
