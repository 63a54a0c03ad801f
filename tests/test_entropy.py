"""Images whose entropy is known: no model may score below it, and one that is trained comes close."""

import math

import pytest
import torch
from conftest import fit
from test_models import MODELS, load_from_checkpoint
from torch import Tensor

from flowgen.models.base import EvalConfig
from flowgen.models.flows.flow import Flow

SIDE, DIMENSIONS = 8, 192


def train(model: Flow, images: Tensor, steps: int, lr: float = 1e-3, batch: int = 128) -> Flow:
    model.initialize(images[:1024])
    fit(model, lambda _: (images[torch.randint(len(images), (batch,))],), steps, lr, decay=0.5)
    return model


def gaussian_field(
    count: int, channels: int = 1, deviation: float = 24.0, neighbour: float = 0.8
) -> tuple[Tensor, float]:
    """8-bit levels with covariance deviation^2 neighbour^(distance in rows + columns), and their entropy in bits/dim.

    Bins are narrow beside the conditional deviations, so that it is the differential entropy 1/2 log2 det(2 pi e K) / D.
    """
    place = torch.arange(SIDE, dtype=torch.double)
    along = neighbour ** (place[:, None] - place).abs()
    covariance = deviation**2 * torch.kron(along, along)
    points = (
        torch.randn(count, channels, SIDE**2, dtype=torch.double)
        @ torch.linalg.cholesky(covariance).T
    )
    images = (points + 128).round().clamp(0, 255).to(torch.uint8).view(count, channels, SIDE, SIDE)
    bits = 0.5 * torch.logdet(2 * math.pi * math.e * covariance).item() / math.log(2) / SIDE**2
    return images, bits


def markov_texture(count: int, channels: int = 1, stay: float = 0.9) -> tuple[Tensor, float]:
    """1-bit levels whose rows are chains of two states that change with probability 1 - stay, and their entropy in bits/dim."""
    first = torch.randint(2, (count, channels, SIDE, 1))
    changes = torch.rand(count, channels, SIDE, SIDE - 1) >= stay
    images = torch.cat((first, changes.long()), 3).cumsum(3) % 2
    change = -(stay * math.log2(stay) + (1 - stay) * math.log2(1 - stay))
    return images.to(torch.uint8), (1 + (SIDE - 1) * change) / SIDE


def uniform_levels(count: int, channels: int = 1) -> tuple[Tensor, float]:
    """5-bit levels, independent and equally likely: 5 bits/dim."""
    return torch.randint(0, 32, (count, channels, SIDE, SIDE), dtype=torch.uint8), 5.0


@pytest.mark.parametrize("kind", ["gaussian field", "markov texture"])
@pytest.mark.parametrize("name", MODELS)
def test_no_model_scores_below_the_entropy(name, kind):
    images, entropy = (
        gaussian_field(1500, 3) if kind == "gaussian field" else markov_texture(1500, 3)
    )
    model = train(
        MODELS[name](bits=8 if kind == "gaussian field" else 1),
        images,
        5 if name.startswith("iaf") else 12,
    )
    figures = model.evaluate(
        [(gaussian_field if kind == "gaussian field" else markov_texture)(500, 3)[0]]
    ).row()
    assert figures["bits_per_dim"] > entropy - 3 * figures["bits_per_dim_error"]
    with torch.no_grad():
        x = (images[:100] + 0.5) / model.bins
        assert (model.bijection.inverse(model.bijection(x)[0])[0] - x).abs().max() < 1e-4
        assert torch.isfinite(model.bijection.inverse(torch.randn(1000, DIMENSIONS))[0]).all()


@pytest.mark.parametrize(
    ("name", "steps", "changes"),
    [
        ("maf", 1500, {"num_transforms": 2, "width": 128}),
        ("glow", 400, {"steps_per_level": 6, "width": 32, "levels": 2}),
    ],
)
def test_a_trained_flow_comes_close_to_the_entropy_of_a_gaussian_field(name, steps, changes):
    images, entropy = gaussian_field(20_000)
    model = train(
        load_from_checkpoint(name, **{"channels": 1, "bits": 8} | changes), images, steps, lr=3e-3
    )
    figures = model.evaluate(gaussian_field(2000)[0].split(500)).row()
    assert entropy - 3 * figures["bits_per_dim_error"] < figures["bits_per_dim"] < entropy + 0.05


def test_a_trained_flow_comes_close_to_the_entropy_of_uniform_levels():
    model = load_from_checkpoint(
        "maf", channels=1, bits=5, num_transforms=1, width=32, transform="spline"
    )
    figures = (
        train(model, uniform_levels(20_000)[0], 300, lr=1e-2)
        .evaluate(uniform_levels(2000)[0].split(500))
        .row()
    )
    assert 5 - 3 * figures["bits_per_dim_error"] < figures["bits_per_dim"] < 5.05


def test_a_trained_flow_comes_close_to_the_entropy_of_a_markov_texture():
    """Two values a pixel, whose noise has to be learnt and averaged over: 16 draws."""
    images, entropy = markov_texture(100_000)
    model = load_from_checkpoint(
        "maf", channels=1, bits=1, num_transforms=2, width=128, dequantization="variational"
    )
    figures = (
        train(model, images, 700, lr=5e-3)
        .evaluate(markov_texture(1000)[0].split(500), how=EvalConfig(draws=16))
        .row()
    )
    assert entropy - 3 * figures["bits_per_dim_error"] < figures["bits_per_dim"] < entropy + 0.05


def test_variational_noise_is_no_worse_than_uniform_noise_and_more_draws_than_one():
    images, entropy = markov_texture(20_000)
    test = markov_texture(2000)[0].split(500)
    figures = {}
    for dequantization in ("uniform", "variational"):
        torch.manual_seed(0)
        model = load_from_checkpoint(
            "glow",
            channels=1,
            bits=1,
            steps_per_level=4,
            width=24,
            levels=1,
            gaussianize=False,
            dequantization=dequantization,
        )
        train(model, images, 250, lr=3e-3)
        figures[dequantization] = model.evaluate(test).row()
        many = model.evaluate(test, how=EvalConfig(draws=8)).row()
        assert many["bits_per_dim"] < figures[dequantization]["bits_per_dim"]
        assert many["bits_per_dim"] > entropy - 3 * figures[dequantization]["bits_per_dim_error"]
    assert (
        figures["variational"]["bits_per_dim"]
        < figures["uniform"]["bits_per_dim"] + figures["uniform"]["bits_per_dim_error"]
    )
