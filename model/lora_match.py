"""Match an adapter's file with a network: which layer each part belongs to, in any trainer's spelling, and whether it
fits. `model/lora_file.py` sorts a file's contents, `model/lora.py` applies an adapter to the network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.adapter_path import FullMatrix, Hadamard, Kronecker, LowRank, Update, dora_gain
from model.checkpoint import open_checkpoint, refuse_unreadable
from model.dit import Krea2
from model.errors import K2Error, listed
from model.hashes import PEFT_WEIGHTS, identity
from model.layouts import diffusers_names
from model.lora import Adapter, Change, ParameterUpdate
from model.lora_file import GIVE_KREA_2, GIVE_PLAIN, HADAMARD, peft_settings, refuse_other_adapters, sort_parts
from model.stream import block_loaded

PREFIXES = (
    "base_model.model.",  # PEFT
    "model.diffusion_model.",  # ComfyUI, like the next
    "diffusion_model.",
    "transformer.",  # diffusers
    "lora_unet_",  # kohya, dots as underscores; so do the next two
    "lora_transformer_",
    "lycoris_",
)
FUSED = re.compile(r"(?P<stem>.*attn[._]to_)qkv")  # queries, keys and values as one matrix
MAX_EXTRA_BYTES = 256 << 20  # bytes allowed for layers that the network lacks
ROW_PARTS = ("up", "diff", "diff_b", "hada_w1_a", "hada_w2_a", "magnitude")  # parts with as many rows as the layer
ROW_FACTORS = ("w1", "w1_a", "w2", "w2_a")  # parts whose product has as many
NORM_TOLERANCE = 0.1  # relative difference of a layer's norm between weights of one model, in few bits or distilled


@dataclass(frozen=True)
class Part:
    """What a file holds for one layer. Methods that make a change of it raise K2Error for what does not fit."""

    path: Path
    module: str  # the layer's name in the file
    tensors: Mapping[str, Tensor]
    scale: float = 1.0  # alpha / rank
    alpha: float | None = None  # as stored in the file
    rows: slice = field(default_factory=lambda: slice(None))  # of a change that several layers share

    def layer_update(self, layer: nn.Linear, width: int, *, dora: bool) -> Update:
        """What is added to a layer of a network of this width. dora: whether the file says that it is a DoRA."""
        shape = layer.out_features, layer.in_features  # few-bit weights are packed, so not weight.shape
        for what, own, whole in (("diff", "weight", shape), ("diff_b", "bias", shape[:1])):
            if what in self.tensors and self.tensors[what].shape != whole:
                theirs = f"its {self.module}.{what} is {list(self.tensors[what].shape)}"
                raise self.wrong_size(f"{theirs}, this network's {own} is {list(whole)}")
        if any(what.startswith("w") for what in self.tensors):
            product: Update = self.kronecker(shape)
        elif self.tensors.keys() >= HADAMARD:
            product = self.hadamard(shape, width)
        else:
            product = self.low_rank(shape, width)
        return replace(product, bias=self.tensors.get("diff_b"), magnitude=self.magnitude(shape, stated=dora))

    def parameter_update(self, own: nn.Parameter) -> ParameterUpdate:
        """What is added to a parameter: a difference, or scale times a pair's product.

        A vector may come as a matrix: diffusers stores a block's modulation as 6 × width.
        """
        if self.tensors.keys() not in ({"diff"}, {"down", "up"}):
            why = f"changes {self.module}, which is not a linear layer, as if it were one"
            raise K2Error(f"{self.path} {why}.", hint=GIVE_PLAIN)
        whole = self.tensors.get("diff")
        shape = (
            tuple(whole.shape) if whole is not None else self.product_shape(self.tensors["up"], self.tensors["down"])
        )
        if shape != tuple(own.shape) and (own.ndim > 1 or math.prod(shape) != own.numel()):
            raise self.wrong_size(f"its change of {self.module} is {list(shape)}, not {list(own.shape)}")
        if whole is not None:
            return ParameterUpdate(whole.float().view(own.shape))
        delta = self.tensors["up"].float() @ self.tensors["down"].float() * self.scale
        return ParameterUpdate(delta.view(own.shape))

    def low_rank(self, shape: tuple[int, int], width: int) -> LowRank | FullMatrix:
        """A low-rank pair or a full matrix; with neither, a pair of rank 0."""
        out_features, in_features = shape
        if "down" in self.tensors:
            self.check_factors(self.tensors["up"], self.tensors["down"], shape, width)
            return LowRank(self.tensors["down"], self.tensors["up"], scale=self.scale)
        if (whole := self.tensors.get("diff")) is None:
            return LowRank(torch.zeros(0, in_features), torch.zeros(out_features, 0))
        return FullMatrix(whole)

    def hadamard(self, shape: tuple[int, int], width: int) -> Hadamard:
        """A Hadamard product of two low-rank matrices."""
        factors = [self.tensors[what] for what in sorted(HADAMARD)]
        for a, b in (factors[:2], factors[2:]):
            self.check_factors(a, b, shape, width)
        return Hadamard(*factors, scale=self.scale)

    def kronecker(self, shape: tuple[int, int]) -> Kronecker:
        """A Kronecker product. If both factors are full matrices there is no rank, and alpha is ignored (LyCORIS)."""
        held = self.tensors
        halves = [(held[what],) if what in held else (held[f"{what}_a"], held[f"{what}_b"]) for what in ("w1", "w2")]
        (a, b), (c, d) = (self.product_shape(*pair) if len(pair) == 2 else self.matrix_shape(*pair) for pair in halves)
        self.check_shape(len(range(a * c)[self.rows]), b * d, shape)
        ranks = [len(pair[1]) for pair in halves if len(pair) == 2]
        left, right = (pair[0] if len(pair) == 1 else pair[0].float() @ pair[1].float() for pair in halves)
        scale = self.scale
        if self.alpha is not None:
            scale = self.alpha / ranks[-1] if ranks else 1.0
        return Kronecker(left, right, self.rows, scale=scale)

    def magnitude(self, shape: tuple[int, int], *, stated: bool) -> Tensor | None:
        """A DoRA's norms: of rows as a column [out, 1], of columns as a row [1, in]. PEFT's vector is for rows.

        stated: whether the file says that it is a DoRA, and so must have them.
        """
        magnitude = self.tensors.get("magnitude")
        if magnitude is None:
            if stated:
                why = f"says that it is a DoRA, but has no magnitude for {self.module}"
                raise K2Error(f"{self.path} {why}.", hint="Fetch it again.")
            return None
        lengths = magnitude[:, None] if magnitude.ndim == 1 else magnitude
        if lengths.shape not in ((shape[0], 1), (1, shape[1])):
            theirs, ours = list(magnitude.shape), f"this network's layer has {shape[0]} rows and {shape[1]} columns"
            raise self.wrong_size(f"its magnitude of {self.module} is {theirs}, {ours}")
        return lengths

    def changes_anything(self) -> bool:
        """Whether it changes anything: a product does if none of its factors is all zeros. For a magnitude on top of an
        idle product see `is_own_norm`."""
        wholes, factors = (
            [bool(tensor.any()) for what, tensor in self.tensors.items() if what.startswith("diff") == whole]
            for whole in (True, False)
        )
        return any(wholes) or (bool(factors) and all(factors))

    def is_own_norm(self, layer: nn.Linear) -> bool:
        """Whether its magnitude is about the layer's own norm, where it starts, and stays if it is not trained."""
        out_features, in_features = layer.out_features, layer.in_features
        lengths = self.magnitude((out_features, in_features), stated=False)
        gain = dora_gain(layer, LowRank(torch.zeros(0, in_features), torch.zeros(out_features, 0), magnitude=lengths))
        return float((gain - 1).square().mean().sqrt()) < NORM_TOLERANCE

    def matrix_shape(self, matrix: Tensor) -> tuple[int, int]:
        """A matrix's shape."""
        if matrix.ndim != 2 or not matrix.numel():
            raise self.damaged(f"is {list(matrix.shape)}")
        return matrix.shape[0], matrix.shape[1]

    def product_shape(self, a: Tensor, b: Tensor) -> tuple[int, int]:
        """The shape of a @ b, which must share a rank."""
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not len(b):
            raise self.damaged(f"is {list(a.shape)} times {list(b.shape)}")
        return a.shape[0], b.shape[1]

    def check_factors(self, a: Tensor, b: Tensor, shape: tuple[int, int], width: int) -> None:
        """Check that the factors of a @ b share a rank and give the layer's shape, (out, in).

        A rank may exceed one side of a small layer (trainers use one rank for all layers), but not the network's width.
        """
        out_features, in_features = self.product_shape(a, b)
        if len(b) > width:
            raise self.damaged(f"has a rank of {len(b)}")
        self.check_shape(out_features, in_features, shape)

    def check_shape(self, out_features: int, in_features: int, shape: tuple[int, int]) -> None:
        """Check that a change has the layer's own shape."""
        if (out_features, in_features) != shape:
            ours = f"this network's {shape[1]} to {shape[0]}"
            raise self.wrong_size(f"its {self.module} maps {in_features} numbers to {out_features}, {ours}")

    def damaged(self, how: str) -> K2Error:
        return K2Error(f"{self.path} is damaged: {self.module} {how}.", hint="Fetch it again.")

    def wrong_size(self, how: str) -> K2Error:
        hint = "Use it with the model that it was trained on."
        return K2Error(f"{self.path} is made for a network of another size: {how}.", hint=hint)


def read_lora(path: Path | str, network: Krea2) -> Adapter:
    """Read a .safetensors file, or a PEFT folder, and match its layers with the network's.

    Layers that the network lacks (a text encoder's, say) are named in `unmatched`. Raises K2Error if none match, if the
    file is for another model or another kind of adapter, and for shapes that do not fit.
    """
    file = weights_file(Path(path))
    checkpoint = open_checkpoint(file)
    refuse_other_adapters(file, checkpoint.tensors)
    refuse_unreadable(checkpoint)
    check_size(file, network)
    # cloned: what is kept must not change with the file
    parts, alphas = sort_parts(file, {name: tensor.clone() for name, tensor in checkpoint.read()})
    spellings = layer_names(network)
    bares = dict(bare_parameters(network))
    fused = split_fused(file, parts, spellings, network)
    known = {module: spellings.get(strip_prefixes(module)) for module in parts}
    unmatched = sorted(module for module, name in known.items() if name is None)
    refuse_unmatched(file, unmatched, len(known))
    if len(set(known.values()) - {None}) < len(known) - len(unmatched):
        raise K2Error(f"{file} holds the same layer twice.", hint=GIVE_KREA_2)

    settings = peft_settings(file)
    layers: dict[str, Change] = {}
    for module, name in known.items():
        if name is None:
            continue
        tensors, (source, rows) = parts[module], fused.get(module, (module, slice(None)))
        scale, alpha = 1.0, alphas.get(source)
        if rank := len(tensors.get("down", tensors.get("hada_w1_b", ()))) or settings.stated_rank(
            strip_prefixes(source)
        ):
            scale = settings.scale(strip_prefixes(source), rank) if alpha is None else alpha / rank
        part = Part(file, module, tensors, scale, alpha, rows)
        if name in bares:
            layers[name] = part.parameter_update(bares[name])
            continue
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if "diff_b" in tensors and layer.bias is None:
            del tensors["diff_b"]
            unmatched.append(f"{module}.diff_b")
        if tensors:
            layers[name] = part.layer_update(layer, network.config.width, dora=settings.dora)
    refuse_unmatched(file, unmatched, len(layers) + len(unmatched))
    return Adapter(Path(path), identity(file), layers, tuple(unmatched))


def weights_file(path: Path) -> Path:
    """An adapter's weights file: PEFT saves a folder."""
    return path / PEFT_WEIGHTS if path.is_dir() else path


def bare_parameters(network: Krea2) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters outside linear layers, by native name: scales of norms, and what layers add to the modulation."""
    for name, parameter in network.named_parameters():
        if not isinstance(network.get_submodule(name.rpartition(".")[0]), nn.Linear):
            yield name, parameter


def layer_names(network: Krea2) -> dict[str, str]:
    """Every spelling of a linear layer, or of a parameter outside them -> its native name. Spellings: native and
    diffusers', with dots and with underscores."""
    theirs = diffusers_names(network.config.blocks)
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    others = {name: theirs[f"{name}.weight"] for name in linear}
    others |= {name: theirs[name] for name, _ in bare_parameters(network)}
    names = {}
    for name, full in others.items():
        other = full.removesuffix(".weight")
        for spelling in (name, full, other, other.removesuffix(".0")):  # some omit the trailing number
            names[spelling] = names[spelling.replace(".", "_")] = name
    return names


def strip_prefixes(module: str) -> str:
    """A layer's name without trainers' prefixes. After kohya's, some double the underscores."""
    while prefix := next((prefix for prefix in PREFIXES if module.startswith(prefix)), ""):
        module = module.removeprefix(prefix)
        if prefix.endswith("_"):
            module = module.lstrip("_").replace("__", "_")
    return module


def check_size(path: Path, network: Krea2) -> None:
    """Raises K2Error, before reading it, for a file larger than any LoRA of this network can be in fp32."""
    numbers = sum(weight.numel() for weight in network.parameters())
    max_bytes = MAX_EXTRA_BYTES + 8 * numbers  # the rank is at most the width
    if path.stat().st_size > max_bytes:
        raise K2Error(f"{path} is larger than a LoRA of this network can be.", hint=GIVE_KREA_2)


def split_fused(
    path: Path, parts: dict[str, dict[str, Tensor]], spellings: Mapping[str, str], network: Krea2
) -> dict[str, tuple[str, slice]]:
    """Split what was trained for queries, keys and values as one matrix; module -> the fused module, and which rows.

    SimpleTuner can train this way, and also writes the three separate layers, untrained. Raises K2Error.
    """
    found = {}
    for module, match in [(module, match) for module in parts if (match := FUSED.fullmatch(module))]:
        three = [match["stem"] + each for each in "qkv"]
        names = [spellings.get(strip_prefixes(each)) for each in three]
        if None in names:
            continue  # it will be reported as unmatched
        layers = [network.get_submodule(str(name)) for name in names]
        sizes = [layer.get_parameter("weight").shape[0] for layer in layers]
        fused, start = parts.pop(module), 0
        if "magnitude" in fused and is_row_vector(fused["magnitude"]):
            why = "holds column magnitudes (DoRA) that three layers share"
            raise K2Error(f"{path} {why}: see its {module}.", hint=GIVE_PLAIN)
        heights = {len(tensor) for what, tensor in fused.items() if what in ROW_PARTS}
        if factors := [tensor for what, tensor in fused.items() if what in ROW_FACTORS]:
            heights.add(math.prod(map(len, factors)))
        if heights != {sum(sizes)}:
            raise K2Error(f"{path} is made for a network of another size: see its {module}.", hint=GIVE_KREA_2)
        separate = {each: Part(path, each, parts[each]) for each in three if each in parts}
        # rare, and it takes reading a block
        needs_norm = any("magnitude" in part.tensors for part in separate.values())
        with block_loaded(network, str(names[0])) if needs_norm else nullcontext():
            for each, part in separate.items():
                layer = network.get_submodule(str(spellings[strip_prefixes(each)]))
                assert isinstance(layer, nn.Linear)
                if part.changes_anything() or ("magnitude" in part.tensors and not part.is_own_norm(layer)):
                    raise K2Error(f"{path} holds {each} twice, on its own and in {module}.", hint=GIVE_PLAIN)
        for each, size in zip(three, sizes, strict=True):
            rows, start = slice(start, start + size), start + size
            parts[each] = {what: tensor[rows] if what in ROW_PARTS else tensor for what, tensor in fused.items()}
            found[each] = module, rows
    return found


def is_row_vector(magnitude: Tensor) -> bool:
    return magnitude.ndim == 2 and len(magnitude) == 1


def refuse_unmatched(path: Path, unmatched: Sequence[str], modules: int) -> None:
    """Raises K2Error if no layer matches."""
    if len(unmatched) == modules:
        layers = listed(list(unmatched), 2)
        raise K2Error(f"{path} matches no layer of this network: it has layers like {layers}.", hint=GIVE_KREA_2)
