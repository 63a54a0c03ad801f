"""The probabilities of all images sum to 1, or to less for lower bounds."""

import pytest
import torch
from enumeration import all_images
from test_models import build_model

SHAPES = [(1, 1, 3), (1, 3, 1), (3, 1, 1)]
EXACT = {
    "pixelcnn": {"num_layers": 2},
    "pixelcnn with classes": {"num_layers": 1, "num_classes": 2},
}


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_the_probabilities_of_all_images_sum_to_one(name, shape, bits):
    images = all_images(shape, bits)
    model = build_model(name.split()[0], **EXACT[name] | {"image_shape": shape, "bits": bits})
    model.initialize(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        assert model.likelihood == "exact"
        assert model.score(images).exp().sum().item() == pytest.approx(1, abs=1e-5)
