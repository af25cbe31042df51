"""Models by name: bundled, pulled from the hub, or at any path. Needs no torch and no network.

Pulled files live in the hub client's own cache, in its layout: `models--ORG--NAME/snapshots/COMMIT/…`. A manifest with
commit, sizes and hashes lies beside them, written before they are fetched; each file appears only once it is verified,
so a snapshot is complete when everything in its manifest exists. Other tools' downloads count if `refs` points to them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from model.comfy_formats import COMFYUI_PREFIXES, PREFIXES, SECOND_SCALE, W4A4, W4A8, is_auxiliary, special_format
from model.errors import K2Error
from model.headers import VARIANTS, own_metadata, read_header, read_json, read_shift, shards, stored_tensors

BUNDLED = Path(__file__).parent / "weights"
OFFICIAL = {  # Krea's own repositories on huggingface.co, as named in its code repository and model cards
    "krea-2-turbo": "krea/Krea-2-Turbo",
    "krea-2-raw": "krea/Krea-2-Raw",
}
RECOMMENDED: dict[str, dict[str, Any]] = {  # the publisher's settings, for weights that state none
    "raw": {"steps": 52, "guidance": 3.5, "mu": "auto"},
    "turbo": {"steps": 8, "guidance": 0.0, "mu": 1.15},
}
OPEN_WEIGHTS_SIDE = 1024  # the side in pixels that the open weights were trained for
TEXT_INPUTS = (  # tensors whose last dimension is the width, and the number of text layers; native and diffusers' names
    ("txtmlp.0.scale", "txt_in.norm.weight"),
    ("txtfusion.projector.weight", "text_fusion.projector.weight"),
)
VISION_PREFIXES = ("model.visual.", "visual.")  # prefixes of a text encoder's vision tower, depending on the writer
RELEASE_SHAPE = {"width": 6144, "blocks": 28}  # the shape of the open 12.9B release, and of everything trained from it
KREA_2_LICENCE = "krea-2-community-license"  # as model cards on the hub call it

MANIFEST = "k2-pull.json"
WEIGHT_SUFFIXES = (".safetensors", ".gguf")
WEIGHT_LIKE_SUFFIXES = (*WEIGHT_SUFFIXES, ".safetensor", ".sft", ".ckpt", ".pt", ".pth", ".bin")  # misspellings too
MAX_DEPTH = 3  # levels at which weights are looked for
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?P<file>(?:/[\w.@ -]+)*)")
NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # in a file's name, also krea2Turbo_v10
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


@dataclass(frozen=True)
class Model:
    """A model on this machine. `path` is a folder, or the file of its transformer."""

    name: str
    path: Path
    source: str  # box | hub | path
    variant: str | None = None  # raw | turbo, if known
    revision: str | None = None  # the hub's commit
    manifest: Mapping[str, Any] = field(default_factory=dict)  # of the pull; {} if k2 did not pull it

    @property
    def root(self) -> Path:
        """The folder that file names are relative to: the snapshot if pulled, else the transformer's folder."""
        if self.revision:
            return next(path for path in (self.path, *self.path.parents) if path.name == self.revision)
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def licence(self) -> str | None:
        """The licence of the weights, as named in their model card."""
        if self.manifest.get("licence"):
            return str(self.manifest["licence"])
        official = self.source == "hub" and (parse_hub_name(self.name) or ("",))[0] in OFFICIAL.values()
        return KREA_2_LICENCE if official or is_release(self.path) else None


@dataclass(frozen=True)
class Parts:
    """A transformer and the parts it needs: files, or folders in transformers' and diffusers' layout."""

    dit: Path
    text: Path  # a file, or the folder that holds text_encoder/ and tokenizer/
    vae: Path
    style: Path | None = None

    @property
    def companion_folder(self) -> Path:
        """The folder that holds text encoder and autoencoder."""
        return self.text if self.text.is_dir() else self.text.parent


def find_parts(model: Model) -> Parts:
    """A lone transformer file gets the parts beside it, else those of the pulled release, else the bundled ones.

    Bundled parts come before the release's if the transformer takes what the bundled text encoder gives.
    """
    if model.source == "box":
        return Parts(model.path, *bundled_parts(model.name))
    folder = pipeline_folder(model.path) or (model.path if model.path.is_dir() else model.path.parent)
    dit = dit_path(model.path)
    if has_companions(folder):
        return Parts(dit, folder, folder / "vae")
    release, box = locate("krea-2"), Parts(dit, *bundled_parts("mini"))
    if release is None or not has_companions(release) or (box.text.is_file() and fits_text_encoder(dit, box.text)):
        return box
    return Parts(dit, release, release / "vae")


def dit_path(path: Path) -> Path:
    """The transformer of a file or folder: its subfolder of that name, if it has one."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def pipeline_folder(path: Path) -> Path | None:
    """A path's diffusers pipeline: the folder itself, or the one whose `transformer` it is or lies in; else None."""
    folder = path if path.is_dir() else path.parent
    whole = folder.parent if folder.name == "transformer" else path
    return whole if (whole / "model_index.json").is_file() else None


def has_companions(folder: Path) -> bool:
    """Whether the folder holds a text encoder and an autoencoder in diffusers' layout."""
    return (folder / "text_encoder").is_dir() and (folder / "vae").is_dir()


def bundled_parts(name: str) -> tuple[Path, Path, Path | None]:
    """Text encoder, autoencoder and style encoder of a bundled model."""
    text, vae, style = (BUNDLED / f"{name}-{part}.safetensors" for part in ("text", "vae", "style"))
    return text, vae, style if style.is_file() else None


def text_weights(text: Path) -> Path:
    """The path of a text encoder's weights, given that path itself or the pipeline folder that contains it."""
    return text / "text_encoder" if (text / "text_encoder").is_dir() else text


def has_vision(text: Path) -> bool:
    """Whether a text encoder's files also hold a vision tower, with at least one layer by its config. Raises K2Error
    if they cannot be read."""
    folder = text_weights(text)
    if not (folder / "config.json").is_file():
        return False
    stated = read_json(folder / "config.json").get("vision_config")
    here = any(name.startswith(VISION_PREFIXES) for file in shards(folder) for name in read_header(file))
    return here and isinstance(stated, dict) and bool(stated.get("depth"))


def fits_text_encoder(dit: Path, text: Path) -> bool:
    """Whether a transformer takes text layers of the number and width that one of our text encoders gives."""
    return text_input_shape(dit) == text_output_shape(text)


def text_input_shape(dit: Path) -> tuple[int, int]:
    """Width and number of the text layers that a transformer takes; 0 if its file does not show them."""
    shapes = {name: shape for file in weights_files(dit) for name, shape in shapes_in(file).items()}
    width, taps = (next((s[-1] for name, s in shapes.items() if s and name.endswith(ends)), 0) for ends in TEXT_INPUTS)
    return width, taps


def text_output_shape(text: Path) -> tuple[int, int]:
    """Width and number of the text layers that one of our text encoders gives."""
    config = describe(text).get("config") or {}
    return config.get("hidden_size") or 0, len(config.get("taps") or ())


def check_text_encoder(model: Model) -> None:
    """Refuse a lone transformer that would get the bundled parts but needs another text encoder. Reads only headers.
    Raises K2Error."""
    parts = find_parts(model)
    if model.source == "box" or parts.companion_folder != BUNDLED or not parts.text.is_file():
        return
    (width, taps), (given_width, given_layers) = text_input_shape(parts.dit), text_output_shape(parts.text)
    if width and taps and (width, taps) != (given_width, given_layers):
        pull = "To get Krea's: k2 models pull krea-2-turbo"
        raise K2Error(
            f"{parts.dit} needs {taps} text layers of width {width}, "
            f"but {parts.text} gives {given_layers} of {given_width}.",
            hint=f"{pull}; or put text_encoder, tokenizer and vae of its pipeline beside the file.",
        )


def locate(name: str, variant: str | None = None) -> Path | None:
    """The path of a model, or None if it is not on this machine. See `find`."""
    model = find(name, variant)
    return model.path if model else None


def find(name: str, variant: str | None = None) -> Model | None:
    """A model by bundled name, `krea-2[-turbo|-raw]`, path, or hub id; for the hub also `NAME@REVISION`.

    A hub id may be followed by a file's path in the repository. Raw is preferred if no variant is asked for. Weights
    that state no variant count as the one asked for; weights that state another are not found.
    """
    wanted = (variant,) if variant else VARIANTS
    if files := bundled_models().get(name):
        held = {path.name: path for path in files}
        paths = ((each, held.get(f"{name}-{each}.safetensors")) for each in wanted)
        return next((Model(name, path, "box", each) for each, path in paths if path), None)
    short, at, revision = name.partition("@")
    if short == "krea-2":
        return next(filter(None, (find(f"krea-2-{each}{at}{revision}") for each in wanted)), None)
    if name and short not in OFFICIAL and os.path.exists(path := Path(os.path.expanduser(name))):
        return as_variant(Model(name, path.absolute(), "path", detect_variant(path)), variant)
    repo, revision, file = parse_hub_name(name) or ("", "", "")
    snapshot = find_snapshot(repo, revision) if repo else None
    if snapshot is None:
        return None
    path = snapshot / file if file else main_weights(snapshot)
    manifest = read_manifest(snapshot)
    found = Model(name, path, "hub", detect_variant(path), snapshot.name, manifest)
    return as_variant(found, variant) if path.exists() else None


def as_variant(model: Model, asked: str | None) -> Model | None:
    """The model as the variant asked for, unless its weights state another."""
    if asked is None or model.variant == asked:
        return model
    return None if stated_variant(model.path) else replace(model, variant=asked)


def list_models() -> list[Model]:
    """Bundled models and those pulled from the hub: all that can be found without a path."""
    models = [model for name in sorted(bundled_models()) for each in VARIANTS if (model := find(name, each))]
    names = {repo: name for name, repo in OFFICIAL.items()}
    for snapshot in snapshots():
        repo = snapshot_repo(snapshot)
        newest = find_snapshot(repo) == snapshot
        name = names.get(repo, repo) + ("" if newest else f"@{snapshot.name[:12]}")
        path = main_weights(snapshot)
        models.append(Model(name, path, "hub", detect_variant(path), snapshot.name, read_manifest(snapshot)))
    return models


def bundled_models() -> dict[str, list[Path]]:
    """The bundled models: name -> files."""
    names = {
        path.stem.rpartition("-")[0]
        for path in BUNDLED.glob("*-*.safetensors")
        if path.stem.endswith(("-raw", "-turbo"))
    }
    return {
        name: sorted(path for path in BUNDLED.glob(f"{name}-*") if path.suffix in (".safetensors", ".json"))
        for name in sorted(names)
    }


def parse_hub_name(name: str) -> tuple[str, str, str] | None:
    """A hub name -> (repository, revision or "", file or ""); None if it is not a hub name."""
    short, at, rest = name.partition("@")
    match = HUB_NAME.fullmatch(OFFICIAL.get(short, short) + at + rest)
    if match is None or ".." in name or "--" in match["repo"]:
        return None
    return match["repo"], match["revision"] or "", match["file"].lstrip("/")


def hub_cache() -> Path:
    """The hub client's cache, located as the client does."""
    env = os.environ
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    where = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(where)))


def repo_folder(repo: str) -> Path:
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def snapshot_repo(snapshot: Path) -> str:
    return snapshot.parent.parent.name.removeprefix("models--").replace("--", "/")


def find_snapshot(repo: str, revision: str = "") -> Path | None:
    """A repository's files at a commit (or its prefix), branch or tag; by default at main, else as last pulled."""
    folder = repo_folder(repo)
    if revision:
        commit = read_ref(folder, revision)
        found = [path for path in snapshots(repo) if path.name == commit or path.name.startswith(revision.lower())]
        return found[0] if len(found) == 1 else None
    main = folder / "snapshots" / (read_ref(folder, "main") or "none")
    here = snapshots(repo)
    return main if main in here else here[-1] if here else None


def read_ref(folder: Path, revision: str) -> str | None:
    try:
        return (folder / "refs" / revision).read_text("utf-8").strip()
    except (OSError, ValueError):
        return None


def snapshots(repo: str = "*") -> list[Path]:
    """The complete snapshots, oldest first, of a repository or of all repositories known to hold a Krea 2 model."""
    folders = [path for path in hub_cache().glob(f"models--{repo.replace('/', '--')}/snapshots/*") if path.is_dir()]
    names = set(OFFICIAL.values())
    known = [
        path for path in folders if read_manifest(path) or snapshot_repo(path) in (names if repo == "*" else {repo})
    ]
    return sorted((path for path in known if is_complete(path)), key=lambda path: (path.stat().st_mtime, path.name))


def is_complete(snapshot: Path) -> bool:
    """Whether everything in the manifest exists; without a manifest, whether another tool's ref points here."""
    if manifest := read_manifest(snapshot):
        files = manifest["files"].items()
        return all(
            (file := snapshot / name).is_file() and file.stat().st_size == entry["bytes"] for name, entry in files
        )
    folder = snapshot.parent.parent
    refs = [path.relative_to(folder / "refs") for path in (folder / "refs").rglob("*") if path.is_file()]
    return any(read_ref(folder, str(ref)) == snapshot.name for ref in refs) and any(find_weights(snapshot))


def read_manifest(snapshot: Path) -> dict[str, Any]:
    """The manifest of what k2 pulled, or began to pull, into a snapshot; {} if it did not."""
    file = snapshot / MANIFEST
    if file.is_symlink():  # the repository's own, from another tool: k2 writes a plain file
        return {}
    try:
        manifest = json.loads(file.read_text("utf-8"))
        sizes = [entry["bytes"] for entry in manifest["files"].values()]
        return manifest if all(type(size) is int for size in sizes) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def find_weights(folder: Path) -> Iterator[Path]:
    """Weights files of a folder, by name, down to `MAX_DEPTH` levels: even a home folder is searched quickly."""
    levels = ("/".join("*" * depth) for depth in range(1, MAX_DEPTH + 1))
    found = sorted(path for level in levels for path in folder.glob(level) if path.suffix in WEIGHT_SUFFIXES)
    return (path for path in found if path.is_file())


def weights_files(path: Path) -> list[Path]:
    """The weights file itself, or those of a folder."""
    return list(find_weights(path)) if path.is_dir() else [path]


def main_weights(folder: Path) -> Path:
    """A folder's weights file if it holds just one; the folder itself if it holds more, or a pipeline."""
    found = list(find_weights(folder))
    return found[0] if len(found) == 1 and not (folder / "model_index.json").exists() else folder


def detect_variant(path: Path) -> str | None:
    """raw or turbo: as the weights state, else from words in the file's name, or on the hub in its folder's or
    repository's; else None."""
    names, above = [path.stem] if path.suffix in WEIGHT_SUFFIXES else [], [parent.name for parent in path.parents]
    if repository := next((name for name in above if name.startswith("models--")), None):
        names += above[: above.index(repository) + 1]
    name_words = [{word.lower() for word in NAME_WORDS.findall(name)} for name in names]
    return stated_variant(path) or next(
        (each for words in name_words for each in ("turbo", "raw") if each in words), None
    )


def stated_variant(path: Path) -> str | None:
    """raw or turbo, from the weights' own metadata or diffusers' index; None if neither says."""
    for file in weights_files(dit_path(path)):
        with suppress(K2Error):
            about = own_metadata(read_header(file).get("__metadata__", {}))
            if file.suffix in WEIGHT_SUFFIXES and about.get("variant"):
                return str(about["variant"])
    try:
        pipeline = pipeline_folder(path)
        index = json.loads((pipeline / "model_index.json").read_text("utf-8")) if pipeline else None
        return None if index is None else "turbo" if index.get("is_distilled") else "raw"
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def recommended(variant: str, about: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Steps, guidance and mu for weights of this variant: as stated in the weights, else (Raw's mu) by the pipeline's
    scheduler, else by the publisher. Raises K2Error if a pipeline's cannot be read."""
    pipeline = pipeline_folder(path) if variant == "raw" else None
    return RECOMMENDED[variant] | (read_shift(pipeline) if pipeline else {}) | (about.get("recommended") or {})


def describe(path: Path) -> dict[str, Any]:
    """What a weights file holds: kind, layout, precision, parameters, shape, and its own metadata."""
    tensors, metadata, _ = stored_tensors(path)
    about = own_metadata(metadata)
    shapes = {name: stored.shape for name, stored in tensors.items() if not is_auxiliary(name)}
    precision: dict[str, int] = {}
    for name, shape in shapes.items():
        four = special_format(tensors[name].marks, FOUR_BITS) or ("nvfp4" if name + SECOND_SCALE in tensors else "")
        number = FOUR_BITS[four] if four else tensors[name].dtype
        precision[number] = precision.get(number, 0) + prod(shape)
    layout, main = dit_shape(shapes)
    found = {
        "layout": layout,
        "precision": {name: precision[name] for name in sorted(precision, key=lambda name: -precision[name])},
        "parameters": sum(precision.values()),
        "shape": main,
    }
    return {key: value for key, value in found.items() if value} | about


FOUR_BITS = {"nvfp4": "NVFP4", W4A8: "W4A8", W4A4: "W4A4"}  # ComfyUI's mark -> its usual name

ATTENTION_NAMES = {  # layout -> prefix of the blocks, and names of the attention's query, key and query norm
    "native": ("blocks", "wq.weight", "wk.weight", "qknorm.qnorm.scale"),
    "diffusers": ("transformer_blocks", "to_q.weight", "to_k.weight", "norm_q.weight"),
}


def dit_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str | None, dict[str, int]]:
    """Layout and main dimensions of a Krea 2 transformer, as far as this file (perhaps a shard) shows them."""
    prefixes = "|".join(map(re.escape, PREFIXES))
    for layout, (stem, query, key, norm) in ATTENTION_NAMES.items():
        pattern = re.compile(rf"(?P<prefix>{prefixes}){stem}\.\d+\.attn\.{re.escape(query)}")
        found = [match for name in shapes if (match := pattern.fullmatch(name)) and len(shapes[name]) == 2]
        if found:
            attention = found[0][0].removesuffix(query)
            rows, width = shapes[attention + query]
            shape = {"width": width, "blocks": len(found)}
            keys, norms = (shapes.get(attention + each, ()) for each in (key, norm))
            if len(keys) == 2 and len(norms) == 1 and norms[0]:
                shape |= {"heads": rows // norms[0], "kv_heads": keys[0] // norms[0]}
            return "comfyui" if found[0]["prefix"] in COMFYUI_PREFIXES else layout, shape
    return None, {}


def is_release(path: Path) -> bool:
    """Whether a file or folder holds the open 12.9B network or one trained from it: its licence covers both."""
    files = [path] if path.is_file() else [each for each in sorted(dit_path(path).iterdir()) if each.is_file()]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix in WEIGHT_SUFFIXES:
            shapes |= shapes_in(file)
    _, shape = dit_shape(shapes)
    return all(shape.get(key) == value for key, value in RELEASE_SHAPE.items())


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a weights file's tensors, as in the network."""
    return {name: stored.shape for name, stored in stored_tensors(path)[0].items()}
