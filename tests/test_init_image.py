"""Pictures that start from a picture: how much of it stays, where it comes from, and what is reported about it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny, tiny_box  # noqa: F401

from k2cli import models, origins, records, runs
from k2cli.cluster import relocate
from k2cli.multi_project import resume_commands
from k2cli.outputs import Run
from k2cli.project import Project
from k2cli.watch import plan_missing
from model.errors import K2Error
from model.hashes import sha256, spec_files
from model.latents import draw_noise, patchify, unpatchify
from model.pipeline import Pipeline, to_image
from model.references import feather, to_mask, to_pixels
from model.sampler import apply_guidance, shifted_sigmas
from model.spec import DENOISE, DENOISE_MASKED, Picture, RenderSpec, tie_to_lead
from model.train.rollout import conditioned_velocity

FOX = RenderSpec("a red fox", seed=7, steps=8)


@pytest.fixture
def pipeline(tiny):  # noqa: F811
    return Pipeline.load("tiny", device="cpu")


@pytest.fixture
def sketch(tmp_path) -> Path:
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


def made(pipeline: Pipeline, *specs: RenderSpec) -> list[str]:
    return [picture.record["pixels"] for picture in pipeline.render(specs)]


def as_array(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image, int)


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("denoise", "taken"), [(0.5, 4), (0.3, 2), (0.01, 1), (0.99, 8)])
def test_denoise_takes_the_last_steps_from_the_noised_image(pipeline, sketch, denoise, taken):
    """Against diffusers' own scheduler, which noises and steps by itself; to the nearest whole step, and at least one.

    The end of guidance is counted over the steps that are taken.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    spec = replace(FOX, init_image=sketch, denoise=denoise, guidance=3.0, guidance_until=0.5)
    (picture,) = pipeline.render([spec])

    settled, config = pipeline.resolve(spec), pipeline.dit.config
    cells = settled.width // pipeline.vae.factor
    grid = (cells // config.patch, cells // config.patch)
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(sigmas=shifted_sigmas(8, settled.mu)[:-1])
    theirs.set_begin_index(8 - taken)
    with torch.inference_mode():
        latents = pipeline.vae.encode(to_pixels(sketch, settled.width, settled.height))
        fresh = draw_noise(FOX.seed, config.channels, cells, cells)
        begun = theirs.scale_noise(latents, theirs.timesteps[8 - taken : 9 - taken], fresh)
        tokens = patchify(begun, config.patch)
        said, unsaid = (
            conditioned_velocity(pipeline.dit, pipeline.text.encode([text])[0], None, grid) for text in (FOX.prompt, "")
        )
        for step, time in enumerate(theirs.timesteps[8 - taken :]):
            level = time[None] / 1000
            v = said(tokens, level)
            v = apply_guidance(v, unsaid(tokens, level), 3.0) if 2 * step < taken else v
            tokens = theirs.step(v, time, tokens).prev_sample
        expected = to_image(pipeline.vae.decode(unpatchify(tokens, config.patch, cells, cells))[0])
    assert np.abs(np.asarray(expected, int) - as_array(picture)).max() <= 1


def test_denoise_1_equals_no_init_image(pipeline, sketch):
    """Bit for bit; less gives another picture."""
    whole, less = replace(FOX, init_image=sketch, denoise=1.0), replace(FOX, init_image=sketch, denoise=0.9)
    assert made(pipeline, whole) == made(pipeline, FOX) != made(pipeline, less)


@pytest.mark.parametrize("sampler", ["euler", "ab2"])
def test_batches_share_denoise_and_pictures_are_independent(pipeline, sketch, tmp_path, sampler):
    """Two init images share a batch, another denoise has its own; all are independent. A changed file is read again."""
    other = tmp_path / "other.png"
    Image.new("RGB", (50, 50), "teal").save(other)
    spec = replace(FOX, sampler=sampler)
    specs = [
        replace(spec, init_image=sketch, denoise=0.5),
        replace(spec, init_image=other, denoise=0.5),
        replace(spec, init_image=other, denoise=0.75),
        spec,
    ]
    assert pipeline.batches(specs) == [2, 1, 1]
    together = [as_array(each) for each in pipeline.render(specs)]
    alone = [as_array(pipeline.render([each])[0]) for each in specs]
    assert max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True)) <= 1
    assert all(np.abs(a - b).max() > 1 for a, b in pairwise(alone))
    sketch.write_bytes(other.read_bytes())
    assert made(pipeline, specs[0]) == made(pipeline, specs[1])


def test_one_init_image_serves_several_sizes(pipeline, sketch):
    cell = pipeline.vae.factor
    for width, height in ((64, 64), (64, 96), (96, 64)):
        assert pipeline.init_images.latents(sketch, width, height).shape[2:] == (height // cell, width // cell)


def test_lead_picture_is_what_it_would_be_alone(pipeline, sketch):
    """And the lead picture that the others follow starts from the init image, as they do."""
    spec = replace(FOX, init_image=sketch, denoise=0.6)
    alone = [as_array(pipeline.render([each])[0]) for each in (spec, replace(spec, seed=8))]
    first, second = (as_array(each) for each in pipeline.render(tie_to_lead([spec, replace(spec, seed=8)], 1.0)))
    assert np.abs(first - alone[0]).max() <= 1 < np.abs(second - alone[1]).max()


def test_progress_counts_only_the_steps_taken(pipeline, sketch):
    told = []
    pipeline.render(
        [replace(FOX, init_image=sketch, denoise=0.5)], on_step=lambda done, steps: told.append((done, steps))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_record_holds_init_image_and_hash(pipeline, sketch):
    (picture,) = pipeline.render([replace(FOX, init_image=sketch)])
    assert picture.record["init_image"] == {"image": str(sketch), "sha256": sha256(sketch)}
    assert picture.record["denoise"] == DENOISE
    assert not {"init_image", "denoise"} & set(pipeline.render([FOX])[0].record)


def test_invalid_init_images_are_refused(pipeline, sketch, tmp_path):
    for denoise in (0.0, 0.009, -0.5, 1.01, float("nan")):
        with pytest.raises(K2Error, match="is out of range"):
            pipeline.resolve(replace(FOX, init_image=sketch, denoise=denoise))
    with pytest.raises(K2Error, match="no picture to denoise"):
        pipeline.resolve(replace(FOX, denoise=0.5))
    (tmp_path / "broken.png").write_bytes(sketch.read_bytes()[:100])
    with pytest.raises(K2Error, match=r"broken\.png cannot be read"):
        pipeline.render([replace(FOX, init_image=tmp_path / "broken.png")])


@pytest.fixture
def noisy(pipeline, tmp_path) -> Path:
    """A picture of the model's own size in which every pixel differs."""
    side = pipeline.native
    Image.effect_noise((side, side), 90).convert("RGB").save(tmp_path / "noisy.png")
    return tmp_path / "noisy.png"


def masked(path: Path, box: tuple[int, int, int, int], size: tuple[int, int]) -> Path:
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)
    return path


@pytest.mark.parametrize("denoise", [None, 0.5])
@pytest.mark.parametrize("sampler", ["euler", "ab2"])
def test_pixels_outside_the_mask_stay(pipeline, noisy, denoise, sampler):
    """Inside it, all pixels but a blended margin change, and another seed gives another result."""
    side = pipeline.native
    spec = replace(
        FOX, init_image=noisy, mask=f"{side // 2}x{side // 4}+8+{side // 4}", denoise=denoise, sampler=sampler
    )
    before = np.asarray(Image.open(noisy), int)
    first, other = (as_array(pipeline.render([each])[0]) for each in (spec, replace(spec, seed=8)))
    inside = np.zeros((side, side), bool)
    inside[side // 4 : side // 2, 8 : 8 + side // 2] = True
    changed = (first != before).any(-1)
    assert not changed[~inside].any() and changed[inside].mean() > 0.9
    assert (first != other)[inside].any() and pipeline.resolve(spec).denoise == (denoise or 1.0)


def test_pixels_outside_the_mask_stay_in_bf16(tiny, noisy):  # noqa: F811
    half = Pipeline.load("tiny", device="cpu", dtype="bfloat16")
    (picture,) = half.render([replace(FOX, init_image=noisy, mask=f"{half.native // 2}x{half.native}+0+0")])
    changed = (as_array(picture) != np.asarray(Image.open(noisy), int)).any(-1)
    assert not changed[:, half.native // 2 :].any() and changed[:, : half.native // 2].mean() > 0.8


def test_kept_tokens_follow_the_straight_path(pipeline, noisy, monkeypatch):
    """The network sees both at one noise level: the kept tokens lie on the straight line from picture to noise."""
    side, cell = pipeline.native, pipeline.vae.factor * pipeline.dit.config.patch
    spec = replace(FOX, init_image=noisy, mask=f"{cell}x{cell}+0+0")
    seen = []
    velocity = pipeline.dit.velocity

    def watched(tokens, *args, **more):
        seen.append(tokens[:1])
        return velocity(tokens, *args, **more)

    monkeypatch.setattr(pipeline.dit, "velocity", watched)
    monkeypatch.setattr(Pipeline, "_one_stream_tokens", property(lambda self: 0))
    pipeline.render([spec])
    config, cells = pipeline.dit.config, side // pipeline.vae.factor
    image = patchify(pipeline.init_images.latents(noisy, side, side), config.patch)
    fresh = patchify(draw_noise(FOX.seed, config.channels, cells, cells), config.patch)
    sigmas = shifted_sigmas(8, pipeline.resolve(spec).mu)
    for tokens, sigma in zip(seen[:: len(seen) // 8], sigmas[:-1], strict=True):
        torch.testing.assert_close(tokens[:, 1:], ((1 - sigma) * image + sigma * fresh)[:, 1:], rtol=1e-4, atol=1e-4)
        assert sigma == 1 or not torch.allclose(tokens[:, 0], ((1 - sigma) * image + sigma * fresh)[:, 0], atol=1e-2)


def test_mask_picture_equals_its_region(pipeline, noisy, tmp_path):
    """White is repainted and black stays, as with a region of the same pixels; each picture of a batch has its own."""
    side = pipeline.native
    box = (side // 4, 0, side // 2, side // 2)
    region = replace(FOX, init_image=noisy, mask=f"{side // 4}x{side // 2}+{side // 4}+0")
    drawn = replace(region, mask=masked(tmp_path / "mask.png", box, (side, side)))
    other = replace(region, mask=f"{side // 4}x{side // 4}+0+0")
    assert made(pipeline, region) == made(pipeline, drawn) != made(pipeline, other)
    assert pipeline.batches([region, drawn, other]) == [3]
    together = [as_array(each) for each in pipeline.render([region, drawn, other])]
    alone = [as_array(pipeline.render([each])[0]) for each in (region, drawn, other)]
    assert max(np.abs(a - b).max() for a, b in zip(together, alone, strict=True)) <= 1
    record = pipeline.render([drawn])[0].record
    assert record["mask"] == {"image": str(drawn.mask), "sha256": sha256(drawn.mask)}
    assert pipeline.render([region])[0].record["mask"] == {"region": region.mask}


def test_mask_of_other_proportions_is_refused_first(pipeline, noisy, tmp_path):
    side = pipeline.native
    wide = masked(tmp_path / "wide.png", (0, 0, side, side // 2), (2 * side, side))
    specs = [FOX, replace(FOX, init_image=noisy, mask=wide)]
    with pytest.raises(K2Error, match=r"wide.png does not have the proportions of .*noisy"):
        next(pipeline.stream(specs))
    larger = masked(tmp_path / "larger.png", (0, 0, side, side), (2 * side, 2 * side))
    assert pipeline.render([replace(FOX, init_image=noisy, mask=larger)])


def test_transparent_mask_areas_are_kept(tmp_path):
    """Painted white on a separate layer, as drawing programs export it."""
    layer = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    layer.paste("white", (8, 0, 16, 32))
    layer.save(tmp_path / "layer.png")
    assert torch.equal(to_mask(tmp_path / "layer.png", 32, 32), to_mask("8x32+8+0", 32, 32))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("96x64", "is not a region"),
        ("8x8+0", "is not a region"),
        ("0x8+0+0", "is empty"),
        ("8x9999+0+0", "extends beyond the picture"),
    ],
)
def test_empty_masks_are_refused(pipeline, noisy, mask, message):
    with pytest.raises(K2Error, match=message):
        pipeline.resolve(replace(FOX, init_image=noisy, mask=mask))
    with pytest.raises(K2Error, match="no picture to mask"):
        pipeline.resolve(replace(FOX, mask="8x8+0+0"))


def test_region_may_touch_every_edge(pipeline, noisy):
    whole = replace(FOX, init_image=noisy, width=96, height=64, mask="96x64+0+0")
    assert pipeline.resolve(whole).mask == whole.mask
    for beyond in ("8x8+89+0", "8x8+0+57"):
        with pytest.raises(K2Error, match="extends beyond the picture"):
            pipeline.resolve(replace(whole, mask=beyond))


def test_mask_edge_is_half_a_latent_cell_wide(pipeline, noisy):
    """So far, inside the mask, the init image and what is painted blend into each other."""
    side, half = pipeline.native, pipeline.init_images.vae.factor // 2
    spec = pipeline.resolve(replace(FOX, init_image=noisy, mask=f"{side // 2}x{side}+0+0"))

    found = pipeline.init_images.kept_pixels(spec).composite(torch.full((3, side, side), 3.0))  # not a picture's value

    soft = side // 2 - half
    assert (found[..., :soft] == 3).all() and (found[..., soft] < 3).all()


def test_partly_masked_cell_is_repainted_in_part(pipeline, noisy):
    side, cell, config = pipeline.native, pipeline.vae.factor, pipeline.dit.config
    spec = pipeline.resolve(replace(FOX, init_image=noisy, mask=f"{cell + cell // 2}x{side}+0+0"))
    cells = side // cell

    way = pipeline.init_images.trajectory(
        [spec], patchify(draw_noise(7, config.channels, cells, cells), config.patch), 1.0
    )

    assert unpatchify(way.repaint, config.patch, cells, cells)[0, 0, 0, :3].tolist() == [1.0, 0.5, 0.0]


def test_files_may_change_once_rendering_has_started(pipeline, noisy, tmp_path):
    """What stays is what was there at the start, as the record's hash says."""
    part = Image.new("L", Image.open(noisy).size)
    part.paste(255, (0, 0, part.width // 2, part.height))
    part.save(tmp_path / "part.png")
    spec = replace(FOX, init_image=noisy, mask=tmp_path / "part.png")
    (before,) = pipeline.render([spec])

    def gone(done: int, of: int) -> None:
        for path in (noisy, tmp_path / "part.png"):
            path.unlink(missing_ok=True)

    (after,) = pipeline.render([spec], on_step=gone)
    assert after.image.tobytes() == before.image.tobytes()


def test_feathering_stays_inside_the_mask():
    mask = to_mask("20x40+0+0", 40, 40)
    soft = feather(mask, 4)
    assert (soft[..., 20:] == 0).all() and (soft[..., :16] == 1).all()
    ramp = soft[0, 0, 5, 15:21]
    assert (ramp.diff() <= 0).all() and 0 < ramp[3] < 1


def test_light_greys_blend_kept_and_repainted_areas():
    soft = [feather(torch.full((1, 1, 16, 16), grey), 4).unique().tolist() for grey in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert soft == [[0.0], [0.0], [0.0], [0.5], [1.0]]
    white = torch.ones(1, 1, 16, 16)
    white[..., 8, 8] = 0.5
    assert feather(white, 4)[0, 0, 8, 8] == 0


# ---- projects -------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(moody):
    """A project whose fox starts from a wide picture inside the project."""
    (moody / "refs").mkdir()
    Image.new("RGB", (300, 200), "orange").save(moody / "refs" / "wide.png")
    text = (moody / "k2.toml").read_text()
    (moody / "k2.toml").write_text(text.replace('name = "fox"', 'name = "fox"\ninit_image = "refs/wide.png"', 1))
    return moody


def plan(k2, *options: object) -> list[dict]:
    return [json.loads(line) for line in k2("render", "--dry-run", "--json", *options).stdout.splitlines()]


def test_prompt_uses_its_own_init_image_and_shape(begun, k2):
    fox = plan(k2, "--only", "fox")[0]
    assert fox["init_image"] == {"image": "refs/wide.png", "sha256": sha256(begun / "refs" / "wide.png")}
    assert (fox["settings"]["width"], fox["settings"]["height"]) == (160, 112)
    assert fox["settings"]["denoise"] == DENOISE
    assert plan(k2, "--only", "an-owl-at-night")[0]["init_image"] is None
    assert [each["settings"]["width"] for each in plan(k2, "--only", "fox", "--size", "256x256")][:1] == [256]
    shares = plan(k2, "--only", "fox", "--matrix", "denoise=0.25,0.5")
    assert [each["settings"]["denoise"] for each in shares] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("sides", "rendered"),
    [
        ((160, 96), (160, 96)),  # supported as they are
        ((160, 100), (160, 96)),  # not multiples of a token's side
        ((480, 320), (160, 112)),  # larger than supported
        ((64, 64), (128, 128)),  # smaller
        ((3000, 100), (256, 64)),
    ],
)
def test_init_image_size_is_kept_if_the_model_supports_it(begun, k2, monkeypatch, sides, rendered):
    monkeypatch.setattr(models, "grid", lambda *_: models.Grid(128, 16, (120 * 120, 160 * 160)))
    Image.new("RGB", sides).save(begun / "refs" / "wide.png")
    fox = plan(k2, "--only", "fox")[0]["settings"]
    assert (fox["width"], fox["height"]) == rendered
    said = plan(k2, "--only", "fox", "--aspect", "1:1")[0]["settings"]
    assert (said["width"], said["height"]) == (128, 128)


def test_exif_orientation_is_applied(begun, k2):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(begun / "refs" / "wide.png", exif=exif)
    fox = plan(k2, "--only", "fox")[0]
    assert (fox["settings"]["width"], fox["settings"]["height"]) == (112, 160)


def test_option_paths_are_relative_to_the_current_folder(begun, k2, monkeypatch, tmp_path):
    """They may lead anywhere: whoever types a path may use it. Records that leave the project need permission."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (64, 64), "navy").save(elsewhere / "dot.png")
    monkeypatch.chdir(elsewhere)
    options = ("--project", begun, "-p", "tea", "--batch", "1", "--init-image", "dot.png", "--denoise", "0.5")
    assert plan(k2, *options)[0]["init_image"]["sha256"] == sha256(elsewhere / "dot.png")
    (made,) = k2("render", *options).stdout.splitlines()
    assert "denoise     0.5\n" in k2("show", made).stdout
    for words in (("rerun", made), ("render", "--project", begun, "--like", made, "--batch", "1")):
        refused = k2(*words, code=1)
        assert "dot.png lies outside the project.\nHint:  Allow it: --allow-outside\n" in refused.stderr
        assert k2(*words, "--allow-outside").stdout
    Image.new("RGB", (64, 64), "red").save(elsewhere / "dot.png")
    assert "has changed since" in k2("rerun", made, "--allow-outside", code=1).stderr
    (elsewhere / "dot.png").unlink()
    assert f"Error: {elsewhere / 'dot.png'} is gone" in k2("rerun", made, "--allow-outside", code=1).stderr


@pytest.mark.parametrize("what", ["init_image", "reference", "model"])
def test_printed_command_resumes_a_run_with_outside_files(begun, k2, fake, tmp_path, what):
    """The run's plan names the files themselves: copies of them would be other files."""
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "dot.png")
    options: tuple[str, ...] = ("--init-image", str(tmp_path / "dot.png"))
    if what == "model":
        options = ("--model", str(shutil.copy(tmp_path / "box/mini-raw.safetensors", tmp_path / "far.safetensors")))
    elif what == "reference":
        (begun / "styles").mkdir()
        (begun / "styles" / "far.toml").write_text('[[reference]]\nimage = "../dot.png"\n')
        options = ("--style", "far=1", "--allow-outside")

    def interrupt(at: int) -> None:
        raise KeyboardInterrupt

    fake.stop = staticmethod(interrupt)
    line = "k2 render --resume --allow-outside"
    assert line in k2("render", "--only", "fox", *options, code=130).stderr
    fake.stop = staticmethod(lambda at: None)
    assert "  k2 render --resume  " in k2().stdout  # no project is allowed outside files unasked
    assert k2("log").stderr == "No pictures yet. Make some: k2 render --resume\n"
    assert "Hint:  Allow it: --allow-outside\n" in k2("render", "--resume", code=1).stderr
    assert k2("render", "--resume", "--allow-outside").stdout


@pytest.mark.parametrize("said", ["../dot.png", "refs/link.png", "refs/loop.png"])
def test_outside_files_are_recorded_by_real_path(begun, k2, said):
    """However they are given, so that a rerun and the resume command ask for what they need."""
    Image.new("RGB", (64, 64), "navy").save(begun.parent / "dot.png")
    (begun / "refs" / "link.png").symlink_to(begun.parent / "dot.png")
    (begun / "refs" / "loop.png").symlink_to("loop.png")
    options = ("--only", "fox", "--batch", "1", "--init-image", said)
    if "loop" in said:
        assert "there is no refs/loop.png" in k2("render", *options, code=2).stderr
        return
    (made,) = k2("render", *options).stdout.split()
    assert records.read(Path(made)).table["init_image"]["image"] == "../dot.png"
    assert "Identical" in k2("rerun", made, "--allow-outside").stderr
    job = runs.resume(Project.open(begun, allow_outside=True), 1)
    asked = replace(job, project=Project.open(begun), run=Run(Path(made).parent))
    assert resume_commands([asked]) == "k2 render --resume --run 1 --allow-outside"


def test_project_may_be_a_link(begun, k2, tmp_path, monkeypatch):
    """Files are named relative to the link's target: ".." goes up from there."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link").symlink_to(begun)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "dot.png")
    for picture in (tmp_path / "dot.png", begun / "refs" / "wide.png"):
        options = ("--project", "deep/link", "--only", "fox", "--batch", "1", "--init-image", picture)
        (made,) = k2("render", *options).stdout.split()
        assert "Identical" in k2("rerun", made, "--project", "deep/link", "--allow-outside").stderr


def test_run_with_outside_init_images_gets_its_sheet(begun, k2, tmp_path):
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "dot.png")
    made = k2("render", "--only", "fox", "--batch", "2", "--init-image", tmp_path / "dot.png").stdout.split()
    assert len(made) == 2 and Path(made[0]).with_name("sheet.png").is_file()


@pytest.mark.parametrize("option", ["--init-image", "--mask"])
def test_truncated_init_image_is_refused_first(begun, k2, tmp_path, option):
    Image.effect_noise((300, 200), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    refused = k2("render", "--only", "fox", option, tmp_path / "cut.png", code=2)
    assert f"Error: {option}: " in refused.stderr and "is not a readable picture" in refused.stderr
    assert not (begun / "outputs").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("../secret.png", "lies outside the project"),
        ("refs/none.png", "there is no picture refs/none.png"),
        ("refs/Wide.png", "there is no picture refs/Wide.png.\nHint:  Did you mean refs/wide.png?"),
        ("k2.toml", "k2.toml is not a readable picture"),
    ],
)
def test_invalid_project_init_image_is_blamed_on_its_line(begun, k2, said, message):
    (begun / "k2.toml").write_text((begun / "k2.toml").read_text().replace("refs/wide.png", said))
    refused = k2("render", "--only", "fox", code=1)
    assert re.match(r"Error: k2.toml, line \d+: ", refused.stderr) and message in refused.stderr
    assert not list((begun / "outputs").glob("*"))


def test_mask_is_recorded_and_found_again(begun, k2):
    (region,) = k2("render", "--only", "fox", "--batch", "1", "--mask", "40x30+8+16").stdout.splitlines()
    assert "40x30+8+16" in k2("show", region).stdout
    masked(begun / "refs" / "mask.png", (0, 0, 50, 50), (150, 100))  # half the size, the same proportions
    (drawn,) = k2("render", "--only", "fox", "--batch", "1", "--mask", "refs/mask.png").stdout.splitlines()
    first, second = (json.loads(line) for line in k2("log", "--json").stdout.splitlines())
    assert first["mask"] == {"region": "40x30+8+16"}
    assert second["mask"] == {"image": "refs/mask.png", "sha256": sha256(begun / "refs" / "mask.png")}
    for made in (region, drawn):
        assert "Identical" in k2("rerun", made).stderr
        assert plan(k2, "--like", made, "--batch", "1")[0]["mask"] == (first if made == region else second)["mask"]
    assert plan(k2, "--only", "fox", "--mask", "8x8+0+0")[0]["settings"]["denoise"] == DENOISE_MASKED
    masked(begun / "refs" / "mask.png", (0, 0, 60, 50), (150, 100))
    assert "has changed since" in k2("rerun", drawn, code=1).stderr


@pytest.mark.parametrize("said", ["", 'image = ""', 'region = ""', 'region = "8x8+0+0"\nimage = "refs/wide.png"'])
def test_record_with_an_invalid_mask_is_refused(begun, k2, said):
    """And not read as if the whole picture had been repainted."""
    (made,) = k2("render", "--only", "fox", "--batch", "1", "--mask", "40x30+8+16", "--no-embed").stdout.split()
    record = Path(made).with_suffix(".toml")
    record.write_text(record.read_text().replace('region = "40x30+8+16"', said))
    for command in (("show", made), ("rerun", made), ("render", "--like", made)):
        assert "expected a region or an image" in k2(*command, code=1).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "an-owl-at-night", "--mask", "8x8+0+0"), "no init_image to mask"),
        (
            ("--only", "fox", "--mask", "161x8+0+0"),
            "--mask: the region 161x8+0+0 extends beyond the picture, which is 160x112",
        ),
        (("--only", "fox", "--mask", "8x0+0+0"), "--mask: the region 8x0+0+0 is empty"),
        (("--only", "fox", "--mask", "96x64"), '"96x64" is not a region'),
        (("--only", "fox", "--mask", "refs/none.png"), "there is no refs/none.png"),
        (("--only", "fox", "--mask", ""), "--mask names no picture"),
        (("--only", "fox", "--mask", "none", "--init-image", ""), "--init-image is empty"),
        (("--only", "fox", "--mask", "refs/dark.png"), "nothing in refs/dark.png is white"),
        (("--only", "fox", "--mask", "refs/green.png"), "nothing in refs/green.png is white"),
        (("--only", "fox", "--mask", "refs/square.png"), "does not have the proportions of its init_image"),
    ],
)
def test_unusable_masks_are_usage_errors(begun, k2, options, message):
    masked(begun / "refs" / "square.png", (0, 0, 50, 50), (100, 100))
    masked(begun / "refs" / "dark.png", (0, 0, 0, 0), (300, 200))
    Image.new("RGB", (300, 200), "lime").save(begun / "refs" / "green.png")  # one of three channels: a third of white
    assert message in k2("render", *options, code=2).stderr
    assert not (begun / "outputs").exists()


def test_none_unsets_an_init_image(begun, k2):
    """And whatever belongs to the picture goes with it; settings given without any picture still warn of no effect."""
    text = (begun / "k2.toml").read_text().replace('name = "fox"\n', 'name = "fox"\ndenoise = 0.3\nmask = "8x8+0+0"\n')
    (begun / "k2.toml").write_text(text.replace("[render]", '[render]\ninit_image = "refs/wide.png"'))
    fox, owl = plan(k2)
    assert fox["init_image"] == owl["init_image"] != None and fox["mask"]  # noqa: E711
    assert plan(k2, "--mask", "none")[0]["mask"] is None
    for each in plan(k2, "--init-image", "none"):
        assert (each["init_image"], each["mask"], each["settings"]["denoise"]) == (None, None, None)
        assert (each["settings"]["width"], each["settings"]["height"]) == (128, 128)
    told = k2("render", "--init-image", "none", "--dry-run").stderr
    assert "denoise" not in told
    assert "denoise has no effect" in k2("render", "--init-image", "none", "--denoise", "0.5", "--dry-run").stderr
    own = text.replace('init_image = "refs/wide.png"', 'init_image = "none"')
    (begun / "k2.toml").write_text(own)
    assert "k2.toml, line 10: there is no init_image to mask." in k2("render", code=1).stderr
    (begun / "k2.toml").write_text(own.replace('mask = "8x8+0+0"', 'mask = "none"'))
    assert "denoise has no effect" in k2("render", "--only", "fox").stderr


def test_none_unsets_only_what_belongs_to_the_init_image(begun, k2):
    """A prompt may say it and the command line the rest for all; a picture that overrides it brings everything back."""
    said = '[render]\ninit_image = "refs/wide.png"\ndenoise = 0.4\nmask = "64x64+8+8"\n'
    text = (begun / "k2.toml").read_text().replace("[render]\n", said)
    (begun / "k2.toml").write_text(text + 'init_image = "none"\n')

    assert k2("render", "--init-image", "none", "--dry-run").stderr == ""
    fox, owl = plan(k2, "--mask", "32x32+0+0")
    assert (fox["mask"], owl["mask"], owl["settings"]["denoise"]) == ({"region": "32x32+0+0"}, None, None)
    for each in plan(k2, "--init-image", "refs/wide.png"):
        assert (each["mask"], each["settings"]["denoise"]) == ({"region": "64x64+8+8"}, 0.4)
    lines = '{"prompt": "tea", "init_image": "none"}\n{"prompt": "a cup", "init_image": "refs/wide.png"}\n'
    for picture in ("refs/wide.png", "none"):
        asked = ("render", "-", "--init-image", picture, "--mask", "32x32+0+0", "--dry-run", "--json")
        tea, cup = (json.loads(line) for line in k2(*asked, input=lines).stdout.splitlines())
        assert (tea["init_image"], tea["mask"], cup["mask"]) == (None, None, {"region": "32x32+0+0"})
    made = k2("render", "--only", "fox", "--batch", "1").stdout.split()[0]
    liked = k2("render", "-", "--like", made, "--dry-run", "--json", input=lines.splitlines()[0])
    assert json.loads(liked.stdout)["mask"] is None

    told = k2("render", "--only", "an-owl-at-night", "--mask", "8x8+0+0", "--denoise", "0.5", "--dry-run").stderr
    assert "No picture has an init image, so denoise and mask have no effect." in told
    (begun / "k2.toml").write_text(text.replace(said, "[render]\n"))
    refused = k2("render", "-p", "tea", "--mask", "8x8+0+0", code=2).stderr
    assert 'Name the picture that "tea" starts from.' in refused


def test_mix_preview_uses_one_init_image(begun, k2):
    """The same without a style, in the parts and in the mix, whatever the project's own prompts start from."""
    (begun / "styles").mkdir()
    for name in ("dusk", "ink"):
        (begun / "styles" / f"{name}.toml").write_text(f'keywords = ["{name}"]\n')
    Image.new("RGB", (64, 64), "navy").save(begun / "dot.png")
    k2("mix-styles", "dusk=1", "ink=1", "-p", "tea", "--init-image", "dot.png", "--denoise", "0.6", "--sampler", "ab2")
    made = [json.loads(line) for line in k2("log", "--json").stdout.splitlines()]
    assert len(made) == 4 and {each["init_image"]["image"] for each in made} == {"dot.png"}


def test_denoise_without_init_image_warns(begun, k2):
    told = "No picture has an init image, so denoise has no effect."
    assert told in k2("render", "-p", "tea", "--denoise", "0.5", "--dry-run").stderr
    assert told in k2("render", "--only", "an-owl-at-night", "--matrix", "denoise=0.5,1", "--dry-run").stderr
    assert told not in k2("render", "--denoise", "0.5", "--dry-run").stderr  # the fox starts from one
    line = '{"prompt": "tea", "denoise": 0.5}'  # overrides the command line, unlike the project's prompts
    assert told in k2("render", "-", "--init-image", "none", "--dry-run", input=line).stderr


def test_doubtful_init_image_settings_warn(begun, k2):
    def told(*options: str) -> str:
        return k2("render", "--only", "fox", *options, "--dry-run").stderr

    nothing, scaled, narrow = "nothing of the init image remains", "is scaled from", "is narrower than"
    assert f"With 1 step, denoise 0.75 amounts to 1: {nothing}" in told("--steps", "1")
    assert "wide.png is scaled from 300x200 to 160x112" in told("--mask", "64x64+0+0")
    assert "The region 64x8+0+0 is narrower than 16 pixels" in told("--mask", "64x8+0+0")
    Image.new("RGB", (160, 112)).save(begun / "refs" / "wide.png")
    quiet = told("--mask", "64x64+0+0", "--steps", "1") + told("--denoise", "1", "--steps", "1") + told()
    assert not any(each in quiet for each in (nothing, scaled, narrow))


def test_equal_step_counts_warn(begun, k2):
    def told(*options: str) -> str:
        said = k2("render", *options, "--dry-run").stderr
        return "".join(line for line in said.splitlines(True) if "are the same" in line)

    same = "With denoise 0.45, 0.5 and 0.55, 4 of 8 steps are used: these pictures are the same.\n"
    assert told("--matrix", "denoise=0.45,0.5,0.55,1", "--steps", "8", "--only", "fox") == same
    assert told("--matrix", "denoise=0.45,0.5,0.55", "--matrix", "steps=8,40", "--only", "fox") == same
    assert told("--matrix", "denoise=0.45,0.5,0.55", "--steps", "8", "--init-image", "none") == ""
    guided = "With guidance_until 0.4 and 1, 1 of 1 step is guided: these pictures are the same.\n"
    assert told("--matrix", "guidance_until=0.4,1", "--steps", "1", "--only", "an-owl-at-night") == guided
    guided = "With guidance_until 0.4 and 0.5, 2 of 4 steps are guided: these pictures are the same.\n"
    assert told("--matrix", "guidance_until=0.4,0.5,1", "--steps", "4", "--only", "an-owl-at-night") == guided
    begins = ("--denoise", "0.5", "--steps", "8", "--only", "fox")  # from a picture, with half of the steps taken
    assert told("--matrix", "guidance_until=0.4,0.5,1", *begins) == guided
    assert told("--matrix", "guidance_until=0.4,0.5", "--steps", "4", "--guidance", "0") == ""
    assert told("--matrix", "guidance_until=0.4,0.6", "--steps", "10", "--only", "an-owl-at-night") == ""
    void = 'Some pictures of "{}" are the same: {} has no effect without {}.\n'
    half = ("--matrix", "guidance=0,3", "--matrix", "guidance_until=0.25,0.75", "--steps", "8", "--only", "fox")
    assert told(*half) == void.format("a red fox", "guidance_until", "guidance")
    toml = (begun / "k2.toml").read_text()
    (begun / "k2.toml").write_text(toml + "guidance = 0\n")
    for axis, what in (("denoise=0.3,0.6", "an init image"), ("guidance_until=0.25,0.75", "guidance")):
        assert told("--matrix", axis, "--steps", "8") == void.format("an owl at night", axis.partition("=")[0], what)
        assert told("--matrix", axis, "--steps", "8", "--only", "an-owl-at-night") == ""  # that has its own warning
    lines = '{"prompt": "a fox", "init_image": "refs/wide.png", "guidance": 3}\n' + '{"prompt": "an owl"}\n' * 2
    for axis in ("denoise=0.3", "guidance_until=0.25"):  # nothing is compared: the lines themselves are the same
        assert "are the same" not in k2("render", "-", "--matrix", axis, "--dry-run", input=lines).stderr
    for first, second in (
        ('denoise = [0.4, 0.7]\nsize = ["256x256"]', 'denoise = [0.42, 0.8]\nsize = ["320x192"]'),
        ("guidance_until = [0.4, 1]\nguidance = [2.0]", "guidance_until = [0.5, 0.8]\nguidance = [4.0]"),
    ):
        (begun / "k2.toml").write_text(f"{toml}\n[[matrix]]\n{first}\n\n[[matrix]]\n{second}\n")
        assert told("--only", "fox", "--steps", "8") == told("--only", "fox", "--steps", "4") == ""


def test_heavy_cropping_warns(begun, k2):
    """A strip longer than pictures may be, and what an explicit size or shape leaves of a picture."""

    def told(sides: tuple[int, int], *options: str) -> str:
        Image.new("RGB", sides).save(begun / "refs" / "wide.png")
        return k2("render", "--only", "fox", *options, "--dry-run").stderr

    assert "wide.png is 3000x100 and fills 256x64: 87% of it is cropped." in told((3000, 100))
    assert "wide.png is 300x200 and fills 256x256: 33% of it is cropped" in told((300, 200), "--size", "256x256")
    assert "wide.png is 100x200 and fills 128x128: 50% of it is cropped" in told((100, 200), "--aspect", "1:1")
    assert "cropped" not in told((300, 200)) + told((640, 480))


def test_denoise_in_the_metadata_of_other_tools(begun, k2, tmp_path):
    made = k2("render", "--only", "fox", "--batch", "1", "--denoise", "0.4").stdout.split()[0]
    with Image.open(made) as image:
        assert "Denoising strength: 0.4, " in image.text["parameters"]
    assert origins.read_origin(Path(made)).left_out[:1] == ("its init image refs/wide.png",)
    assert ": its init image refs/wide.png" in k2("new", tmp_path / "anew", "--from", made).stderr
    said = "a fox\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Denoising strength: 0.6"
    assert origins.from_a1111(said).left_out == ("its init image", "denoising strength 0.6")
    second = origins.from_a1111(said + ", Hires upscale: 2")  # which starts from its own picture
    assert second.left_out == ("hires upscale 2", "denoising strength 0.6")
    (mflux,) = origins.from_mflux({"prompt": "a fox", "image_path": "a.png", "mflux_version": "1"})
    assert mflux.left_out == ("its init image",)


def test_cluster_receives_the_init_image(tmp_path):
    spec = RenderSpec("a fox", init_image=tmp_path / "a.png", mask=tmp_path / "b.png")
    assert spec_files(spec) == {tmp_path / "a.png", tmp_path / "b.png"}
    there = relocate(spec, lambda path: Path("/far") / path.name)
    assert (there.init_image, there.mask) == (Path("/far/a.png"), Path("/far/b.png"))
    region = replace(spec, mask="8x8+0+0")
    assert spec_files(region) == {tmp_path / "a.png"} and relocate(region, Path).mask == "8x8+0+0"


def test_watch_notices_a_changed_init_image(begun, k2):
    """A picture's key contains the hash of its init image."""
    settings = dict.fromkeys(("variant", "batch", "steps", "size", "device"))
    _, before, _ = plan_missing(Project.open(begun), ["fox"], settings, {}, {})
    Image.new("RGB", (300, 200), "teal").save(begun / "refs" / "wide.png")
    _, after, _ = plan_missing(Project.open(begun), ["fox"], settings, {}, {})
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())
