"""The calculated figures against the network itself where possible, and the model card against the figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dit import inputs, random_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.dit import PRESETS, DiTConfig, Krea2
from model.train import cost_model, loop
from model.train.adapter import TrainablePairs
from model.train.loop import Run, Stage

sys.path.append(str(Path(__file__).parent / "bench"))
from modulation import OwnModulation

CARD = Path(cost_model.__file__).parents[1] / "weights" / "README.md"
SMALL = DiTConfig(width=128, heads=8, kv_heads=2, blocks=3, text_width=32, text_taps=3, text_heads=2, channels=4)


@pytest.mark.parametrize("config", [SMALL, PRESETS["medium"]], ids=["small", "medium"])
def test_parameter_counts_match_the_network(config):
    with torch.device("meta"):
        network, heavy = Krea2(config), OwnModulation(config)
    count = cost_model.parameters(config)
    assert count.total == sum(p.numel() for p in network.parameters())
    assert count.block * config.blocks == count.in_blocks == sum(p.numel() for p in network.blocks.parameters())
    assert cost_model.unshared_parameters(config) == sum(p.numel() for p in heavy.parameters())


def test_per_block_modulation_depends_on_time():
    """The heavy variant has the same inputs and outputs, and every block's own matrix matters."""
    torch.manual_seed(0)
    heavy = OwnModulation(SMALL)
    heavy.initialise()
    nn.init.normal_(heavy.last.linear.weight, std=0.1)
    tokens, sigma, embeds, grid = inputs(SMALL)
    answer = heavy(tokens, sigma, embeds, grid)
    assert answer.shape == tokens.shape and not torch.equal(answer, heavy(tokens, sigma / 2, embeds, grid))
    answer.square().mean().backward()
    assert all(block.own[1].weight.grad.abs().sum() > 0 for block in heavy.blocks)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, kv_heads=8, text_taps=4)])
def test_operation_counts_match_pytorch(config):
    tokens, sigma, embeds, grid = inputs(config)
    # it does not count the CPU's attention kernel; the plain one consists of products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        random_model(config)(tokens[:1], sigma[:1], embeds[:1], grid)
    counted = cost_model.forward_operations(config, embeds.shape[1], tokens.shape[1])
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-6)


class Alone(Stage):
    """The transformer by itself, with nothing in particular to learn."""

    def __init__(self) -> None:
        self.recipe = loop.Recipe(name="alone", steps=1, lr=1e-3, muon_lr=1e-3)
        self.model = nn.ModuleDict({"dit": random_model(SMALL).requires_grad_(True)})

    def batch(self, step, part=0):
        return {}

    def loss(self, batch):
        return self.model["dit"](*inputs(SMALL)).square().mean(), {}


def test_state_bytes_match_a_run(tmp_path):
    """Weights, averages and moments as saved, plus a gradient as large as the weights."""
    run = Run(Alone(), tmp_path)
    run.advance({})
    saved = sum(tensor.numel() * 4 for tensor in run.state().values() if tensor.numel() > 1)
    gradients = sum(param.numel() * 4 for param in run.model.parameters())
    need = cost_model.memory(SMALL, 1, 0, 1, recompute=True)
    assert need.state == pytest.approx(saved + gradients, rel=1e-3)
    assert cost_model.memory(SMALL, 1, 0, 64, recompute=True).state == need.state / 64


def test_kept_activations_match_autograd():
    """Kept in bf16, unlike the weights; within a tenth."""
    network = random_model(replace(SMALL, blocks=1)).requires_grad_(True).bfloat16()
    weights = {param.untyped_storage().data_ptr() for param in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, 64, SMALL.width, dtype=torch.bfloat16, requires_grad=True)
    time = torch.randn(1, 1, 6 * SMALL.width, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.blocks[0](x, time, network.rope(0, (8, 8)), None)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert cost_model.activation_bytes(SMALL, 64) == pytest.approx(measured, rel=0.1)


def test_recomputing_saves_memory():
    medium = PRESETS["medium"]
    whole, lean = (cost_model.memory(medium, 4224, 1, 64, recompute=each).activations for each in (False, True))
    assert whole == medium.blocks * cost_model.activation_bytes(medium, 4224) and lean < whole / 8


def test_lora_parameters_are_counted():
    halves = TrainablePairs(random_model(SMALL), "blocks", 4)
    numbers = sum(param.numel() for param in halves.parameters())
    count = cost_model.parameters(SMALL)
    weights, _ = cost_model.adapter_memory(SMALL, 1, 1, 4)
    assert weights == count.in_blocks + 2 * count.outside_blocks + 20 * numbers


def test_days_follow_from_the_recipes():
    for cost in cost_model.stages():
        recipe = cost.recipe
        assert recipe.config == PRESETS["medium"]
        assert cost.pictures == recipe.steps * recipe.accumulate * recipe.batch and recipe.accumulate == cost_model.GPUS
        assert cost.operations == 3 * cost.pictures * cost_model.forward_operations(
            recipe.config, cost_model.TEXT_TOKENS, (recipe.size // 16) ** 2
        )
        rate = (
            cost_model.GPUS
            * cost_model.PEAK
            * cost_model.UTILISATION
            * (1.0 if recipe.products == "wide" else cost_model.SPEEDUP_8_BIT)
        )
        assert cost.days * 86400 * rate == pytest.approx(cost.operations)


def test_model_card_matches_the_computation():
    card = CARD.read_text("utf-8")
    for text in (cost_model.modulation_table(), cost_model.stage_table(), cost_model.adapter_line()):
        assert text in card
