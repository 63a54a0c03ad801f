"""The offline distances by which `make reproduce-thesis` compares samples, against values that are known."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "thesis"))
import claims
import judge
from test_models import noise, started


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    """Independent components: |m - m'|^2 + sum (s - s')^2."""
    scale, other = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    one = scale * torch.randn(200_000, 3)
    two = 1.0 + other * torch.randn(200_000, 3)
    expected = 3.0 + (scale - other).square().sum().item()
    assert judge.likeness(one[:2000], two[:2000]).frechet == pytest.approx(expected, rel=0.15)
    assert judge._frechet(one.double(), two.double()) == pytest.approx(expected, rel=0.01)
    assert judge._frechet(one.double(), one.double()) == pytest.approx(0, abs=1e-6)


def test_coverage_falls_with_missing_samples_and_with_blank_ones():
    def two_modes():
        return torch.cat((torch.randn(300, 2), 20 + torch.randn(300, 2)))

    real, one_mode = two_modes(), torch.randn(600, 2)
    assert judge.likeness(two_modes(), real).coverage > 0.9
    assert judge.likeness(one_mode, real).coverage == pytest.approx(0.5, abs=0.05) and judge.likeness(one_mode, real).spread < 0.5
    like_faces = torch.cat((torch.randn(590, 64), 10 * torch.randn(10, 64))) / torch.arange(1, 65)  # with outliers, which are near all
    assert judge.likeness(torch.zeros(600, 64), like_faces).coverage < 0.3


def test_the_offset_of_a_real_point_is_one_and_of_their_mean_zero():
    real = 3 + torch.randn(500, 8)
    assert judge.offset(real.mean(0), real) == pytest.approx(0, abs=1e-5)
    assert torch.tensor([judge.offset(point, real) for point in real]).mean().item() == pytest.approx(1, abs=1e-4)


def test_a_claim_is_found_only_beyond_two_errors_and_its_opposite_too():
    assert claims.mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))
    assert [claims._verdict((mean, 0.1)) for mean in (0.21, 0.19, -0.19, -0.21)] == [
        "found",
        "no difference found",
        "no difference found",
        "the opposite is found",
    ]


def test_the_best_machine_is_named_where_all_were_trained():
    trained = {"filters_100": -90.0, **{f"l2_1e3_{hidden}": -100.0 + hidden / 100 for hidden in (50, 100, 300)}, "l1_1e6_100": -80.0}
    said = claims.best_of_prior(trained)
    assert "is that of l2_1e3_300" in said and "L1 prior 300 hidden units at 1e-6: not all" in said


def test_the_space_keeps_what_varies_most():
    images = torch.rand(500, 1, 4, 4) * torch.tensor([10.0] + 15 * [0.01]).view(1, 4, 4)
    assert judge.Space(images)(images)[:, 0].std().item() == pytest.approx(images[:, 0, 0, 0].std().item(), rel=0.01)


def test_a_walk_through_the_pixels_is_even_and_both_ways_meet_at_the_ends():
    model = started("glow")
    first, second = noise(5, 6) // 2, noise(5, 6) // 2
    walk = judge.walk(model, first, second, 5)
    assert max(walk.pixel_steps) / min(walk.pixel_steps) < 1.001 and min(walk.unevenness) >= 1 and len(walk.unevenness) == 6
    assert judge.bits_per_image(model, first.split(4)).mean().item() == pytest.approx(walk.bits[0], rel=0.05)
    assert walk.bits[0] == pytest.approx(walk.pixel_bits[0]) and walk.bits[-1] == pytest.approx(walk.pixel_bits[-1])
