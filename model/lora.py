"""Low-rank adapters: read in any trainer's layout, checked against the network, laid over it and taken off again.

A LoRA adds `weight · alpha / rank · up @ down` to the matrix of a linear layer: down [r, in], up [out, r]. Laid over,
it is a second, narrow path beside the layer: the base is neither copied nor changed, so taking it off leaves the very
bits that were there. Some files add a whole matrix to a layer (`.diff`), something to its bias (`.diff_b`), a Kronecker
product (LoKr) or a Hadamard one (LoHa), or say how long its rows are to be (DoRA): see `model/second_path.py`. And some
change the scales of norms, or what a layer adds to the time's modulation. These few numbers are exchanged for as long
as the layer that they belong to works.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint import open_checkpoint, refuse_unreadable
from model.dit import Krea2, Modulation
from model.errors import K2Error
from model.hashes import PEFT_WEIGHTS, identity
from model.headers import some
from model.layouts import diffusers_names
from model.lora_file import HADAMARD, ON_RAW, PLAIN, peft_settings, refuse_others, sort_out
from model.second_path import Hadamard, Kronecker, LowRank, SecondPath, Update, gain_of
from model.stream import at_hand

PREFIXES = (
    "base_model.model.",  # PEFT
    "model.diffusion_model.",  # ComfyUI, as the next
    "diffusion_model.",
    "transformer.",  # diffusers
    "lora_unet_",  # kohya, dots as underscores; as the next two
    "lora_transformer_",
    "lycoris_",
)
FUSED = re.compile(r"(?P<stem>.*attn[._]to_)qkv")  # queries, keys and values as one matrix
OTHER_MODELS = {  # whose layers are called so; the first that fits
    r"(double|single)_blocks|single_transformer_blocks": "FLUX",
    r"joint_blocks": "Stable Diffusion 3",
    r"(img|txt)_(mod|mlp)[._]|[._]add_[qkv]_proj": "Qwen-Image or FLUX",
    r"(^|[._])(down|up|input|output)_blocks|(mid|middle)_block": "SDXL or Stable Diffusion 1",
    r"blocks[._]\d+[._](self_attn|cross_attn)": "Wan",
    r"(^|[._])layers[._]\d+[._](attention|feed_forward)": "Z-Image",
}
TEXT_ENCODER = r"lora_te\d?_|text_encoder|text_model|layers[._]\d+[._](self_attn|mlp)"
MOST_BESIDE = 256 << 20  # bytes of layers that the network lacks
ROWS = ("up", "diff", "diff_b", "hada_w1_a", "hada_w2_a", "magnitude")  # what has as many rows as a layer has
TALL = ("w1", "w1_a", "w2", "w2_a")  # whose product has
ABOUT = 0.1  # of a layer's norm: as far off it may be in other weights of one model, in few bits or distilled


@dataclass(frozen=True)
class Shift:
    """What is added to a parameter that is no linear layer's at weight 1."""

    delta: Tensor  # in the parameter's shape

    def changes(self) -> bool:
        return bool(self.delta.any())


Change = Update | Shift


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, matched against a network."""

    path: Path
    sha256: str  # of the file, and of settings beside it: see `hashes.identity`
    layers: Mapping[str, Change]  # by the native name of the linear layer, or of the parameter
    unmatched: tuple[str, ...]  # layers that the network lacks, as the file calls them

    def report(self, weight: float) -> dict[str, Any]:
        """For records: matched of modules layers are in use; the others are named. `idle` is one that changes none."""
        idle = not any(each.changes() for each in self.layers.values())
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "weight": weight,
            "matched": len(self.layers),
            "modules": len(self.layers) + len(self.unmatched),
            "unmatched": list(self.unmatched),
            **({"idle": True} if idle else {}),
        }


def read_lora(path: Path | str, network: Krea2) -> Adapter:
    """Read a .safetensors file, or PEFT's folder of one, and match its layers with the network's.

    Layers that the network lacks (of a text encoder, say) are named in `unmatched`. Raises K2Error where none match,
    where the file is made for another model or is an adapter of another kind, and for shapes that do not fit.
    """
    file = weights_file(Path(path))
    checkpoint = open_checkpoint(file)
    refuse_others(file, checkpoint.tensors)
    refuse_unreadable(checkpoint)
    refuse_giants(file, network)
    # copies: what is kept of the file must not change with it
    parts, alphas = sort_out(file, {name: tensor.clone() for name, tensor in checkpoint.read()})
    spellings = layer_names(network)
    bares = dict(bare_parameters(network))
    fused = part_fused(file, parts, spellings, network)
    known = {module: spellings.get(bare(module)) for module in parts}
    unmatched = sorted(module for module, name in known.items() if name is None)
    refuse_unmatched(file, unmatched, len(known))
    if len(set(known.values()) - {None}) < len(known) - len(unmatched):
        raise K2Error(f"{file} holds the same layer twice.", hint=ON_RAW)

    settings = peft_settings(file)
    layers: dict[str, Change] = {}
    for module, name in known.items():
        if name is None:
            continue
        part, (called, rows) = parts[module], fused.get(module, (module, slice(None)))
        scale, alpha = 1.0, alphas.get(called)
        if rank := len(part.get("down", part.get("hada_w1_b", ()))) or settings.stated_rank(bare(called)):
            scale = settings.scale(bare(called), rank) if alpha is None else alpha / rank
        if name in bares:
            layers[name] = shift_of(file, module, part, scale, bares[name])
            continue
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if "diff_b" in part and layer.bias is None:
            del part["diff_b"]
            unmatched.append(f"{module}.diff_b")
        check_wholes(file, module, part, layer)
        shape = layer.out_features, layer.in_features  # what is held in few bits is packed
        if any(what.startswith("w") for what in part):
            update: Update = kronecker_of(file, module, part, alpha, scale, rows, shape)
        elif part.keys() >= HADAMARD:
            update = hadamard_of(file, module, part, scale, shape, network.config.width)
        else:
            update = low_rank_of(file, module, part, scale, shape, network.config.width)
        if part:
            magnitude = magnitude_of(file, module, part, shape, stated=settings.dora)
            layers[name] = replace(update, bias=part.get("diff_b"), magnitude=magnitude)
    refuse_unmatched(file, unmatched, len(layers) + len(unmatched))
    return Adapter(Path(path), identity(file), layers, tuple(unmatched))


def weights_file(path: Path) -> Path:
    """PEFT saves a folder."""
    return path / PEFT_WEIGHTS if path.is_dir() else path


@contextmanager
def laid_over(network: Krea2, adapters: Iterable[tuple[Adapter, float]]) -> Iterator[None]:
    """Within the context the network answers with the adapters, each at its weight (negative too), in any order.

    Weight 0 adds nothing, not even a rounding. Contexts may be nested: they add.
    """
    with ExitStack() as stack:
        for name, changes in together(adapters).items():
            if updates := [(each, weight) for each, weight in changes if isinstance(each, Update)]:
                stack.enter_context(network.get_submodule(name).register_forward_hook(SecondPath(updates)))
            else:
                stack.enter_context(Exchange(network, name, changes).at_work())
        yield


class Exchange:
    """A parameter is another while the module that reads it works; then it is itself again, also where that failed."""

    def __init__(self, network: Krea2, name: str, weighted: Sequence[tuple[Change, float]]):
        above, _, self.own = name.rpartition(".")
        self.holder = self.reader = network.get_submodule(above)
        if isinstance(self.holder, Modulation):  # it only holds
            self.reader = network.get_submodule(above.rpartition(".")[0])
        self.delta = torch.stack([each.delta * weight for each, weight in weighted if isinstance(each, Shift)]).sum(0)
        self.before: list[nn.Parameter] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Blocks that are streamed have their numbers only while they work: so it comes after their filling, and ends
        before their emptying, as one of these within another does."""
        with (
            self.reader.register_forward_pre_hook(self.put),
            self.reader.register_forward_hook(self.take, prepend=True, always_call=True),
        ):
            yield

    def put(self, reader: nn.Module, inputs: Any) -> None:
        old = self.holder.get_parameter(self.own)
        self.before.append(old)
        new = (old.float() + self.delta.to(old.device)).to(old.dtype)
        setattr(self.holder, self.own, nn.Parameter(new, requires_grad=False))

    def take(self, reader: nn.Module, inputs: Any, answer: Any) -> None:
        if self.before:
            setattr(self.holder, self.own, self.before.pop())


def together(adapters: Iterable[tuple[Adapter, float]]) -> dict[str, list[tuple[Change, float]]]:
    """Several adapters as one: layer -> what changes it, and at which weight, in an order of their own."""
    in_use = sorted(((a, weight) for a, weight in adapters if weight), key=lambda pair: (pair[0].sha256, pair[1]))
    changes: dict[str, list[tuple[Change, float]]] = {}
    for adapter, weight in in_use:
        for name, each in adapter.layers.items():
            changes.setdefault(name, []).append((each, weight))
    return changes


# ---- matching -----------------------------------------------------------------------------------


def bare_parameters(network: Krea2) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that are no linear layer's, by native name: scales of norms, and what layers add to the modulation."""
    for name, parameter in network.named_parameters():
        if not isinstance(network.get_submodule(name.rpartition(".")[0]), nn.Linear):
            yield name, parameter


def layer_names(network: Krea2) -> dict[str, str]:
    """Every spelling of a linear layer, or of a parameter beside them -> its native name: native and diffusers', with
    dots and with underscores."""
    theirs = diffusers_names(network.config.blocks)
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    others = {name: theirs[f"{name}.weight"] for name in linear}
    others |= {name: theirs[name] for name, _ in bare_parameters(network)}
    names = {}
    for name, full in others.items():
        other = full.removesuffix(".weight")
        for spelling in (name, full, other, other.removesuffix(".0")):  # some leave the last name's number out
            names[spelling] = names[spelling.replace(".", "_")] = name
    return names


def bare(module: str) -> str:
    """A layer's name without the prefixes that trainers put before it."""
    while prefix := next((prefix for prefix in PREFIXES if module.startswith(prefix)), ""):
        module = module.removeprefix(prefix)
    return module


def refuse_giants(path: Path, network: Krea2) -> None:
    """Raises K2Error, before it is read, for a file of more than any LoRA of this network can hold in fp32."""
    most = MOST_BESIDE + 8 * sum(weight.numel() for weight in network.parameters())  # a rank is the width at most
    if path.stat().st_size > most:
        raise K2Error(f"{path} is larger than a LoRA of this network can be.", hint=ON_RAW)


def part_fused(
    path: Path, parts: dict[str, dict[str, Tensor]], spellings: Mapping[str, str], network: Krea2
) -> dict[str, tuple[str, slice]]:
    """Cut what was trained for queries, keys and values as one matrix into theirs; module -> the whole, and which rows.

    SimpleTuner trains so where it is told to, and writes beside it the three that it did not train. Raises K2Error.
    """
    found = {}
    for module, match in [(module, match) for module in parts if (match := FUSED.fullmatch(module))]:
        three = [match["stem"] + each for each in "qkv"]
        names = [spellings.get(bare(each)) for each in three]
        if None in names:
            continue  # it is named with the others that do not match
        layers = [network.get_submodule(str(name)) for name in names]
        sizes = [layer.get_parameter("weight").shape[0] for layer in layers]
        whole, start = parts.pop(module), 0
        if "magnitude" in whole and is_row(whole["magnitude"]):
            why = "holds the lengths of columns (DoRA) that three layers have together"
            raise K2Error(f"{path} {why}: see its {module}.", hint=PLAIN)
        heights = {len(tensor) for what, tensor in whole.items() if what in ROWS}
        if factors := [tensor for what, tensor in whole.items() if what in TALL]:
            heights.add(math.prod(map(len, factors)))
        if heights != {sum(sizes)}:
            raise K2Error(f"{path} is made for a network of another size: see its {module}.", hint=ON_RAW)
        beside = {each: parts[each] for each in three if each in parts}
        measured = any("magnitude" in part for part in beside.values())  # which few are, and a block is read for it
        with at_hand(network, str(names[0])) if measured else nullcontext():
            for each, layer in zip(three, layers, strict=True):
                part = beside.get(each, {})
                if trained(part) or ("magnitude" in part and not is_own_norm(path, each, part, layer)):
                    raise K2Error(f"{path} holds {each} twice, by itself and in {module}.", hint=PLAIN)
        for each, size in zip(three, sizes, strict=True):
            rows, start = slice(start, start + size), start + size
            parts[each] = {what: tensor[rows] if what in ROWS else tensor for what, tensor in whole.items()}
            found[each] = module, rows
    return found


def trained(part: Mapping[str, Tensor]) -> bool:
    """Whether it changes anything: a product does where none of its factors is all noughts. Of a magnitude over one
    that does not, see `is_own_norm`."""
    wholes, factors = (
        [bool(tensor.any()) for what, tensor in part.items() if what.startswith("diff") == whole]
        for whole in (True, False)
    )
    return any(wholes) or (bool(factors) and all(factors))


def is_own_norm(path: Path, module: str, part: Mapping[str, Tensor], layer: nn.Module) -> bool:
    """Whether a magnitude is about its layer's own norm, as it begins, and stays where nothing trains it. Raises
    K2Error for its shape."""
    assert isinstance(layer, nn.Linear)
    out, inward = layer.out_features, layer.in_features
    lengths = magnitude_of(path, module, part, (out, inward), stated=False)
    gain = gain_of(layer, LowRank(torch.zeros(0, inward), torch.zeros(out, 0), magnitude=lengths))
    return float((gain - 1).square().mean().sqrt()) < ABOUT


def shift_of(path: Path, module: str, part: Mapping[str, Tensor], scale: float, own: nn.Parameter) -> Shift:
    """What is added to a parameter: a difference, or scale times a pair's product. Raises K2Error.

    A row of numbers may come as a table: diffusers has a block's modulation as 6 × width.
    """
    if part.keys() not in ({"diff"}, {"down", "up"}):
        raise K2Error(f"{path} changes {module}, which is no linear layer, as if it were one.", hint=PLAIN)
    whole = part.get("diff")
    shape = tuple(whole.shape) if whole is not None else check_product(path, module, part["up"], part["down"])
    if shape != tuple(own.shape) and (own.ndim > 1 or math.prod(shape) != own.numel()):
        raise of_another_size(path, f"its change of {module} is {list(shape)}, this one's {list(own.shape)}")
    delta = whole.float() if whole is not None else part["up"].float() @ part["down"].float() * scale
    return Shift(delta.view(own.shape))


def check_matrix(path: Path, module: str, matrix: Tensor) -> tuple[int, int]:
    """A matrix's shape. Raises K2Error where it is none."""
    if matrix.ndim != 2 or not matrix.numel():
        raise K2Error(f"{path} is damaged: {module} is {list(matrix.shape)}.", hint="Fetch it again.")
    return matrix.shape[0], matrix.shape[1]


def check_product(path: Path, module: str, a: Tensor, b: Tensor) -> tuple[int, int]:
    """The shape of a @ b, which must share a rank. Raises K2Error."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not len(b):
        raise K2Error(f"{path} is damaged: {module} is {list(a.shape)} times {list(b.shape)}.", hint="Fetch it again.")
    return a.shape[0], b.shape[1]


def low_rank_of(
    path: Path, module: str, part: Mapping[str, Tensor], scale: float, shape: tuple[int, int], width: int
) -> LowRank:
    """A layer's low-rank pair. A whole matrix is one too, of the rank of its shorter side, with as many ones; so is
    nothing, of no rank. Raises K2Error for halves that do not fit."""
    out, inward = shape
    if "down" in part:
        check_factors(path, module, part["up"], part["down"], shape, width)
        return LowRank(part["down"], part["up"], scale=scale)
    if "diff" not in part:
        return LowRank(torch.zeros(0, inward), torch.zeros(out, 0))
    return LowRank(part["diff"], torch.eye(out)) if out <= inward else LowRank(torch.eye(inward), part["diff"])


def hadamard_of(
    path: Path, module: str, part: Mapping[str, Tensor], scale: float, shape: tuple[int, int], width: int
) -> Hadamard:
    """A layer's Hadamard product of two low-rank matrices. Raises K2Error for factors that do not fit."""
    factors = [part[what] for what in sorted(HADAMARD)]
    for a, b in (factors[:2], factors[2:]):
        check_factors(path, module, a, b, shape, width)
    return Hadamard(*factors, scale=scale)


def kronecker_of(
    path: Path,
    module: str,
    part: Mapping[str, Tensor],
    alpha: float | None,
    scale: float,
    rows: slice,
    shape: tuple[int, int],
) -> Kronecker:
    """A layer's Kronecker product. Where both factors are whole there is no rank, and alpha means nothing (LyCORIS).

    scale: for a file without alphas. Raises K2Error for factors that do not make up the layer's shape, (out, in).
    """
    halves = [(part[what],) if what in part else (part[f"{what}_a"], part[f"{what}_b"]) for what in ("w1", "w2")]
    (a, b), (c, d) = (
        check_product(path, module, *pair) if len(pair) == 2 else check_matrix(path, module, *pair) for pair in halves
    )
    check_span(path, module, len(range(a * c)[rows]), b * d, shape)
    ranks = [len(pair[1]) for pair in halves if len(pair) == 2]
    left, right = (pair[0] if len(pair) == 1 else pair[0].float() @ pair[1].float() for pair in halves)
    if alpha is not None:
        scale = alpha / ranks[-1] if ranks else 1.0
    return Kronecker(left, right, rows, scale=scale)


def magnitude_of(
    path: Path, module: str, part: Mapping[str, Tensor], shape: tuple[int, int], *, stated: bool
) -> Tensor | None:
    """A DoRA's lengths: of rows as a column [out, 1], of columns as a row [1, in]. PEFT's vector is of rows.

    stated: whether the file says that it is a DoRA. Raises K2Error where it then is none, and for another shape.
    """
    magnitude = part.get("magnitude")
    if magnitude is None:
        if stated:
            raise K2Error(f"{path} says that it is a DoRA, and has no magnitude of {module}.", hint="Fetch it again.")
        return None
    lengths = magnitude[:, None] if magnitude.ndim == 1 else magnitude
    if lengths.shape not in ((shape[0], 1), (1, shape[1])):
        theirs, ours = list(magnitude.shape), f"this one has {shape[0]} rows and {shape[1]} columns"
        raise of_another_size(path, f"the magnitude of its {module} is {theirs}, {ours}")
    return lengths


def is_row(magnitude: Tensor) -> bool:
    return magnitude.ndim == 2 and len(magnitude) == 1


def refuse_unmatched(path: Path, unmatched: Sequence[str], modules: int) -> None:
    """Raises K2Error with the nearest reason where no layer matches, or where another model's layers are among them."""
    for pattern, model in OTHER_MODELS.items():
        if theirs := [module for module in unmatched if re.search(pattern, module)]:
            raise K2Error(f"{path} is made for {model}: it has layers like {some(theirs, 2)}.", hint=ON_RAW)
    if len(unmatched) == modules:
        of_text = all(re.search(TEXT_ENCODER, module) for module in unmatched)
        why = "is made for a text encoder" if of_text else "matches no layer of this network"
        raise K2Error(f"{path} {why}: it has layers like {some(list(unmatched), 2)}.", hint=ON_RAW)


def check_wholes(path: Path, module: str, part: Mapping[str, Tensor], layer: nn.Linear) -> None:
    """What is added as it is must have the shape of what it is added to. Raises K2Error."""
    whole = layer.out_features, layer.in_features
    for what, own, shape in (("diff", "weight", whole), ("diff_b", "bias", whole[:1])):
        if what in part and part[what].shape != shape:
            theirs = f"its {module}.{what} is {list(part[what].shape)}"
            raise of_another_size(path, f"{theirs}, this one's {own} {list(shape)}")


def check_factors(path: Path, module: str, a: Tensor, b: Tensor, shape: tuple[int, int], width: int) -> None:
    """Both factors of a @ b must share a rank and span the layer's shape, (out, in). Raises K2Error.

    A rank may exceed one side of a small layer (trainers give all layers one rank), but never the network's width.
    """
    out, inward = check_product(path, module, a, b)
    if len(b) > width:
        raise K2Error(f"{path} is damaged: {module} has a rank of {len(b)}.", hint="Fetch it again.")
    check_span(path, module, out, inward, shape)


def check_span(path: Path, module: str, out: int, inward: int, shape: tuple[int, int]) -> None:
    """What changes a layer must turn as many numbers into as many as it does itself. Raises K2Error."""
    if (out, inward) != shape:
        ours = f"this one {shape[1]} into {shape[0]}"
        raise of_another_size(path, f"its {module} turns {inward} numbers into {out}, {ours}")


def of_another_size(path: Path, how: str) -> K2Error:
    return K2Error(
        f"{path} is made for a network of another size: {how}.", hint="Give the model that it was trained on."
    )
