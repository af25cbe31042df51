"""Style files: what they contain, how they mix, and what they cannot reach."""

from __future__ import annotations

import io
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import pytest
from conftest import PROJECT, write_weights
from PIL import Image

from k2cli.project import Project
from model.errors import K2Error


@pytest.fixture
def styled(moody: Path) -> Path:
    """moody with three styles: dusk, riso, and blend, a mix of the two."""
    (moody / "styles").mkdir()
    for name, colour in (("a", "navy"), ("b", "black"), ("c", "red")):
        (moody / "refs" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(moody / "refs" / name / f"{name}.png")
    write(
        moody,
        "dusk",
        'keywords = ["film grain", "low key"]\navoids = ["glossy"]\n'
        '[[reference]]\nimage = "refs/*/*.png"\nweight = 0.5\n',
    )
    write(moody, "riso", 'keywords = ["riso print", "low key"]\n')
    write(moody, "blend", "[mix]\ndusk = 0.7\nriso = 0.3\n")
    return moody


def write(project: Path, name: str, text: str) -> None:
    (project / "styles" / f"{name}.toml").write_text(text)


def resolve(folder: Path, **weights: float):
    project = Project.open(folder)
    return project.shots(project.resolve_settings(), None, weights)[0].spec


def test_words_join_the_prompt_pictures_become_references(styled):
    spec = resolve(styled, dusk=0.6)

    assert spec.prompt == "a red fox, film grain, low key"
    assert spec.negative == "glossy"
    (style,) = spec.styles
    assert (style.name, style.strength) == ("dusk", 0.6)
    assert [(reference.image.name, reference.weight) for reference in style.references] == [
        ("a.png", 0.5),
        ("b.png", 0.5),
        ("c.png", 0.5),
    ]


def test_lora_joins_at_style_strength_with_its_triggers(styled):
    write_weights(styled / "ink.safetensors", {})
    write(styled, "ink", 'lora = "ink.safetensors"\ntriggers = ["in the inkk style"]\nkeywords = ["bold"]\n')

    up, down = resolve(styled, ink=0.8), resolve(styled, ink=-0.8)

    assert up.prompt == "a red fox, in the inkk style, bold"
    assert (up.styles[0].lora, up.styles[0].strength) == ((styled / "ink.safetensors").resolve(), 0.8)
    assert down.prompt == "a red fox" and down.styles[0].lora
    write(styled, "ink", 'lora = "ink.safetensors"\ntriggers = ["Red", "ink"]\n')
    assert resolve(styled, ink=0.8).prompt == "a red fox, ink"  # joined as in training: no word twice


def test_style_may_be_just_a_lora(styled):
    """A mix carries it along."""
    write_weights(styled / "ink.safetensors", {})
    write(styled, "ink", 'lora = "ink.safetensors"\n')
    write(styled, "half", "[mix]\nink = 0.5\n")

    for name, strength in (("ink", 1.0), ("half", 0.5)):
        (style,) = resolve(styled, **{name: 1.0}).styles
        assert (style.name, style.strength, style.lora) == ("ink", strength, (styled / "ink.safetensors").resolve())


def test_only_toml_files_are_styles(styled):
    """A moodboard's palette lies beside its style, and editors leave backups there."""
    for file in ("board.png", "dusk.toml~", "dusk.toml.orig"):
        (styled / "styles" / file).touch()

    styles = Project.open(styled).styles
    assert styles.names == ("blend", "dusk", "riso") and styles.file_of("dusk") == "styles/dusk.toml"


def test_style_may_choose_its_method(styled):
    write(styled, "cut", 'method = "splice"\n[[reference]]\nimage = "refs/a/a.png"\n')

    assert [resolve(styled, **{name: 1}).styles[0].method for name in ("cut", "dusk")] == ["splice", "auto"]


def test_style_settings_reach_every_picture(styled):
    (styled / "k2.toml").write_text(
        PROJECT.replace(
            "seed = 7", 'seed = 7\nstyle_guidance = 1.5\nleak_guard = "shift"\nvision_tiles = 4\nvision_rows = false'
        )
    )

    spec = resolve(styled, dusk=1)

    assert (spec.style_guidance, spec.leak_guard, spec.vision_tiles, spec.vision_rows) == (1.5, "shift", 4, False)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ('leak_guard = "dampin"', '"leak_guard" cannot be "dampin".', 'Did you mean "damping"?'),
        ("vision_tiles = 3", '"vision_tiles" cannot be 3.', "Known: 1, 2, 4."),
        ("style_guidance = -1", '"style_guidance" must be between 0 and 100', ""),
        ("vision_rows = 1", '"vision_rows" must be true or false, not 1.', ""),
    ],
)
def test_style_settings_are_checked(styled, line, message, hint):
    (styled / "k2.toml").write_text(PROJECT.replace("seed = 7", line))

    with pytest.raises(K2Error) as error:
        resolve(styled)
    assert str(error.value).startswith("k2.toml, line 5: ") and message in str(error.value)
    assert error.value.hint == hint


def test_weight_zero_is_the_prompt_alone(styled):
    assert resolve(styled, dusk=0) == resolve(styled)


def test_negative_weight_swaps_keywords_and_avoids(styled):
    spec = resolve(styled, dusk=-1)

    assert (spec.prompt, spec.negative) == ("a red fox, glossy", "film grain, low key")


def test_style_order_never_matters(styled):
    assert resolve(styled, dusk=0.6, riso=0.3) == resolve(styled, riso=0.3, dusk=0.6)


def test_strongest_styles_words_come_first(styled):
    assert resolve(styled, dusk=0.3, riso=0.6).prompt == "a red fox, riso print, low key, film grain"


@pytest.mark.parametrize("weight", [2, -2])
def test_total_strength_is_limited_to_two(styled, weight):
    assert resolve(styled, riso=weight).styles[0].strength == weight
    write(styled, "x", "[mix]\nriso = 1.1\n")
    with pytest.raises(K2Error, match=f'The weights of style "riso" add up to {1.1 * weight:g}, beyond'):
        resolve(styled, x=weight)


def test_mix_equals_its_weighted_parts(styled):
    assert resolve(styled, blend=0.5) == resolve(styled, dusk=0.35, riso=0.15)
    assert resolve(styled, blend=1, dusk=-0.7) == resolve(styled, riso=0.3)


def test_mix_may_have_avoids_of_its_own(styled):
    write(styled, "calm", 'avoids = ["neon"]\n[mix]\nriso = 0.5\n')

    spec = resolve(styled, calm=1)

    assert (spec.prompt, spec.negative) == ("a red fox, riso print, low key", "neon")


def test_nested_mixes_are_resolved_once(styled):
    """Every level doubles the paths to the bottom, so each name must be visited only once."""
    for level in range(14):
        write(styled, f"l{level}", f"[mix]\nl{level + 1} = 0.5\nm{level + 1} = 0.5\n")
        write(styled, f"m{level}", f"[mix]\nl{level + 1} = 0.5\nm{level + 1} = 0.5\n")
    write(styled, "l14", "[mix]\ndusk = 1.0\n")
    write(styled, "m14", "[mix]\ndusk = 1.0\n")

    (style,) = resolve(styled, l0=1).styles

    assert (style.name, style.strength) == ("dusk", 1.0)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[mix]\nx = 1\n", "styles/x.toml, line 2: the mixes form a loop, x → x.", "Break the loop."),
        ("[mix]\nducks = 1\n", 'styles/x.toml, line 2: there is no style "ducks".', 'Did you mean "dusk"?'),
        ("[[mix]]\ndusk = 1\n", "line 1: expected a table in [mix].", 'Like [mix] and below it "dusk = 0.6".'),
        ("", "styles/x.toml has no keywords, no [[reference]], no lora and no [mix].", "Give it at least one"),
        ('avoids = ["neon"]\n', "no keywords, no [[reference]], no lora and no [mix].", "Give it at least one"),
        ('keyword = ["a"]\n', 'styles/x.toml, line 1: unknown key "keyword".', 'Did you mean "keywords"?'),
        ("keywords = [1]\n", '1: "keywords" must be a list of strings.', 'Like keywords = ["one", "two"].'),
        ('avoids = ["b"]\nkeywords = ["", "x"]\n', 'x.toml, line 2: "keywords" has an empty string.', "or write a"),
        ('keywords = ["x"]\navoids = [" "]\n', 'x.toml, line 2: "avoids" has an empty string.', "or write a"),
        ('keywords = "film"\n', '1: "keywords" must be a list, not "film".', ""),
        ('lora = "a.safetensors"\n', "1: there is no file a.safetensors.", "Paths are relative to the project."),
        ('lora = "../a.safetensors"\n', "1: ../a.safetensors lies outside the project.", "--allow-outside"),
        ('keywords = ["a"]\ntriggers = ["b"]\n', "2: triggers need a lora.", "Use keywords instead."),
        ('[[reference]]\nimage = "refs/z/*"\n', "2: refs/z/* matches no picture.", "Put png, jpg or webp files there."),
        ('[[reference]]\nimage = "refs/z.png"\n', "2: there is no picture refs/z.png.", "Paths are relative"),
        ('[[reference]]\nimage = "refs/a/A.PNG"\n', "no picture refs/a/A.PNG.", "Did you mean refs/a/a.png?"),
        (
            '[[reference]]\nimage = "k2.toml"\n',
            "2: k2.toml is not a readable picture.",
            "Use png, jpg or webp.",
        ),
        ('[[reference]]\nimage = "../*.png"\n', "2: ../ lies outside the project.", "--allow-outside"),
        ('[[reference]]\nimage = "/etc/passwd"\n', "2: /etc/passwd lies outside the project.", "--allow-outside"),
        ('[[reference]]\nimage = "**/**/*.png"\n', "2: **/**/*.png has more than one **.", "One covers all subfolders"),
        ('[[reference]]\nimage = "refs/a/a.png"\nweight = 9\n', '3: "weight" must be between −2 and 2, not 9.0.', ""),
        ('keywords = ["a"]\nmethod = "splice"\n', "2: a method needs a [[reference]].", "how to read reference"),
        (
            'method = "spice"\n[[reference]]\nimage = "refs/a/a.png"\n',
            '1: "method" cannot be "spice".',
            'Did you mean "splice"?',
        ),
        (
            33 * '[[reference]]\nimage = "refs/?/[ab].png"\n',
            "x.toml has 66 reference pictures; the limit is 64.",
            "best",
        ),
        ("[mix]\ndusk = 2\nblend = 2\n", 'The weights of style "dusk" add up to 3.4, beyond −2 … 2.', "Lower them."),
    ],
)
def test_errors_in_style_files_are_named(styled, text, message, hint):
    write(styled, "x", text)

    with pytest.raises(K2Error) as error:
        resolve(styled, x=1.0)

    assert str(error.value).endswith(message)
    assert hint in error.value.hint


def test_unreadable_lora_is_blamed_on_its_line(styled):
    write(styled, "x", 'keywords = ["a"]\nlora = "k2.toml"\n')

    with pytest.raises(K2Error, match=r"^styles/x\.toml, line 2: .*k2\.toml is not a safetensors file") as error:
        resolve(styled, x=1)
    assert ".safetensors and .gguf" in error.value.hint


def test_style_file_is_found_with_any_accent_form(styled, k2):
    """Some systems and archives decompose accents; the hint then named the very style that was not found."""
    apart, joined = (unicodedata.normalize(form, "Süß") for form in ("NFD", "NFC"))
    write(styled, apart, 'keywords = ["sweet"]\n')
    write(styled, "x", f'[mix]\n"{apart}" = 1\n')

    assert resolve(styled, **{joined: 0.5}).prompt == resolve(styled, **{apart: 0.5}).prompt == "a red fox, sweet"
    assert resolve(styled, x=0.5).styles[0].name == joined
    assert f"styles/{apart}.toml\twords\tsweet" in k2("style", "list").stdout
    assert "already" in k2("mix-styles", "dusk=1", "--save-as", joined, "--no-preview", code=1).stderr
    k2("mix-styles", "dusk=1", "--save-as", joined, "--no-preview", "--force")
    assert [path.name for path in (styled / "styles").glob("S*")] == [f"{apart}.toml"]


@pytest.mark.parametrize("said", ["größe/süß.png", "größe", "größe/*", "gr?ße/*.png", "größe/s[üu]ß.png"])
def test_reference_is_found_with_any_accent_form(styled, said):
    for there, asked in (("NFD", "NFC"), ("NFC", "NFD")):
        folder = styled / "refs" / unicodedata.normalize(there, "größe")
        folder.mkdir()
        shutil.copy(styled / "refs" / "a" / "a.png", folder / unicodedata.normalize(there, "süß.png"))
        write(styled, "x", f'[[reference]]\nimage = "refs/{unicodedata.normalize(asked, said)}"\n')

        (style,) = resolve(styled, x=1.0).styles

        assert [each.image for each in style.references] == list(folder.iterdir())
        shutil.rmtree(folder)


def test_unknown_style_is_blamed_on_its_line(styled):
    (styled / "k2.toml").write_text(PROJECT + "\n[style]\ndisk = 1.0\n")

    with pytest.raises(K2Error, match=r'^k2\.toml, line 15: there is no style "disk"') as error:
        resolve(styled)
    assert error.value.hint == 'Did you mean "dusk"?'


def test_cycle_over_two_files_is_found(styled):
    write(styled, "x", "[mix]\ny = 1\n")
    write(styled, "y", "[mix]\nx = 1\n")

    with pytest.raises(K2Error, match="x → y → x"):
        resolve(styled, x=1)


def test_mix_nesting_depth_is_limited(styled):
    for level in range(17):
        write(styled, f"l{level}", f"[mix]\nl{level + 1} = 1\n")
    write(styled, "l17", "[mix]\ndusk = 1\n")

    assert resolve(styled, l2=1).styles[0].name == "dusk"
    with pytest.raises(K2Error, match="mixes nest more than 16 deep"):
        resolve(styled, l0=1)


def test_link_out_of_the_project_is_outside(styled, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    (styled / "refs" / "a" / "link.png").symlink_to(tmp_path / "secret.png")

    with pytest.raises(K2Error, match=r"refs/a/link\.png lies outside the project"):
        resolve(styled, dusk=1)


def test_huge_glob_is_stopped(styled):
    for index in range(65):
        (styled / "refs" / "a" / f"{index}.png").touch()
    write(styled, "x", '[[reference]]\nimage = "**/*.png"\n')

    with pytest.raises(K2Error, match="more than 64 pictures"):
        resolve(styled, x=1)


def test_image_bomb_is_refused_undecoded(styled):
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    start = bytearray(buffer.getvalue())  # every PNG has its size at byte 16 and the checksum at 29
    start[16:24] = struct.pack(">II", 30_000, 30_000)
    start[29:33] = struct.pack(">I", zlib.crc32(start[12:29]))
    (styled / "refs" / "a" / "bomb.png").write_bytes(start)

    with pytest.raises(K2Error, match=r"far too large|has 30000 x 30000 pixels"):
        resolve(styled, dusk=1)
