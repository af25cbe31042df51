"""`k2 new --from PICTURE`: what other tools write into pictures, in the forms that they use."""

from __future__ import annotations

import json
import time
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin

from k2cli import from_pictures, origins
from k2cli.project import Project
from model.errors import K2Error

PARAMETERS = """a red fox, (film grain:1.2), <lora:dusk_v2:0.8>
second line
Negative prompt: blurry, text
Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Seed: 1234567890, Size: 512x768, Model hash: abc, Model: dreams_v8, \
Lora hashes: "dusk_v2: 0a1b, other: 2c", Version: v1.10.1"""

GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 99, "steps": 24, "cfg": 5.5, "model": ["10", 0], "positive": ["6", 0],
                   "negative": ["7", 0], "latent_image": ["5", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 832, "height": 1216, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "model": ["4", 0]}},
    "20": {"class_type": "PrimitiveString", "inputs": {"value": "a {red} fox"}},
}  # fmt: skip
FLUX = {
    "1": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["2", 0], "guider": ["3", 0], "sampler": ["9", 0], "sigmas": ["4", 0],
                   "latent_image": ["5", 0]},
    },
    "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}},
    "3": {"class_type": "BasicGuider", "inputs": {"model": ["8", 0], "conditioning": ["6", 0]}},
    "4": {"class_type": "BasicScheduler", "inputs": {"steps": 28, "model": ["8", 0]}},
    "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024}},
    "6": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["7", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "an owl", "clip": ["11", 0]}},
    "8": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors"}},
}  # fmt: skip


def png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (64, 96)).save(path, pnginfo=info)
    return path


def with_comment(path: Path, comment: bytes) -> Path:
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: comment}
    Image.new("RGB", (64, 96)).save(path, exif=exif.tobytes())
    return path


def test_a1111(tmp_path):
    found = origins.read_origin(png(tmp_path / "a.png", parameters=PARAMETERS))

    assert found == origins.Origin(
        "A1111", "a red fox, film grain, second line", "blurry, text", 1234567890, 512, 768, 20, 6.0, "dreams_v8",
        ("LoRA dusk_v2", "prompt weights"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "prompt", "avoid", "seed", "model"),
    [
        ("a fox\nSteps: 20, Seed: 5", "a fox", "", 5, ""),
        ("Steps: the fox\nSteps: 20, Seed: 5", "Steps: the fox", "", 5, ""),
        ("a fox, <lora:a:1>, <lora:b:0.5:1>, red\nNegative prompt: text,\n((blur))\nSteps: 1, Seed: 5", "a fox, red",
         "text, blur", 5, ""),
        (r"((tail)), [ear], hero \(film\) BREAK night, (a:b:1.1), [x:y:0.5]" + "\nSteps: 9, Seed: 5",
         "tail, ear, hero (film), night, a:b, [x:y:0.5]", "", 5, ""),
        ("a fox BREAK\na house BREAK BREAK a tree BREAK\nSteps: 9, Seed: 5", "a fox, a house, a tree", "", 5, ""),
        ("18+, C++ book, A+ (fan)-made\nSteps: 9, Seed: 5", "18+, C++ book, A+ fan-made", "", 5, ""),
        ("{masterpiece}, {{red}} fox\nSteps: 9, Seed: 5", "{masterpiece}, {{red}} fox", "", 5, ""),
        ('{"scene": "a fox"}\nSteps: 9, Seed: 5', '{"scene": "a fox"}', "", 5, ""),
        ('a fox\nSteps: 20, Model: "dreams, \\"v8\\"", Hires prompt: "Seed: 9, x", Seed: 5, Version: f2\n'
         "Template: a {red|blue} fox, Seed: 8", "a fox", "", 5, 'dreams, "v8"'),
    ],
)  # fmt: skip
def test_a1111_with_awkward_words(tmp_path, text, prompt, avoid, seed, model):
    found = origins.read_origin(png(tmp_path / "a.png", parameters=text))

    assert (found.prompt, found.avoid, found.seed, found.model) == (prompt, avoid, seed, model)


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("a (red:1.3) fox\nSteps: 9", ["prompt weights"]),
        ("a fox\nNegative prompt: [blur]\nSteps: 9", ["prompt weights"]),
        (r"a fox \(film\)" + "\nSteps: 9", []),
        ("a fox, 18+\nSteps: 9", []),
        ("a fox\nSteps: 9, Denoising strength: 0.4", ["its init image", "denoising strength 0.4"]),
        ("a fox\nSteps: 9, Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: Latent",
         ["hires upscale 2", "denoising strength 0.4"]),
        ('a fox\nSteps: 9, ControlNet 0: "Module: canny, Weight: 1"', ["ControlNet"]),
        ('a fox\nSteps: 9, Civitai resources: [{"type":"checkpoint"},{"type":"lora","weight":0.8}]', ["LoRAs"]),
        ('a fox\nSteps: 9, Civitai resources: [{"type":"checkpoint"}]', []),
        ("a fox\nSteps: 9, Hires steps: 5, Hires resize: 0x1024", ["hires resize 0x1024"]),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_left_out(tmp_path, text, left_out):
    found = origins.read_origin(png(tmp_path / "a.png", parameters=text))

    assert list(found.left_out) == left_out


@pytest.mark.parametrize(("denoise", "told"), [(0.5, ["denoising strength 0.5"]), (1, [])])
def test_comfyui_denoise_below_1_is_reported(denoise, told):
    sampler = {**TALL["3"], "inputs": {**TALL["3"]["inputs"], "denoise": denoise}}
    scheduler = {**FLUX["4"], "inputs": {**FLUX["4"]["inputs"], "denoise": denoise}}

    for graph in (TALL | {"3": sampler}, FLUX | {"4": scheduler}):
        assert [each for each in next(origins.from_comfy(graph)).left_out if each != "ControlNet"] == told


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + PARAMETERS.encode("utf-16-be"),
        b"UNICODE\0" + PARAMETERS.encode("utf-16-le"),
        b"ASCII\0\0\0" + PARAMETERS.encode(),
        PARAMETERS.encode(),
    ],
)
def test_a1111_in_the_exif_comment(tmp_path, suffix, comment):
    found = origins.read_origin(with_comment(tmp_path / f"a{suffix}", comment))

    assert (found.prompt, found.seed, found.steps) == ("a red fox, film grain, second line", 1234567890, 20)


@pytest.mark.parametrize("coding", ["utf-16-be", "utf-16-le", "utf-16"])
@pytest.mark.parametrize("words", ["狐, fox", "一匹の狐", "{fox}"])
def test_an_exif_comment_in_either_byte_order(tmp_path, words, coding):
    comment = b"UNICODE\0" + f"{words}\nSteps: 3, Seed: 4".encode(coding)

    assert origins.read_origin(with_comment(tmp_path / "a.jpg", comment)).prompt == words


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0Screenshot", b"UNICODE\0" + "at the sea".encode("utf-16-be")])
def test_a_cameras_comment_is_not_a_prompt(tmp_path, comment):
    with pytest.raises(K2Error, match="does not state its prompt"):
        origins.read_origin(with_comment(tmp_path / "a.jpg", comment))


def test_comfyui(tmp_path):
    found = origins.read_origin(png(tmp_path / "a.png", prompt=json.dumps(GRAPH), workflow="{}"))

    assert found == origins.Origin(
        "ComfyUI", "a {red} fox", "blurry", 99, 832, 1216, 24, 4.5, "sd_xl.safetensors", ("LoRAs",)
    )


def test_comfyui_init_images_are_reported():
    """A picture encoded for the sampler itself, not one for the first sampler if there is a second pass."""
    (sampler,) = [node for node in GRAPH if GRAPH[node]["class_type"].startswith("KSampler")]
    own = {**GRAPH[sampler]["inputs"], "latent_image": ["90", 0]}
    encode = {"class_type": "VAEEncode", "inputs": {"pixels": ["91", 0], "vae": ["4", 2]}}
    load = {"class_type": "LoadImage", "inputs": {"image": "sketch.png", "upload": "image"}}
    begun = {**GRAPH, sampler: {**GRAPH[sampler], "inputs": own}, "90": encode, "91": load}
    assert next(origins.from_comfy(begun)).left_out == ("LoRAs", "its init image sketch.png")
    second = {**GRAPH[sampler], "inputs": {**own, "latent_image": [sampler, 0]}}
    assert next(origins.from_comfy({**begun, "99": second})).left_out == ("LoRAs",)


def test_comfyui_init_images_behind_a_mask_are_reported():
    """But not that of another sampler."""
    nodes = {
        "3": {**GRAPH["3"], "inputs": {**GRAPH["3"]["inputs"], "model": ["4", 0], "latent_image": ["90", 0]}},
        "90": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["91", 0], "mask": ["93", 1]}},
        "91": {"class_type": "Reroute", "inputs": {"": ["92", 0]}},
        "92": {"class_type": "VAEEncode", "inputs": {"pixels": ["93", 0], "vae": ["4", 2]}},
        "93": {"class_type": "LoadImage", "inputs": {"image": "room.png"}},
        "94": {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["3", 0]}},
    }
    second = {"95": {**nodes["3"], "inputs": {**nodes["3"]["inputs"], "latent_image": ["94", 0]}}}

    told = [each.left_out for each in origins.from_comfy(GRAPH | nodes | second)]

    assert told == [(), ("its init image room.png",)]


@pytest.mark.parametrize(
    ("side", "node", "told"),
    [
        ("positive", {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["6", 0]}}, "ControlNet"),
        ("positive", {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["6", 0]}}, "reference pictures"),
        ("model", {"class_type": "IPAdapterAdvanced", "inputs": {"model": ["4", 0]}}, "reference pictures"),
        ("latent_image", {"class_type": "ReferenceLatent", "inputs": {"conditioning": ["6", 0]}}, None),
    ],
)
def test_comfyui_guides_besides_the_prompt_are_reported(side, node, told):
    sampler = {**GRAPH["3"], "inputs": {**GRAPH["3"]["inputs"], "model": ["4", 0], side: ["90", 0]}}

    (found,) = origins.from_comfy(GRAPH | {"3": sampler, "90": node})

    assert found.left_out == ((told,) if told else ()) and found.prompt == "a {red} fox"


def test_comfyui_with_a_guider(tmp_path):
    found = origins.read_origin(png(tmp_path / "a.png", prompt=json.dumps(FLUX)))

    assert (found.prompt, found.seed, found.steps, found.width, found.guidance) == ("an owl", 42, 28, 1024, None)
    assert found.model == "flux.safetensors"


TALL = {  # a ControlNet, two joined texts, a number held by a node, nothing in place of the negative prompt
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": ["21", 0], "steps": 8, "cfg": 1.0, "model": ["4", 0], "positive": ["9", 0],
                   "negative": ["9", 1], "latent_image": ["5", 0]},
    },
    "4": {"class_type": "UNETLoader", "inputs": {"unet_name": "krea2.safetensors"}},
    "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["14", 0], "vae": ["15", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["4", 1]}},
    "7": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
    "9": {"class_type": "ControlNetApplyAdvanced", "inputs": {"strength": 1.0, "negative": ["7", 0],
                                                              "positive": ["6", 0], "image": ["14", 0]}},
    "20": {"class_type": "StringConcatenate", "inputs": {"string_a": "an owl", "string_b": ["22", 0],
                                                         "delimiter": ", "}},
    "21": {"class_type": "PrimitiveInt", "inputs": {"value": 77}},
    "22": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "at \\(deep\\) night"}},
}  # fmt: skip
EDITOR = {  # as the editor saves it: one sampler behind a node that only passes on
    "nodes": [
        {"id": 1, "type": "KSampler", "mode": 0, "widgets_values": [5, "randomize", 12, 4.0, "euler", "simple", 1],
         "inputs": [{"name": "model", "link": 1}, {"name": "positive", "link": 2}, {"name": "negative", "link": 3},
                    {"name": "latent_image", "link": 4}]},
        {"id": 2, "type": "CheckpointLoaderSimple", "widgets_values": ["sd.safetensors"], "inputs": []},
        {"id": 3, "type": "CLIPTextEncode", "widgets_values": ["a tea pot"], "inputs": [{"name": "clip", "link": 5}]},
        {"id": 4, "type": "CLIPTextEncode", "widgets_values": ["blurry"], "inputs": []},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [640, 960, 1], "inputs": []},
        {"id": 6, "type": "Reroute", "inputs": [{"name": "", "link": 6}]},
        {"id": 7, "type": "KSampler", "mode": 2, "widgets_values": [6, "fixed", 1, 1.0],
         "inputs": [{"name": "positive", "link": 3}, {"name": "latent_image", "link": 4}]},
    ],
    "links": [[1, 2, 0, 1, 0, "MODEL"], [2, 6, 0, 1, 1, "*"], [3, 4, 0, 1, 2, "CONDITIONING"], [5, 2, 1, 3, 0, "CLIP"],
              {"id": 4, "origin_id": 5, "origin_slot": 0}, [6, 3, 0, 6, 0, "CONDITIONING"]],
}  # fmt: skip


def test_comfyui_nodes_that_pass_on_join_and_hold_values(tmp_path):
    found = origins.read_origin(png(tmp_path / "a.png", prompt=json.dumps(TALL)))

    assert found == origins.Origin(
        "ComfyUI", "an owl, at (deep) night", "", 77, 64, 96, 8, 0.0, "krea2.safetensors", ("ControlNet",)
    )


def test_comfyui_workflows_as_the_editor_saves_them(tmp_path):
    found = origins.read_origin(png(tmp_path / "a.png", workflow=json.dumps(EDITOR)))

    assert found == origins.Origin("ComfyUI", "a tea pot", "blurry", 5, 640, 960, 12, 3.0, "sd.safetensors")


def test_comfyui_webp_metadata_is_in_camera_tags(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Model], exif[ExifTags.Base.Make] = "prompt:" + json.dumps(GRAPH), "workflow:{}"
    Image.new("RGB", (64, 96)).save(tmp_path / "a.webp", exif=exif.tobytes())

    assert origins.read_origin(tmp_path / "a.webp").prompt == "a {red} fox"


KREA = {  # the nodes between texts and sampler in ComfyUI's own template for Krea 2
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 7, "steps": 8, "cfg": 1, "model": ["22", 0], "positive": ["6", 0], "negative": ["13", 0],
                   "latent_image": ["5", 0]},
    },
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1152, "height": 896, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["28", 0], "clip": ["11", 0]}},
    "10": {"class_type": "UNETLoader", "inputs": {"unet_name": "krea2_turbo.safetensors"}},
    "13": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}},
    "15": {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "brush", "model": ["10", 0]}},
    "16": {"class_type": "TextGenerate", "inputs": {"prompt": ["17", 0], "max_length": 512, "clip": ["11", 0]}},
    "17": {"class_type": "StringConcatenate", "inputs": {"string_a": ["18", 0], "string_b": ["19", 0],
                                                         "delimiter": ""}},
    "18": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "You are an expert. User's Input:\n"}},
    "19": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a red fox"}},
    "20": {"class_type": "PreviewAny", "inputs": {"source": ["21", 0]}},
    "21": {"class_type": "ComfySwitchNode", "inputs": {"switch": ["24", 0], "on_false": ["19", 0],
                                                       "on_true": ["16", 0]}},
    "22": {"class_type": "ComfySwitchNode", "inputs": {"switch": ["23", 0], "on_false": ["10", 0],
                                                       "on_true": ["15", 0]}},
    "23": {"class_type": "PrimitiveBoolean", "inputs": {"value": False}},
    "24": {"class_type": "PrimitiveBoolean", "inputs": {"value": False}},
    "27": {"class_type": "StringConcatenate", "inputs": {"string_a": ["20", 0], "string_b": "ink", "delimiter": ", "}},
    "28": {"class_type": "ComfySwitchNode", "inputs": {"switch": ["23", 0], "on_false": ["20", 0],
                                                       "on_true": ["27", 0]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "enhance", "prompt", "left_out"),
    [
        (False, False, "a red fox", ()),
        (True, False, "a red fox, ink", ("LoRAs",)),
        (False, True, "a red fox", ("prompt enhancement",)),
        (True, True, "a red fox, ink", ("LoRAs", "prompt enhancement")),
    ],
)
def test_comfyui_template_for_krea_2(lora, enhance, prompt, left_out):
    """The user's words, on the chosen side of each switch."""
    turned = {key: {**KREA[key], "inputs": {"value": on}} for key, on in (("23", lora), ("24", enhance))}

    (found,) = origins.from_comfy(KREA | turned)

    assert (found.prompt, found.avoid, found.left_out) == (prompt, "", left_out)
    assert (found.model, found.seed, found.width) == ("krea2_turbo.safetensors", 7, 1152)


def test_enhancer_instructions_are_not_a_prompt():
    turned = {"24": {**KREA["24"], "inputs": {"value": True}}, "19": {**KREA["19"], "inputs": {"value": ""}}}

    assert next(origins.from_comfy(KREA | turned)).prompt == ""


def test_sizes_are_not_sought_in_a_language_models_text():
    """An upscaled picture is sampled again, and the way back from there leads through its prompt."""
    numbers = {
        "18": {"class_type": "PrimitiveInt", "inputs": {"value": 3}},
        "24": {**KREA["24"], "inputs": {"value": True}},
        "40": {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["3", 0], "scale_by": 2}},
        "41": {**KREA["3"], "inputs": {**KREA["3"]["inputs"], "latent_image": ["40", 0]}},
    }
    assert [(each.width, each.prompt) for each in origins.from_comfy(KREA | numbers)] == [(1152, "a red fox")] * 2


def test_typed_enhancer_instructions_are_not_the_users_words():
    """Wherever they are, if the user's words come from another node."""
    turned = {"24": {**KREA["24"], "inputs": {"value": True}}}
    for parts in (
        {"string_a": ["19", 0], "string_b": "Rewrite this richly."},
        {"string_a": "Rewrite this richly:", "string_b": ["19", 0]},
    ):
        (found,) = origins.from_comfy(KREA | turned | {"17": {**KREA["17"], "inputs": parts}})

        assert (found.prompt, found.left_out) == ("a red fox", ("prompt enhancement",))


@pytest.mark.parametrize(
    ("parts", "prompt"),
    [
        ({"string_a": ["18", 0], "string_b": "a blue owl"}, "a blue owl"),
        ({"string_a": ["30", 0], "string_b": "a blue owl"}, "a blue owl"),
        ({"string_a": ["18", 0], "string_b": ""}, ""),
        ({"string_a": ["18", 0], "string_b": "a blue owl", "string_c": "Write English."}, "a blue owl"),
        ({"string_a": ["16", 0], "string_b": ["19", 0]}, "a red fox"),
    ],
    ids=["typed", "instructions passed on", "none", "in between", "circle"],
)
def test_what_follows_instructions_are_the_users_words(parts, prompt):
    """Typed words too, behind instructions that another node holds."""
    turned = {"24": {**KREA["24"], "inputs": {"value": True}}, "17": {**KREA["17"], "inputs": parts}}
    reroute = {"30": {"class_type": "Reroute", "inputs": {"": ["18", 0]}}}

    assert next(origins.from_comfy(KREA | turned | reroute)).prompt == prompt


@pytest.mark.parametrize(
    ("flag", "prompt"),
    [
        ({"30": {"class_type": "Reroute", "inputs": {"": ["23", 0]}}}, "a red fox, ink"),
        ({"30": {"class_type": "Reroute", "inputs": {"": ["31", 0]}},
          "31": {"class_type": "PreviewAny", "inputs": {"source": ["23", 0]}}}, "a red fox, ink"),
        ({"30": {"class_type": "InvertBoolean", "inputs": {"boolean": ["23", 0]}}}, ""),
        ({"30": {"class_type": "ComfySwitchNode", "inputs": {"switch": ["30", 0], "on_true": ["23", 0]}}}, ""),
        ({}, ""),
    ],
    ids=["passed", "passed twice", "computed", "circle", "nothing"],
)  # fmt: skip
def test_a_switch_with_an_unreadable_setting_leads_nowhere(flag, prompt):
    nodes = {"23": {**KREA["23"], "inputs": {"value": True}},
             "28": {**KREA["28"], "inputs": {**KREA["28"]["inputs"], "switch": ["30", 0]}}}  # fmt: skip

    (found,) = origins.from_comfy(KREA | nodes | flag)

    assert found.prompt == prompt


def encoded(text):
    return {"class_type": "CLIPTextEncode", "inputs": {"text": text, "clip": ["4", 1]}}


@pytest.mark.parametrize(
    ("nodes", "prompt"),
    [
        ({"6": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["31", 0],
                                                                "conditioning_2": ["32", 0]}}}, "fog, rain"),
        ({"6": {"class_type": "ConditioningConcat", "inputs": {"conditioning_to": ["31", 0],
                                                               "conditioning_from": ["32", 0]}}}, "fog, rain"),
        ({"6": encoded(["33", 0]), "33": {"inputs": {"text_a": ["20", 0], "text_b": ["34", 0]}},
          "34": {"inputs": {"text_a": "an owl and", "text_b": ["20", 0]}}}, "a {red} fox an owl and a {red} fox"),
        ({"6": encoded(["33", 0]), "33": {"inputs": {"text_a": ["33", 0], "text_b": ["20", 0]}}}, "a {red} fox"),
        ({"6": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["31", 0],
                                                                "conditioning_2": ["35", 0]}},
          "35": {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["31", 0], "width": 64}}}, "fog"),
        ({"6": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["36", 0],
                                                                "conditioning_2": ["35", 0]}},
          "35": {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["31", 0], "width": 64}},
          "36": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["31", 0],
                                                                 "conditioning_2": ["32", 0]}}}, "fog, rain"),
    ],
    ids=["combine", "concat", "twice", "circle", "areas", "areas of several"],
)  # fmt: skip
def test_comfyui_nodes_that_combine_prompts(nodes, prompt):
    (found,) = origins.from_comfy(GRAPH | {"31": encoded("fog"), "32": encoded("rain")} | nodes)

    assert found.prompt == prompt


@pytest.mark.parametrize(
    ("node", "prompt"),
    [
        ({"wildcard_text": "a __beast__", "populated_text": "a red fox", "seed": 1}, "a red fox"),
        ({"text_positive": "a red fox", "text_negative": "blurry", "style": "ink"}, "a red fox"),
        ({"text": ["31", 0], "text_0": "a red fox, as it was shown"}, "a red fox, as it was shown"),
        ({"text": ["32", 0], "text_0": "a red fox, as it was shown"}, "an owl"),
    ],
    ids=["wildcards", "styler", "shown", "shown and known"],
)
def test_comfyui_nodes_with_other_names_for_their_text(node, prompt):
    aside = {"30": {"inputs": node}, "31": {"inputs": {"image": "a.png"}}, "32": {"inputs": {"text": "an owl"}}}
    negative = encoded(["30", 1]) if "text_negative" in node else GRAPH["7"]

    (found,) = origins.from_comfy(GRAPH | aside | {"6": encoded(["30", 0]), "7": negative})

    assert (found.prompt, found.avoid) == (prompt, "blurry")


def test_comfyui_loras_are_reported_if_the_sampler_uses_them():
    aside = {**GRAPH["3"], "inputs": {**GRAPH["3"]["inputs"], "model": ["4", 0]}}

    (found,) = origins.from_comfy(GRAPH | {"3": aside})

    assert found.left_out == () and found.model == "sd_xl.safetensors"


@pytest.mark.parametrize("side", ["6", "7"])
def test_comfyui_loras_of_the_texts_alone_are_reported(side):
    aside = {**GRAPH["3"], "inputs": {**GRAPH["3"]["inputs"], "model": ["4", 0]}}
    text = {**GRAPH[side], "inputs": {**GRAPH[side]["inputs"], "clip": ["30", 0]}}
    last = {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["10", 1], "stop_at_clip_layer": -2}}

    (found,) = origins.from_comfy(GRAPH | {"3": aside, side: text, "30": last})

    assert found.left_out == ("LoRAs",)


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ({"class_type": "PreviewAny", "inputs": {"source": ["40", 0]}}, (41, 41)),
        ({"class_type": "Reroute", "inputs": {"": ["40", 0]}}, (41, 41)),
        ({"class_type": "easy showAnything", "inputs": {"anything": ["40", 0], "text": "41"}}, (41, 41)),
        ({"class_type": "Display Any (rgthree)", "inputs": {"source": ["40", 0]}}, (41, 41)),
        ({"class_type": "MathExpression", "inputs": {"expression": "a*4", "a": ["40", 0]}}, (None, 64)),
        ({"class_type": "SquareRoot", "inputs": {"a": ["40", 0]}}, (None, 64)),
    ],
)
def test_a_computed_number_is_not_the_nodes_input(tmp_path, between, found):
    """The picture's own width is known anyway."""
    nodes = {"40": {"class_type": "PrimitiveInt", "inputs": {"value": 41}}, "21": between}
    size = {"class_type": "EmptyLatentImage", "inputs": {"width": ["21", 0], "height": 96}}

    read = origins.read_origin(png(tmp_path / "a.png", prompt=json.dumps(TALL | nodes | {"5": size})))

    assert (read.seed, read.width) == found


@pytest.mark.parametrize(
    ("between", "seed"),
    [
        ({"class_type": "MathExpression", "inputs": {"expression": "a*4", "a": ["40", 0]}}, None),
        ({"class_type": "easy pipeOut", "inputs": {"pipe": ["40", 3]}}, 41),
        ({"class_type": "Context (rgthree)", "inputs": {"base_ctx": ["40", 0], "model": ["4", 0]}}, 41),
    ],
)
def test_a_seed_behind_a_computing_node_is_not_the_samplers(between, seed):
    """Behind one that carries it among other things, it is."""
    graph = TALL | {"40": {"class_type": "Seed (rgthree)", "inputs": {"seed": 41}}, "21": between}

    assert next(origins.from_comfy(graph)).seed == seed


def test_noise_and_sigmas_lead_to_seed_and_steps():
    """Through nodes that change them."""
    given = {**FLUX["1"]["inputs"], "noise": ["20", 0], "sigmas": ["21", 0]}
    nodes = {"20": {"class_type": "MixNoise", "inputs": {"strength": 0.1, "first": ["2", 0]}},
             "21": {"class_type": "SplitSigmas", "inputs": {"step": 3, "sigmas": ["4", 0]}}}  # fmt: skip

    found = next(origins.from_comfy(FLUX | nodes | {"1": {**FLUX["1"], "inputs": given}}))

    assert (found.seed, found.steps) == (42, 28)


def test_comfyui_nodes_bypassed_in_the_editor_pass_on(tmp_path):
    """A LoRA between the model and the sampler, and a second sampler."""
    lora = {"id": 8, "type": "LoraLoader", "mode": 4, "widgets_values": ["x", 1, 1],
            "inputs": [{"name": "model", "link": 7}]}  # fmt: skip
    second = {**EDITOR["nodes"][0], "id": 9, "mode": 4, "widgets_values": [6, "fixed", 1, 1.0]}
    links = [[1, 8, 0, 1, 0, "MODEL"], *EDITOR["links"][1:], [7, 2, 0, 8, 0, "MODEL"]]
    editor = {"nodes": [*EDITOR["nodes"], lora, second], "links": links}

    found = origins.read_origin(png(tmp_path / "a.png", workflow=json.dumps(editor)))

    assert found == origins.Origin("ComfyUI", "a tea pot", "blurry", 5, 640, 960, 12, 3.0, "sd.safetensors")


def test_reading_endlessly_joined_texts_ends(tmp_path):
    graph = {str(i): {"inputs": {"text_a": "x", "text_b": [str(i + 1), 0]}} for i in range(5000)}
    graph["s"] = {"inputs": {"positive": ["0", 0], "latent_image": ["0", 0]}}

    assert origins.read_origin(png(tmp_path / "a.png", prompt=json.dumps(graph))).prompt.startswith("x x x")


def test_reading_a_circular_graph_ends(tmp_path):
    graph = {"1": {"inputs": {"positive": ["2", 0], "latent_image": ["2", 0]}},
             "2": {"inputs": {f"in{i}": ["2", 0] for i in range(30)} | {"text": ["2", 0]}}}  # fmt: skip

    with pytest.raises(K2Error, match="does not state its prompt"):
        origins.read_origin(png(tmp_path / "a.png", prompt=json.dumps(graph)))


def test_invokeai(tmp_path):
    said = {"positive_prompt": "a red fox", "negative_prompt": "blur", "seed": 7, "steps": 30, "cfg_scale": 7.5,
            "width": 768, "height": 512, "model": {"name": "juggernaut", "hash": "x"}, "loras": []}  # fmt: skip
    old = {"model_weights": "stable-diffusion-1.5",
           "image": {"prompt": [{"prompt": "an owl++ (at night)1.2 [blur]", "weight": 1}], "seed": 3, "steps": 50,
                     "cfg_scale": 7.5}}  # fmt: skip

    new = origins.read_origin(png(tmp_path / "a.png", invokeai_metadata=json.dumps(said)))
    assert new == origins.Origin("InvokeAI", "a red fox", "blur", 7, 768, 512, 30, 6.5, "juggernaut")
    led = said | {"controlnets": [{"weight": 1}], "ipAdapters": [{"weight": 1}]}
    assert [*origins.from_invokeai(led)][-1].left_out == ("ControlNet", "reference pictures")
    before = origins.read_origin(png(tmp_path / "b.png", **{"sd-metadata": json.dumps(old)}))
    assert before == origins.Origin(
        "InvokeAI", "an owl at night", "blur", 3, 64, 96, 50, 6.5, "stable-diffusion-1.5", ("prompt weights",)
    )


def test_mflux(tmp_path):
    said = {"mflux_version": "0.18.0", "model": "krea2", "seed": 5, "steps": 8, "guidance": None, "height": 512,
            "width": 1024, "prompt": "a red fox", "negative_prompt": None, "lora_paths": ["x.safetensors"]}  # fmt: skip
    found = origins.read_origin(with_comment(tmp_path / "a.png", b"ASCII\0\0\0" + json.dumps(said).encode()))

    assert found == origins.Origin("mflux", "a red fox", "", 5, 1024, 512, 8, None, "krea2", ("LoRAs",))


def test_mflux_metadata_beside_the_picture(tmp_path):
    said = {"mflux_version": "0.18.0", "model": "krea2", "seed": 5, "steps": 8, "width": 64, "height": 96,
            "prompt": "a (red) fox"}  # fmt: skip
    Image.new("RGB", (64, 96)).save(tmp_path / "a.png")
    (tmp_path / "a.metadata.json").write_text(json.dumps(said))
    (tmp_path / "other.json").write_text("[1]")

    found = origins.Origin("mflux", "a (red) fox", "", 5, 64, 96, 8, None, "krea2")
    assert origins.read_origin(tmp_path / "a.png") == found == origins.read_origin(tmp_path / "a.metadata.json")
    with pytest.raises(K2Error, match="does not state a prompt"):
        origins.read_origin(tmp_path / "other.json")


JOB = " Job ID: 758b8376-b799-4065-ac91-90d109ab15a8"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red fox, film (grain) --ar 2:3 --v 7", ("a red fox, film (grain)", "", None, ())),
        ("a fox --raw --no text, red -- blue --seed 42 --stylize 80 --v 6.1",
         ("a fox", "text, red -- blue", 42, ("--raw --stylize 80",))),
        ("https://s.mj.run/abc <https://s.mj.run/d.png> a fox --niji 6",
         ("a fox", "", None, ("its image prompt", "--niji 6"))),
        ("hot::2 dog::-1 a (cat):: in snow --no dogs --ar 2:3 --no rain",
         ("hot, a (cat), in snow", "dog, dogs, rain", None, ("prompt weights",))),
        ("space:: ship", ("space, ship", "", None, ())),
    ],
)  # fmt: skip
def test_midjourney(tmp_path, text, said):
    found = origins.read_origin(png(tmp_path / "a.png", Description=text + JOB, Author="someone"))

    assert (found.tool, found.prompt, found.avoid, found.seed, found.left_out) == ("Midjourney", *said)
    assert (found.width, found.height) == (64, 96)


@pytest.mark.parametrize(
    "text", ["a fox at the sea", "--v 7" + JOB, "https://s.mj.run/abc <https://s.mj.run/d.png> --ar 1:1" + JOB]
)
def test_descriptions_without_job_id_or_words_are_not_prompts(tmp_path, text):
    with pytest.raises(K2Error, match="does not state its prompt"):
        origins.read_origin(png(tmp_path / "a.png", Description=text))


def test_sources_without_a_prompt_are_refused(k2, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "outputs").mkdir()

    for name, message in (
        ("bare.png", "does not state its prompt"),
        ("text.png", "not a readable picture"),
        ("gone.png", "There is no"),
        ("outputs", "outputs holds no picture."),
    ):
        assert message in k2("new", tmp_path / "x", "--from", tmp_path / name, code=1).stderr
    assert not (tmp_path / "x").exists()


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(["1", 0])
trees = st.recursive(
    leaves, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each), max_leaves=8
)
nodes = st.dictionaries(
    st.sampled_from(["positive", "negative", "latent_image", "seed", "text", "guider", "model", "cfg", "steps"]), trees
)
words = st.text(max_size=12) | st.sampled_from(["fog, rain", "rain", "low", "a.safetensors"])
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -0.5])


wrong = numbers | words | st.lists(words | numbers, max_size=2) | st.dictionaries(words, numbers, max_size=2)
odd = st.just(wrong).flatmap(lambda each: each)  # one alternative to the right value, not one for each type


def some(**kinds):
    """A table of these keys, whose values are sometimes of the wrong type."""
    return st.fixed_dictionaries({key: kind | odd for key, kind in kinds.items()})


style = some(name=words, strength=numbers, avoids=st.lists(words, max_size=3), keywords=st.lists(words, max_size=3))
records = st.fixed_dictionaries(
    {
        "prompt": some(text=words, avoid=words, creativity=words),
        "settings": some(**dict.fromkeys(("seed", "width", "height", "steps", "guidance", "cohesion"), numbers)),
        "style": st.lists(style | odd, max_size=3) | odd,
    },
    optional={
        "model": some(name=words, variant=words) | odd,
        "leader": some(prompt=words) | odd,
        "lora": st.lists(some(file=words) | odd, max_size=2) | odd,
    },
)


@given(records)
def test_any_record_gives_a_valid_project_file(record):
    for found in origins.read_metadata({"k2": tomli_w.dumps(record)}, ""):
        tomllib.loads(from_pictures.project_toml("x", [found]))


@given(st.dictionaries(st.sampled_from("1234"), st.fixed_dictionaries({"inputs": nodes}) | trees), trees, st.text())
def test_any_picture_metadata_gives_a_valid_project_file(graph, table, text):
    nodes = [{"id": key, "type": "KSampler", **each} for key, each in graph.items() if isinstance(each, dict)]
    editor = json.dumps({"nodes": nodes, "links": table})
    texts = {
        "prompt": json.dumps(graph),
        "workflow": editor,
        "invokeai_metadata": json.dumps(table),
        "parameters": text,
        "k2": text,
    }

    for found in origins.read_metadata(texts, text):
        tomllib.loads(from_pictures.project_toml("x", [found]))


def test_lone_surrogates_are_dropped(tmp_path, k2, monkeypatch):
    """JSON can express them, but no file can hold them."""
    monkeypatch.chdir(tmp_path)
    said = json.dumps({"positive_prompt": "a red\ud800 fox", "model": "\udfff", "width": 64, "height": 64})
    png(tmp_path / "a.png", invokeai_metadata=said)

    k2("new", "made", "--from", "a.png")

    assert Project.open(tmp_path / "made").prompts[0].text == "a red fox"


@pytest.mark.parametrize(
    "texts",
    [
        {"k2": "a." * 400_000 + "a = 1\n"},
        {"parameters": "\n" * 900_000},
        {"parameters": "Steps: 1, " + "a" * 900_000},
        {"parameters": "Steps: 1, " + " " * 900_000},
        {"parameters": "Steps: 1, " + 'a:"' * 300_000},
        {"parameters": "(" * 150_000 + "a" + ":1)" * 150_000},
        {"parameters": "<lora:" * 150_000},
        {"Description": "https://a " * 30_000 + " --a" * 100_000 + " " * 200_000 + JOB},
        {"prompt": json.dumps({"0": {"inputs": {f"x{i}": ["0", 0] for i in range(60_000)}}})},
        {
            "prompt": json.dumps(
                {str(i): {"inputs": {"positive": [str(i + 1), 0], "samples": [str(i + 1), 0]}} for i in range(12_000)}
            )
        },
        {
            "prompt": json.dumps(
                {"0": {"inputs": {"positive": ["1", 0], "samples": ["1", 0]}}}
                | {"1": {"inputs": {f"{i}": [str(i), 0] for i in range(20_000)}}}
                | {str(i): {"inputs": {"a": [str(i + 1), 0]}} for i in range(2, 12_000)}
            )
        },
        {
            "prompt": json.dumps(
                {f"s{i}": {"inputs": {"positive": ["0", 0], "samples": ["0", 0]}} for i in range(50)}
                | {str(i): {"inputs": {f"text_{k}": [str(i + 1), 0] for k in "abcdefgh"}} for i in range(90)}
                | {"90": {"inputs": {f"x{i}": ["91", 0] for i in range(90)}}, "91": {"inputs": {"text": ["92", 0]}}}
            )
        },
        {
            "prompt": json.dumps(
                {str(i): {"inputs": {"text_a": [str(i + 1), 0], "text_b": [str(i + 1), 0]}} for i in range(40)}
                | {"40": {"inputs": {"text": "x" * 900_000}}, "s": {"inputs": {"positive": ["0", 0], "samples": []}}}
            )
        },
        {"prompt": "[" * 500_000},
        {"prompt": '{"a": ' * 150_000},
    ],
    ids=[
        "key",
        "lines",
        "fact",
        "spaces",
        "quotes",
        "weights",
        "loras",
        "job",
        "links",
        "samplers",
        "fan",
        "joined",
        "doubled",
        "lists",
        "tables",
    ],
)
def test_pathological_metadata_is_read_quickly(tmp_path, texts):
    """Each text is within Pillow's limit of a megabyte."""
    path = png(tmp_path / "a.png", **texts)
    started = time.process_time()
    with suppress(K2Error):
        origins.read_origin(path)
    assert time.process_time() - started < 5
