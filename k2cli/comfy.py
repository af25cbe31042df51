"""Reads a ComfyUI graph backwards: from each sampler along its links to the words and numbers that it was given.

A picture holds it in two forms: `prompt`, which is what ran, has nodes by number with named inputs; `workflow`, which
is what the editor keeps, lists a node's own values without names.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

Graph = Mapping[str, Any]

TEXT_KEYS = ("text", "populated_text", "prompt", "text_g", "t5xxl", "clip_l", "text_0")  # last: what a node displays
VALUE_KEYS = ("value", "string", "int", "float")  # of nodes that hold a single value for others
SWITCH_INPUTS = {"on_true", "on_false"}  # of a switch
BYPASSED = "bypassed"  # stands for a node, and only passes its input on
PASS_THROUGH = re.compile(  # words in the names of nodes that pass a number on, alone or among other values
    f"{BYPASSED}|reroute|pass.?through|preview|show|display|any.?switch|pipe|context", re.IGNORECASE
)
CONDITIONING_JOINS = {
    "ConditioningCombine": ("conditioning_1", "conditioning_2"),
    "ConditioningConcat": ("conditioning_to", "conditioning_from"),
}
TEXT_INPUT = re.compile(r"(?:string|text|prompt)_?[a-z1-9]$")  # inputs of nodes that join texts
COLONS = (":", "\uff1a")  # the second in Chinese texts
MAX_LINKS = 2000  # followed for one value
MAX_INPUTS = 100  # of a node; one with more is ignored
MAX_CHARS = 100_000  # characters of joined texts
MAX_JOINS = 100  # nested nodes that join texts, as each one recurses a level deeper here
LORA_NODE = re.compile("lora", re.IGNORECASE)  # in the names of nodes, as the next two
CONTROL_NODE = re.compile("control.?net", re.IGNORECASE)
REFERENCE_NODE = re.compile("reference|ip.?adapter|style.?model|redux|unclip|image.?edit", re.IGNORECASE)
LATENT_INPUTS = ("latent_image", "samples", "latent")
SIZE_KEYS = ("width", "height")
WIDGETS: Mapping[str, tuple[str, ...]] = {  # the values of a node in `workflow`, in order; "" is one we ignore
    "KSampler": ("seed", "", "steps", "cfg", "", "", "denoise"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg"),
    "SamplerCustom": ("", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",),
    "BasicScheduler": ("", "steps", "denoise"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl"),
    **{f"Empty{kind}LatentImage": SIZE_KEYS for kind in ("", "SD3", "Hunyuan", "Flux2")},
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "LoadImage": ("image",),
    **{f"Primitive{kind}": ("value",) for kind in ("String", "StringMultiline", "Int", "Float", "Boolean")},
    "ComfySwitchNode": ("switch",),
    "ImpactWildcardProcessor": ("", "populated_text"),
    "SDXLPromptStyler": ("text_positive", "text_negative"),
    "StringConcatenate": ("string_a", "string_b", "delimiter"),
    "TextGenerate": ("prompt",),
}


def samplers(graph: Graph) -> Iterator[dict[str, Any]]:
    """The inputs of each sampler, the last first: prompt, avoid, enhanced, seed, steps, cfg, denoise, width, height,
    model, loras, control, references; and begun, its init image."""
    graph = resolve_switches(graph)
    for node in [*graph][::-1]:
        node_inputs = inputs(graph, node)
        latent = next((node_inputs[key] for key in LATENT_INPUTS if key in node_inputs), None)
        if latent is None or not {"positive", "guider"} & set(node_inputs) or class_type(graph, node) == BYPASSED:
            continue
        guider = inputs(graph, source_node(node_inputs["guider"])) if "guider" in node_inputs else node_inputs
        model = node_inputs.get("model", guider.get("model"))
        conditioning = guider.get("positive", guider.get("conditioning"))
        positive, negative = (
            Search(graph, (*TEXT_KEYS, f"text_{side}"), str, side) for side in ("positive", "negative")
        )
        found = {
            "prompt": positive.value_at(conditioning),
            "avoid": negative.value_at(guider.get("negative")),
            "enhanced": positive.enhanced or negative.enhanced,
            "seed": find_number(graph, node_inputs, ("seed", "noise_seed"), int, behind="noise"),
            "steps": find_number(graph, node_inputs, ("steps",), int, behind="sigmas"),
            "cfg": find_number(graph, guider, ("cfg",), (int, float)),
            "denoise": find_number(graph, node_inputs, ("denoise",), (int, float), behind="sigmas"),
            **{side: find_value(graph, latent, (side,), int) for side in SIZE_KEYS},
            "model": find_value(graph, model, ("ckpt_name", "unet_name"), str),
            "begun": find_value(graph, encoded_image(graph, latent), ("image",), str),
        }
        on_model = kinds_along(graph, [model], "model")
        on_clip = kinds_along(graph, [*positive.clips, *negative.clips], "clip")  # known only after the texts are found
        on_conditioning = on_model | kinds_along(graph, [conditioning], ("positive", "conditioning"))
        node_patterns = {
            "loras": (LORA_NODE, on_model | on_clip),
            "control": (CONTROL_NODE, on_conditioning),
            "references": (REFERENCE_NODE, on_conditioning),
        }
        yield found | {key: any(map(sign.search, kinds)) for key, (sign, kinds) in node_patterns.items()}


def resolve_switches(graph: Graph) -> dict[str, Any]:
    """The graph with each switch replaced by a node that passes on the side it selects, or nothing if that cannot be
    told. Other nodes may hold its flag."""
    flags, new = Search(graph, (), bool), dict(graph)
    for node in graph:
        node_inputs = inputs(graph, node)
        if "switch" in node_inputs and SWITCH_INPUTS & {*node_inputs}:
            on = flags.value_at(node_inputs["switch"], direct=True)
            side = {True: "on_true", False: "on_false"}.get(on, "")
            new[node] = {"class_type": BYPASSED, "inputs": {"value": node_inputs[side]} if side in node_inputs else {}}
    return new


def inputs(graph: Graph, node: Any) -> Mapping[str, Any]:
    found = graph.get(node) if isinstance(node, str) else None
    found = found.get("inputs") if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) and len(found) <= MAX_INPUTS else {}


def class_type(graph: Graph, node: str) -> str:
    found = graph.get(node)
    return str(found.get("class_type")) if isinstance(found, Mapping) else ""


def source_node(value: Any) -> str | None:
    """The node that a link comes from; links are [node, output]."""
    return str(value[0]) if isinstance(value, list) and len(value) == 2 else None


class Search:
    """A search for one value that follows at most MAX_LINKS links.

    keys      names of the value; the first one found answers
    side      the input to follow at nodes that pass on both sides, such as a ControlNet
    enhanced  whether the search passed a node in which a language model rewrites texts
    clips     the links to the encoders of the texts found
    """

    def __init__(self, graph: Graph, keys: tuple[str, ...], kind: type | tuple[type, ...], side: str = ""):
        self.graph, self.keys, self.kind, self.side = graph, keys, kind, side
        self.enhanced = False
        self.clips: list[Any] = []
        self.links_left = MAX_LINKS

    def value_at(self, value: Any, direct: bool = False, ancestors: frozenset[str] = frozenset()) -> Any:
        """The value at the end of a link, or further up.

        direct     the link asks for this very value, so a node that holds a single value answers, whatever its name
        ancestors  the nodes whose parts include this link; the search does not return to them
        """
        found = self.values_at(value, direct, ancestors)
        return ", ".join(found)[:MAX_CHARS] if len(found) > 1 else next(iter(found), None)

    def values_at(self, value: Any, direct: bool, ancestors: frozenset[str]) -> list[Any]:
        """The same, but several values where CONDITIONING_JOINS joins texts."""
        queue = deque([(value, direct)])
        seen: dict[str, bool] = {}  # node -> whether it was asked directly, which finds all that asking indirectly does
        while queue:
            value, direct = queue.popleft()
            node = source_node(value)
            if node is None:
                if isinstance(value, self.kind) and isinstance(value, bool) == (self.kind is bool) and value != "":
                    return [value]
                continue
            if node in ancestors or seen.get(node, -1) >= direct:
                continue
            seen[node] = direct
            if class_type(self.graph, node) == "ConditioningZeroOut":  # it stands for no text at all
                continue
            if found := self.joined_text(node, ancestors | {node}):
                return found
            onward = self.next_inputs(node, direct, ancestors | {node})[: self.links_left]
            self.links_left -= len(onward)
            queue.extendleft(reversed(onward))
        return []

    def joined_text(self, node: str, ancestors: frozenset[str]) -> list[str]:
        """The text of a node that joins others into one, or its texts if it keeps them apart."""
        if self.kind is not str or len(ancestors) > MAX_JOINS:
            return []
        node_inputs, kind = inputs(self.graph, node), class_type(self.graph, node)
        parts = text_inputs(self.graph, node) if kind in CONDITIONING_JOINS or not {*self.keys} & {*node_inputs} else []
        parts = parts[: self.links_left]
        self.links_left -= len(parts)
        if (
            kind in CONDITIONING_JOINS
        ):  # the same text may arrive more than once, each time for another part of the picture
            return [
                *dict.fromkeys(text for key in parts for text in self.values_at(node_inputs[key], False, ancestors))
            ]
        joint = node_inputs.get("delimiter", " ")
        found = [self.value_at(node_inputs[key], True, ancestors) for key in parts]
        text = (joint if isinstance(joint, str) else " ").join(filter(None, found))[:MAX_CHARS]
        return [text] if text else []

    def next_inputs(self, node: str, direct: bool, ancestors: frozenset[str]) -> list[tuple[Any, bool]]:
        """The inputs of a node to search next, and whether directly."""
        node_inputs = inputs(self.graph, node)
        if self.side and self.side in node_inputs:
            return [(node_inputs[self.side], False)]
        if class_type(self.graph, node).startswith("TextGenerate"):
            self.enhanced = True
            if self.kind is not str:
                return []  # its text holds no number
            return [(self.user_text(node_inputs.get("prompt"), ancestors), True)]
        values = [
            (node_inputs[key], True) for key in (*self.keys, *(VALUE_KEYS if direct else ())) if key in node_inputs
        ]
        links = [each for each in node_inputs.values() if source_node(each)]
        self.clips += [node_inputs["clip"]] if values and "clip" in node_inputs else []
        if direct and self.kind is not str and not PASS_THROUGH.search(class_type(self.graph, node)):
            return values  # the node computes another number from those behind it
        return [*values, *((each, direct and not values and len(links) == 1) for each in links)]

    def user_text(self, value: Any, ancestors: frozenset[str]) -> Any:
        """The user's words in what a language model is given: the part after instructions that end with a colon;
        otherwise a linked part, as instructions may be typed into the node that joins both; otherwise the last."""
        node = source_node(value)
        parts = [inputs(self.graph, node)[key] for key in text_inputs(self.graph, node)][: self.links_left]
        self.links_left -= len(parts)
        read = [self.value_at(each, True, ancestors) or "" for each in parts[:-1] if len(ancestors) <= MAX_JOINS]
        announced = [part for text, part in zip(read, parts[1:], strict=False) if text.rstrip().endswith(COLONS)]
        return (announced or [each for each in parts if source_node(each)] or parts or [value])[-1]


def find_value(graph: Graph, value: Any, keys: tuple[str, ...], kind: type | tuple[type, ...]) -> Any:
    """The first value of one of these keys at the end of a link, or further up."""
    return Search(graph, keys, kind).value_at(value)


def find_number(
    graph: Graph, node_inputs: Mapping[str, Any], keys: tuple[str, ...], kind: type | tuple[type, ...], behind: str = ""
) -> Any:
    """The number that a node calls by one of these keys; or else the first behind its input `behind`."""
    key = next((key for key in keys if key in node_inputs), behind)
    return Search(graph, keys, kind).value_at(node_inputs.get(key), direct=key in keys)


def text_inputs(graph: Graph, node: str | None) -> list[str]:
    """The inputs of a node that joins texts, in order."""
    node_inputs = inputs(graph, node)
    parts = CONDITIONING_JOINS.get(class_type(graph, node or ""), ()) or sorted(
        key for key in node_inputs if TEXT_INPUT.fullmatch(key)
    )
    parts = [key for key in parts if key in node_inputs]
    return parts if len(parts) > 1 else []


def kinds_along(graph: Graph, links: list[Any], sides: str | tuple[str, ...]) -> set[str]:
    """The kinds of the nodes along these links; followed are inputs whose names start with `sides`, such as "model", or
    all if there are none."""
    queue, seen = [*links], set[str]()
    while queue and len(seen) < MAX_LINKS:
        node = source_node(queue.pop())
        if node is None or node in seen:
            continue
        seen.add(node)
        node_inputs = inputs(graph, node)
        queue += [each for key, each in node_inputs.items() if key.startswith(sides)] or node_inputs.values()
    return {class_type(graph, node) for node in seen}


def encoded_image(graph: Graph, link: Any) -> Any:
    """The pixels that latents were encoded from, through masks and resizes, but not through another sampler."""
    for _ in range(MAX_LINKS):
        node_inputs = inputs(graph, source_node(link))
        if "pixels" in node_inputs:
            return node_inputs["pixels"]
        links = [node_inputs[key] for key in LATENT_INPUTS if key in node_inputs] or [
            each for each in node_inputs.values() if source_node(each)
        ]
        if len(links) != 1 or {"positive", "guider"} & {*node_inputs}:
            break
        link = links[0]
    return None


def from_workflow(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the editor's form into the one that runs, as far as WIDGETS knows the nodes; muted nodes are dropped, and
    bypassed ones keep only their links."""
    nodes, links = as_list(workflow.get("nodes")), as_list(workflow.get("links"))
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
        kind = BYPASSED if node.get("mode") == 4 else str(node.get("type"))
        values = zip(WIDGETS.get(kind, ()), as_list(node.get("widgets_values")), strict=False)
        given = {name: value for name, value in values if name}
        for each in as_list(node.get("inputs")):
            if isinstance(each, Mapping) and isinstance(each.get("link"), int) and each["link"] in ends:
                given[str(each.get("name"))] = ends[each["link"]]
        graph[str(node.get("id"))] = {"class_type": kind, "inputs": given}
    return graph


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
