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
VAE = {"latent_dim": 2, "num_transforms": 2}
RANDOM_BOUNDS = {
    "nice": {"num_layers": 1},
    "vae": VAE,
    "vae with a planar posterior and a vamp prior": VAE | {"posterior": "planar", "prior": "vamp"},
    "vae with a sylvester posterior": VAE | {"posterior": "sylvester"},
    "vae with an iaf posterior and a flow prior": VAE | {"posterior": "iaf", "prior": "flow"},
    "vae with a pixelcnn decoder": VAE | {"decoder": "pixelcnn", "pixelcnn_layers": 1},
}
NOISE_SAMPLES = 256


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


@torch.no_grad()
@pytest.mark.parametrize("name", RANDOM_BOUNDS)
def test_importance_samples_raise_the_bounds_of_all_images_whose_sum_stays_below_one(name):
    images = all_images((1, 1, 3), bits=2)
    model = build_model(name.split()[0], **RANDOM_BOUNDS[name], image_shape=(1, 1, 3), bits=2)
    model.initialize(images)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    model.eval()
    assert model.likelihood == "bound"
    totals = []
    for samples in (1, 4, 16):
        repetitions = NOISE_SAMPLES // samples
        scores = model.score(
            images.repeat(repetitions, 1, 1, 1),
            num_importance_samples=samples,
            generator=torch.Generator().manual_seed(0),
        )
        expected = scores.view(repetitions, len(images)).mean(0)
        totals.append(expected.exp().sum().item())
    assert 0.01 < totals[0] < totals[1] < totals[2] < 1.01
