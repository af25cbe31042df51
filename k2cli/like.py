"""More like an existing picture: its prompt, settings and styles, with the picture itself as the lead picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2cli import records
from k2cli.console import short_path
from k2cli.folder import find_root
from k2cli.matrix import escape_braces
from k2cli.models import auto_method
from k2cli.origins import own_negative_prompt
from k2cli.project import Project
from k2cli.prompts import Prompt, prompt_name
from k2cli.records import SPEC_KEYS, Record
from k2cli.settings import SIZE_KEYS, Settings
from k2cli.styles import BOARD_STYLE, Styles
from k2cli.texts import nfc, shell_quote
from k2cli.toml_tables import Option
from model.errors import USAGE, K2Error
from model.hashes import identity, sha256
from model.spec import Leader, Style

if TYPE_CHECKING:
    from k2cli.runs import Job

OPTION = Option("--like")
# settings that do not carry over to another checkpoint
CHECKPOINT_KEYS = ("variant", "steps", "guidance", "guidance_until", "sampler", "mu", "precision")


@dataclass(frozen=True)
class Example:
    """A project's picture that others are to be like."""

    record: Record
    file: Path

    @classmethod
    def read(cls, file: Path, project: Project) -> Example:
        """Raises K2Error if k2 did not make it. Its files may have changed since: they count as they are now."""
        return cls(records.parse(records.read(file), project.recorded_path), file)

    def prompt(self) -> Prompt:
        """The prompt it was made from."""
        shot = self.record.shot
        avoid = own_negative_prompt(shot.spec.negative, self.record.table)
        return Prompt(escape_braces(shot.given), prompt_name(shot.name, shot.caption), avoid)

    def settings(self, given: Collection[str]) -> dict[str, Any]:
        """Its settings of [render], except those `given` otherwise and those that these make void. None means
        none, whatever the project says by now."""
        shot, model = self.record.shot, self.record.model
        spec = shot.spec
        found = {key: getattr(spec, key) for key in SPEC_KEYS if key not in ("seed", "width", "height")}
        found |= {"model": model.name, "variant": model.variant, "creativity": shot.creativity}
        found |= {"precision": model.precision if model.precision != "native" else None}  # native: what fits, as then
        found |= {"size": f"{spec.width}x{spec.height}"} if spec.width and spec.height else {}
        found |= {"init_image": spec.init_image and str(spec.init_image)}
        found |= {"mask": spec.mask and str(spec.mask)}
        dropped = set(given) | (set() if "size" in found else {"mu"})  # then the project sets the size
        if dropped & {"model", "variant"}:
            dropped |= set(CHECKPOINT_KEYS)
        if dropped & SIZE_KEYS:
            dropped |= {"size", "mu"}
        if "init_image" in dropped:  # the new one has its own shape, and a mask was drawn for the old one
            dropped |= {"size", "mu", "mask"} | ({"denoise"} if spec.mask or not spec.init_image else set())
        return {key: value for key, value in found.items() if key not in dropped}

    def with_own_settings(self, prompt: Prompt, project_settings: Settings, given: Collection[str]) -> Prompt:
        """The prompt, with the project's own settings restored where the prompt's settings make the picture's void, as
        the same settings on a command line would."""
        dropped = self.settings(given).keys() - self.settings({*given, *prompt.settings}).keys()
        dropped |= SIZE_KEYS if "size" in dropped else set()
        return replace(prompt, restored={key: getattr(project_settings, key) for key in dropped})

    def leader(self) -> Leader:
        """This picture, or its own lead picture, whose look its batch shares."""
        spec = self.record.shot.spec
        return spec.leader or Leader(spec.prompt, spec.seed, spec.negative)

    def describe_changes(self, job: Job) -> str:
        """A sentence on what a job takes from this picture that has changed since; else ""."""
        root, shots = job.project.root, job.shots
        current = {style.name: style for shot in shots for style in shot.spec.styles}
        recorded = {style.name: style for style in self.record.shot.spec.styles if style.name in current}
        read = any(style.references for style in recorded.values())
        auto_now = auto_method(job.model.name, job.model.variant) if read else ""
        changes = []
        for name, style in recorded.items():
            old_look, new_look = (
                look_sources(style, root, self.record.references.__getitem__),
                look_sources(current[name], root),
            )
            differing = [called for called, said in old_look.items() if new_look[called] != said]
            changes += [f"{name} has different {' and '.join(differing)}"] if differing else []
            if style.references and current[name].references:
                old_method, new_method = (
                    auto_now if each.method == "auto" else each.method for each in (style, current[name])
                )
                changes += [f"{name} is now read by {new_method}"] if old_method != new_method else []
        mixed = set(map(nfc, job.project.styles.with_mixed(recorded.keys() - {BOARD_STYLE}, OPTION)))
        added = (name for name in current if name in mixed - recorded.keys())  # since then, or its weight was 0 in all
        changes += [f"{name} is now mixed in" for name in added]
        input_files = {
            path for shot in shots for path in (shot.spec.init_image, shot.spec.mask) if isinstance(path, Path)
        }
        for path in sorted(input_files & self.record.references.keys()):
            changes += [f"{path.name} is a different picture"] if sha256(path) != self.record.references[path] else []
        return f"The look has changed since {self.file.name} was made: {', '.join(changes)}." if changes else ""

    def apply_to(
        self,
        project: Project,
        given: Mapping[str, Any],
        styles: Mapping[str, float],
        board: float | None,
        *,
        reuse_prompt: bool,
    ) -> tuple[Project, dict[str, float]]:
        """Its project with the picture's settings and styles in place of those of the project and its prompts, and the
        command line's weights for styles that exist. Raises K2Error.

        given         settings from the command line, which take precedence, and what a matrix compares
        styles        weights from the command line, which take precedence; 0 drops a style that is gone
        board         the moodboard's strength from the command line; 0 drops one that is gone
        reuse_prompt  the picture's own prompt is rendered: with the seeds after its own, if none are given
        """
        spec = self.record.shot.spec
        settings = self.settings(given)
        if reuse_prompt and "seed" not in given:
            settings["seed"] = spec.seed + 1
        if reuse_prompt and "avoid" not in given:
            settings["avoid"] = ""  # the picture's negative prompt includes the project's of then
        weights = {style.name: style.strength for style in spec.styles}
        board_strength = weights.pop(BOARD_STYLE, 0.0)
        more = " any more" if is_within(self.file, project.root) else ""
        missing = [name for name in weights if name not in project.styles.names]
        for name in missing:
            if styles.get(name) != 0:
                raise K2Error(
                    f'{OPTION}: {project.root.name} has no style "{name}"{more}.',
                    hint=f"Create it, or omit it: --style {shell_quote(name)}=0",
                    code=USAGE,
                )
        weights = weights_for({name: weight for name, weight in weights.items() if name not in missing}, project.styles)
        if board_strength and board is None and not project.board:
            raise K2Error(
                f"{OPTION}: {project.root.name} has no moodboard{more}.",
                hint="Add one to k2.toml, or omit it: --moodboard 0",
                code=USAGE,
            )
        if project.board or board:
            project = project.with_board(board_strength if board is None else board)
        project = replace(
            project,
            settings=project.settings.overridden_by(settings, dict.fromkeys(settings, OPTION)),
            weights=weights,
            prompts=tuple(replace(prompt, style={}) for prompt in project.prompts),  # their settings yield, too
            leader=self.leader(),
        )
        return project, {name: weight for name, weight in styles.items() if name not in missing}


def weights_for(strengths: Mapping[str, float], styles: Styles) -> dict[str, float]:
    """The weights that give styles these strengths, although some may be mixed into others."""
    mixed: dict[str, dict[str, float]] = {}
    for name in strengths:
        with suppress(K2Error):  # an unusable style, which is reported where it is used
            parts = styles.resolve({name: 1.0}, lambda name: OPTION)
            mixed[name] = {part.name: part.strength for part in parts if part.name != name}
    weights = dict(strengths)
    for _ in strengths:  # nested mixes converge one level per pass
        weights = {
            name: strength - sum(weights[other] * parts.get(name, 0.0) for other, parts in mixed.items())
            for name, strength in strengths.items()
        }
    return weights


def look_sources(style: Style, root: Path, hash_of: Callable[[Path], str] = identity) -> dict[str, Any]:
    """What a style's look comes from, by name; the order and names of files do not matter."""
    table = records.style_table(style, root, hash_of)
    return {
        "pictures": sorted((each["sha256"], each["weight"]) for each in table["reference"]),
        **{key: sorted(table.get(key, ())) for key in ("keywords", "avoids", "triggers")},
        "weights": table["lora"]["sha256"] if style.lora else "",
    }


def note_on_project(file: Path, root: Path) -> str:
    """A sentence on where pictures like this one go, if not into the current folder's project; else ""."""
    here = find_root(Path.cwd())
    if here is None or here.samefile(root):
        return ""
    return f"{file.name} belongs to another project; pictures like it go there: {short_path(root)}"


def is_within(file: Path, folder: Path) -> bool:
    """Whether a file is below a folder, with links resolved."""
    return file.resolve().is_relative_to(folder.resolve())
