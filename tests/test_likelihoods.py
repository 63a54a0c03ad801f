"""Likelihoods of all images of three numbers of two bits, which must not sum to more than 1."""

from collections.abc import Callable

import pytest
import torch
from test_models import build_model

from flowgen.models.likelihood import LikelihoodModel

SHAPE = {"image_shape": (1, 1, 3), "bits": 2}
IMAGES = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * 3).view(64, 1, 1, 3)
NOISE_SAMPLES = 200  # of models whose log-probability is random
MODELS: dict[str, Callable[[], LikelihoodModel]] = {
    "nice": lambda: build_model("nice", **SHAPE, num_layers=1),
    "maf": lambda: build_model("maf", **SHAPE, num_transforms=1),
    "vqvae": lambda: build_model("vqvae", **SHAPE, fsq_levels=[3, 2]),
    "vqvae vq": lambda: build_model("vqvae", **SHAPE, quantizer="vq", codebook_size=4),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LikelihoodModel:
    """A model away from its initial parameters, as if it had been trained."""
    model = MODELS[request.param]()
    # Images that are not uniform, so that the model prefers some
    model.initialize(IMAGES[torch.randint(64, (256,)) * torch.randint(2, (256,))])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def total_probability(model: LikelihoodModel, num_importance_samples: int) -> float:
    """Return the sum of exp(E[log w]) over all images; E is a mean over repetitions."""
    repetitions = 1 if model.likelihood == "exact" else NOISE_SAMPLES // num_importance_samples
    scores = model.score(
        IMAGES.repeat(repetitions, 1, 1, 1), num_importance_samples=num_importance_samples
    )
    return scores.view(repetitions, 64).mean(0).exp().sum().item()


@torch.no_grad()
def test_probabilities_of_all_images_sum_to_one_or_to_less_if_they_are_bounds(model):
    total = total_probability(model, 1)
    if model.likelihood == "exact":
        assert total == pytest.approx(1, abs=1e-5)
    else:
        assert 0.05 < total < 1.005


@torch.no_grad()
def test_importance_samples_tighten_the_bound_of_all_images(model):
    one, eight = (total_probability(model, samples) for samples in (1, 8))
    assert one - 1e-9 < eight < 1.02
