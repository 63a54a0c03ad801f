"""The offline distances by which `make reproduce-thesis` compares samples, against values that are known."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "thesis"))
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


def test_precision_falls_with_bad_samples_and_recall_with_missing_ones():
    real = torch.cat((torch.randn(300, 2), 20 + torch.randn(300, 2)))
    one_mode, noisy = torch.randn(600, 2), torch.cat((real[:300] + 0.1, 100 + 50 * torch.randn(300, 2)))
    half = judge.likeness(one_mode, real)
    assert half.precision > 0.9 and half.recall < 0.6 and half.spread < 0.5
    assert judge.likeness(noisy, real).precision < 0.6
    assert judge.likeness(torch.cat((torch.randn(300, 2), 20 + torch.randn(300, 2))), real).recall > 0.9


def test_the_space_keeps_what_varies_most():
    images = torch.rand(500, 1, 4, 4) * torch.tensor([10.0] + 15 * [0.01]).view(1, 4, 4)
    assert judge.Space(images)(images)[:, 0].std().item() == pytest.approx(images[:, 0, 0, 0].std().item(), rel=0.01)


def test_a_walk_through_the_pixels_is_even_and_both_ways_meet_at_the_ends():
    model = started("glow")
    first, second = noise(5, 6) // 2, noise(5, 6) // 2
    walk = judge.walk(model, first, second, 5)
    assert max(walk.pixel_steps) / min(walk.pixel_steps) < 1.1 and min(walk.unevenness) >= 1 and len(walk.unevenness) == 6
    assert walk.bits[0] == pytest.approx(walk.pixel_bits[0]) and walk.bits[-1] == pytest.approx(walk.pixel_bits[-1])
