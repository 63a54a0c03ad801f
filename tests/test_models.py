"""The contract of every model, and what a likelihood must obey."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import yaml
from conftest import fit

from flowgen.config.compose import conf_folder, group_options
from flowgen.config.instantiate import build, resolve_target
from flowgen.models.base import EvalConfig, GenerativeModel
from flowgen.models.flows.glow import Glow


def read_config_of(name: str) -> dict:
    config = yaml.safe_load((conf_folder() / "model" / f"{name}.yaml").read_text())
    config = config.get("model", config)
    return config | ({"negative_phase": None} if name == "rbm" else {})


def load_from_checkpoint(name: str, **changes: object) -> GenerativeModel:
    """The model of `conf/model/NAME.yaml` for images of 3x8x8 at 5 bits, but for `changes`."""
    config = read_config_of(name)
    return build(
        "model",
        config
        | {"image_shape": (3, 8, 8), "bits": 5}
        | ({"width": 8} if "width" in config else {})
        | changes,
    )


def glow(**changes: object) -> Glow:
    return load_from_checkpoint("glow", **{"steps_per_level": 2} | changes)


MODELS: dict[str, Callable[..., GenerativeModel]] = {
    "glow": glow,
    "glow resnet": lambda **changes: glow(network="resnet", **changes),
    "glow gated": lambda **changes: glow(network="gated", num_blocks=2, **changes),
    "glow additive": lambda **changes: glow(transform="additive", convolution="plain", **changes),
    "glow of the thesis": lambda **changes: glow(
        gaussianize=False,
        split_prior="standard",
        log_scale="sigmoid",
        final_actnorm=False,
        **changes,
    ),
    **{
        f"glow {name}": lambda name=name, **changes: glow(transform=name, **changes)
        for name in ("multiplicative", "spline", "mixture")
    },
    "glow variational": lambda **changes: glow(dequantization="variational", **changes),
    "realnvp": lambda **changes: load_from_checkpoint("realnvp", num_blocks=1, **changes),
    "nice": lambda **changes: load_from_checkpoint("nice", num_layers=2, **changes),
    "nice affine": lambda **changes: load_from_checkpoint(
        "nice", num_layers=2, transform="affine", **changes
    ),
    "maf": lambda **changes: load_from_checkpoint("maf", num_transforms=2, **changes),
    "maf spline": lambda **changes: load_from_checkpoint(
        "maf", num_transforms=1, transform="spline", **changes
    ),
    "iaf": lambda **changes: load_from_checkpoint("iaf", num_transforms=1, **changes),
    "tarflow": lambda **changes: load_from_checkpoint(
        "tarflow", num_layers=[1, 1], transform="affine", **changes
    ),
    "tarflow mixture": lambda **changes: load_from_checkpoint(
        "tarflow", patch=2, num_layers=[1], local=False, roll=True, permutation="plu", **changes
    ),
    "tarflow of the paper": lambda **changes: load_from_checkpoint(
        "tarflow",
        num_layers=[1, 1],
        transform="affine",
        local=False,
        permutation="none",
        gaussianize=False,
        **changes,
    ),
    "jet": lambda **changes: load_from_checkpoint("jet", num_couplings=5, **changes),
    "jet of the paper": lambda **changes: load_from_checkpoint(
        "jet", patch=2, num_couplings=5, permutation="permutation", gaussianize=False, **changes
    ),
    "flow matching": lambda **changes: load_from_checkpoint(
        "flow_matching", **{"num_layers": 1, "tolerance": 1e-9} | changes
    ),
    "planar": lambda **changes: load_from_checkpoint("planar", num_transforms=3, **changes),
    "sylvester": lambda **changes: load_from_checkpoint("sylvester", num_transforms=3, **changes),
    "glow with learned base": lambda **changes: glow(base="learned", levels=1, **changes),
}


def noise(bits: int, count: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randint(0, 2**bits, (count, channels, 8, 8), dtype=torch.uint8)


def started(name: str, bits: int = 5) -> GenerativeModel:
    """A model started from noise and pushed off that start, as training would."""
    model = MODELS[name](bits=bits)
    model.initialize(noise(bits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> GenerativeModel:
    return started(request.param)


@pytest.fixture(
    params=[name for name in MODELS if name != "flow matching"]
)  # which see test_flow_matching.py
def exact(request: pytest.FixtureRequest) -> GenerativeModel:
    """The same in float64, where log-dets are no estimates."""
    return started(request.param).double()


def test_loss_is_a_finite_scalar_with_gradients_for_every_parameter(model):
    loss = model(noise(5, 4))
    assert loss.shape == () and torch.isfinite(loss)
    loss.backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in model.parameters()
    )


def test_evaluation_names_its_metric_error_bits_and_draws_and_repeats_itself(model):
    batches = noise(5, 10).split(4)
    found = model.evaluate(batches)
    assert found == model.evaluate(batches)
    assert next(iter(found.measured)) == model.metric.name and found[model.metric.name].error > 0
    assert found.facts == {"bits": 5, "draws": 1, "images": 10}


def test_evaluation_leaves_the_random_state_of_training_alone(model):
    images, before = noise(5, 4), torch.get_rng_state()
    expected = torch.rand(3)
    torch.set_rng_state(before)
    model.evaluate([images])
    model.sample(2, generator=torch.Generator())
    assert torch.equal(torch.rand(3), expected)


def test_samples_are_levels_sorted_by_something(model):
    images, worth = model.sample(5, temperature=0.7, generator=torch.Generator().manual_seed(1))
    again, _ = model.sample(5, temperature=0.7, generator=torch.Generator().manual_seed(1))
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8 and images.max() < 32
    assert worth.shape == (5,) and torch.isfinite(worth).all() and torch.equal(images, again)


def test_temperature_zero_leaves_one_image(model):
    images, _ = model.sample(3, temperature=0.0)
    assert (images == images[:1]).all()


def test_decoding_the_latents_returns_the_levels(model):
    images = noise(5, 16)
    latent = model.encode(images)
    assert latent.shape == (16, 3 * 8 * 8) and torch.equal(model.decode(latent), images)


def test_temperature_scales_every_latent(model):
    """At the top and at every split: encoding the sample again finds T times the same draw."""
    model = model.double()
    z = torch.randn(4, 192, dtype=torch.float64)
    x, _ = model.bijection.inverse(0.5 * z)
    assert torch.allclose(model.bijection(x)[0], 0.5 * z, atol=1e-8)
    drawn = torch.randn(4, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        model.sample(4, 0.5, torch.Generator().manual_seed(1))[0], model.decode(0.5 * drawn)
    )


def test_log_prob_of_samples_is_the_density_that_the_inverse_carried(exact):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 192, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, carried = exact.sample(4, generator=generator)
    x, _ = exact.bijection.inverse(z)
    again, log_det = exact.bijection(x)
    expected = -0.5 * (again.square() + math.log(2 * math.pi)).sum(1) + log_det - 192 * math.log(32)
    assert torch.allclose(carried, expected, atol=1e-6)


def test_in_float64_a_model_inverts_and_its_log_det_is_that_of_autograd(exact):
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    z, log_det = exact.bijection(x)
    again, back = exact.bijection.inverse(z)
    assert (again - x).abs().max() < 1e-9 and abs(back + log_det) < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: exact.bijection(x)[0], x).view(192, 192)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det) < 1e-9


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_no_model_scores_below_the_entropy_of_uniform_levels(name, bits):
    """iid uniform levels cost exactly `bits` each: less would mean that the figure is no likelihood."""
    model = MODELS[name](bits=bits)
    model.initialize(noise(bits, 256))
    fit(model, lambda _: (noise(bits, 32),), steps=20, lr=1e-3)
    found = model.evaluate([noise(bits, 256)])["bits_per_dim"]
    assert bits - 3 * found.error < found.value < bits + 0.6


def test_more_draws_tighten_the_bound():
    model = glow()
    model.initialize(noise(5))
    images = noise(5, 200) // 8  # an eighth of the levels, so that the noise within a bin matters
    once, often = (
        model.evaluate([images], how=EvalConfig(draws=draws))["bits_per_dim"].value
        for draws in (1, 8)
    )
    assert often < once


def test_variational_noise_starts_uniform():
    model = glow(dequantization="variational")
    images = noise(5, 200)
    model.initialize(images)
    u, log_q = model.dequantizer(images, torch.float32, torch.Generator().manual_seed(0))
    assert log_q.abs().max() < 4e-3  # of 192 noises below 1 - 2^-16
    assert (torch.histc(u, 10, 0, 1) / u.numel() - 0.1).abs().max() < 0.01


def test_the_density_of_variational_noise_is_that_of_its_draws():
    """One image's u from e by autograd, against the log q that comes with it."""
    model, images, seen = glow(dequantization="variational").double(), noise(5, 1), []
    model.initialize(noise(5))
    for parameter in model.dequantizer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)

    def draw(e: torch.Tensor) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, **how: e.view(1, 3, 8, 8))
            u, log_q = model.dequantizer(images, torch.float64, None)
        seen.append(log_q)
        return u.flatten()

    e = 0.5 * torch.randn(192, dtype=torch.float64)
    slope = torch.linalg.slogdet(torch.autograd.functional.jacobian(draw, e)).logabsdet
    expected = -0.5 * (e.square() + math.log(2 * math.pi)).sum() - slope
    assert abs(seen[0].item() - expected.item()) < 1e-8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": "five"}, "whole number"),
        ({"width": 0}, "whole number"),
        ({"network": "unet"}, "conv, resnet, gated"),
        ({"log_scale": "exp"}, "bounded, sigmoid, tanh"),
        ({"levels": 4}, "fewer levels"),
    ],
)
def test_arguments_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        glow(**changes)
    with pytest.raises(ValueError, match="draws must be a whole number"):
        EvalConfig(draws=0)


@pytest.mark.parametrize("name", group_options("model"))
def test_every_argument_stands_in_the_configuration(name):
    config = read_config_of(name)
    target = resolve_target("model", config)
    of_the_images = target.image_kwargs((1, 8, 8), 1).keys()
    assert inspect.signature(target.__init__).parameters.keys() - {
        "self",
        *of_the_images,
    } == config.keys() - {"_target_"}


def test_a_model_can_be_averaged_and_saved(model):
    """As the trainer does: buffers that share memory with themselves cannot be copied."""
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    copy = average.module
    copy.load_state_dict(model.state_dict())
    images = noise(5, 4)
    assert torch.equal(copy.encode(images), model.encode(images))
