"""Several projects in one command: what is wrong with any is known before the first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tree, write_weights
from PIL import Image

from k2cli import pictures

NAMES = ("one", "two", "three")
PLAIN = (
    '[render]\nseed = 7\n\n[[prompt]]\nname = "fox"\ntext = "a red fox"\n\n[[prompt]]\nname = "owl"\ntext = "an owl"\n'
)


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Any) -> Path:
    """The folder, which is the current one, of three projects alike."""
    folder = tmp_path / "all"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "k2.toml").write_text(PLAIN)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def spoilt(three: Path) -> Callable[[str], None]:
    def spoil(what: str) -> None:
        """Give the last project a style of a picture that is cut off, or of a LoRA that is none."""
        project = three / "three"
        (project / "styles").mkdir()
        Image.effect_noise((64, 64), 50).save(project / "a.png")
        raw = (project / "a.png").read_bytes()
        (project / "cut.png").write_bytes(raw[: len(raw) // 2])
        write_weights(project / "no.safetensors", {})
        text = 'lora = "no.safetensors"\n' if what == "lora" else f'[[reference]]\nimage = "{what}"\n'
        (project / "styles" / "dusk.toml").write_text(text)
        (project / "k2.toml").write_text(f"{PLAIN}\n[style]\ndusk = 1\n")

    return spoil


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.parametrize(("what", "said"), [("cut.png", "cut.png is not a picture"), ("lora", "is no LoRA: it holds")])
def test_what_styles_name_is_looked_at_before_the_first_run(three, k2, spoilt, what, said, more):
    spoilt(what)
    before = tree(three)

    result = k2("render", *NAMES, *more, code=1)

    assert said in result.stderr and 'Style "dusk": ' in result.stderr and result.stdout == ""
    assert tree(three) == before
    k2("render", "three", "--style", "dusk=0", *more)  # what is off is not looked at


def test_a_reference_is_decoded_once(three, k2, spoilt):
    spoilt("a.png")
    pictures.decode.cache_clear()

    k2("render", "three", "--batch", "3", "--dry-run")
    k2("render", "three", "--batch", "3", "-q")

    assert pictures.decode.cache_info().misses == 1
