"""The interface of every model, and properties that a likelihood must have."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from conftest import fit

import flowgen.models
from flowgen.config.compose import conf_folder, group_options
from flowgen.config.instantiate import instantiate, resolve_target
from flowgen.models.base import EvalConfig, GenerativeModel
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.glow import Glow
from flowgen.models.likelihood import LikelihoodModel


def model_config(name: str) -> dict:
    """The section of `conf/model/NAME.yaml`."""
    config = yaml.safe_load((conf_folder() / "model" / f"{name}.yaml").read_text())
    config = config.get("model", config)
    return config | ({"negative_phase": None} if name == "rbm" else {})


def build_model(name: str, **changes: object) -> Any:
    """Build a small model of `conf/model/NAME.yaml` for images of 3x8x8 pixels with 5 bits."""
    config = model_config(name) | {"image_shape": (3, 8, 8), "bits": 5}
    if "width" in config:
        config["width"] = 8
    return instantiate("model", config | changes)


def glow(**changes: object) -> Glow:
    return build_model("glow", **{"steps_per_level": 2} | changes)


FLOWS: dict[str, Callable[..., Flow]] = {
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
    "realnvp": lambda **changes: build_model("realnvp", num_blocks=1, **changes),
    "nice": lambda **changes: build_model("nice", num_layers=2, **changes),
    "nice affine": lambda **changes: build_model(
        "nice", num_layers=2, transform="affine", **changes
    ),
    "maf": lambda **changes: build_model("maf", num_transforms=2, **changes),
    "maf spline": lambda **changes: build_model(
        "maf", num_transforms=1, transform="spline", **changes
    ),
    "iaf": lambda **changes: build_model("iaf", num_transforms=1, **changes),
    "tarflow": lambda **changes: build_model(
        "tarflow", num_layers=[1, 1], transform="affine", **changes
    ),
    "tarflow mixture": lambda **changes: build_model(
        "tarflow", patch=2, num_layers=[1], local=False, roll=True, permutation="plu", **changes
    ),
    "tarflow of the paper": lambda **changes: build_model(
        "tarflow",
        num_layers=[1, 1],
        transform="affine",
        local=False,
        permutation="none",
        gaussianize=False,
        **changes,
    ),
    "jet": lambda **changes: build_model("jet", num_couplings=5, **changes),
    "jet of the paper": lambda **changes: build_model(
        "jet", patch=2, num_couplings=5, permutation="permutation", gaussianize=False, **changes
    ),
    "flow_matching": lambda **changes: build_model(
        "flow_matching", **{"num_layers": 1, "tolerance": 1e-9} | changes
    ),
    "planar": lambda **changes: build_model("planar", num_transforms=3, **changes),
    "sylvester": lambda **changes: build_model("sylvester", num_transforms=3, **changes),
    "flow_gan": lambda **changes: build_model(
        "flow_gan", **{"steps_per_level": 1, "discriminator_width": 4} | changes
    ),
    "glow with learned base": lambda **changes: glow(base="learned", levels=1, **changes),
}
OTHER_MODELS: dict[str, Callable[..., LikelihoodModel]] = {
    "pixelcnn": lambda **changes: build_model("pixelcnn", **{"num_layers": 2} | changes),
    "pixelcnn mixture": lambda **changes: build_model(
        "pixelcnn", **{"num_layers": 2, "num_components": 3} | changes
    ),
    "diffusion": lambda **changes: build_model(
        "diffusion", **{"sampling_steps": 10, "eval_times": 4} | changes
    ),
    "vae": lambda **changes: build_model("vae", **changes),
    "vae with flows": lambda **changes: build_model(
        "vae", posterior="iaf", prior="flow", **changes
    ),
    "vae pixelcnn": lambda **changes: build_model(
        "vae", posterior="sylvester", decoder="pixelcnn", pixelcnn_layers=1, **changes
    ),
    "vqvae": lambda **changes: build_model("vqvae", **changes),
    "vqvae vq": lambda **changes: build_model("vqvae", quantizer="vq", **changes),
}
MODELS: dict[str, Callable[..., LikelihoodModel]] = FLOWS | OTHER_MODELS


def random_images(
    bits: int, count: int = 64, channels: int = 3, size: tuple[int, int] = (8, 8)
) -> torch.Tensor:
    """Images of independent, uniform pixels."""
    return torch.randint(0, 2**bits, (count, channels, *size), dtype=torch.uint8)


def initialized(name: str, bits: int = 5, size: tuple[int, int] = (8, 8)) -> GenerativeModel:
    """An initialized model whose parameters are perturbed, as if it had been trained."""
    model = MODELS[name](bits=bits, image_shape=(3, *size))
    model.initialize(random_images(bits, size=size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


# Distributions of pixel values treat the first and the last value differently.
CASES = [(name, 5) for name in FLOWS] + [(name, bits) for name in OTHER_MODELS for bits in (1, 8)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def model(request: pytest.FixtureRequest) -> GenerativeModel:
    return initialized(*request.param)


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> GenerativeModel:
    return initialized(request.param)


# test_flow_matching.py tests flow matching, whose log-dets are estimates.
@pytest.fixture(params=[name for name in FLOWS if name != "flow_matching"])
def exact(request: pytest.FixtureRequest) -> GenerativeModel:
    """A model in float64 with exact log-dets."""
    return initialized(request.param).double()


def test_loss_is_a_finite_scalar_with_gradients_for_every_parameter(model):
    loss = model(random_images(model.bits, 4))
    assert loss.shape == () and torch.isfinite(loss)
    loss.backward()
    assert all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for parameter in model.parameters()
    )


def test_evaluation_is_reproducible_and_reports_error_bits_and_samples(model):
    batches = random_images(model.bits, 10).split(4)
    metrics = model.evaluate(batches)
    assert metrics == model.evaluate(batches)
    name = model.metric.name
    assert next(iter(metrics.measured)) == name and metrics[name].error > 0
    assert metrics.facts == {"bits": model.bits, "num_importance_samples": 1, "images": 10}


def test_evaluation_does_not_change_the_random_state_of_training(model):
    images = random_images(model.bits, 4)
    state = torch.get_rng_state()
    expected = torch.rand(3)
    torch.set_rng_state(state)
    model.evaluate([images])
    model.sample(2, generator=torch.Generator())
    assert torch.equal(torch.rand(3), expected)


def test_samples_are_images_with_their_log_probability(model):
    images, log_prob = model.sample(5, temperature=0.7, generator=torch.Generator().manual_seed(1))
    again, _ = model.sample(5, temperature=0.7, generator=torch.Generator().manual_seed(1))
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.uint8
    assert images.max().item() < 2**model.bits
    assert torch.equal(images, again)
    assert log_prob.shape == (5,) and torch.isfinite(log_prob).all()


def test_samples_at_temperature_zero_are_equal(model):
    images, _ = model.sample(3, temperature=0.0)
    assert (images == images[:1]).all()


def test_decoding_the_latents_returns_the_images_if_the_model_says_so(model):
    images = random_images(model.bits, 16)
    latent = model.encode(images)
    assert latent.ndim == 2 and len(latent) == 16
    restored = torch.equal(model.decode(latent), images)
    if model.bits > 1 or model.restores_images:  # few errors are possible at one bit
        assert restored == model.restores_images


def test_temperature_scales_every_latent_of_a_flow(flow):
    """Encoding a sample at temperature T returns T times the noise, also at splits."""
    flow = flow.double()
    z = torch.randn(4, 192, dtype=torch.float64)
    x, _ = flow.bijection.inverse(0.5 * z)
    assert torch.allclose(flow.bijection(x)[0], 0.5 * z, atol=1e-8)


def test_temperature_scales_every_latent(model):
    if not model.restores_images:
        pytest.skip("samples are not decoded from Gaussian latents")
    model = model.double()
    noise = torch.randn(4, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images, _ = model.sample(4, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(images, model.decode(0.5 * noise))


def test_log_prob_of_samples_equals_the_density_of_the_forward_pass(exact):
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 192, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, log_prob = exact.sample(4, generator=generator)
    x, _ = exact.bijection.inverse(z)
    again, log_det = exact.bijection(x)
    expected = -0.5 * (again.square() + math.log(2 * math.pi)).sum(1) + log_det - 192 * math.log(32)
    assert torch.allclose(log_prob, expected, atol=1e-6)


def test_in_float64_a_model_inverts_and_its_log_det_agrees_with_autograd(exact):
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    z, log_det = exact.bijection(x)
    again, inverse_log_det = exact.bijection.inverse(z)
    assert (again - x).abs().max() < 1e-9 and abs(inverse_log_det + log_det) < 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: exact.bijection(x)[0], x).view(192, 192)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det) < 1e-9


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_no_model_scores_below_the_entropy_of_uniform_pixels(name, bits):
    """Uniform pixels cost exactly `bits` bits/dim; a lower value would not be a likelihood."""
    model = MODELS[name](bits=bits)
    model.initialize(random_images(bits, 256))
    fit(model, lambda _: (random_images(bits, 32),), steps=20, lr=1e-3)
    result = model.evaluate([random_images(bits, 256)])["bits_per_dim"]
    assert bits - 3 * result.error < result.value < bits + 1


def test_more_importance_samples_tighten_the_bound():
    model = glow()
    model.initialize(random_images(5))
    images = random_images(5, 200) // 8  # few values are used, so the noise in a bin matters
    one, many = (
        model.evaluate([images], eval_config=EvalConfig(num_importance_samples=samples))
        for samples in (1, 8)
    )
    assert many["bits_per_dim"].value < one["bits_per_dim"].value


def test_variational_noise_starts_uniform():
    model = glow(dequantization="variational")
    images = random_images(5, 200)
    model.initialize(images)
    u, log_q = model.dequantizer(images, torch.float32, torch.Generator().manual_seed(0))
    assert log_q.abs().max() < 4e-3  # 192 log(1 - 2^-16)
    assert (torch.histc(u, 10, 0, 1) / u.numel() - 0.1).abs().max() < 0.01


def test_the_density_of_variational_noise_agrees_with_autograd():
    """log q(u) of one image, computed from the Jacobian of u with respect to e."""
    model = glow(dequantization="variational").double()
    images = random_images(5, 1)
    log_probs = []
    model.initialize(random_images(5))
    for parameter in model.dequantizer.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)

    def noise(e: torch.Tensor) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, **kwargs: e.view(1, 3, 8, 8))
            u, log_q = model.dequantizer(images, torch.float64, None)
        log_probs.append(log_q)
        return u.flatten()

    e = 0.5 * torch.randn(192, dtype=torch.float64)
    log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(noise, e)).logabsdet
    expected = -0.5 * (e.square() + math.log(2 * math.pi)).sum() - log_det
    assert abs(log_probs[0].item() - expected.item()) < 1e-8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": "five"}, "width must be a whole number"),
        ({"width": 0}, "width must be a whole number"),
        ({"bits": 0}, "bits must be a whole number"),
        ({"bits": 9}, "bits must be a whole number of at least 1 and at most 8"),
        ({"num_blocks": 1001}, "num_blocks must be a whole number .* at most 1000"),
        ({"steps_per_level": 0}, "steps_per_level must be a whole number"),
        ({"steps_per_level": [1, 2]}, "steps_per_level=.* for each of 3 levels"),
        ({"network": "unet"}, "network must be one of conv, resnet, gated"),
        ({"log_scale": "exp"}, "log_scale must be one of bounded, sigmoid, tanh"),
        ({"transform": "linear"}, "transform must be one of additive, "),
        ({"convolution": "qr"}, "convolution must be one of plu, plain"),
        ({"split_prior": "learned"}, "split_prior must be one of predicted, standard"),
        ({"base": "uniform"}, "base must be one of standard, learned"),
        ({"dequantization": "none"}, "dequantization must be one of uniform, variational"),
        ({"num_classes": 0}, "num_classes must be a whole number"),
        ({"levels": 4}, "choose fewer levels"),
        ({"image_shape": (3, 8, 4), "levels": 3}, r"multiple of 8, not \[8,4\]: choose fewer"),
        ({"image_shape": (1, 7, 8)}, r"an even data.size for gray images, not \[7,8\]"),
        ({"image_shape": (1, 7, 7)}, "an even data.size for gray images, not 7"),
    ],
)
def test_invalid_arguments_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        glow(**changes)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("realnvp", {"alpha": 0.5}, "alpha must lie between 0 and 0.5"),
        ("nice", {"num_couplings": 0}, "num_couplings must be a whole number"),
        ("maf", {"num_transforms": 1001}, "num_transforms must be a whole number"),
        ("planar", {"num_transforms": 0}, "num_transforms must be a whole number"),
        ("sylvester", {"width": 0}, "width must be a whole number"),
        ("jet", {"permutation": "none"}, "permutation must be one of permutation, plu"),
        ("jet", {"patch": 1, "image_shape": (1, 8, 8)}, "choose a larger patch"),
        ("tarflow", {"num_layers": []}, "num_layers must be a list"),
        ("tarflow", {"num_layers": 2}, "num_layers must be a list"),
        ("tarflow", {"permutation": "lu"}, "permutation must be one of none, actnorm, plu"),
        ("tarflow", {"patch": 3}, "patch=3 does not divide"),
        ("tarflow", {"dropout": 1.0}, "dropout must be below 1"),
        ("tarflow", {"num_heads": 3}, "is not a multiple of num_heads=3"),
    ],
)
def test_invalid_arguments_of_other_models_are_rejected(name, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(name, **changes)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in MODELS if name != "flow_matching"])
def test_images_need_not_be_square(name):
    model = initialized(name, size=(4, 8))
    images = random_images(5, 3, size=(4, 8))
    assert torch.equal(model.decode(model.encode(images)), images) == model.restores_images
    samples, log_probs = model.sample(2)
    assert samples.shape == (2, 3, 4, 8) and log_probs.isfinite().all()


@pytest.mark.parametrize("name", [name for name in FLOWS if name != "flow_matching"])
def test_log_dets_of_images_that_are_not_square(name):
    model = initialized(name, size=(4, 8)).double()
    x = torch.rand(1, 3, 4, 8, dtype=torch.double)
    _, log_det = model.bijection(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.bijection(x)[0], x).view(96, 96)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - log_det) < 1e-9


def test_an_rbm_does_not_restore_images():
    rbm = flowgen.models.RBM(visible=(1, 8, 8), hidden=6)
    images = random_images(1, 16, channels=1)
    assert not torch.equal(rbm.decode(rbm.encode(images)), images) and not rbm.restores_images


def test_flow_matching_of_images_that_are_not_square():
    model = initialized("flow_matching", size=(2, 4))
    samples, log_probs = model.sample(2)
    assert samples.shape == (2, 3, 2, 4) and log_probs.isfinite().all()
    assert torch.equal(model.decode(model.encode(samples)), samples)


def test_evaluation_settings_are_checked():
    with pytest.raises(ValueError, match="num_importance_samples must be a whole number"):
        EvalConfig(num_importance_samples=0)


@pytest.mark.parametrize("name", group_options("model"))
def test_constructor_defaults_equal_the_configuration(name):
    config = model_config(name)
    constructor = resolve_target("model", config)
    parameters = inspect.signature(constructor.__init__).parameters
    image_arguments = constructor.image_kwargs((1, 8, 8), 1, {}).keys()
    names = parameters.keys() - {"self", *image_arguments}
    assert names == config.keys() - {"_target_"}
    for argument in names - {"negative_phase"}:
        default = parameters[argument].default
        if default is inspect.Parameter.empty:
            assert not issubclass(constructor, Flow), f"{argument} has no default"
            continue
        default = list(default) if isinstance(default, tuple) else default
        assert default == config[argument], argument
        assert type(default) is type(config[argument]), argument


LIKELIHOODS = {"flow_matching": "estimate", "pixelcnn": "exact"}  # others: bound
# test_reverse_kl.py tests reverse KL, which models points of the plane alone, and test_gan.py GANs.
LIKELIHOOD_MODELS = [
    name for name in group_options("model") if name not in ("gan", "rbm", "reverse_kl")
]


@pytest.mark.parametrize("name", LIKELIHOOD_MODELS)
def test_every_model_is_exported_and_tested(name):
    exported = resolve_target("model", model_config(name)).__name__
    assert exported in flowgen.models.__all__, f"export {exported} in flowgen/models/__init__.py"
    assert name in MODELS, f"add {name} to MODELS in tests/test_models.py"


@pytest.mark.parametrize("name", LIKELIHOOD_MODELS)
def test_models_are_built_from_image_shape_and_bits_alone(name):
    constructor = resolve_target("model", model_config(name))
    with torch.device("meta"):
        model = constructor()
        assert model.image_shape == (1, 28, 28) and model.bits == 8
        model = constructor(image_shape=(3, 32, 32), bits=5)
    assert model.image_shape == (3, 32, 32) and model.bits == 5
    assert model.likelihood == LIKELIHOODS.get(name, "bound")


@pytest.mark.parametrize("name", group_options("model"))
def test_docstrings_explain_every_argument(name):
    constructor = resolve_target("model", model_config(name))
    documentation = inspect.getdoc(constructor)
    for argument in inspect.signature(constructor.__init__).parameters.keys() - {"self"}:
        assert f"\n    {argument}: " in documentation, argument


def test_models_are_imported_on_first_use():
    assert flowgen.models.Glow is Glow and flowgen.models.Flow is Flow
    assert set(flowgen.models.__all__) == set(dir(flowgen.models))
    for name in flowgen.models.__all__:
        assert getattr(flowgen.models, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = flowgen.models.Nothing


def test_a_model_can_be_averaged_and_saved(model):
    """Like the trainer does. Buffers that overlap in memory could not be copied."""
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    copy = average.module
    copy.load_state_dict(model.state_dict())
    images = random_images(model.bits, 4)
    assert torch.equal(copy.encode(images), model.encode(images))
