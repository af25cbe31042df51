"""Distillation on mixtures of Gaussians, for which the answer is known."""

import math

import pytest
import torch
from torch import nn

from model.sampler import apply_guidance, shifted_sigmas
from model.train.distill import (
    Draws,
    fake_loss,
    follow,
    matching_loss,
    predicted_image,
    predicted_noise,
    renoise,
    sample_between,
    student_loss,
)


def test_point_splits_into_image_and_noise():
    x0, eps, t = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5)
    x = (1 - t[:, None]) * x0 + t[:, None] * eps

    torch.testing.assert_close(predicted_image(x, eps - x0, t), x0)
    torch.testing.assert_close(predicted_noise(x, eps - x0, t), eps)


def test_renoising_gives_points_of_the_flow():
    """The signal is (1 − t), the noise has variance t², and the velocity leads straight back to the picture."""
    x0, eps, fresh = torch.full((200_000, 1), 3.0), torch.randn(200_000, 1), torch.randn(200_000, 1)
    s, t = torch.full((200_000,), 0.4), torch.full((200_000,), 0.7)

    x, v = renoise(x0, eps, s, t, fresh)

    assert x.mean().item() == pytest.approx(0.3 * 3, abs=0.01)
    assert x.std().item() == pytest.approx(0.7, abs=0.01)
    torch.testing.assert_close(predicted_image(x, v, t), x0, atol=1e-5, rtol=1e-5)


def test_renoising_by_nothing_is_identity():
    x0, eps, fresh = torch.randn(3, 4, 8)
    s = torch.tensor([0.2, 0.5, 0.8, 0.9])

    x, _ = renoise(x0, eps, s, s, fresh)

    torch.testing.assert_close(x, (1 - s)[:, None] * x0 + s[:, None] * eps)


def test_trajectory_keeps_every_segments_start():
    times = shifted_sigmas(4, 0.5)
    way = follow(lambda x, t: 0 * x + t[:, None], torch.randn(3, 2), times)

    x, v, start, end = way.segment(torch.tensor([0, 1, 3]))
    assert start.tolist() == pytest.approx([times[0], times[1], times[3]])
    assert end.tolist() == pytest.approx([times[1], times[2], times[4]])
    torch.testing.assert_close(v, start[:, None].expand(3, 2))
    torch.testing.assert_close(way.points[1], way.points[0] + (times[1] - times[0]) * times[0])
    assert torch.equal(x[2], way.points[3, 2])


def test_levels_lie_inside_their_segment():
    s, t = torch.tensor([0.0, 0.3]), torch.tensor([0.3, 1.0])

    for uniform in (0.0, 1.0):
        tau = sample_between(s, t, torch.full((2,), uniform))
        assert (tau > s).all() and (tau < t).all()


def test_agreeing_student_gets_no_gradient():
    """If teacher and fake score agree and guidance is off, there is no gradient, wherever the student is."""
    x0 = torch.randn(4, 6, requires_grad=True)
    said = torch.randn(4, 6)

    matching_loss(x0, said, said, torch.randn(4, 6), guidance=0.0).sum().backward()

    assert x0.grad is not None and not x0.grad.any()


def test_guidance_moves_the_student_past_its_teacher():
    """Away from the prediction without the prompt, and further with more guidance."""
    said, without = torch.randn(2, 4, 6)
    aim = said + 2 * (said - without)
    x0 = said.clone().requires_grad_()  # where the fake score sees it as well

    matching_loss(x0, said, said, without, guidance=2.0, softness=1e3).sum().backward()

    torch.testing.assert_close(torch.cosine_similarity(-x0.grad, aim - said), torch.ones(4))


def test_gradient_is_normalised_by_distance_to_the_guided_image():
    """Twice as far off, half the gradient; distance is measured to the guided image, not to the teacher's alone."""
    said, without, off = torch.randn(3, 4, 6)
    aim = said + 2 * (said - without)
    near, far = (aim + off).requires_grad_(), (aim + 2 * off).requires_grad_()

    for x0 in (near, far):
        matching_loss(x0, said, said, without, guidance=2.0).sum().backward()

    torch.testing.assert_close(far.grad, near.grad / 2)


def test_converged_picture_gets_no_extra_weight():
    x0 = torch.randn(4, 6, requires_grad=True)
    said = x0.detach().clone()

    loss = matching_loss(x0, said + 0.1, said, said, guidance=2.0)
    loss.sum().backward()

    assert loss.isfinite().all() and x0.grad.isfinite().all() and x0.grad.abs().max() < 2


CENTRES = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.3, 1.9, 3.6, 5.2)]) * 1.5
SPREAD = 0.08


def exact(x, t):
    """The velocity of the mixture of narrow Gaussians in closed form."""
    t = t[:, None].clamp(1e-3, 1)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    away = x[:, None] - (1 - t)[..., None] * CENTRES
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), 1)[..., None]
    x0 = (share * (CENTRES + ((1 - t) * SPREAD**2 / variance)[..., None] * away)).sum(1)
    return (x - x0) / t


def one_gaussian(centre, spread):
    """The velocity of a single Gaussian."""

    def velocity(x, t):
        t = t[:, None].clamp(1e-3, 1)
        share = (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)
        return (x - centre - share * (x - (1 - t) * centre)) / t

    return velocity


class Toy(nn.Module):
    """A velocity: the teacher's exact one plus a learned correction that starts at zero."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact
        self.layers = nn.Sequential(nn.Linear(8, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, t):
        waves = torch.stack([t, torch.sin(3 * t), torch.cos(3 * t), torch.sin(9 * t)], 1)
        return self.exact(x, t) + self.layers(torch.cat((x, x.square(), waves), 1))


def miss(x):
    """Mean distance from the nearest centre, less the mixture's own."""
    return (x[:, None] - CENTRES).norm(dim=-1).min(1).values.mean().item() - SPREAD * math.sqrt(math.pi / 2)


def end(way):
    return way.points[-1] - way.times[-2] * way.velocities[-1]


def distilled(with_prompt, without, times, guidance, rate):
    """A student for the steps in `times`, after 150 steps of training."""
    torch.manual_seed(0)
    student, fake, segments = Toy(with_prompt), Toy(with_prompt), len(times) - 1
    slow, fast = (torch.optim.Adam(m.parameters(), lr, betas=(0.0, 0.95)) for m, lr in ((student, rate), (fake, 2e-2)))

    def teacher(x, t):
        return with_prompt(x, t), without(x, t)

    for _ in range(150):
        way = follow(student, torch.randn(256, 2), times)
        for _ in range(3):
            fast.zero_grad()
            fake_loss(fake, way, Draws.draw(segments, way.points[0])).mean().backward()
            fast.step()
        slow.zero_grad()
        student_loss(student, fake, teacher, way, Draws.draw(segments, way.points[0]), guidance).mean().backward()
        slow.step()
    return student


def test_four_student_steps_reach_what_four_teacher_steps_miss():
    """Four Euler steps end between the Gaussians; the student's four end much nearer, and reach all of them."""
    times = shifted_sigmas(4, 0.7)
    student = distilled(exact, exact, times, guidance=0.0, rate=1e-2)

    noise = torch.randn(4000, 2)
    before, after = (end(follow(velocity, noise, times)) for velocity in (exact, student))
    assert miss(before) > 0.25
    assert miss(after) < 0.7 * miss(before)
    nearest = (after[:, None] - CENTRES).norm(dim=-1).argmin(1)
    assert torch.bincount(nearest, minlength=4).min() > 0.7 * 1000


def test_student_of_a_guided_teacher_follows_guidance():
    """The student's few steps go much of the way from where the prompt alone leads to where many guided steps end."""
    times, centre = shifted_sigmas(4, 0.7), torch.tensor([1.0, 0.5])
    with_prompt, without = one_gaussian(centre, 0.5), one_gaussian(torch.zeros(2), 1.0)
    student = distilled(with_prompt, without, times, guidance=1.0, rate=2e-3)

    def led(x, t):
        return apply_guidance(with_prompt(x, t), without(x, t), 1.0)

    noise = torch.randn(4000, 2)
    many = shifted_sigmas(64, 0.7)
    plain, aim, after = (
        end(follow(*way)).mean(0) for way in ((with_prompt, noise, many), (led, noise, many), (student, noise, times))
    )
    way = aim - plain
    assert way.norm() > 0.3
    assert 0.25 < (after - plain) @ way / way.square().sum() < 1.25
    assert (after - aim).norm() < 0.75 * way.norm()
