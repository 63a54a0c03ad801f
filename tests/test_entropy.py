"""Images of known entropy: no model scores below it, and a trained model comes close to it."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import fit
from test_models import FLOWS, MODELS, build_model
from torch import Tensor

from flowgen.models.base import EvalConfig
from flowgen.models.likelihood import LikelihoodModel

SIZE = 8
DIMENSIONS = 3 * SIZE**2
SLOW = {"flow_matching", "realnvp"}  # a solver of hundreds of steps, and large networks


def train(
    model: LikelihoodModel, images: Tensor, steps: int, lr: float = 1e-3, batch_size: int = 128
) -> LikelihoodModel:
    model.initialize(images[:1024])

    def batch(step: int) -> tuple[Tensor]:
        return (images[torch.randint(len(images), (batch_size,))],)

    fit(model, batch, steps, lr, decay=0.5)
    return model


def evaluate(
    model: LikelihoodModel, images: Tensor, num_importance_samples: int = 1
) -> dict[str, float]:
    config = EvalConfig(num_importance_samples=num_importance_samples)
    return model.evaluate(images.split(500), eval_config=config).row()


def gaussian_field(count: int, channels: int = 1) -> tuple[Tensor, float]:
    """8-bit images of a Gaussian field, and their entropy in bits/dim.

    The covariance is deviation^2 correlation^(distance in rows + distance in columns). The bins are
    much narrower than the conditional deviations, so the entropy is the differential entropy
    1/2 log2 det(2 pi e K) / D.
    """
    deviation = 24.0
    correlation = 0.8
    coordinates = torch.arange(SIZE, dtype=torch.double)
    along_axis = correlation ** (coordinates[:, None] - coordinates).abs()
    covariance = deviation**2 * torch.kron(along_axis, along_axis)
    noise = torch.randn(count, channels, SIZE**2, dtype=torch.double)
    points = noise @ torch.linalg.cholesky(covariance).T
    images = (points + 128).round().clamp(0, 255).to(torch.uint8).view(count, channels, SIZE, SIZE)
    entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance).item() / math.log(2)
    return images, entropy / SIZE**2


def markov_texture(count: int, channels: int = 1) -> tuple[Tensor, float]:
    """1-bit images whose rows are Markov chains of two states, and their entropy in bits/dim."""
    stay = 0.9
    first = torch.randint(2, (count, channels, SIZE, 1))
    changes = torch.rand(count, channels, SIZE, SIZE - 1) >= stay
    images = torch.cat((first, changes.long()), 3).cumsum(3) % 2
    step_entropy = -(stay * math.log2(stay) + (1 - stay) * math.log2(1 - stay))
    return images.to(torch.uint8), (1 + (SIZE - 1) * step_entropy) / SIZE


def uniform_pixels(count: int, channels: int = 1) -> tuple[Tensor, float]:
    """5-bit images of independent uniform pixels: 5 bits/dim."""
    return torch.randint(0, 32, (count, channels, SIZE, SIZE), dtype=torch.uint8), 5.0


@pytest.mark.parametrize(
    ("make_images", "bits"),
    [(gaussian_field, 8), (markov_texture, 1)],
    ids=["gaussian field", "markov texture"],
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS],
)
def test_no_model_scores_below_the_entropy(
    name: str, make_images: Callable[[int, int], tuple[Tensor, float]], bits: int
):
    images, entropy = make_images(1500, 3)
    steps = 5 if name.startswith("iaf") else 12
    model = train(MODELS[name](bits=bits), images, steps)
    metrics = evaluate(model, make_images(500, 3)[0])
    assert metrics["bits_per_dim"] > entropy - 3 * metrics["bits_per_dim_error"]
    if name not in FLOWS:
        return
    with torch.no_grad():
        x = (images[:100] + 0.5) / model.bins
        assert (model.bijection.inverse(model.bijection(x)[0])[0] - x).abs().max() < 1e-4
        assert torch.isfinite(model.bijection.inverse(torch.randn(1000, DIMENSIONS))[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "changes"),
    [
        ("maf", 1500, {"num_transforms": 2, "width": 128}),
        ("glow", 400, {"steps_per_level": 6, "width": 32, "levels": 2}),
    ],
)
def test_a_trained_flow_comes_close_to_the_entropy_of_a_gaussian_field(name, steps, changes):
    images, entropy = gaussian_field(20_000)
    model = build_model(name, **{"image_shape": (1, SIZE, SIZE), "bits": 8} | changes)
    train(model, images, steps, lr=3e-3)
    metrics = evaluate(model, gaussian_field(2000)[0])
    lower = entropy - 3 * metrics["bits_per_dim_error"]
    assert lower < metrics["bits_per_dim"] < entropy + 0.05


def test_a_trained_flow_comes_close_to_the_entropy_of_uniform_pixels():
    model = build_model(
        "maf",
        image_shape=(1, SIZE, SIZE),
        bits=5,
        num_transforms=1,
        width=32,
        transform="spline",
    )
    train(model, uniform_pixels(20_000)[0], 300, lr=1e-2)
    metrics = evaluate(model, uniform_pixels(2000)[0])
    assert 5 - 3 * metrics["bits_per_dim_error"] < metrics["bits_per_dim"] < 5.05


@pytest.mark.slow
def test_a_trained_flow_comes_close_to_the_entropy_of_a_markov_texture():
    """Pixels have two values, so the noise has to be learned and averaged over 16 samples."""
    images, entropy = markov_texture(100_000)
    model = build_model(
        "maf",
        image_shape=(1, SIZE, SIZE),
        bits=1,
        num_transforms=2,
        width=128,
        dequantization="variational",
    )
    train(model, images, 700, lr=5e-3)
    metrics = evaluate(model, markov_texture(1000)[0], num_importance_samples=16)
    lower = entropy - 3 * metrics["bits_per_dim_error"]
    assert lower < metrics["bits_per_dim"] < entropy + 0.05


def test_variational_noise_and_importance_samples_improve_the_bound():
    images, entropy = markov_texture(20_000)
    test_images, _ = markov_texture(2000)
    metrics = {}
    for dequantization in ("uniform", "variational"):
        torch.manual_seed(0)
        model = build_model(
            "glow",
            image_shape=(1, SIZE, SIZE),
            bits=1,
            steps_per_level=4,
            width=24,
            levels=1,
            gaussianize=False,
            dequantization=dequantization,
        )
        train(model, images, 250, lr=3e-3)
        single = evaluate(model, test_images)
        several = evaluate(model, test_images, num_importance_samples=8)
        assert several["bits_per_dim"] < single["bits_per_dim"]
        assert several["bits_per_dim"] > entropy - 3 * single["bits_per_dim_error"]
        metrics[dequantization] = single
    uniform = metrics["uniform"]
    limit = uniform["bits_per_dim"] + uniform["bits_per_dim_error"]
    assert metrics["variational"]["bits_per_dim"] < limit
