"""The contents of an adapter's file, by layer and in any trainer's naming, and the reasons to refuse it.

`model/lora_match.py` matches it with a network. Needs no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import K2Error, brief, listed, pluralise
from model.hashes import peft_settings_file
from model.headers import own_metadata, read_header, read_json

if TYPE_CHECKING:
    from torch import Tensor

PART = re.compile(  # module . part [. the adapter's name] [. weight]
    r"(?P<module>.+?)\.(lora[_.](?P<half>A|B|down|up)|(?P<factor>hada_w[12]_[ab])"
    r"|dora_scale|lora_magnitude_vector|magnitude)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.weight)?"
)
FULL_MATRIX = re.compile(r"(?P<module>.+)\.(?P<what>diff|diff_b)")  # added as is to a layer's matrix or its bias
KRONECKER = re.compile(r"(?P<module>.+)\.lokr_(?P<what>w[12](_[ab])?)")  # a factor, or the two that make it up
OTHER_KINDS = {  # adapters that k2 does not read
    r"\.lokr_t[12]$": "a convolutional LoKr",
    r"\.hada_t[12]$": "a convolutional LoHa",
    r"\.wd_for_diff$": "a DoRA of differences",
    r"\.(oft_|boft_)": "an OFT",
    r"\.([ab][12]|bm)\.weight$": "a GLoRA",
    r"\.on_input$": "an IA3",
    r"\.[wb]_norm$": "an adapter of norms",
    r"\.set_weight$": "a set of weights that replace the model's own",
    r"\.lora_mid": "a convolutional LoRA",
    r"\.lora_(B|up)(\.\w+)?\.bias$": "a LoRA with biases",
}
OTHER_MODELS = {  # by their layers' names; the first match counts
    r"(double|single)_blocks|single_transformer_blocks": "FLUX",
    r"joint_blocks": "Stable Diffusion 3",
    r"(img|txt)_(mod|mlp)[._]|[._]add_[qkv]_proj": "Qwen-Image or FLUX",
    r"(^|[._])(down|up|input|output)_blocks|(mid|middle)_block": "SDXL or Stable Diffusion 1",
    r"blocks[._]\d+[._](self_attn|cross_attn)": "Wan",
    r"(^|[._])layers[._]\d+[._](attention|feed_forward)": "Z-Image",
}
TEXT_ENCODER = r"lora_te\d?_|text_encoder|text_model|layers[._]\d+[._](self_attn|mlp)"
BASE_CHANGERS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # inits that subtract the adapter from the base
PAIR, HADAMARD = {"down", "up"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
LEFT_FACTORS, RIGHT_FACTORS = ({"w1"}, {"w1_a", "w1_b"}), ({"w2"}, {"w2_a", "w2_b"})
COMPLETE_SETS = [PAIR, HADAMARD, *(left | right for left in LEFT_FACTORS for right in RIGHT_FACTORS)]
MAX_TRIGGER_CHARS, MAX_TRIGGERS = 200, 16  # characters of one, and number, that a file may add to every prompt
GIVE_KREA_2 = "Give a LoRA trained on Krea 2."
GIVE_PLAIN = "Give a plain LoRA; if this is one, fetch it again."


def check_kind(path: Path) -> None:
    """Refuse, by its header, a file that is not an adapter k2 can read, or is for another model; whether it fits a
    network is not checked. Raises K2Error."""
    refuse_other_adapters(path, read_header(path).keys() - {"__metadata__"})
    peft_settings(path)


def stated_triggers(path: Path) -> tuple[list[str], str]:
    """The trigger words stated in an adapter's metadata, by ModelSpec or by k2's own training; tag frequencies (kohya)
    do not count. It is a stranger's text and may hold anything: what is too much for a prompt is skipped -> triggers,
    and a sentence about what was skipped, or ""."""
    about = read_header(path).get("__metadata__", {})
    own = own_metadata(about).get("triggers")
    stated = [*(own if isinstance(own, list) else ()), about.get("modelspec.trigger_phrase")]
    words = dict.fromkeys(" ".join(each.split()) for each in stated if isinstance(each, str) and each.strip())
    accepted = [each for each in words if len(each) <= MAX_TRIGGER_CHARS][:MAX_TRIGGERS]
    over = pluralise(len(words) - len(accepted), "trigger")
    limits = f"k2 uses up to {MAX_TRIGGERS} per LoRA, of up to {MAX_TRIGGER_CHARS} characters"
    return accepted, f"Passed over: {over} stated by the LoRA; {limits}." if len(accepted) < len(words) else ""


def refuse_other_adapters(path: Path, names: Iterable[str]) -> None:
    """Raises K2Error for adapters of another kind or for another model, and for files that hold none."""
    for pattern, what in OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in names):
            raise K2Error(f"{path} is {what}, which k2 does not read.", hint="Give a plain LoRA.")
    found = (FULL_MATRIX.fullmatch(name) or KRONECKER.fullmatch(name) or PART.fullmatch(name) for name in names)
    modules = sorted({match["module"] for match in found if match})
    if not modules:
        raise K2Error(f"{path} is not a LoRA: it holds {listed(sorted(names), 3) or 'nothing'}.", hint=GIVE_KREA_2)
    for pattern, model in OTHER_MODELS.items():
        if theirs := [module for module in modules if re.search(pattern, module)]:
            raise K2Error(f"{path} is made for {model}: it has layers like {listed(theirs, 2)}.", hint=GIVE_KREA_2)
    if all(re.search(TEXT_ENCODER, module) for module in modules):
        raise K2Error(f"{path} is made for a text encoder: it has layers like {listed(modules, 2)}.", hint=GIVE_KREA_2)


def sort_parts(path: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Module -> its parts, {"down": …, "up": …}, {"w1": …, "w2": …}, `HADAMARD` or {"diff": …}, plus "diff_b" and
    "magnitude" (DoRA); module -> alpha, if stated. A factor may come as two, {"w2_a": …, "w2_b": …}.

    Raises K2Error.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    alphas, strange = {}, []
    for name, tensor in state.items():
        if name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = tensor.item()
        elif not tensor.ndim:
            strange.append(name)
        elif match := FULL_MATRIX.fullmatch(name) or KRONECKER.fullmatch(name):
            parts.setdefault(match["module"], {})[match["what"]] = tensor
        elif match := PART.fullmatch(name):
            what = {"A": "down", "B": "up"}.get(match["half"], match["half"]) or match["factor"] or "magnitude"
            if what in parts.setdefault(match["module"], {}):
                raise K2Error(
                    f"{path} holds more than one adapter: {name} appears twice.",
                    hint="Save each adapter in its own file.",
                )
            parts[match["module"]][what] = tensor
        else:
            strange.append(name)
    kinds = {module: part.keys() - {"diff_b", "magnitude"} for module, part in parts.items()}
    strange += [module for module, kind in kinds.items() if "diff" not in kind and kind and kind not in COMPLETE_SETS]
    strange += [f"{module}.alpha" for module in alphas if kinds.get(module, {"diff"}) <= {"diff"}]
    strange += [f"the magnitude of {m}" for m, part in parts.items() if "magnitude" in part and kinds[m] <= {"diff"}]
    if strange:
        raise K2Error(
            f"{path} holds parts that do not make up a low-rank pair or product: {listed(strange, 3)}.", hint=GIVE_PLAIN
        )
    if both := [module for module, kind in kinds.items() if kind > {"diff"}]:
        raise K2Error(f"{path} changes {listed(both, 3)} both by a full matrix and by factors.", hint=GIVE_PLAIN)
    # ai-toolkit's norm omits alpha, which equals the rank in all transformers that it trains: then it is PEFT's norm
    if any(f"{m}.magnitude" in state and alpha != len(parts[m].get("down", ())) for m, alpha in alphas.items()):
        raise K2Error(f"{path} is a DoRA whose norm omits alpha (ai-toolkit), which k2 does not read.", hint=GIVE_PLAIN)
    if not all(tensor.float().isfinite().all() for tensor in state.values()):
        raise K2Error(f"{path} holds NaN or infinite numbers.", hint="Its training went wrong.")
    return parts, alphas


@dataclass(frozen=True)
class PeftSettings:
    """What PEFT states besides the tensors; without it alpha equals the rank."""

    alpha: float | None = None
    alphas: Mapping[re.Pattern[str], float] | None = None  # of single layers; the first match counts
    rank_stabilised: bool = False  # scaled by alpha / √rank
    dora: bool = False  # every layer has a magnitude
    ranks: Mapping[re.Pattern[str], float] | None = None  # of a LoKr, to scale it by if its factors have none

    def stated_rank(self, name: str) -> float | None:
        return first_match(self.ranks, name)

    def scale(self, name: str, rank: float) -> float:
        """The scale of a layer by its name in the file, which is what the patterns match."""
        alpha = first_match(self.alphas, name, self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def first_match(
    patterns: Mapping[re.Pattern[str], float] | None, name: str, otherwise: float | None = None
) -> float | None:
    return next((value for pattern, value in (patterns or {}).items() if pattern.match(name)), otherwise)


def peft_settings(path: Path) -> PeftSettings:
    """From the file's own metadata, as diffusers writes it, or from PEFT's adapter_config.json beside it."""
    beside = peft_settings_file(path)
    try:
        text = read_header(path).get("__metadata__", {}).get("lora_adapter_metadata")
        if text:
            stated = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
        else:
            stated = read_json(beside) if beside else {}
        kind = str(stated.get("peft_type") or "LORA").rpartition(".")[2].upper()
        alpha = stated.get("lora_alpha" if kind == "LORA" else "alpha")
        alphas, ranks = pattern_table(stated, "alpha_pattern"), None
        if not all(map(math.isfinite, [*alphas.values(), 0.0 if alpha is None else float(alpha)])):
            raise ValueError("an alpha is not a finite number")
        if kind == "LOKR":
            any_other = re.compile("")
            ranks = pattern_table(stated, "rank_pattern") | {any_other: float(stated.get("r") or 0)}
            if not all(0 < each < math.inf for each in ranks.values()):
                raise ValueError("a rank is not a positive number")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as error:
        raise K2Error(f"{path} states settings that cannot be read: {error}.", hint="Fetch it again.") from None
    if kind not in ("LORA", "LOHA", "LOKR"):  # others state their scales differently
        raise K2Error(f"{path} is a PEFT {brief(kind)}, which k2 does not read.", hint="Give a plain LoRA.")
    if (init := str(stated.get("init_lora_weights")).lower()).startswith(BASE_CHANGERS):
        raise K2Error(
            f"{path} is an adapter for weights that PEFT changed first ({brief(init)}), not for the model's own.",
            hint="Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    rank_stabilised, dora = bool(stated.get("use_rslora")), bool(stated.get("use_dora"))
    return PeftSettings(None if alpha is None else float(alpha), alphas, rank_stabilised, dora, ranks)


def pattern_table(stated: Mapping[str, Any], key: str) -> dict[re.Pattern[str], float]:
    """One of PEFT's tables, {pattern: number}. Raises ValueError, TypeError, AttributeError or re.error."""
    return {layer_pattern(name): float(value) for name, value in (stated.get(key) or {}).items()}


def layer_pattern(key: str) -> re.Pattern[str]:
    """The layers that a key of PEFT's patterns matches: a regular expression for the end of a name.

    Raises ValueError for one that could make the search explode: it comes with a stranger's file.
    """
    if len(key) > 200 or re.search(r"[)\]}][*+?{]", key) or len(re.findall(r"[*+?{]", key)) > 3:
        raise ValueError(f"the pattern {key[:50]!r}")
    return re.compile(rf"(.*\.)?({key})$")
