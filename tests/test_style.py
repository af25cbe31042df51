"""Style rows: strength and mixing are linear, and order does not matter."""

from itertools import pairwise, permutations

import pytest
import torch
import torch.nn.functional as F

from model.hashes import sha256
from model.reference_weights import WeightedReference, weigh
from model.spec import Reference, Style
from model.style import (
    RESPONSES,
    SHUFFLES,
    STRENGTHS,
    StyleConfig,
    StyleEncoder,
    destroy_content,
    even_out,
    response,
)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    made = StyleEncoder(StyleConfig(text_width=32, text_taps=2, rows=3, width=16, hidden=24, vector=8))
    made.initialise()
    return made.eval()


@pytest.fixture
def rows(encoder):
    with torch.no_grad():
        return list(encoder(torch.randn(3, 16, 8, 12))[0])


def test_shapes_and_unit_vectors(encoder):
    rows, vectors = encoder(torch.randn(5, 16, 16, 8))

    assert rows.shape == (5, 3, 2, 32)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))


@torch.no_grad()
def test_statistics_are_means_and_deviations_of_residual_features(encoder):
    """Computed a second way: each block adds to its input; the deviation is the sample's."""
    latents = torch.randn(2, 16, 8, 12)
    x = F.conv2d(latents, encoder.inward.weight, encoder.inward.bias, stride=2)
    for block in encoder.blocks:
        inner = F.silu(F.group_norm(x, 8, block.norm.weight, block.norm.bias))
        inner = F.silu(F.conv2d(inner, block.conv1.weight, block.conv1.bias, padding=1))
        x = x + F.conv2d(inner, block.conv2.weight, block.conv2.bias)
    mean = x.mean((2, 3), keepdim=True)
    spread = ((x - mean).square().sum((2, 3)) / (x[0, 0].numel() - 1)).sqrt()

    torch.testing.assert_close(encoder.statistics(latents), torch.cat((mean.flatten(1), spread), -1))


def test_strength_zero_is_no_style_and_one_is_the_style(encoder, rows):
    torch.testing.assert_close(encoder.mix(rows[:1], [0.0]), encoder.null.detach(), rtol=0, atol=0)
    torch.testing.assert_close(encoder.mix(rows[:1], [1.0]), rows[0])
    with pytest.raises(ValueError):
        encoder.mix(rows, [1.0])  # missing strengths do not default to 0


def test_negative_strength_is_the_mirror_image(encoder, rows):
    up, down = encoder.mix(rows[:1], [0.7]), encoder.mix(rows[:1], [-0.7])

    torch.testing.assert_close(up + down, 2 * encoder.null.detach())


def test_parts_of_the_same_style_add_up(encoder, rows):
    torch.testing.assert_close(encoder.mix([rows[0]] * 2, [0.4, 0.6]), rows[0])
    torch.testing.assert_close(encoder.mix([rows[0]] * 2, [0.2, 0.3]), encoder.mix(rows[:1], [0.5]))


def test_strength_response_has_no_jumps():
    """Unchanged at 0, at 1 and beyond; rising everywhere; odd."""
    strengths = [i / 100 for i in range(-200, 201)]
    answers = [response(s) for s in strengths]

    assert [response(s) for s in (0, 1, 1.5, -1)] == [0, 1, 1.5, -1]
    assert [response(s) for s in STRENGTHS] == list(RESPONSES)
    assert all(b > a for a, b in pairwise(answers)) and answers == [-a for a in reversed(answers)]
    assert max(b - a for a, b in pairwise(answers)) < 0.03


def test_positive_and_negative_strengths_keep_their_proportions(encoder, rows):
    made = even_out([0.4, -0.3, 0.2, 0.0])

    assert made[0] == pytest.approx(2 * made[2]) and made[3] == 0
    assert made[0] + made[2] == pytest.approx(response(0.6)) and made[1] == pytest.approx(response(-0.3))
    torch.testing.assert_close(
        encoder.mix(rows[:2], [0.3, 0.7]), 0.3 * rows[0] + 0.7 * rows[1], rtol=1e-5, atol=1e-5
    )  # the path from one style to another is straight


def test_order_of_styles_never_matters(encoder, rows):
    strengths = [0.3, 1.1, -0.4]
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)]

    mixed = [encoder.mix([rows[i] for i in order], [strengths[i] for i in order]) for order in orders]

    assert all(torch.equal(mixed[0], other) for other in mixed[1:])


def test_rows_with_equal_sums_do_not_depend_on_order(encoder):
    """Sorting by the sum would leave such rows in the order given."""
    base = torch.randn(3, 2, 32).double()
    rows = [base.roll(shift, 0) for shift in range(3)] + [base.roll(1, 2), -base]

    mixed = {encoder.mix([rows[i] for i in order], [0.1] * 5).numpy().tobytes() for order in permutations(range(5))}

    assert len(mixed) == 1


def test_references_are_weighed_by_content(tmp_path):
    """The same picture counts once, however often and under whatever name; the order is that of the hashes."""
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / name for name in "abc")
    one, two = map(sha256, (a, b))
    styles = [
        Style("x", 0.9, (Reference(a), Reference(b, -2.0)), method="tokens"),
        Style("y", 0.3, (Reference(c),), method="tokens"),
        Style("off", 0.0, (Reference(b),), method="tokens"),
        Style("spliced", 1.0, (Reference(b),), method="splice"),
    ]
    back = Style("z", -0.6, (Reference(c), Reference(c)), method="tokens")

    for order in permutations(styles):
        assert weigh(order, "tokens") == (WeightedReference(one, a, 0.6), WeightedReference(two, b, -0.6))
    assert weigh([*styles, back], "tokens") == (WeightedReference(two, b, -0.6),)
    assert weigh([Style("x", 1.0, (Reference(a),) * 3, method="splice")], "splice") == (WeightedReference(one, a, 1.0),)


def test_destroying_content_moves_tiles_without_losing_any():
    """It also mirrors all of them or none."""
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)

    def tiles(latents: torch.Tensor) -> list[list[list[float]]]:
        cut = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return [sorted(each.tolist()) for each in cut]

    ways = []
    for seed in range(8):
        shuffled = destroy_content(latents, 2, torch.Generator().manual_seed(seed))
        assert shuffled.shape == latents.shape and not torch.equal(shuffled, latents)
        ways.append([tiles(latents), tiles(latents.flip(-1))].index(tiles(shuffled)))
    assert set(ways) == {0, 1}


def test_reference_is_read_in_tiles_shuffled_the_same_way_each_time(encoder):
    """So the positions of things in it hardly matter."""
    torch.manual_seed(1)
    picture = torch.randn(1, 16, 16, 16).cumsum(-1).cumsum(-2) / 20
    with torch.no_grad():
        read = encoder.encode_reference(picture)
        assert read.shape == (3, 2, 32) and torch.equal(encoder.encode_reference(picture), read)
        moved = [destroy_content(picture, 4, torch.Generator().manual_seed(seed)) for seed in (3, 4)]
        plainly = encoder(torch.cat(moved))[0]
        apart = (encoder.encode_reference(moved[0]) - encoder.encode_reference(moved[1])).norm()

    assert apart < 0.7 * (plainly[0] - plainly[1]).norm()
    for side in (4, 22):  # too small to cut, and not divisible by four
        assert encoder.encode_reference(torch.randn(1, 16, side, side)).isfinite().all()


def test_reference_is_read_in_the_tile_sizes_of_training(encoder, monkeypatch):
    """An eighth and a quarter of its side, in cells, equally often (`model/train/training_set.py`)."""
    sizes = []

    def cut(latents: torch.Tensor, tile: int, generator: torch.Generator) -> torch.Tensor:
        sizes.append(tile)
        return latents

    monkeypatch.setattr("model.style.destroy_content", cut)
    encoder.encode_reference(torch.randn(1, 16, 64, 64))
    assert sorted(sizes) == [8] * SHUFFLES + [16] * SHUFFLES
    small = torch.randn(1, 16, 4, 4)  # too small for tiles: single cells would no longer be a picture
    with torch.no_grad():
        assert torch.equal(encoder.encode_reference(small), encoder(small)[0][0])


def test_statistics_ignore_positions(encoder):
    """Shuffling tiles as large as the network's receptive field changes the rows far less than another picture does."""
    torch.manual_seed(1)
    picture, other = torch.randn(2, 1, 16, 32, 32)
    picture, other = 0.3 * picture + 1, 1.5 * other - 1
    with torch.no_grad():
        shuffled = encoder(destroy_content(picture, 16, torch.Generator().manual_seed(2)))[0]
        same, different = encoder(picture)[0], encoder(other)[0]

    assert (shuffled - same).norm() < 0.3 * (different - same).norm()
