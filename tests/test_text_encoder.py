"""The text encoder compared with transformers and diffusers, and what a prompt may contain."""

import base64
import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_layouts import every_tool, gguf_of, packed_as
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.checkpoint import open_checkpoint, save
from model.errors import K2Error
from model.four_bit import to_codes
from model.low_bit import SUFFIXES
from model.quantize import rotate, to_int8
from model.text_encoder import (
    MAX_PROMPT_TOKENS,
    PREFIX,
    SPECIAL_TOKENS,
    SUFFIX,
    TextConfig,
    TextEncoder,
    TextTower,
    open_tower,
)

WEIGHTS = Path(__file__).parents[1] / "model" / "weights"
TAPS = (1, 3, 4)
PROMPTS = [
    "",
    "fox",
    "a red fox, curled up asleep; 3 Füchse\nund ein 狐 🦊 " + "in the snow " * 8,
    "very " * 600 + "long",
]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def qwen_tokenizer() -> Tokenizer:
    """Qwen's tokenizer from its published ranks.

    tiktoken merges the adjacent pair whose union has the lowest rank; so every way to split a token into two known
    parts is a merge, with the union's rank as its priority.
    """
    alphabet = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in alphabet)}
    source = Path(find_spec("dashscope").origin).parent / "resources" / "qwen.tiktoken"
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, source.read_text().splitlines())}

    def text(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = [
        (text(token[:cut]), text(token[cut:]))
        for token in sorted(ranks, key=ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE({text(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A small random Qwen3-VL, saved by transformers in shards beside Qwen's tokenizer."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 151_646,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 5e6,  # as transformers 4 writes it and 5 still reads it
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
        elif "layers" in name:
            weight.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(folder, max_shard_size="150KB")
    qwen_tokenizer().save(str(folder / "tokenizer.json"))
    return SimpleNamespace(folder=folder, model=model.model, encoder=TextEncoder.load(folder, taps=TAPS))


@pytest.mark.parametrize("prompt", PROMPTS, ids=["empty", "one word", "forty tokens", "too long"])
def test_rows_match_transformers(qwen, prompt):
    """Without padding, with the prefix cached and equal rotary axes for text: the same hidden states up to rounding."""
    ids = qwen.encoder.prefix_ids[0].tolist() + qwen.encoder.token_ids(prompt)
    reference = qwen.model.language_model(torch.tensor([ids]), output_hidden_states=True).hidden_states

    embeds, mask = qwen.encoder.encode([prompt])

    assert mask.all()
    torch.testing.assert_close(embeds, torch.stack([reference[tap] for tap in TAPS], 2)[:, 34:], atol=2e-5, rtol=2e-4)


def test_rows_match_the_diffusers_pipeline(qwen):
    """It pads between prompt and suffix, and cuts at 512 tokens."""
    from diffusers import Krea2Pipeline
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(qwen.folder / "tokenizer.json"), pad_token="<|endoftext|>")
    pipeline = SimpleNamespace(
        prompt_template_encode_start_idx=34,
        prompt_template_encode_num_suffix_tokens=5,
        prompt_template_encode_prefix=PREFIX,
        prompt_template_encode_suffix=SUFFIX,
        tokenizer=tokenizer,
        text_encoder=qwen.model,
        text_encoder_select_layers=TAPS,
    )
    for prompt in PROMPTS:
        states, mask = Krea2Pipeline.get_text_hidden_states(pipeline, prompt.strip(), device=torch.device("cpu"))

        embeds, _ = qwen.encoder.encode([prompt])

        torch.testing.assert_close(embeds[0], states[0][mask[0]], atol=2e-5, rtol=2e-4)


def test_last_layers_state_is_the_normed_one(qwen):
    encoder = TextEncoder.load(qwen.folder, taps=(2, 6))
    ids = torch.tensor([encoder.prefix_ids[0].tolist() + encoder.token_ids("a red fox")])
    reference = qwen.model.language_model(ids, output_hidden_states=True).hidden_states[6]

    torch.testing.assert_close(encoder.encode(["a red fox"])[0][:, :, 1], reference[:, 34:], atol=2e-5, rtol=2e-4)


def test_only_layers_up_to_the_last_tap_exist(qwen):
    names = qwen.encoder.tower.state_dict()

    assert not any(name.startswith(("layers.4", "layers.5", "norm")) for name in names)
    assert "layers.3.mlp.down_proj.weight" in names


def test_cached_prefix_is_exact(qwen):
    tower, ids = qwen.encoder.tower, torch.tensor([qwen.encoder.token_ids("a red fox")] * 2)
    whole, _ = tower(torch.cat((qwen.encoder.prefix_ids.expand(2, -1), ids), 1))

    torch.testing.assert_close(tower(ids, qwen.encoder.prefix_cache)[0], whole[:, 34:], atol=1e-5, rtol=1e-5)


def test_other_prompts_in_the_list_change_nothing(qwen):
    alone = qwen.encoder.encode(["a red fox"])[0]
    embeds, mask = qwen.encoder.encode(["", "a red fox", "a much longer prompt about two sleeping foxes"])
    together, _ = qwen.encoder.encode(["", "a red fox", "a much longer prompt about two sleeping foxes"], batch_size=3)

    assert torch.equal(embeds[1, mask[1]], alone[0])
    assert mask.sum(1).tolist()[:2] == [5, 8]
    assert not embeds[~mask].any()
    torch.testing.assert_close(together, embeds, atol=1e-5, rtol=1e-4)


def test_key_value_heads_are_shared_as_in_the_transformer(monkeypatch):
    """Its attention picks a fused kernel that can: on a GPU, all logits of sixteen pictures would take gigabytes."""
    shapes = []
    monkeypatch.setattr(
        "model.text_encoder.attention", lambda q, k, v, mask: shapes.append((q.shape, k.shape, mask.shape)) or q
    )

    TextTower(TextConfig(50, 32, 64, 2, 4, 1, 8, 1e4, 1e-6, (1, 2), (2, 1, 1)))(torch.zeros(1, 7, dtype=torch.long))

    assert shapes == [((1, 4, 7, 8), (1, 1, 7, 8), (7, 7))] * 2


def test_long_prompts_are_cut(qwen):
    assert len(qwen.encoder.token_ids("very " * 600)) == MAX_PROMPT_TOKENS + 5


@pytest.mark.parametrize("kept", [{"truncation": True, "max_length": 77}, {"padding": "max_length", "max_length": 541}])
def test_saved_truncation_and_padding_are_ignored(qwen, tmp_path, kept):
    """transformers saves the last call's settings in the file, where they would cut prompts or pad the template."""
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(qwen.folder, tmp_path, dirs_exist_ok=True)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(qwen.folder / "tokenizer.json"), pad_token="<|endoftext|>")
    theirs("a red fox", **kept)
    theirs.save_pretrained(tmp_path)

    encoder = TextEncoder.load(tmp_path, taps=TAPS)

    for prompt in ("fox", "very " * 300, "very " * 600):
        assert encoder.token_ids(prompt) == qwen.encoder.token_ids(prompt)
        assert encoder.truncated(prompt) == qwen.encoder.truncated(prompt)


@pytest.mark.parametrize("prompt", ["a fox<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>"])
def test_template_tokens_in_a_prompt_are_text(qwen, prompt):
    special = {qwen.encoder.tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}

    assert not special & set(qwen.encoder.token_ids(prompt)[:-5])


@pytest.mark.parametrize(
    "prompt", ["\0", "a\0b", "\ud800 fox", "\u200d\ufe0f", "e\u0301" * 40, "\U0010ffff", " \n\t ", "﷽"]
)
def test_unusual_prompts_encode(qwen, prompt):
    assert qwen.encoder.encode([prompt])[0].isfinite().all()


def test_diffusers_folder_states_its_taps(qwen, tmp_path):
    (tmp_path / "text_encoder").symlink_to(qwen.folder)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").symlink_to(qwen.folder / "tokenizer.json")
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder_select_layers": TAPS}))

    encoder = TextEncoder.load(tmp_path)

    assert torch.equal(encoder.encode(["fox"])[0], qwen.encoder.encode(["fox"])[0])


@pytest.mark.parametrize("beside", ["scale", "zeros", "svd_up", "bias"])
def test_unknown_tensors_of_a_layer_are_refused(qwen, tmp_path, beside):
    """Numbers in 8 bits mean nothing without their scales, whatever the scales' names."""
    config = json.loads((qwen.folder / "config.json").read_text())
    state = dict(open_checkpoint(qwen.folder).read())
    name = next(name for name in state if name.endswith("layers.1.mlp.up_proj.weight"))
    for spare in ("language_model.layers.5.mlp.up_proj.", "visual.blocks.0.mlp.linear_fc1."):  # never used
        state[f"model.{spare}{beside}2"] = torch.ones(3)
    shutil.copy(qwen.folder / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(tmp_path / "model.safetensors", state, {})
    assert torch.equal(TextEncoder.load(tmp_path, taps=TAPS).encode(["fox"])[0], qwen.encoder.encode(["fox"])[0])

    state[f"{name.removesuffix('weight')}{beside}"] = torch.ones(48)
    save(tmp_path / "model.safetensors", state, {})
    with pytest.raises(K2Error, match=rf"1 tensor that Qwen3-VL does not have \(layers.1.mlp.up_proj.{beside}\)"):
        TextEncoder.load(tmp_path, taps=TAPS)


@every_tool
@pytest.mark.parametrize("within", ["layers.", "language_model."])
def test_refuses_encoders_packed_by_other_tools(qwen, tmp_path, within, packed, tool):
    """The embedding may be packed, too."""
    shutil.copy(qwen.folder / "config.json", tmp_path)
    save(tmp_path / "model.safetensors", packed_as(packed, dict(open_checkpoint(qwen.folder).read()), within), {})
    with pytest.raises(K2Error, match=f"stored as {tool}, which"):
        open_tower(tmp_path, TAPS)


def test_refuses_gguf_text_encoders(qwen, tmp_path):
    """llama.cpp uses other names, so this must not look like a broken download, for a file or a folder."""
    shutil.copy(qwen.folder / "config.json", tmp_path)
    names = ("token_embd.weight", "blk.0.attn_q.weight")
    file = gguf_of(tmp_path, dict.fromkeys(names, torch.ones(64, 32)), "F32")
    for path in (tmp_path, file):
        with pytest.raises(K2Error, match="is a GGUF file, but text encoders are read from safetensors only"):
            open_tower(path, TAPS)


@pytest.mark.parametrize("layers", ["int8_tensorwise", "asym_w4a8_int8"])
def test_few_bit_weights_load_as_the_encoder_they_stand_for(qwen, tmp_path, layers):
    """As in ComfyUI's text encoders, with the embedding in int8; all widths here are multiples of 16."""
    state = dict(open_checkpoint(qwen.folder).read())
    stored, means = dict(state), dict(state)
    for name in [n for n, t in state.items() if re.search("language_model.(layers|embed_tokens)", n) and t.ndim == 2]:
        kind = "int8_tensorwise" if "embed_tokens" in name else layers
        mark = json.dumps({"format": kind, "convrot": True, "convrot_groupsize": 16}).encode()
        stored[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
        turned = rotate(state[name], 16)
        if kind == "int8_tensorwise":
            rows, scale = to_int8(turned)
            stored |= {name: rows, f"{name}_scale": scale[:, None]}
        else:
            codes = to_codes(turned)
            ends = (codes.packed, codes.groups.view(torch.float8_e4m3fn), codes.rows, codes.levels)
            stored |= {name + end: part for end, part in zip(SUFFIXES[4], ends, strict=True)}
            rows, scale = codes.numbers, codes.rows
        means[name] = rotate(rows.float() * scale[:, None], 16)
    encoders = []
    for folder, tensors in ((tmp_path / "stored", stored), (tmp_path / "means", means)):
        folder.mkdir()
        for file in ("tokenizer.json", "config.json"):
            shutil.copy(qwen.folder / file, folder)
        save(folder / "model.safetensors", tensors, {})
        encoders.append(TextEncoder.load(folder, taps=TAPS))
    assert torch.equal(*(encoder.encode(["fox"])[0] for encoder in encoders))


def test_refuses_encoders_with_too_few_layers(qwen):
    with pytest.raises(K2Error, match="has 6 layers, but layer 35"):
        TextEncoder.load(qwen.folder)


def test_published_config_is_read():
    """In Qwen3-VL-4B-Instruct's own format, older than what transformers writes today."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
    }

    config = TextConfig.from_dict({"model_type": "qwen3_vl", "text_config": text})

    assert (config.rope_theta, config.taps) == (5e6, (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35))
    assert TextConfig.from_dict(asdict(config)) == config


def test_loading_imports_no_heavy_library():
    code = (
        "import sys; from model.text_encoder import TextEncoder; TextEncoder.load(sys.argv[1]);"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'torch._inductor', 'sympy')))"
    )

    assert not subprocess.run(
        [sys.executable, "-c", code, str(WEIGHTS / "mini-text.safetensors")], check=False
    ).returncode


def test_foreign_tokenizer_is_refused():
    config = TextConfig(300, 8, 8, 1, 1, 1, 8, 1e4, 1e-6, (1,))

    with pytest.raises(K2Error, match="template"):
        TextEncoder(TextTower(config), Tokenizer(models.BPE({"a": 0, "t": 1}, [])))


@pytest.fixture(scope="module")
def mini_tokenizer():
    return Tokenizer.from_file(str(WEIGHTS / "mini-tokenizer.json"))


def test_bundled_tokenizer_splits_the_template_as_qwen_does(mini_tokenizer):
    assert (len(mini_tokenizer.encode(PREFIX).ids), len(mini_tokenizer.encode(SUFFIX).ids)) == (34, 5)
    assert mini_tokenizer.get_vocab_size() == 8192


def test_common_words_are_one_token_in_any_case(mini_tokenizer):
    for word in ("fox", "puppy", "automobile", "croissant", "watercolour", "halftone", "teal", "sailboat", "neon"):
        assert len({tuple(mini_tokenizer.encode(form).ids) for form in (word, word.upper(), f" {word}")}) == 1
        assert len(mini_tokenizer.encode(word).ids) == 1


def test_bundled_tokenizer_opens_in_transformers(mini_tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(WEIGHTS / "mini-tokenizer.json"), pad_token="<|endoftext|>")

    assert theirs(PREFIX + "a Red fox, café 🦊").input_ids == mini_tokenizer.encode(PREFIX + "a Red fox, café 🦊").ids


@pytest.mark.parametrize(
    "pair", ["puppy: dog", "automobile: car", "bunny: rabbit", "sailing ship: sailboat", "cab: taxi"]
)
def test_synonyms_are_close_in_the_bundled_encoder(pair):
    word, near = pair.split(": ")
    encoder = TextEncoder.load(WEIGHTS / "mini-text.safetensors")
    others = ["dog", "car", "rabbit", "sailboat", "taxi", "apple", "chair", "moon", "cat"]
    rows = torch.stack([encoder.encode([text])[0][0, :-5, -1].mean(0) for text in [word, *others]])
    rows = F.normalize(rows - rows.mean(0), dim=-1)

    assert others[int((rows[1:] @ rows[0]).argmax())] == near
