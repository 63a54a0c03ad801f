"""The probabilities of all images sum to 1, or to less for lower bounds."""

import pytest
import torch
from conftest import fit
from enumeration import all_images
from test_models import build_model

from flowgen.models.likelihood import LikelihoodModel

SHAPES = [(1, 1, 3), (1, 3, 1), (3, 1, 1)]
EXACT = {
    "pixelcnn": {"num_layers": 2},
    "pixelcnn with classes": {"num_layers": 1, "num_classes": 2},
}
BOUNDS = {  # without noise
    "vqvae": {"fsq_levels": [3, 2]},
    "vqvae with a codebook": {"quantizer": "vq", "codebook_size": 4},
    "vqvae with classes": {"fsq_levels": [3], "num_classes": 2},
}


def perturbed_model(name: str, arguments: dict, shape: tuple, bits: int) -> LikelihoodModel:
    """Return an initialized model whose parameters are perturbed, as if it had been trained."""
    model = build_model(name.split()[0], **arguments | {"image_shape": shape, "bits": bits})
    model.initialize(all_images(shape, bits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_the_probabilities_of_all_images_sum_to_one(name, shape, bits):
    model = perturbed_model(name, EXACT[name], shape, bits)
    assert model.likelihood == "exact"
    total = model.score(all_images(shape, bits)).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_the_probabilities_of_all_images_sum_to_one_at_most(name, shape):
    """After a short training, so that the bounds are tight enough to exceed 1 by mistake."""
    images = all_images(shape, bits=2)
    model = perturbed_model(name, BOUNDS[name], shape, bits=2)
    fit(model, lambda _: (images,), steps=60, lr=1e-2)
    assert model.likelihood == "bound"
    with torch.no_grad():
        assert 0.2 < model.score(images).exp().sum().item() <= 1
