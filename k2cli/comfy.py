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

TEXTS = ("text", "populated_text", "prompt", "text_g", "t5xxl", "clip_l", "text_0")  # last: what a node displays
VALUES = ("value", "string", "int", "float")  # of nodes that hold a single value for others
SIDES = {"on_true", "on_false"}  # of a switch
BYPASSED = "bypassed"  # stands for a node, and only passes its input on
PASSING = re.compile(  # words in the names of nodes that pass a number on, alone or among other values
    f"{BYPASSED}|reroute|pass.?through|preview|show|display|any.?switch|pipe|context", re.IGNORECASE
)
JOINED = {
    "ConditioningCombine": ("conditioning_1", "conditioning_2"),
    "ConditioningConcat": ("conditioning_to", "conditioning_from"),
}
PART = re.compile(r"(?:string|text|prompt)_?[a-z1-9]$")  # inputs of nodes that join texts
COLONS = (":", "\uff1a")  # the second in Chinese texts
MOST_LINKS = 2000  # followed for one value
MOST_INPUTS = 100  # of a node; one with more is ignored
MOST_WORDS = 100_000  # characters of joined texts
MOST_JOINED = 100  # nested nodes that join texts, as each one recurses a level deeper here
LORA = re.compile("lora", re.IGNORECASE)  # in the names of nodes, as the next two
CONTROL = re.compile("control.?net", re.IGNORECASE)
REFERENCE = re.compile("reference|ip.?adapter|style.?model|redux|unclip|image.?edit", re.IGNORECASE)
STARTS = ("latent_image", "samples", "latent")
SIZE = ("width", "height")
WIDGETS: Mapping[str, tuple[str, ...]] = {  # the values of a node in `workflow`, in order; "" is one we ignore
    "KSampler": ("seed", "", "steps", "cfg", "", "", "denoise"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg"),
    "SamplerCustom": ("", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed",),
    "BasicScheduler": ("", "steps", "denoise"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl"),
    **{f"Empty{kind}LatentImage": SIZE for kind in ("", "SD3", "Hunyuan", "Flux2")},
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
    graph = switched(graph)
    for node in [*graph][::-1]:
        here = inputs(graph, node)
        start = next((here[key] for key in STARTS if key in here), None)
        if start is None or not {"positive", "guider"} & set(here) or kind_of(graph, node) == BYPASSED:
            continue
        guider = inputs(graph, linked(here["guider"])) if "guider" in here else here
        model = here.get("model", guider.get("model"))
        words = guider.get("positive", guider.get("conditioning"))
        asked, avoided = (Search(graph, (*TEXTS, f"text_{side}"), str, side) for side in ("positive", "negative"))
        found = {
            "prompt": asked.at(words),
            "avoid": avoided.at(guider.get("negative")),
            "enhanced": asked.enhanced or avoided.enhanced,
            "seed": number(graph, here, ("seed", "noise_seed"), int, behind="noise"),
            "steps": number(graph, here, ("steps",), int, behind="sigmas"),
            "cfg": number(graph, guider, ("cfg",), (int, float)),
            "denoise": number(graph, here, ("denoise",), (int, float), behind="sigmas"),
            **{side: find(graph, start, (side,), int) for side in SIZE},
            "model": find(graph, model, ("ckpt_name", "unet_name"), str),
            "begun": find(graph, encoded(graph, start), ("image",), str),
        }
        on_model = kinds_on_way(graph, [model], "model")
        on_clip = kinds_on_way(graph, [*asked.clips, *avoided.clips], "clip")  # known only after the texts are found
        leading = on_model | kinds_on_way(graph, [words], ("positive", "conditioning"))
        named = {"loras": (LORA, on_model | on_clip), "control": (CONTROL, leading), "references": (REFERENCE, leading)}
        yield found | {key: any(map(sign.search, kinds)) for key, (sign, kinds) in named.items()}


def switched(graph: Graph) -> dict[str, Any]:
    """The graph with each switch replaced by a node that passes on the side it selects, or nothing if that cannot be
    told. Other nodes may hold its flag."""
    flags, new = Search(graph, (), bool), dict(graph)
    for node in graph:
        here = inputs(graph, node)
        if "switch" in here and SIDES & {*here}:
            on = flags.at(here["switch"], direct=True)
            side = {True: "on_true", False: "on_false"}.get(on, "")
            new[node] = {"class_type": BYPASSED, "inputs": {"value": here[side]} if side in here else {}}
    return new


def inputs(graph: Graph, node: Any) -> Mapping[str, Any]:
    found = graph.get(node) if isinstance(node, str) else None
    found = found.get("inputs") if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) and len(found) <= MOST_INPUTS else {}


def kind_of(graph: Graph, node: str) -> str:
    found = graph.get(node)
    return str(found.get("class_type")) if isinstance(found, Mapping) else ""


def linked(value: Any) -> str | None:
    """The node that a link comes from; links are [node, output]."""
    return str(value[0]) if isinstance(value, list) and len(value) == 2 else None


class Search:
    """A search for one value that follows at most MOST_LINKS links.

    keys      names of the value; the first one found answers
    side      the input to follow at nodes that pass on both sides, such as a ControlNet
    enhanced  whether the search passed a node in which a language model rewrites texts
    clips     the links to the encoders of the texts found
    """

    def __init__(self, graph: Graph, keys: tuple[str, ...], kind: type | tuple[type, ...], side: str = ""):
        self.graph, self.keys, self.kind, self.side = graph, keys, kind, side
        self.enhanced = False
        self.clips: list[Any] = []
        self.left = MOST_LINKS

    def at(self, value: Any, direct: bool = False, above: frozenset[str] = frozenset()) -> Any:
        """The value at the end of a link, or further up.

        direct  the link asks for this very value, so a node that holds a single value answers, whatever its name
        above   the nodes whose parts include this link; the search does not return to them
        """
        found = self.each_at(value, direct, above)
        return ", ".join(found)[:MOST_WORDS] if len(found) > 1 else next(iter(found), None)

    def each_at(self, value: Any, direct: bool, above: frozenset[str]) -> list[Any]:
        """The same, but several values where JOINED joins texts."""
        left = deque([(value, direct)])
        seen: dict[str, bool] = {}  # node -> whether it was asked directly, which finds all that asking indirectly does
        while left:
            value, direct = left.popleft()
            node = linked(value)
            if node is None:
                if isinstance(value, self.kind) and isinstance(value, bool) == (self.kind is bool) and value != "":
                    return [value]
                continue
            if node in above or seen.get(node, -1) >= direct:
                continue
            seen[node] = direct
            if kind_of(self.graph, node) == "ConditioningZeroOut":  # it stands for no text at all
                continue
            if found := self.put_together(node, above | {node}):
                return found
            onward = self.onward(node, direct, above | {node})[: self.left]
            self.left -= len(onward)
            left.extendleft(reversed(onward))
        return []

    def put_together(self, node: str, above: frozenset[str]) -> list[str]:
        """The text of a node that joins others into one, or its texts if it keeps them apart."""
        if self.kind is not str or len(above) > MOST_JOINED:
            return []
        here, kind = inputs(self.graph, node), kind_of(self.graph, node)
        parts = parts_of(self.graph, node) if kind in JOINED or not {*self.keys} & {*here} else []
        parts = parts[: self.left]
        self.left -= len(parts)
        if kind in JOINED:  # the same text may arrive more than once, each time for another part of the picture
            return [*dict.fromkeys(text for key in parts for text in self.each_at(here[key], False, above))]
        joint = here.get("delimiter", " ")
        found = [self.at(here[key], True, above) for key in parts]
        text = (joint if isinstance(joint, str) else " ").join(filter(None, found))[:MOST_WORDS]
        return [text] if text else []

    def onward(self, node: str, direct: bool, above: frozenset[str]) -> list[tuple[Any, bool]]:
        """The inputs of a node to search next, and whether directly."""
        here = inputs(self.graph, node)
        if self.side and self.side in here:
            return [(here[self.side], False)]
        if kind_of(self.graph, node).startswith("TextGenerate"):
            self.enhanced = True
            if self.kind is not str:
                return []  # its text holds no number
            return [(self.users_part(here.get("prompt"), above), True)]
        told = [(here[key], True) for key in (*self.keys, *(VALUES if direct else ())) if key in here]
        links = [each for each in here.values() if linked(each)]
        self.clips += [here["clip"]] if told and "clip" in here else []
        if direct and self.kind is not str and not PASSING.search(kind_of(self.graph, node)):
            return told  # the node computes another number from those behind it
        return [*told, *((each, direct and not told and len(links) == 1) for each in links)]

    def users_part(self, value: Any, above: frozenset[str]) -> Any:
        """The user's words in what a language model is given: the part after instructions that end with a colon;
        otherwise a linked part, as instructions may be typed into the node that joins both; otherwise the last."""
        node = linked(value)
        parts = [inputs(self.graph, node)[key] for key in parts_of(self.graph, node)][: self.left]
        self.left -= len(parts)
        read = [self.at(each, True, above) or "" for each in parts[:-1] if len(above) <= MOST_JOINED]
        announced = [part for text, part in zip(read, parts[1:], strict=False) if text.rstrip().endswith(COLONS)]
        return (announced or [each for each in parts if linked(each)] or parts or [value])[-1]


def find(graph: Graph, value: Any, keys: tuple[str, ...], kind: type | tuple[type, ...]) -> Any:
    """The first value of one of these keys at the end of a link, or further up."""
    return Search(graph, keys, kind).at(value)


def number(
    graph: Graph, here: Mapping[str, Any], keys: tuple[str, ...], kind: type | tuple[type, ...], behind: str = ""
) -> Any:
    """The number that a node calls by one of these keys; or else the first behind its input `behind`."""
    key = next((key for key in keys if key in here), behind)
    return Search(graph, keys, kind).at(here.get(key), direct=key in keys)


def parts_of(graph: Graph, node: str | None) -> list[str]:
    """The inputs of a node that joins texts, in order."""
    here = inputs(graph, node)
    parts = JOINED.get(kind_of(graph, node or ""), ()) or sorted(key for key in here if PART.fullmatch(key))
    parts = [key for key in parts if key in here]
    return parts if len(parts) > 1 else []


def kinds_on_way(graph: Graph, links: list[Any], sides: str | tuple[str, ...]) -> set[str]:
    """The kinds of the nodes along these links; followed are inputs whose names start with `sides`, such as "model", or
    all if there are none."""
    left, seen = [*links], set[str]()
    while left and len(seen) < MOST_LINKS:
        node = linked(left.pop())
        if node is None or node in seen:
            continue
        seen.add(node)
        here = inputs(graph, node)
        left += [each for key, each in here.items() if key.startswith(sides)] or here.values()
    return {kind_of(graph, node) for node in seen}


def encoded(graph: Graph, link: Any) -> Any:
    """The pixels that latents were encoded from, through masks and resizes, but not through another sampler."""
    for _ in range(MOST_LINKS):
        here = inputs(graph, linked(link))
        if "pixels" in here:
            return here["pixels"]
        links = [here[key] for key in STARTS if key in here] or [each for each in here.values() if linked(each)]
        if len(links) != 1 or {"positive", "guider"} & {*here}:
            break
        link = links[0]
    return None


def from_workflow(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the editor's form into the one that runs, as far as WIDGETS knows the nodes; muted nodes are dropped, and
    bypassed ones keep only their links."""
    nodes, links = list_of(workflow.get("nodes")), list_of(workflow.get("links"))
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
        values = zip(WIDGETS.get(kind, ()), list_of(node.get("widgets_values")), strict=False)
        given = {name: value for name, value in values if name}
        for each in list_of(node.get("inputs")):
            if isinstance(each, Mapping) and isinstance(each.get("link"), int) and each["link"] in ends:
                given[str(each.get("name"))] = ends[each["link"]]
        graph[str(node.get("id"))] = {"class_type": kind, "inputs": given}
    return graph


def list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
