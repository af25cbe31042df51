"""A picture on a GPU, as a whole and part by part: 1024², Turbo, 8 steps, random weights of the true size.

`python tests/bench/gpu.py [--size 1024] [--steps 8] [--rounds 5] [--out .cache/bench/gpu] [--smoke]`. Ours in bf16 and
fp8, plain and compiled, against diffusers on the same tensors in the same run; also the bf16 rate that a large product
reaches. `speed.py --device cuda` runs the other benchmark. `--smoke` also runs without a GPU. Results are
printed and written row by row; a row that fails says why, and the others continue.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from measure import (
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
    write_rows,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention import attention
from model.dit import Krea2
from model.export import transformer_config
from model.fast import Graph, accelerate
from model.latents import draw_noise, patchify, unpatchify
from model.layouts import to_diffusers
from model.library import RECOMMENDED
from model.low_bit import is_native
from model.sampler import euler, shifted_sigmas
from model.text_encoder import QWEN3_VL_4B, Cache, TextTower
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
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("there is no CUDA GPU here; --smoke runs at toy size without one")
    size, steps, rounds = (64, 2, 1) if options.smoke else (options.size, options.steps, options.rounds)
    config, dtype = SMALL if options.smoke else MEDIUM, torch.bfloat16

    with torch.device("meta"):
        dit, tower = Krea2(config), TextTower(small_tower() if options.smoke else QWEN3_VL_4B)
        theirs = diffusers.Krea2Transformer2DModel(
            **{k: v for k, v in transformer_config(config).items() if not k.startswith("_")}
        )
        vae = QwenImageVAE(vae_config := VAEConfig(base_dim=8 if options.smoke else 96))
    for network in (dit, tower, vae):
        fill_random(network, device, dtype)
    for name, values in (("mean", vae_config.latents_mean), ("std", vae_config.latents_std)):
        setattr(vae, name, torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1))
    theirs.load_state_dict(to_diffusers(dit.state_dict(), config), strict=True, assign=True)
    video = diffusers.AutoencoderKLQwenImage.from_config(vae_config.to_diffusers())
    video.load_state_dict(vae.to_diffusers(), strict=True)

    grid, rows = (size // 16, size // 16), size // 8
    ids, prefix = torch.arange(PROMPT, device=device)[None], tower(torch.arange(TEMPLATE, device=device)[None])[1]
    sigmas = shifted_sigmas(steps, RECOMMENDED["turbo"]["mu"])

    def text() -> Tensor:
        return (
            random_tensor((1, PROMPT, config.text_taps, config.text_width), 1, dtype, device)
            if options.smoke
            else tower(ids, prefix)[0]
        )

    def sample(network: Krea2, embeds: Tensor) -> Tensor:
        context, rope = network.encode_text(embeds), network.rope(PROMPT, grid)
        mods = network.modulate(torch.tensor(sigmas[:-1], device=device))
        start = patchify(draw_noise(0, config.channels, rows, rows).to(device), config.patch)
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
    embeds = random_tensor((1, PADDED, config.text_taps, config.text_width), 1, dtype, device)
    mask = (torch.arange(PADDED, device=device) < PROMPT)[None]

    def diffusers_picture() -> None:
        """Without text encoding, which favours diffusers; `speed.py` compares that."""
        pipe(
            prompt_embeds=embeds, prompt_embeds_mask=mask, height=size, width=size,
            num_inference_steps=steps, guidance_scale=0.0, output_type="pt",
        )  # fmt: skip

    found: list[Row] = []
    facts: dict[str, Any] = {"smoke": options.smoke, "steps": steps, "size": size}
    failed = []

    def attempt(name: str, work: Callable[[], None]) -> None:
        """Run one row; if it fails, the others are still worth having."""
        try:
            work()
        except Exception as error:
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
        write_rows(options.out, found, **facts)

    def compare(name: str, *works: Callable[[], Any], times: int = rounds, **more: Any) -> None:
        def measured() -> None:
            found.append(make_row(name, *interleaved(works, times), **more))
            print(found[-1].line(), flush=True)

        attempt(name, measured)

    embedded = text()
    exact = sample(dit, embedded)
    facts["rate"] = product_rate(dtype, device, 512 if options.smoke else 8192)
    limit = steps * stream_operations(config, PROMPT, grid[0] * grid[1]) / facts["rate"]
    print(f"{facts['rate'] / 1e12:.4g} TFLOP/s, ready after {time.perf_counter() - started:.0f} s", flush=True)
    print(HEAD, flush=True)

    networks = {"bf16": dit}

    for precision in ["int8", "int4"] if options.smoke else ["fp8", "int4"]:
        if precision != "fp8" or is_native(torch.float8_e4m3fn, device):
            attempt(f"to {precision}", lambda p=precision: networks.update({p: low_bit_copy(dit, p)}))

    def compile_network(network: Krea2) -> None:
        accelerate(network)
        if not network.velocity.compiled:
            raise RuntimeError("there is no compiler for this GPU")
        began = time.perf_counter()
        sample(network, embedded)
        print(f"  compiled and run in {time.perf_counter() - began:.0f} s", flush=True)

    def check_network(network: Krea2, label: str) -> None:
        """Check the result, and measure its memory in addition to the weights."""
        far = ((sample(network, embedded) - exact).float().norm() / exact.float().norm()).item()
        weights = sum(tensor.nbytes for part in (network, tower, vae) for tensor in part.state_dict().values())
        facts[label] = {"latents_off": far, "gigabytes": weights / 1e9 + peak_megabytes(lambda: picture(network)) / 1e3}
        print(f"  latents off by {far:.2%}, {facts[label]['gigabytes']:.1f} GB", flush=True)
        if not far < 1:  # NaN fails too; a GPU multiplies it faster
            raise ArithmeticError(f"{label} is not the same network")

    for compiled in (False, True) if device == "cuda" else (False,):
        for name, network in networks.items():
            label = f"{name}{', compiled' * compiled}"
            if compiled:
                attempt(label, lambda n=network: compile_network(n))
                if label in failed:
                    continue
            compare(
                f"picture, {size} px, {steps} steps, {label}",
                lambda n=network: picture(n),
                diffusers_picture,
                aim=1.3,
                limit=limit,
            )
            compare(
                f"  of it the sampling, {label}",
                lambda n=network: sample(n, embedded),
                lambda n=network: picture(n),
                times=min(rounds, 3),
                limit=limit,
            )
            attempt(f"  looking at {label}", lambda n=network, label=label: check_network(n, label))
    latents = exact[:, :16]

    def decode() -> Tensor:
        return vae.decode(latents)

    def compare_option(name: str, better: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
        """A possible further saving against the current way."""
        far = ((better() - plain()).float().norm() / plain().float().norm()).item()
        compare(f"  {name}, against as is", better, plain)
        print(f"  off by {far:.2%}", flush=True)

    compare("decode", decode, lambda: video.decode(latents[:, :, None]))
    if not options.smoke:
        compare("  encoding the prompt, of a picture", text, lambda: picture(dit), times=min(rounds, 3))
    if device == "cuda":
        attempt(
            "the tower recorded",
            lambda: compare_option("encoding the prompt, recorded", recorded_tower(tower, prefix, ids), text),
        )
        attempt(
            "the decoder compiled", lambda: compare_option("decode, compiled", compiled_decoder(vae, latents), decode)
        )
        compare_attention(config, grid, dtype, steps, compare)
        for name, network in networks.items():
            attempt(f"kernels of {name}", lambda name=name, n=network: print_kernels(name, lambda: sample(n, embedded)))
        attempt("kernels of the other", lambda: print_kernels("the other", diffusers_picture))
    save(options.out, f"{size} px, {steps} steps on {device}", found, **facts)
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def recorded_tower(tower: TextTower, prefix: Cache, ids: Tensor) -> Callable[[], Tensor]:
    """The text tower as a single launch: it spends its time on launches, not in kernels."""
    graph = Graph(lambda ids: tower(ids, prefix)[0], (ids,))
    return lambda: graph(ids)


def compiled_decoder(vae: QwenImageVAE, latents: Tensor) -> Callable[[], Tensor]:
    compiled = torch.compile(vae.decode)
    compiled(latents)
    return lambda: compiled(latents)


def compare_attention(
    config: Any, grid: tuple[int, int], dtype: torch.dtype, steps: int, compare: Callable[..., None]
) -> None:
    """All the attention of a picture, with the chosen kernel against each alternative."""
    tokens, wide = PROMPT + grid[0] * grid[1], config.head_dim
    q, k, v = (
        random_tensor((1, tokens, heads, wide), 1, dtype, "cuda").transpose(1, 2)
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    )

    def all_of_it() -> None:
        for _ in range(steps * config.blocks):
            attention(q, k, v)

    def by(kernel: SDPBackend) -> None:
        with sdpa_kernel(kernel):
            all_of_it()

    for name, kernel in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        compare(f"  all attention, against {name}'s", all_of_it, lambda kernel=kernel: by(kernel))


def print_kernels(name: str, work: Callable[[], Any], limit: int = 12) -> None:
    """Print where the GPU spends its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    each = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    print(f"  {name}: {sum(event.self_device_time_total for event in each) / 1e3:.0f} ms in kernels")
    for event in each[:limit]:
        print(f"  {event.self_device_time_total / 1e3:>9.1f} ms {event.count:>6} x {event.key[:90]}", flush=True)


if __name__ == "__main__":
    main()
