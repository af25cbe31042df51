"""The Turbo stage: what is trained, what is frozen, and resuming."""

import pytest
import torch

from model.dit import PRESETS, DiTConfig, Krea2
from model.errors import K2Error
from model.sampler import shifted_sigmas
from model.train import distill, loop, pretrain, states
from model.train.pretrain import TrainedModel
from model.train.turbo import Recipe, TurboStage

TINY = DiTConfig(width=32, heads=2, kv_heads=1, blocks=2, text_width=32, text_taps=2, text_heads=2)


def recipe(method: str, **more) -> Recipe:
    plain = {"name": "tiny", "size": 64, "steps": 4, "batch": 4, "lr": 1e-3, "muon_lr": 1e-3, "mu": 0.0}
    return Recipe(**plain | {"preset": "tiny", "warmup_steps": 1, "method": method, "walk_steps": 3} | more)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def stage(method: str, **more) -> TurboStage:
    torch.manual_seed(3)
    teacher = TrainedModel(TINY, 3)
    torch.nn.init.normal_(teacher.dit.last.linear.weight, std=0.1)
    made = TurboStage(recipe(method, **more), None, teacher, torch.randn(1, 3, 2, 32))
    made.batch = batch
    return made


def batch(step: int, part: int = 0, references: bool = True) -> dict:
    generator = torch.Generator().manual_seed(step)
    masked = torch.ones(4, 5, dtype=torch.bool)
    masked[1, 3:] = False
    return {
        "latents": torch.randn(4, 16, 4, 4, generator=generator),
        "embeds": torch.randn(4, 5, 2, 32, generator=generator),
        "mask": masked,
        "references": torch.randn(4, 16, 4, 4, generator=generator) if references else None,
        "generator": generator,
    }


@pytest.mark.parametrize("method", ["guidance", "trajectory"])
def test_student_learns_and_teacher_stays_frozen(method):
    """Also in bf16, where a weight first cast without gradients would stay without."""
    turbo = stage(method)

    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = turbo.loss(batch(0))
    loss.backward()

    assert not [name for name, param in turbo.model.named_parameters() if param.grad is None]
    assert not [name for name, param in turbo.teacher.named_parameters() if param.grad is not None]


def test_student_and_fake_score_start_as_the_teacher():
    turbo = stage("trajectory")

    for network in (turbo.model.dit, turbo.model.fake):
        assert all(
            torch.equal(network.state_dict()[name], value) for name, value in turbo.teacher.dit.state_dict().items()
        )


def test_trajectory_follows_the_recipe(monkeypatch):
    turbo = stage("trajectory", guidance=1.5, walk_mu=0.3, fakes=3)
    times, scales, followed = [], [], []

    def follow(velocity, noise, levels):
        times.append(levels)
        return distill.follow(velocity, noise, levels)

    def student_loss(student, fake, teacher, way, chance, guidance):
        scales.append(guidance)
        return torch.zeros(4)

    def fake_loss(fake, way, chance):
        followed.append(chance)
        return torch.zeros(4)

    for watched in (follow, student_loss, fake_loss):
        monkeypatch.setattr(f"model.train.turbo.{watched.__name__}", watched)
    turbo.loss(batch(0))

    assert times == [shifted_sigmas(3, 0.3)] and scales == [1.5] and len(followed) == 3


def test_student_absorbs_guidance():
    turbo = stage("guidance", lr=3e-3, muon_lr=3e-3)
    optimiser = torch.optim.Adam(turbo.model.parameters(), 3e-3)
    shares = []
    for _ in range(60):
        loss, figures = turbo.loss(batch(0))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        shares.append(figures["share"].item())

    assert shares[-1] < 0.2 * shares[0]


def test_teacher_without_guidance_is_its_own_student():
    turbo = stage("guidance", guidance=0.0)

    assert turbo.loss(batch(0))[0].item() == pytest.approx(0, abs=1e-10)


def test_zero_strength_gives_the_null_rows():
    turbo = stage("trajectory", strengths=(0.0, 0.0), untouched=0.0)
    given = batch(0)
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}

    embeds, mask = turbo.prompts(tensors, torch.Generator())

    assert torch.equal(embeds[:, 5:], turbo.teacher.style.null.expand(4, -1, -1, -1))
    assert mask[:, 5:].all() and embeds.shape[1] == mask.shape[1] == 5 + len(turbo.teacher.style.null)


def test_strengths_cover_the_users_range():
    turbo = stage("trajectory", strengths=(-1.0, 1.5), untouched=0.0)
    tensors = {k: v for k, v in batch(0).items() if isinstance(v, torch.Tensor)}
    null, full = turbo.teacher.style.null.flatten(), turbo.teacher.style(tensors["references"])[0].flatten(1)
    rows = torch.stack(
        [turbo.prompts(tensors, torch.Generator().manual_seed(s))[0][:, 5:].flatten(1) for s in range(16)]
    )

    strengths = ((rows - null) * (full - null)).sum(-1) / (full - null).square().sum(-1)

    assert -1.001 < strengths.min() < -0.75 and 1.25 < strengths.max() < 1.501


def test_untouched_styles_stay_at_full_strength():
    turbo = stage("trajectory", strengths=(0.0, 0.0), untouched=1.0)
    tensors = {k: v for k, v in batch(0).items() if isinstance(v, torch.Tensor)}

    embeds, _ = turbo.prompts(tensors, torch.Generator())

    assert torch.equal(embeds[:, 5:], turbo.teacher.style(tensors["references"])[0])


def test_fake_score_learns_faster_and_run_resumes_exactly(tmp_path):
    def run(folder):
        return loop.Run(stage("trajectory"), folder)

    straight = run(tmp_path / "a")
    for step in range(3):
        last = straight.advance(batch(step))
    rates = {group["peak"] for group in straight.optimisers["adamw"].param_groups}
    assert sorted(rates) == pytest.approx([1e-3, 5e-3])

    broken = run(tmp_path / "b")
    broken.advance(batch(0))
    broken.save()
    resumed = run(tmp_path / "b")
    for step in (1, 2):
        again = resumed.advance(batch(step))

    assert again == last
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_resume_with_another_teacher_or_data_says_so(tmp_path):
    begun = stage("trajectory")
    begun.data = "one"
    first = loop.Run(begun, tmp_path)
    first.step = 1  # a run at step 0 would start over
    first.save()
    same, other = stage("trajectory"), stage("trajectory")
    same.data = other.data = "one"
    assert loop.Run(same, tmp_path).recipe_changes == []
    other.data = "two"
    other.teacher.dit.first.weight.data += 1
    assert loop.Run(other, tmp_path).recipe_changes == ["another data set", "another frozen network"]


def test_teacher_needs_a_trained_style_encoder(tmp_path, monkeypatch):
    """A Turbo run holds only a transformer: styles would be noise, and nobody would notice."""
    monkeypatch.chdir(tmp_path)
    weights = {f"ema.dit.{name}": tensor for name, tensor in Krea2(TINY).state_dict().items()}
    states.write_state(states.RUNS / "distilled", weights, {}, {})

    with pytest.raises(K2Error, match='"distilled" has no style encoder'):
        pretrain.load_teacher(recipe("guidance"), "distilled", 3)
    made = pretrain.load_teacher(recipe("guidance", references=0.0), "distilled", 3)
    assert torch.equal(made.dit.first.weight, weights["ema.dit.first.weight"])


def test_unknown_method_is_named():
    with pytest.raises(K2Error, match='no method "tdm"'):
        recipe("tdm")
