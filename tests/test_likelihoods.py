"""The probabilities of all images sum to 1, or to less for lower bounds.

The images have three numbers of 2 bits (64 images), as gray pixels in a row or as one color pixel.
"""

import pytest
import torch
from conftest import fit
from enumeration import all_images
from test_models import build_model

from flowgen.config.compose import group_options
from flowgen.models.likelihood import LikelihoodModel

SHAPES = [(1, 1, 3), (1, 3, 1), (3, 1, 1)]
EXACT = {
    "pixelcnn": {"num_layers": 2},
    "pixelcnn with classes": {"num_layers": 1, "num_classes": 2},
    "pixelcnn with mixtures": {"num_layers": 2, "num_components": 3},
}
VAE = {"latent_dim": 2, "num_transforms": 2}
GRAY = (1, 1, 3)
COLOR = (3, 1, 1)  # for models that split gray images of an even size only
RANDOM_BOUNDS = {
    "glow": (COLOR, {"steps_per_level": 1}),
    "glow with variational dequantization": (
        COLOR,
        {"steps_per_level": 1, "dequantization": "variational"},
    ),
    "flow_gan": (COLOR, {"steps_per_level": 1, "discriminator_width": 4}),
    "jet": (COLOR, {"num_couplings": 2}),
    "realnvp": (GRAY, {"num_blocks": 1}),
    "nice": (GRAY, {"num_layers": 1}),
    "maf": (GRAY, {"num_transforms": 1}),
    "iaf": (GRAY, {"num_transforms": 1}),
    "tarflow": (GRAY, {"num_layers": [1]}),
    "planar": (GRAY, {"num_transforms": 2}),
    "sylvester": (GRAY, {"num_transforms": 2}),
    "reverse_kl": ((2, 1, 1), {"density": "u1"}),  # points of the plane, two numbers
    "vae": (GRAY, VAE),
    "vae with a planar posterior and a vamp prior": (
        GRAY,
        VAE | {"posterior": "planar", "prior": "vamp"},
    ),
    "vae with a sylvester posterior": (GRAY, VAE | {"posterior": "sylvester"}),
    "vae with an iaf posterior and a flow prior": (
        GRAY,
        VAE | {"posterior": "iaf", "prior": "flow"},
    ),
    "vae with a pixelcnn decoder": (GRAY, VAE | {"decoder": "pixelcnn", "pixelcnn_layers": 1}),
}
NOISE_SAMPLES = 256
BOUNDS = {  # without noise
    "vqvae": {"fsq_levels": [3, 2]},
    "vqvae with a codebook": {"quantizer": "vq", "codebook_size": 4},
    "vqvae with classes": {"fsq_levels": [3], "num_classes": 2},
}
NOT_ENUMERATED = {
    "diffusion": "test_diffusion.py: its importance samples are averaged",
    "flow_matching": "test_flow_matching.py: a solver would take minutes for so many samples",
    "gan": "it has no likelihood",
    "rbm": "test_log_z.py: its probabilities have another normalization",
}


def perturbed_model(
    name: str, arguments: dict, shape: tuple, bits: int, noise: float = 0.3
) -> LikelihoodModel:
    """Return an initialized model whose parameters are perturbed, as if it had been trained."""
    model = build_model(name.split()[0], **arguments | {"image_shape": shape, "bits": bits})
    model.initialize(all_images(shape, bits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", group_options("model"))
def test_every_model_is_enumerated(name):
    tested = {case.split()[0] for case in EXACT | BOUNDS | RANDOM_BOUNDS}
    assert name in tested | set(NOT_ENUMERATED), f"add {name} to tests/test_likelihoods.py"


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
    fit(model, lambda _: (images,), steps=150, lr=1e-2)
    assert model.likelihood == "bound"
    with torch.no_grad():
        assert 0.2 < model.score(images).exp().sum().item() <= 1


@torch.no_grad()
@pytest.mark.parametrize("name", RANDOM_BOUNDS)
def test_importance_samples_raise_the_bounds_of_all_images_whose_sum_stays_below_one(name):
    shape, arguments = RANDOM_BOUNDS[name]
    images = all_images(shape, bits=2)
    model = perturbed_model(name, arguments, shape, bits=2, noise=0.1)
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
