"""A graph of ComfyUI read backwards: from each sampler along its links to the words and numbers that it was given.

There are two forms. What runs stands in a picture as `prompt`, nodes by their number with named inputs; what the editor
keeps stands there as `workflow`, where a node's own values lie in a row without names.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

Graph = Mapping[str, Any]

TEXTS = ("text", "prompt", "text_g", "t5xxl", "clip_l")
VALUES = ("value", "string", "int", "float")  # of nodes that hold one value for others
PART = re.compile(r"(?:string|text|prompt)_?[a-z1-9]$")  # of nodes that put texts together
MOST_LINKS = 2000  # that are followed for one value
MOST_JOINED = 100  # nodes behind which no more texts are put together, as each is a step deeper here
STARTS = ("latent_image", "samples", "latent")
SIZE = ("width", "height")
WIDGETS: Mapping[str, tuple[str, ...]] = {  # the values of an editor's node in their order; "" is none of ours
    "KSampler": ("seed", "", "steps", "cfg"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg"),
    "SamplerCustom": ("", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",),
    "BasicScheduler": ("", "steps"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl"),
    **{f"Empty{kind}LatentImage": SIZE for kind in ("", "SD3", "Hunyuan", "Flux2")},
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "LoadImage": ("image",),
    **{f"Primitive{kind}": ("value",) for kind in ("String", "StringMultiline", "Int", "Float")},
}


def samplers(graph: Graph) -> Iterator[dict[str, Any]]:
    """What each sampler was given, the last first: prompt, avoid, seed, steps, cfg, width, height, model, loras; and
    begun, the picture that was encoded for it."""
    loras = any("Lora" in kind_of(graph, node) for node in graph)
    for node in [*graph][::-1]:
        here = inputs(graph, node)
        start = next((here[key] for key in STARTS if key in here), None)
        if start is None or not {"positive", "guider"} & set(here):
            continue
        guider = inputs(graph, linked(here["guider"])) if "guider" in here else here
        seed = here.get("seed", here.get("noise_seed", here.get("noise")))
        yield {
            "prompt": words(graph, guider.get("positive", guider.get("conditioning")), "positive"),
            "avoid": words(graph, guider.get("negative"), "negative"),
            "seed": find(graph, seed, ("seed", "noise_seed"), int, direct=True),
            "steps": find(graph, here.get("steps", here.get("sigmas")), ("steps",), int, direct=True),
            "cfg": find(graph, guider.get("cfg"), ("cfg",), (int, float), direct=True),
            **{side: find(graph, start, (side,), int) for side in SIZE},
            "model": find(graph, here.get("model", guider.get("model")), ("ckpt_name", "unet_name"), str),
            "loras": loras,
            "begun": find(graph, inputs(graph, linked(start)).get("pixels"), ("image",), str),
        }


def inputs(graph: Graph, node: Any) -> Mapping[str, Any]:
    found = graph.get(node) if isinstance(node, str) else None
    found = found.get("inputs") if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def kind_of(graph: Graph, node: str) -> str:
    found = graph.get(node)
    return str(found.get("class_type")) if isinstance(found, Mapping) else ""


def linked(value: Any) -> str | None:
    """The node that a link comes from; links are [node, output]."""
    return str(value[0]) if isinstance(value, list) and len(value) == 2 else None


def words(graph: Graph, value: Any, side: str) -> str | None:
    """The text at the end of a link. Nodes that pass both sides on, as a ControlNet does, are followed on this one."""
    return find(graph, value, TEXTS, str, side=side)


def find(
    graph: Graph,
    value: Any,
    keys: tuple[str, ...],
    kind: type | tuple[type, ...],
    *,
    side: str = "",
    direct: bool = False,
    seen: set[str] | None = None,
) -> Any:
    """The first value of one of these keys at the end of a link, or further up; every node is asked once.

    direct  the link asks for this very value, so that a node which holds a single one answers, whatever it calls it
    """
    seen = set() if seen is None else seen
    left = deque([(value, direct)])
    for _ in range(MOST_LINKS):
        if not left:
            break
        value, direct = left.popleft()
        node = linked(value)
        if node is None:
            if isinstance(value, kind) and not isinstance(value, bool) and value != "":
                return value
            continue
        if node in seen or kind_of(graph, node) == "ConditioningZeroOut":  # which says: nothing, not this text
            continue
        seen.add(node)
        here = inputs(graph, node)
        if side and side in here:
            left.appendleft((here[side], False))
            continue
        parts = sorted(key for key in here if PART.fullmatch(key)) if kind is str and not set(keys) & set(here) else []
        if len(parts) > 1 and len(seen) < MOST_JOINED:
            found = [find(graph, here[key], keys, str, side=side, direct=True, seen=seen) for key in parts]
            joint = here.get("delimiter", " ")
            if any(found):
                return (joint if isinstance(joint, str) else " ").join(filter(None, found))
        told = [(here[key], True) for key in (*keys, *(VALUES if direct else ())) if key in here]
        left.extendleft(reversed([*told, *((each, False) for each in here.values() if linked(each))]))
    return None


def from_workflow(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """The editor's form as the one that runs, as far as WIDGETS knows the nodes; muted ones are left out."""
    nodes, links = ([each for each in listed(workflow.get(key))] for key in ("nodes", "links"))
    ends: dict[Any, list[Any]] = {}
    for link in links:  # [id, node, output, node, input, type], or the same with names
        if isinstance(link, Mapping):
            link = [link.get(key) for key in ("id", "origin_id", "origin_slot")]
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int):
            ends[link[0]] = [str(link[1]), link[2]]
    graph: dict[str, Any] = {}
    for node in nodes:
        if not isinstance(node, Mapping) or node.get("mode") == 2:
            continue
        kind = str(node.get("type"))
        values = zip(WIDGETS.get(kind, ()), listed(node.get("widgets_values")), strict=False)
        given = {name: value for name, value in values if name}
        for each in listed(node.get("inputs")):
            if isinstance(each, Mapping) and isinstance(each.get("link"), int) and each["link"] in ends:
                given[str(each.get("name"))] = ends[each["link"]]
        graph[str(node.get("id"))] = {"class_type": kind, "inputs": given}
    return graph


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
