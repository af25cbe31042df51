"""Recognise weights files that are not Krea 2 transformers. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from model.comfy_formats import PREFIXES
from model.errors import K2Error
from model.headers import own_metadata, read_header

NATIVE_KEYS = ("txtfusion.projector.weight", "blocks.0.attn.wq.weight")  # either identifies the layout
DIFFUSERS_KEYS = ("text_fusion.projector.weight", "transformer_blocks.0.attn.to_gate.weight")
LORA = "a LoRA, which goes on top of a model"
KIND_NAMES = {  # stated in our own files
    "text": "a text encoder",
    "vae": "an autoencoder",
    "style": "a style encoder",
    "judge": "a judge",
    "lora": LORA,
    "words": "a table of words",
}
OTHER_FILES = {  # other contents of .safetensors files, by tensor names
    r"lora_(A|B|down|up)\b|\.lokr_|\.hada_": LORA,
    r"^(encoder|decoder)\.(conv_in|conv1|down|up|mid)|^(post_)?quant_conv": "an autoencoder",
    r"(^|\.)layers\.\d+\.(self_attn|input_layernorm)|(^|\.)embed_tokens\.|^blk\.\d|^token_embd\.": "a text encoder",
    r"(double|single|joint|input|down)_blocks\.|img_mod|add_q_proj|caption_projection": "another kind of image model",
}
GIVE_TRANSFORMER = "Give the file or folder of the diffusion transformer."
MAKE_A_STYLE = "Make it a style: k2 style add NAME FILE"


def check_transformer(path: Path) -> None:
    """Refuse a file whose header shows that it is something else. Raises K2Error."""
    header = read_header(path)
    refuse_other_weights(path, own_metadata(header.get("__metadata__", {})), header)


def refuse_other_weights(path: Path, about: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises K2Error for a file that is recognised as something else, by its metadata or its tensors' names."""
    kind = str(about.get("kind", "dit"))
    if kind != "dit":
        what = KIND_NAMES.get(kind, kind)
    elif any(prefix + name in names for prefix in PREFIXES for name in (*NATIVE_KEYS, *DIFFUSERS_KEYS)):
        return
    else:
        what = next((what for pattern, what in OTHER_FILES.items() if any(re.search(pattern, n) for n in names)), "")
    if what:
        raise K2Error(
            f"{path} is {what}, not a Krea 2 transformer.", hint=MAKE_A_STYLE if what == LORA else GIVE_TRANSFORMER
        )
