"""The DiT against an independent implementation, and the properties the sampler relies on."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from model import flux_vae, vae, vision
from model.attention import attention, repeat_heads
from model.dit import PRESETS, DiTConfig, Krea2, hidden_width, rms_norm, rotate
from model.latents import position_ids

SIZES = {
    "mini": PRESETS["mini"],
    # medium scaled down in proportion: groups of four heads, twelve taps
    "small-medium": DiTConfig(width=384, heads=12, kv_heads=3, blocks=3, text_width=160, text_taps=12, text_heads=5),
}

SMALL = replace(PRESETS["mini"], width=64, text_width=64, heads=4, kv_heads=2, blocks=2)


def random_model(config: DiTConfig, seed: int = 0) -> Krea2:
    """Random everywhere, norms and modulation included, so that no part can hide behind a zero."""
    torch.manual_seed(seed)
    model = Krea2(config).eval().requires_grad_(False)
    model.initialise()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "mod" in name or name.startswith("last."):
            parameter.normal_(std=0.3)
    return model


# spelled out a second time, independently of the table in `model.layouts`
DIFFUSERS_NAMES = [
    (r"^first\.", "img_in."),
    (r"^tmlp\.0", "time_embed.linear_1"),
    (r"^tmlp\.2", "time_embed.linear_2"),
    (r"^tproj\.1", "time_mod_proj"),
    (r"^txtmlp\.0\.scale", "txt_in.norm.weight"),
    (r"^txtmlp\.1", "txt_in.linear_1"),
    (r"^txtmlp\.3", "txt_in.linear_2"),
    (r"^txtfusion\.", "text_fusion."),
    (r"^blocks\.", "transformer_blocks."),
    (r"^last\.modulation\.lin", "final_layer.scale_shift_table"),
    (r"^last\.norm\.scale", "final_layer.norm.weight"),
    (r"^last\.", "final_layer."),
    (r"\.prenorm\.scale", ".norm1.weight"),
    (r"\.postnorm\.scale", ".norm2.weight"),
    (r"\.mod\.lin", ".scale_shift_table"),
    (r"\.attn\.qknorm\.qnorm\.scale", ".attn.norm_q.weight"),
    (r"\.attn\.qknorm\.knorm\.scale", ".attn.norm_k.weight"),
    (r"\.attn\.w([qkv])\.", r".attn.to_\1."),
    (r"\.attn\.gate\.", ".attn.to_gate."),
    (r"\.attn\.wo\.", ".attn.to_out.0."),
    (r"\.mlp\.", ".ff."),
]


def diffusers_key(native: str) -> str:
    for pattern, name in DIFFUSERS_NAMES:
        native = re.sub(pattern, name, native)
    return native


def reference(model: Krea2):
    """diffusers' network with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    c = model.config
    other = diffusers.Krea2Transformer2DModel(
        in_channels=c.token_dim,
        num_layers=c.blocks,
        attention_head_dim=c.head_dim,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        intermediate_size=hidden_width(c.width, c.multiplier),
        timestep_embed_dim=c.time_dim,
        text_hidden_dim=c.text_width,
        num_text_layers=c.text_taps,
        text_num_attention_heads=c.text_heads,
        text_num_key_value_heads=c.text_heads,
        text_intermediate_size=hidden_width(c.text_width, c.multiplier),
        axes_dims_rope=c.rope_axes,
        rope_theta=c.rope_base,
        norm_eps=c.eps,
    ).eval()
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    renamed = {diffusers_key(name): tensor for name, tensor in model.state_dict().items()}
    other.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in renamed.items()})
    return other


def inputs(config: DiTConfig, batch: int = 2, text: int = 7, grid: tuple[int, int] = (3, 5)):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, grid[0] * grid[1], config.token_dim, generator=generator)
    embeds = torch.randn(batch, text, config.text_taps, config.text_width, generator=generator)
    return tokens, torch.tensor([0.9, 0.3])[:batch], embeds, grid


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("padded", [False, True], ids=["natural", "padded"])
@torch.no_grad()
def test_agrees_with_diffusers(config, padded):
    model = random_model(config)
    tokens, sigma, embeds, grid = inputs(config)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 2 + [True] * 2]) if padded else None

    ours = model(tokens, sigma, embeds, grid, mask)
    theirs = reference(model)(tokens, embeds, sigma, position_ids(7, *grid), mask, return_dict=False)[0]

    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_dropping_padding_changes_nothing(config):
    model = random_model(config)
    tokens, sigma, embeds, grid = inputs(config, batch=1)
    mask = torch.tensor([[True, True, True, False, False, True, True]])

    padded = model(tokens, sigma, embeds, grid, mask)
    natural = model(tokens, sigma, embeds[:, mask[0]], grid)

    assert relative_error(natural, padded) < 1e-5


@torch.no_grad()
def test_prompt_row_order_is_irrelevant():
    """All rows sit at position zero, so style rows may be appended in any order."""
    model = random_model(SIZES["mini"])
    tokens, sigma, embeds, grid = inputs(model.config)

    assert relative_error(model(tokens, sigma, embeds.flip(1), grid), model(tokens, sigma, embeds, grid)) < 1e-5


@torch.no_grad()
def test_rope_depends_only_on_offsets():
    """A head's q·k depends on the offset of two image tokens, rows and columns separately; text is not rotated."""
    model = random_model(SIZES["mini"])
    rope = torch.view_as_complex(model.rope(2, (6, 6)))
    assert torch.equal(rope[:2], torch.ones_like(rope[:2]))

    image = rope[2:].view(6, 6, -1)
    torch.testing.assert_close(image[3, 4] * image[1, 1].conj(), image[2, 3] * image[0, 0].conj())
    assert not torch.allclose(image[3, 4] * image[1, 1].conj(), image[4, 3] * image[1, 1].conj())


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_rope_axes_match_the_published_split(head_dim):
    """A quarter for the frame, the rest halved between row and column: as the published 32, 48, 48 of 128."""
    axes = replace(SIZES["mini"], width=6 * head_dim).rope_axes
    assert axes == tuple(head_dim * eighths // 8 for eighths in (2, 3, 3))


def test_other_grids_are_centred_on_the_trained_square():
    """The square itself stays bit-identical, and text stays where it was."""
    model = random_model(SIZES["mini"])
    free = model.rope(2, (8, 8))

    model.side = 8
    assert torch.equal(model.rope(2, (8, 8)), free)
    assert torch.equal(model.rope(2, (6, 10))[:2], free[:2])
    few = torch.view_as_complex(model.rope(0, (4, 4))).view(4, 4, -1)  # each at the centre of four
    many = torch.view_as_complex(free[2:]).view(8, 8, -1)
    torch.testing.assert_close(few[1, 2] ** 2, many[2, 4] * many[3, 5])


@torch.no_grad()
def test_separate_calls_equal_the_training_forward():
    """The sampler encodes text once and modulates all steps in one product; this equals the training forward."""
    model = random_model(SIZES["mini"])
    tokens, sigma, embeds, grid = inputs(model.config)
    mods = model.modulate(sigma)

    one_step = model.velocity(tokens, model.encode_text(embeds), mods[1:], model.rope(7, grid))

    torch.testing.assert_close(one_step, model(tokens, sigma[[1, 1]], embeds, grid), rtol=1e-4, atol=1e-5)


def test_initial_velocity_is_zero_and_every_parameter_learns():
    torch.manual_seed(0)
    model = Krea2(SMALL)
    model.initialise()
    tokens, sigma, embeds, grid = inputs(model.config)
    assert not model(tokens, sigma, embeds, grid).any()
    shared = model.modulate(sigma)[..., : 6 * 64].unflatten(-1, (6, -1)) + model.blocks[0].mod.lin.view(6, -1)
    torch.testing.assert_close(shared.mean((0, 1, 3)), torch.tensor([0.0, 0, 1, 0, 0, 1]), rtol=0, atol=0.1)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):  # the first step opens the last linear layer, the second reaches everything
        optimizer.zero_grad()
        (model(tokens, sigma, embeds, grid) - torch.randn_like(tokens)).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_residual_branches_start_quiet():
    """Together, a stack's branches add as much as one variance-preserving product, however deep the stack."""
    torch.manual_seed(0)
    for blocks in (2, 6):
        (model := Krea2(replace(SMALL, blocks=blocks))).initialise()
        for stack in (model.blocks, model.txtfusion):
            ends = [layer for name, layer in stack.named_modules() if name.endswith((".wo", ".down"))]
            added = sum(layer(torch.randn(256, layer.in_features)).var().item() for layer in ends)
            assert added == pytest.approx(1, rel=0.1)


@torch.no_grad()
def test_gates_start_open_at_every_noise_level():
    """Gates are near one, scales and shifts near zero: the influence of time is still small."""
    torch.manual_seed(0)
    (model := Krea2(SMALL)).initialise()
    shared = model.modulate(torch.linspace(0, 1, 9))[..., : 6 * model.config.width]
    parts = (shared + model.blocks[0].mod.lin).unflatten(-1, (6, -1))

    start = torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].expand_as(parts)
    torch.testing.assert_close(parts, start, rtol=0, atol=0.25)


def test_preset_sizes():
    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Krea2(PRESETS[name]).parameters())

    assert parameters("medium") == pytest.approx(12.9e9, rel=0.01)
    assert parameters("large") > 2 * parameters("medium")
    assert PRESETS["large"].token_dim == 128  # as FLUX.2's autoencoder packs them


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 5},
        {"kv_heads": 4},
        {"width": 100},
        {"text_heads": 3},
        {"blocks": 0},
        {"time_dim": 255},
        {"heads": 6.0},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(PRESETS["mini"], **wrong)


def test_neighbouring_query_heads_share_key_value_heads():
    """Also where no kernel supports sharing and the heads are repeated."""
    q, k, v = torch.randn(2, 12, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    groups = [attention(q[:, 4 * i : 4 * i + 4], k[:, i : i + 1], v[:, i : i + 1]) for i in range(3)]

    for answer in (attention(q, k, v), attention(q, repeat_heads(k, 12), repeat_heads(v, 12))):
        torch.testing.assert_close(answer, torch.cat(groups, 1))


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "heads"),
    [
        ("cuda", torch.bfloat16, False, 3),
        ("cuda", torch.bfloat16, True, 12),
        ("cuda", torch.float32, False, 12),
        ("cpu", torch.float32, True, 3),
    ],
)
def test_heads_are_repeated_where_gpu_kernels_cannot_share(monkeypatch, device, dtype, masked, heads):
    """Needs no GPU: nothing is computed."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: seen.extend([k.shape[1], v.shape[1]]))
    with FakeTensorMode():
        q, k = (torch.empty(1, count, 5, 16, dtype=dtype, device=device) for count in (12, 3))
        attention(q, k, k, torch.ones(1, 1, 1, 5, dtype=torch.bool, device=device) if masked else None)
    assert seen == [heads, heads]


def test_custom_attention_hook():
    """The hook sees every block's normalised, rotated queries and keys, and its result is the block's attention."""
    model = random_model(SIZES["small-medium"])
    tokens, context = torch.randn(2, 12, 64), torch.randn(2, 5, 384)
    given = (tokens, context, model.modulate(torch.tensor([0.3])), model.rope(5, (3, 4)))
    seen = []

    def look(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        return attention(q, k, v)

    plain = model.velocity(*given)

    assert torch.equal(model.velocity(*given, attend=[look, None, look]), plain)
    assert seen == [((2, 12, 17, 32), (2, 3, 17, 32), (2, 3, 17, 32))] * 2
    assert not torch.allclose(model.velocity(*given, attend=[None, None, lambda q, k, v: 0 * q]), plain)
    with pytest.raises(ValueError, match="and no mask"):
        model.velocity(*given, prompt_mask=torch.ones(2, 5, dtype=torch.bool), attend=[None] * 3)
    with pytest.raises(ValueError):
        model.velocity(*given, attend=[None] * 2)  # the last block would silently be left out


@pytest.mark.parametrize("mask", [None, torch.ones(5, 9, dtype=torch.bool).tril(4), torch.arange(9)[None] < 7])
@pytest.mark.parametrize("most", [1, 100, 230])
def test_held_scores_are_limited(monkeypatch, mask, most):
    """Queries are split as needed, into single ones at most: one query of 2 rows and 4 heads has 72 scores."""
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    whole, scores, fused = attention(q, k, v, mask), [], F.scaled_dot_product_attention

    def held(q, k, v, **how):
        scores.append(q.shape[:3].numel() * k.shape[2])
        return fused(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", held)
    monkeypatch.setattr("model.attention.MAX_SCORES", {"cpu": most})
    torch.testing.assert_close(attention(q, k, v, mask), whole)
    assert max(scores) <= max(most, 72) and sum(scores) == 5 * 72


def test_every_attention_limits_its_scores(monkeypatch):
    """A large picture has too many cells, and a reference too many patches, to hold all their scores at once."""
    eyes = vision.VisionConfig(1, 24, 48, 3, 24, 16, ())
    cells, patches = torch.randn(2, 8, 3, 5), torch.randn(15, 24)
    rope = torch.randn(15, 8), torch.randn(15, 8)
    parts: list[tuple[nn.Module, tuple]] = [(vae.Attention(8), (cells,)), (flux_vae.Attention(8, 2), (cells,))]
    parts += [(vision.Attention(eyes), (patches, rope))]
    whole, scores, fused = [part(*given) for part, given in parts], [], F.scaled_dot_product_attention

    def held(q, k, v, **how):
        scores.append(q.shape[:3].numel() * k.shape[2])
        return fused(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", held)
    monkeypatch.setattr("model.attention.MAX_SCORES", {"cpu": 100})
    for (part, given), before in zip(parts, whole, strict=True):
        torch.testing.assert_close(part(*given), before)
    assert max(scores) <= 100 and sum(scores) == (2 + 2 + 3) * 15 * 15


def test_several_prompt_lengths_run_as_one_stream():
    """As if each group had gone through by itself, one after the other, with or without attention hooks."""
    model = random_model(SIZES["small-medium"])
    mods = model.modulate(torch.tensor([0.3]))
    shapes = ((2, 5), (1, 9), (3, 1))
    groups = [(torch.randn(n, 12, 64), torch.randn(n, t, 384), model.rope(t, (3, 4))) for n, t in shapes]
    heard = []

    def hear(q, k, v):
        heard[:] = [v.mean()]
        return 2 * attention(q, k, v)

    def answer(q, k, v):
        return attention(q, k, v) + heard[0]

    for attends in (None, ([None, hear, None], None, [None, answer, None])):
        together = model.velocities(groups, mods, attends)
        for found, attend, (tokens, context, rope) in zip(together, attends or [None] * 3, groups, strict=True):
            torch.testing.assert_close(found, model.velocity(tokens, context, mods, rope, attend=attend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfused_path_gives_the_same_numbers(dtype, monkeypatch):
    """The CPU's own implementation against the one that is compiled."""
    x, rope = torch.randn(2, 7, 3, 32).to(dtype), Krea2(SIZES["small-medium"]).rope(3, (2, 2))
    ways = []
    for own in (True, False):
        monkeypatch.setattr("model.dit.runs_unfused", lambda x, own=own: own)
        ways.append((rotate(x, rope), rms_norm(x, torch.linspace(-1, 2, 32), 1e-5)))

    for ours, theirs in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs)
