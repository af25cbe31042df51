"""Export a model as a folder that `diffusers.Krea2Pipeline.from_pretrained` opens.

It proves that this is a plain Krea 2: another implementation, given the folder and the same noise, renders the same
picture. Parts that came from such a folder are copied; parts from our own files are written under diffusers' names.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from model.checkpoint import save
from model.dit import DiTConfig, hidden_width
from model.errors import K2Error
from model.layouts import to_diffusers
from model.library import RECOMMENDED
from model.low_bit import dequantised_state
from model.text_encoder import SPECIAL_TOKENS, TextConfig, TextEncoder
from model.vae import QwenImageVAE

if TYPE_CHECKING:
    from model.pipeline import Pipeline

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"  # diffusers' file name, in any of its folders
COMPONENT_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "text_encoder": ["transformers", "Qwen3VLModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "Krea2Transformer2DModel"],
}


def export_diffusers(pipeline: Pipeline, folder: Path) -> None:
    """Write the complete folder, or nothing. Raises K2Error if it exists already or cannot be written."""
    if folder.exists():
        raise K2Error(f"{folder} exists already.", hint="Choose another name.")
    if not isinstance(pipeline.vae, QwenImageVAE):
        raise K2Error("diffusers' Krea2Pipeline supports Qwen-Image's autoencoder only.", hint="Keep k2's own files.")
    if pipeline.plan.offload != "none":
        raise K2Error("Streamed weights cannot be exported.", hint='Load the model with offload="none".')
    draft = None
    missing = [path for path in folder.parents if not path.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        draft.chmod(0o755)
        write_transformer(pipeline, draft / "transformer")
        write_scheduler(pipeline, draft / "scheduler")
        text_path = pipeline.parts.text
        if text_path.is_dir():
            shutil.copytree(text_path / "text_encoder", draft / "text_encoder")
        else:
            write_text_encoder(pipeline.text, draft / "text_encoder")
        if (text_path / "tokenizer").is_dir():
            shutil.copytree(text_path / "tokenizer", draft / "tokenizer")
        else:  # a lone tokenizer.json, which works just as well
            write_tokenizer(pipeline.text, draft / "tokenizer")
        if pipeline.parts.vae.is_dir():
            shutil.copytree(pipeline.parts.vae, draft / "vae")
        else:
            write_component(draft / "vae", pipeline.vae.config.to_diffusers(), pipeline.vae.to_diffusers())
        write_json(draft / "model_index.json", model_index(pipeline))
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        hint = "Free some space, and try again." if "No space left" in why else ""
        raise K2Error(f"{folder} cannot be written: {why}.", hint=hint) from None
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if not folder.exists():
            with suppress(OSError):  # they may hold something by now
                for path in missing:
                    path.rmdir()


def model_index(pipeline: Pipeline) -> dict[str, Any]:
    """model_index.json: which class reads which folder, and the pipeline's own settings."""
    turbo = RECOMMENDED["turbo"]
    return {
        "_class_name": "Krea2Pipeline",
        "is_distilled": pipeline.recommended["mu"] == turbo["mu"],  # there it only means that mu is 1.15 at any size
        "patch_size": pipeline.dit.config.patch,
        "text_encoder_select_layers": list(pipeline.text.tower.config.taps),
        **COMPONENT_CLASSES,
    }


def write_transformer(pipeline: Pipeline, folder: Path) -> None:
    c = pipeline.dit.config
    write_component(
        folder,
        transformer_config(c),
        to_diffusers(dequantised_state(pipeline.dit, pipeline.dtype), c),
        pipeline.metadata,
    )


def transformer_config(c: DiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "Krea2Transformer2DModel",
        "in_channels": c.token_dim,
        "num_layers": c.blocks,
        "attention_head_dim": c.head_dim,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": hidden_width(c.width, c.multiplier),
        "timestep_embed_dim": c.time_dim,
        "text_hidden_dim": c.text_width,
        "num_text_layers": c.text_taps,
        "text_num_attention_heads": c.text_heads,
        "text_num_key_value_heads": c.text_heads,
        "text_intermediate_size": hidden_width(c.text_width, c.multiplier),
        "axes_dims_rope": list(c.rope_axes),
        "rope_theta": c.rope_base,
        "norm_eps": c.eps,
    }


def write_scheduler(pipeline: Pipeline, folder: Path) -> None:
    """Write the scheduler's config: mu grows with the picture, or is constant, with equal values at both sizes."""
    mu = pipeline.recommended["mu"]
    low, high = (0.5, 1.15) if mu == "auto" else mu if isinstance(mu, tuple) else (mu, mu)
    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
        "base_image_seq_len": 256,
        "max_image_seq_len": 6400,
        "base_shift": low,
        "max_shift": high,
    }
    write_json(folder / "scheduler_config.json", config)


def write_text_encoder(text: TextEncoder, folder: Path) -> None:
    """The language tower, completed to what transformers' Qwen3-VL class requires."""
    config, state = text.tower.config, text.tower.state_dict()
    depth = max(config.taps)
    state = {f"language_model.{name}": tensor for name, tensor in state.items()}
    if "language_model.norm.weight" not in state:
        # transformers norms the very last state. One more layer, of zeros, keeps the last tap from being that state.
        zeros = {name: tensor for name, tensor in state.items() if f".layers.{depth - 1}." in name}
        state |= {name.replace(f".{depth - 1}.", f".{depth}."): torch.zeros_like(t) for name, t in zeros.items()}
        state["language_model.norm.weight"] = torch.ones_like(state["language_model.layers.0.input_layernorm.weight"])
        depth += 1
    vision_config, vision_state = empty_vision_tower(config.hidden_size)
    end = text.tokenizer.token_to_id(SPECIAL_TOKENS[0])
    write_component(
        folder,
        {
            "architectures": ["Qwen3VLModel"],
            "model_type": "qwen3_vl",
            "text_config": text_config(config, depth),
            "vision_config": vision_config,
            # no picture ever comes in; the ids just must not be those of words
            **dict.fromkeys(("image_token_id", "video_token_id"), config.vocab_size),
            **dict.fromkeys(("vision_start_token_id", "vision_end_token_id"), end),
        },
        state | vision_state,
        file="model.safetensors",
    )


def text_config(c: TextConfig, depth: int) -> dict[str, Any]:
    half = c.head_dim // 2
    return {
        "model_type": "qwen3_vl_text",
        **{
            name: getattr(c, name)
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        },
        "num_hidden_layers": depth,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rope_theta": c.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": c.rope_theta,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],  # all three are equal in text
            "mrope_interleaved": True,
        },
    }


def empty_vision_tower(width: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The smallest vision tower that the class accepts, all zeros: this encoder reads only text."""
    inner = 16
    config = {
        "model_type": "qwen3_vl_vision",
        "depth": 0,
        "hidden_size": inner,
        "intermediate_size": inner,
        "num_heads": 1,
        "num_position_embeddings": 4,
        "out_hidden_size": width,
        "deepstack_visual_indexes": [],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    shapes = {
        "patch_embed.proj.weight": (inner, 3, 2, 16, 16),
        "patch_embed.proj.bias": (inner,),
        "pos_embed.weight": (4, inner),
        "merger.norm.weight": (inner,),
        "merger.norm.bias": (inner,),
        "merger.linear_fc1.weight": (4 * inner, 4 * inner),
        "merger.linear_fc1.bias": (4 * inner,),
        "merger.linear_fc2.weight": (width, 4 * inner),
        "merger.linear_fc2.bias": (width,),
    }
    return config, {f"visual.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def write_tokenizer(text: TextEncoder, folder: Path) -> None:
    folder.mkdir()
    text.tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_component(
    folder: Path,
    config: dict[str, Any],
    state: dict[str, Tensor],
    metadata: dict[str, Any] | None = None,
    *,
    file: str = WEIGHTS_NAME,
) -> None:
    """A folder of config.json and one file of weights."""
    folder.mkdir()
    write_json(folder / "config.json", config)
    save(folder / file, state, metadata or {})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
