"""Mixtures of discretized logistics: normalization, formulas, gradients and exact quantiles."""

import itertools

import pytest
import torch

from flowgen.models import pixel_distribution
from flowgen.models.logistic_mixture import (
    LogisticMixture,
    initial_parameters,
    num_parameters,
    scale_values,
    shift_means,
)

SHAPES = [(1, 1), (1, 2), (2, 2), (3, 2), (1, 8)]


def random_mixture(channels: int, bits: int, spread: float = 3.0, batch: int = 4):
    parameters = spread * torch.randn(batch, num_parameters(channels, 10), 1, 1)
    return LogisticMixture(parameters, channels, bits)


@pytest.mark.parametrize("channels, bits", SHAPES)
def test_probabilities_of_all_values_sum_to_one(channels, bits):
    mixture = random_mixture(channels, bits, spread=6)
    total = torch.zeros(4)
    for values in itertools.product(range(2**bits), repeat=channels):
        images = torch.tensor(values, dtype=torch.uint8).view(1, -1, 1, 1).expand(4, -1, -1, -1)
        total += mixture.log_prob(images).sum((1, 2, 3)).exp()
    assert torch.allclose(total, torch.ones(4), atol=2e-6)


def test_one_component_is_the_difference_of_logistic_cumulative_distributions(monkeypatch):
    monkeypatch.setattr(pixel_distribution, "UNIFORM_WEIGHT", 1e-300)
    parameters = torch.tensor([0.0, 0.2, -1.0], dtype=torch.double).view(1, 3, 1, 1)
    mixture = LogisticMixture(parameters, channels=1, bits=8)
    scale = mixture.log_scales.exp().item()

    def cumulative(border: float) -> float:
        return torch.tensor((border - 0.2) / scale, dtype=torch.double).sigmoid().item()

    for value in (0, 1, 100, 254, 255):
        upper = 1.0 if value == 255 else cumulative((2 * value + 1) / 255 - 1)
        lower = 0.0 if value == 0 else cumulative((2 * value - 1) / 255 - 1)
        image = torch.full((1, 1, 1, 1), value, dtype=torch.uint8)
        assert mixture.log_prob(image).exp().item() == pytest.approx(upper - lower, rel=1e-9)


@pytest.mark.parametrize("channels, bits", SHAPES)
def test_intervals_hold_the_probability_and_quantiles_invert_them(channels, bits):
    mixture = random_mixture(channels, bits, spread=6, batch=200)
    images = torch.randint(2**bits, (200, channels, 1, 1), dtype=torch.uint8)
    low, high = mixture.interval(images)
    log_prob = mixture.double().log_prob(images)
    assert torch.allclose((high - low).log(), log_prob, atol=1e-5)
    for position in (0.0, 0.5, 1 - 1e-6):
        assert torch.equal(mixture.quantile(low + position * (high - low)), images)


def test_samples_have_the_probabilities_of_the_mixture():
    mixture = LogisticMixture(
        2 * torch.randn(1, num_parameters(2, 3), 1, 1).expand(20_000, -1, -1, -1), 2, bits=1
    )
    images = mixture.quantile(torch.rand(20_000, 2, 1, 1))
    for values in itertools.product((0, 1), repeat=2):
        wanted = torch.tensor(values).view(1, 2, 1, 1)
        share = (images == wanted).all(1).double().mean().item()
        chosen = wanted.to(torch.uint8).expand(20_000, -1, -1, -1)
        probability = mixture.log_prob(chosen).sum((1, 2, 3)).exp().mean().item()
        assert share == pytest.approx(probability, abs=0.015)


def test_gradients_are_finite_for_extreme_parameters():
    parameters = torch.full((3, num_parameters(1, 2), 2, 2), 30.0)
    parameters[1] = -30.0
    parameters[2] = 0.0
    parameters.requires_grad_()
    images = torch.tensor([0, 1, 254, 255], dtype=torch.uint8).view(1, 1, 2, 2).expand(3, 1, 2, 2)
    LogisticMixture(parameters, 1, 8).log_prob(images).sum().backward()
    assert parameters.grad.isfinite().all()


@pytest.mark.parametrize("relative_scale", [None, 1.3])
def test_initial_parameters_describe_the_marginal_distribution(relative_scale):
    images = torch.cat([torch.zeros(80, 1, 4, 4), torch.full((20, 1, 4, 4), 200)]).to(torch.uint8)
    values = scale_values(images, 256, torch.float32)
    parameters = initial_parameters(values, 10, 8, relative_scale).view(1, -1, 1, 1)
    mixture = LogisticMixture(parameters.expand(100, -1, 4, 4), 1, 8)
    bits = -mixture.log_prob(images).mean() / torch.tensor(2.0).log()
    assert bits < 4  # a uniform distribution needs 8


def test_shifted_means_belong_to_their_channel():
    parameters = torch.randn(2, num_parameters(3, 4), 5, 6)
    shift = torch.randn(2, 3, 5, 6)
    mixture = LogisticMixture(parameters, 3, 8)
    shifted = LogisticMixture(shift_means(parameters, shift), 3, 8)
    expected = mixture.means + shift.transpose(0, 1)[:, :, None]
    torch.testing.assert_close(shifted.means, expected)
    for name in ("log_weights", "log_scales", "coefficients"):
        assert torch.equal(getattr(shifted, name), getattr(mixture, name))
