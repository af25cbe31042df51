"""Cohesion: no effect at 0, more the higher it is, an unchanged lead picture, pictures that can be rerun alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import DIT, difference, pixels, tiny, tiny_box  # noqa: F401

from k2cli import workers
from model.attention import attention
from model.cohesion import (
    LEAD_GUARD,
    NOISE,
    PULL,
    SHARE,
    LeadAttention,
    is_lead,
    lead_spec,
    shared_attention,
    shared_noise,
)
from model.errors import K2Error
from model.pipeline import Pipeline
from model.spec import Leader, Reference, RenderSpec, Style
from model.spec import tie_to_lead as tie
from model.splice import Capture, guard_keys, moments, pull_statistics

FOX = RenderSpec("a red fox", seed=7, steps=3)
OWL = RenderSpec("an owl in flight over a dark forest", seed=9, steps=3)
BATCH = [FOX, replace(FOX, seed=8), OWL]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["mini's layout", "open layout"])
def pipeline(request, tiny, tmp_path) -> Pipeline:  # noqa: F811
    pipeline = Pipeline.load("tiny", device="cpu")
    if request.param == "open layout":
        pipeline.export(tmp_path / "model")
        return Pipeline.load(str(tmp_path / "model"), device="cpu")
    return pipeline


@pytest.fixture
def board(tmp_path) -> Path:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "board.png")
    return tmp_path / "board.png"


def latents(pipeline: Pipeline, specs: list[RenderSpec]) -> torch.Tensor:
    with torch.inference_mode():
        return pipeline._latents([pipeline.resolve(spec) for spec in specs], (), None)


@pytest.mark.parametrize("side", [64, 128])
def test_captured_tokens_lie_beside_the_picture_at_every_size(tiny, board, monkeypatch, side):  # noqa: F811
    pipeline, reached = Pipeline.load("tiny", device="cpu"), set()
    for module in ("cohesion", "splice"):
        monkeypatch.setattr(f"model.{module}.guard_keys", lambda *args: reached.add(args[-1]) or guard_keys(*args))
    grid = (side // 16,) * 2

    pipeline.render(tie([replace(spec, width=side, height=side) for spec in BATCH], 1.0))
    style = Style("board", 1.0, (Reference(board),), method="splice")
    pipeline.render([replace(BATCH[0], width=side, height=side, styles=(style,))])

    assert reached == {pipeline.dit.column_offset(grid)} and (side == 64) == (
        pipeline.dit.column_offset(grid) == grid[1]
    )


# ---- pictures ---------------------------------------------------------------------------------------------------


def test_zero_cohesion_is_bit_identical_to_independent(pipeline):
    free = [pixels(picture) for picture in pipeline.render(BATCH)]
    assert [pixels(picture) for picture in pipeline.render(tie(BATCH, 0.0))] == free
    leader = Leader("an owl", 1)
    assert [pixels(p) for p in pipeline.render([replace(s, leader=leader) for s in BATCH])] == free


def test_lead_picture_equals_itself_alone(pipeline):
    (alone,) = pipeline.render([FOX])
    first, *others = pipeline.render(tie(BATCH, 1.0))
    assert difference(first, alone) <= 1
    assert pixels(pipeline.render(tie([FOX], 1.0))[0]) == pixels(alone)
    assert all(pixels(tied) != pixels(free) for tied, free in zip(others, pipeline.render(BATCH[1:]), strict=True))


def test_influence_rises_from_zero_with_cohesion(pipeline):
    free = latents(pipeline, BATCH[1:])
    far = [(latents(pipeline, tie(BATCH, c)[1:]) - free).norm().item() for c in (1e-4, 0.1, 0.3, 0.6, 1.0)]
    assert far == sorted(far) and far[0] < 0.02 * far[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance": 0.0},
        {"style_guidance": 1.0},
        {"guidance": 0.0, "negative": "fog"},
        {"guidance_until": 0.5, "sampler": "ab2"},
    ],
)
@pytest.mark.parametrize("method", [None, "splice", "tokens"])
def test_tied_picture_does_not_depend_on_its_batch(pipeline, board, method, changes):
    """The lead picture as well as those that follow: alone and in any order, with any style method and guidance."""
    if method == "tokens" and pipeline.parts.style is None:
        method = None
    styles = (Style("board", 0.7, (Reference(board),), method=method),) if method else ()
    specs = tie([replace(spec, styles=styles, **changes) for spec in BATCH], 0.7)
    together = pipeline.render(specs)
    for spec, picture in zip(specs, together, strict=True):
        assert difference(pipeline.render([spec])[0], picture) <= 1
    for picture, other in zip(pipeline.render(specs[::-1])[::-1], together, strict=True):
        assert difference(picture, other) <= 1
    assert len({pixels(picture) for picture in together}) == len(specs)


def test_large_batches_are_rendered_in_chunks(pipeline, monkeypatch):
    specs = tie([replace(FOX, seed=seed) for seed in range(9)], 0.5)
    whole = pipeline.render(specs)
    monkeypatch.setattr("model.pipeline.BATCH_TOKENS", {"cpu": 48, "cuda": 48})
    assert all(difference(a, b) <= 1 for a, b in zip(pipeline.render(specs), whole, strict=True))


def test_guided_picture_follows_in_every_branch(pipeline):
    """With its own prompt as the negative one, guidance has no effect, if the lead picture's has none either."""
    batch = [replace(spec, guidance=3.0, negative=spec.prompt) for spec in BATCH]
    off = [replace(spec, guidance=0.0, negative="") for spec in BATCH]
    on = pipeline.render(tie(batch, 0.8))
    assert all(difference(a, b) <= 1 for a, b in zip(on, pipeline.render(tie(off, 0.8)), strict=True))


def test_record_says_what_was_shared_with_whom(pipeline):
    first, second, _ = (picture.record for picture in pipeline.render(tie(BATCH, 0.5)))
    assert second["cohesion"] == 0.5 and second["leader"] == {"prompt": "a red fox", "seed": 7, "negative": ""}
    assert second["shared"] == pytest.approx({"noise": NOISE / 2, "statistics": PULL / 2, "attention": SHARE / 2})
    assert first["leader"] == second["leader"] and not any(first["shared"].values())
    assert "leader" not in pipeline.render([FOX])[0].record


def test_invalid_ties_are_refused(pipeline):
    leader = Leader("an owl", 1)
    for changes, message in (
        ({"cohesion": 1.5, "leader": leader}, "A cohesion of 1.5"),
        ({"cohesion": float("nan"), "leader": leader}, "A cohesion of nan"),
        ({"cohesion": 0.5}, "none is named"),
        ({"cohesion": 0.5, "leader": replace(leader, seed=-1)}, "-1 is not a seed"),
    ):
        with pytest.raises(K2Error, match=message) as error:
            pipeline.render([replace(FOX, **changes)])
        assert error.value.hint


# ---- the mathematics --------------------------------------------------------------------------------------------


def test_lead_picture_is_recognised():
    first, second, _ = tie(BATCH, 0.5)
    assert lead_spec(FOX) is None and lead_spec(first) == lead_spec(second) == FOX
    assert is_lead(first) and not is_lead(second)
    assert lead_spec(replace(second, cohesion=0.0)) is None


def test_shared_noise_is_still_noise():
    """Of the same scale at any cohesion, channel means included; everything but those means is left alone."""
    torch.manual_seed(0)
    starts = torch.randn(3, 3200, 8, 8)
    for cohesion in (0.0, 0.3, 0.5, 1.0):
        noise = shared_noise(starts, cohesion)
        assert torch.equal(noise[0], starts[0])
        assert 0.96 < noise[1:].mean((2, 3)).std() * 8 < 1.04
        torch.testing.assert_close(noise.var((2, 3)), starts.var((2, 3)))
    torch.testing.assert_close(shared_noise(starts, 0.0), starts)
    led = shared_noise(starts, 1.0).mean((2, 3))
    torch.testing.assert_close(led, led[:1].expand_as(led))
    of_one_seed = starts[:1].repeat(3, 1, 1, 1)
    assert torch.equal(shared_noise(of_one_seed, 0.5), of_one_seed)


@pytest.fixture
def scene():
    """Streams of 5 text and 12 image tokens in two rows, and the capture of a lead picture."""
    torch.manual_seed(0)
    stream = torch.randn(2, 4, 17, 16), torch.randn(2, 2, 17, 16), torch.randn(2, 2, 17, 16)
    keys, values, queries = 1 + torch.randn(2, 2, 12, 16), 2 + torch.randn(2, 2, 12, 16), torch.randn(2, 4, 12, 16) - 1
    return stream, Capture(keys, values, *moments(queries), *moments(keys))


def test_prompt_tokens_never_see_the_lead(scene):
    stream, heard = scene
    answer = shared_attention(attention, heard, 0.7)(*stream)
    assert torch.equal(answer[:, :, :5], attention(*stream)[:, :, :5])
    assert not torch.allclose(answer[:, :, 5:], attention(*stream)[:, :, 5:])


def test_shared_attention_is_continuous_at_zero(scene):
    stream, heard = scene
    torch.testing.assert_close(
        shared_attention(attention, heard, 1e-6)(*stream), attention(*stream), rtol=1e-4, atol=1e-4
    )


def test_following_itself_changes_nothing(scene):
    """The same keys twice give the same answer, and its statistics are its own already."""
    q, k, v = (x[:, :, 5:] for x in scene[0])
    answer = shared_attention(attention, Capture(k, v, *moments(q), *moments(k)), 1.0)(q, k, v)
    torch.testing.assert_close(answer, attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_image_tokens_move_towards_the_leads_statistics(scene):
    stream, heard = scene
    asked = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        asked.append((q, k))
        return attention(q, k, v)

    shared_attention(spy, heard, 0.5)(*stream)

    q, k = (x[:, :, -12:] for x in asked[-1])
    torch.testing.assert_close(q, pull_statistics(stream[0][:, :, 5:], heard.q_mean, heard.q_var, PULL * 0.5))
    torch.testing.assert_close(k, pull_statistics(stream[1][:, :, 5:], heard.k_mean, heard.k_var, PULL * 0.5))


def test_shared_attention_follows_its_formula(scene):
    """A share of each image token's answer comes from attention to the lead picture's tokens and its own stream's."""
    (q, k, v), heard = scene
    queries = pull_statistics(q[:, :, 5:], heard.q_mean, heard.q_var, PULL / 2)
    own = torch.cat((k[:, :, :5], pull_statistics(k[:, :, 5:], heard.k_mean, heard.k_var, PULL / 2)), 2)
    keys, values = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((own, heard.k), (v, heard.v)))
    together = (queries @ keys.transpose(2, 3) / 4).softmax(-1) @ values  # 4 is √16

    answer = shared_attention(attention, heard, 0.5)(q, k, v)

    expected = attention(q, k, v)[:, :, 5:].lerp(together, SHARE / 2)
    torch.testing.assert_close(answer[:, :, 5:], expected, rtol=1e-4, atol=1e-5)


def test_lead_is_captured_in_deeper_blocks_and_guarded():
    config = replace(DIT, blocks=8)
    bond = LeadAttention(config, 0.5, [1.0, 0.6], 12, 4)
    q, k, v = (torch.randn(1, n, 17, config.head_dim) for n in (config.heads, config.kv_heads, config.kv_heads))

    attend = bond.record(None, [0], 1)

    assert attend[:2] == [None, None] and torch.equal(attend[2](q, k, v), attention(q, k, v))
    (heard,) = bond.captures[0]
    torch.testing.assert_close(heard.k, guard_keys(k[0, :, 5:], config, LEAD_GUARD, 0.6, 4))
    torch.testing.assert_close(heard.k_mean, k[0, :, 5:].mean(1, keepdim=True))

    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2 * attention(q, k, v)

    within = bond.record([None, twice] * 4, [0], 1)  # as with a splice, around which ties are put
    assert within[:2] == [None, twice]
    for block, times in ((2, 1), (3, 2)):
        assert torch.equal(within[block](q, k, v), times * attention(q, k, v))


# ---- the command line -------------------------------------------------------------------------------------------

PROJECT = """\
[render]
model = "tiny"
steps = 2
batch = 2
cohesion = 0.5

[[prompt]]
name = "fox"
text = "a red fox"

[[prompt]]
name = "owl"
text = "an owl"
avoid = "fog"
"""


@pytest.fixture
def den(tiny, tmp_path, monkeypatch) -> Path:  # noqa: F811
    workers.load_pipeline.cache_clear()
    (folder := tmp_path / "den").mkdir()
    (folder / "k2.toml").write_text(PROJECT)
    monkeypatch.chdir(folder)
    yield folder
    workers.load_pipeline.cache_clear()


def test_tied_pictures_rerun_one_by_one(den, k2):
    paths = k2("render", "--quiet").stdout.split()
    assert len(paths) == 4
    for path in paths:
        assert "cohesion 0.5, follows seed 0 of:" in " ".join(k2("show", path).stdout.split())
        k2("rerun", path, "--quiet")


def test_scope_is_the_prompt_or_the_run(den, k2):
    import json

    def led(*options: str) -> list[tuple[str, int, str]]:
        lines = k2("render", "--dry-run", "--json", *options).stdout.splitlines()
        return [tuple((json.loads(line)["leader"] or {}).values()) for line in lines]

    fox, owl = ("a red fox", 0, ""), ("an owl", 0, "fog")
    assert led() == [fox, fox, owl, owl]
    assert led("--scope", "run", "--cohesion", "0.2") == [fox] * 4
    assert led("--cohesion", "0") == [()] * 4
    assert led("--scope", "run", "--only", "fox") == [fox] * 2
    assert led("--scope", "run", "--only", "owl") == [fox] * 2  # as when rendering all
    assert led("--scope", "run", "--only", "o*") == [fox] * 2
    assert led("--scope", "run", "--only", "owl", "--seed", "9") == [fox] * 2  # another owl to go with the others
    assert led("--scope", "run", "--only", "fox", "--seed", "9") == [fox] * 2
    assert led("--scope", "run", "--seed", "9") == [("a red fox", 9, "")] * 4
    assert led("--scope", "run", "-p", "a hen") == [("a hen", 0, "")] * 2
    for options, message in (
        (("--cohesion", "2"), "--cohesion must be between 0 and 1, not 2.0."),
        (("--scope", "all"), '--scope cannot be "all".'),
    ):
        assert message in " ".join(k2("render", *options, code=2).stderr.split())


def test_unnamed_prompts_and_choices_follow_the_first_picture(den, k2):
    import json

    text = (den / "k2.toml").read_text()
    (den / "k2.toml").write_text(text + '\n[[prompt]]\ntext = "a hen"\n\n[[prompt]]\ntext = "a {red|blue} car"\n')
    for name in ("a-hen", "a-blue-car"):
        lines = k2("render", "--scope", "run", "--only", name, "--batch", "1", "--dry-run", "--json").stdout
        assert json.loads(lines)["leader"]["prompt"] == "a red fox"


def test_stream_lines_are_not_project_prompts(den, k2):
    """JSON or not, and in a project without prompts too."""
    import json

    lines = 'a cat\n{"prompt": "a cat"}\n'

    def led() -> list[str]:
        told = k2("render", "--stream", "--scope", "run", "--dry-run", "--json", "--batch", "1", input=lines).stdout
        return [json.loads(line)["leader"]["prompt"] for line in told.splitlines()]

    assert led() == ["a cat", "a cat"]
    (den / "k2.toml").write_text('[render]\nmodel = "tiny"\ncohesion = 0.5\n')
    assert led() == ["a cat", "a cat"]


def test_matrix_pictures_follow_the_first_of_the_whole_matrix(den, k2):
    import json

    text = (den / "k2.toml").read_text()
    (den / "k2.toml").write_text(text + "\n[[matrix]]\nseed = [4, 5]\n")

    def led(*options: str) -> set[tuple[str, int]]:
        lines = k2("render", "--scope", "run", "--dry-run", "--json", *options).stdout.splitlines()
        return {(leader["prompt"], leader["seed"]) for line in lines if (leader := json.loads(line)["leader"])}

    assert led() == led("--only", "owl") == {("a red fox", 4)}


def test_first_matrix_provides_the_lead(den, k2):
    import json

    text = (den / "k2.toml").read_text()
    two = '\n[[matrix]]\nprompt = ["owl"]\nseed = [1, 2]\n\n[[matrix]]\nprompt = ["fox"]\nseed = [3, 4]\n'
    (den / "k2.toml").write_text(text + two)

    def led(*options: str) -> set[tuple[str, int]]:
        lines = k2("render", "--scope", "run", "--dry-run", "--json", *options).stdout.splitlines()
        return {(leader["prompt"], leader["seed"]) for line in lines if (leader := json.loads(line)["leader"])}

    assert led() == led("--only", "fox") == led("--only", "owl") == {("an owl", 1)}


def test_matrix_may_name_a_prompt_by_its_derived_name(den, k2):
    import json

    head = PROJECT.partition("[[prompt]]")[0] + 'scope = "run"\n'
    matrix = '[[matrix]]\nprompt = ["a-red-fox-2"]\nseed = [5, 6]\n'
    (den / "k2.toml").write_text(head + 3 * '[[prompt]]\ntext = "a red fox"\n' + matrix)

    lines = k2("render", "--only", "a-red-fox-2", "--dry-run", "--json").stdout.splitlines()

    assert [json.loads(line)["leader"]["seed"] for line in lines] == [5, 5]


def test_single_expansion_is_compared_and_led_as_in_the_full_run(den, k2):
    import json

    head = PROJECT.partition("[[prompt]]")[0] + 'scope = "run"\n'
    prompts = ('name = "a"\ntext = "a {red|green} fox"', 'name = "b"\ntext = "an owl"')
    two = '\n[[matrix]]\nprompt = ["b"]\nseed = [1, 2]\n\n[[matrix]]\nprompt = ["a"]\nseed = [3, 4]\n'
    (den / "k2.toml").write_text(head + "".join(f"\n[[prompt]]\n{each}\n" for each in prompts) + two)

    def made(*options: str) -> dict[str, tuple[str, int]]:
        lines = k2("render", "--dry-run", "--json", *options).stdout.splitlines()
        return {told["file"]: tuple(told["leader"].values())[:2] for told in map(json.loads, lines)}

    every = made()
    assert set(every.values()) == {("an owl", 1)} and len(every) == 6
    for name in ("a-green", "a-red"):
        ours = made("--only", name)
        assert len(ours) == 2 and all(name in file for file in ours) and ours.items() <= every.items()


def test_selected_prompts_equal_those_of_the_full_run(den, k2):
    def pixels(*options: str) -> dict[str, bytes]:
        paths = map(Path, k2("render", "--scope", "run", "--batch", "1", "--quiet", *options).stdout.split())
        return {path.name: Image.open(path).tobytes() for path in paths}

    every, owl = pixels(), pixels("--only", "owl")
    assert owl == {"owl-0.png": every["owl-0.png"]}


def test_ineffective_cohesion_options_warn(den, k2):
    def told(*options: str) -> str:
        return k2("render", "--dry-run", *options).stderr

    alone = "Every picture is its own lead picture, so cohesion has no effect."
    assert alone in told("--cohesion", "0.5", "--batch", "1")
    for options in (["--batch", "1"], ["--cohesion", "0.5"], ["--cohesion", "0", "--batch", "1"]):
        assert alone not in told(*options)
    assert alone not in told("--cohesion", "0.5", "--batch", "1", "--scope", "run")
    untied = "Cohesion is 0, so scope has no effect."
    assert untied in told("--scope", "run", "--cohesion", "0") and untied not in told("--scope", "run")
    wordless = "No style has reference pictures, so style_guidance has no effect."
    assert wordless in told("--style-guidance", "2") and wordless not in told()
    made = k2("render", "--only", "fox", "--batch", "1", "--quiet").stdout.strip()
    assert wordless not in told("--like", made)


def test_tied_run_resumes_as_planned(den, k2):
    whole = k2("render", "--quiet").stdout.split()
    before = [Image.open(path).tobytes() for path in whole]
    for path in map(Path, whole[1:]):
        path.unlink()
        path.with_suffix(".toml").unlink()
    k2("render", "--resume", "--quiet")
    after = [Image.open(path).tobytes() for path in whole]
    assert all(max(abs(a - b) for a, b in zip(x, y, strict=True)) <= 1 for x, y in zip(before, after, strict=True))


def test_missing_lead_of_a_random_seed_warns(den, k2):
    def told(*options: str) -> str:
        return " ".join(k2("render", "--scope", "run", "--dry-run", *options).stderr.split())

    strange = "these pictures match no earlier ones. To match one: --like PICTURE"
    owl = k2("render", "--only", "owl", "--batch", "1", "--quiet").stdout.strip()
    for options in (["--only", "owl"], ["--only", "owl", "--seed", "random"]):
        assert strange not in told(*options)  # the project's own seed leads
    (den / "k2.toml").write_text((den / "k2.toml").read_text().replace("[render]", '[render]\nseed = "random"'))

    assert strange in told("--only", "owl")
    for options in ([], ["--only", "fox"], ["--only", "owl", "--cohesion", "0"], ["--only", "owl", "--like", owl]):
        assert strange not in told(*options)
    assert strange not in told("--only", "owl", "--seed", "9")
