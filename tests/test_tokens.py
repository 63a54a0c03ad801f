"""Tests of token-autoregressive bijections and of TarFlow: dependencies, inverses and guidance."""

import pytest
import torch
from conftest import SMALL
from test_bijections import tokens
from test_models import MODELS, build_model, initialized, random_images
from torch.nn import functional as F

from flowgen.bijections.autoregressive import TokenAutoregressive
from flowgen.bijections.networks import TransformerBlock, temporary_attributes
from flowgen.bijections.univariate import Affine, GuidedAffine
from flowgen.models.flows.jet import token_masks
from flowgen.models.flows.tarflow import TarFlow


def perturb(module: torch.nn.Module, scale: float) -> None:
    """Move the parameters away from their initial values, where tokens are independent."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn_like(parameter)


def perturbed(bijection: TokenAutoregressive) -> TokenAutoregressive:
    perturb(bijection, 0.3)
    return bijection.double().eval()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_jacobian_is_triangular_in_tokens_and_with_a_local_head_in_their_values(local, reverse):
    bijection = perturbed(tokens(local=local, reverse=reverse))
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: bijection(x)[0], x)
    jacobian = jacobian.view(4, 8, 4, 8)  # value and token of z, value and token of x
    jacobian = jacobian.permute(1, 0, 3, 2).reshape(32, 32)
    if reverse:
        jacobian = jacobian.flip(0, 1)
    token = torch.arange(32) // 4
    assert not jacobian.triu(1).any()
    assert (jacobian[token[:, None] > token] != 0).float().mean() > 0.9
    within_tokens = jacobian.view(8, 4, 8, 4)[range(8), :, range(8)].tril(-1)
    assert within_tokens.any() == local


def test_frozen_weights_do_not_change_a_differentiable_inverse():
    bijection = perturbed(tokens())
    z = torch.randn(5, 4, 4, 2, dtype=torch.float64)
    with torch.no_grad():
        expected = bijection.inverse(z)[0]
    bijection.requires_grad_(False)
    x = bijection.inverse(z.requires_grad_())[0]
    assert (x - expected).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(x.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["affine", "spline", "mixture"])
@pytest.mark.parametrize("local", [False, True])
def test_cached_keys_jacobi_and_recomputation_give_the_same_image(name, local):
    bijection = perturbed(tokens(name, local, cond_channels=3))
    z = torch.randn(5, 4, 4, 2, dtype=torch.float64)
    condition = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]]
    cached, cached_log_det = bijection.inverse(z, condition)
    assert bijection.num_iterations == 8
    recomputed = torch.zeros(5, 8, 4, dtype=torch.float64)
    for index in range(8):
        context = bijection.network(recomputed, condition)[:, index]
        recomputed[:, index] = bijection.head.inverse(z.flatten(2)[:, :, index], context)[0]
    assert (recomputed.transpose(1, 2).view_as(z) - cached).abs().max() < 1e-9
    bijection.jacobi = True
    jacobi, jacobi_log_det = bijection.inverse(z, condition)
    assert (jacobi - cached).abs().max() < 1e-4
    assert (jacobi_log_det - cached_log_det).abs().max() < 1e-3
    assert 1 < bijection.num_iterations <= 8
    assert (bijection(jacobi, condition)[0] - z).abs().max() < 1e-4


@pytest.mark.parametrize("seed", [1, 2])
def test_both_inverses_agree_in_float32_if_tokens_depend_strongly_on_each_other(seed):
    """The rounding error of a token is passed on to the tokens after it."""
    torch.manual_seed(seed)
    bijection = tokens("mixture")
    perturb(bijection, 0.5)
    with torch.no_grad():
        z = torch.randn(50, 4, 4, 2)
        cached, _ = bijection.inverse(z)
        bijection.jacobi = True
        jacobi, _ = bijection.inverse(z)
    assert (jacobi - cached).abs().max() < 1e-5


def test_exact_forward_equals_that_in_float64():
    bijection = tokens("mixture", cond_channels=3)
    x = torch.randn(5, 4, 4, 2)
    perturb(bijection, 0.5)
    condition = torch.eye(3)[[0, 1, 2, 0, 1]]
    bijection.float64_forward = True
    z, log_det = bijection(x, condition)
    (gradient,) = torch.autograd.grad(z.sum(), bijection.network.embed.weight)
    assert gradient.any()
    assert z.dtype == log_det.dtype == torch.float32
    bijection.float64_forward = False
    bijection = bijection.double()
    assert torch.equal(bijection(x.double(), condition.double())[0].float(), z)


def test_inverses_report_progress_and_work_with_any_progress_wrapper():
    class Recorder:
        """A wrapper that cannot be copied, as a progress bar that holds a lock."""

        def __init__(self):
            self.calls = []

        def __call__(self, steps, description, total=None):
            self.calls.append((description, len(steps)))
            return steps

        def __deepcopy__(self, memo):
            raise TypeError("not copied")

    recorder = Recorder()
    bijection = tokens()
    bijection.progress = recorder
    bijection.head.progress = recorder
    bijection.inverse(torch.randn(2, 4, 4, 2))
    assert recorder.calls == [("tokens", 8), *[("values", 4)] * 8]


def test_encoding_in_float64_is_more_accurate_than_the_float32_forward():
    model = build_model("tarflow", bits=8, num_layers=[1, 1], width=16, permutation="actnorm")
    model.initialize(random_images(8, 256))
    perturb(model, 0.2)
    with torch.no_grad():
        images = random_images(8)
        centers = (images + 0.5) / 256
        encoded_error, forward_error = (
            (model.bijection.inverse(z)[0] - centers).abs().max()
            for z in (model.eval().encode(images), model.bijection(centers)[0])
        )
    assert encoded_error < 0.6 * forward_error


def test_samples_in_float32_belong_to_the_same_latents_as_in_float64():
    model = build_model("tarflow", bits=8, num_layers=[1, 1], width=16, permutation="actnorm")
    model.initialize(random_images(8, 256))
    perturb(model, 0.2)
    z = torch.randn(64, model.eval().dimensions)
    points, errors = [], []
    for exact in (False, True):
        with (
            torch.no_grad(),
            temporary_attributes(blocks(model), float64_inverse=exact, float64_forward=True),
        ):
            x, log_det = model.bijection.inverse(z)
            encoded, encoded_log_det = model.bijection(x)
        points.append(x)
        errors.append((encoded - z).abs().max())
        assert (log_det + encoded_log_det).abs().max() < 0.01
    assert 0 < (points[0] - points[1]).abs().max() < 0.25 / 256
    assert errors[0] < 10 * errors[1]  # the ratio depends on the processor: 1.5 to 3


def test_sample_computes_in_float32_but_decode_and_jacobi_in_float64(monkeypatch):
    model = build_model("tarflow", num_layers=[1])
    model.initialize(random_images(5))
    dtypes = []
    for name in ("_invert_sequentially", "_invert_by_jacobi"):
        invert = getattr(TokenAutoregressive, name)
        monkeypatch.setattr(
            TokenAutoregressive,
            name,
            lambda self, z, *args, invert=invert: dtypes.append(z.dtype) or invert(self, z, *args),
        )
    model.sample(2)
    model.sample(2, jacobi=True)
    model.decode(torch.randn(2, model.dimensions))
    assert dtypes == [torch.float32, torch.float64, torch.float64]


def test_inverse_with_cached_keys_has_gradients():
    bijection = perturbed(tokens())
    z = torch.randn(1, 4, 4, 2, dtype=torch.float64)
    inverse = torch.autograd.functional.jacobian(lambda z: bijection.inverse(z)[0], z)
    x = bijection.inverse(z)[0].detach()
    forward = torch.autograd.functional.jacobian(lambda x: bijection(x)[0], x)
    product = inverse.view(32, 32) @ forward.view(32, 32)
    assert torch.allclose(product, torch.eye(32, dtype=torch.float64), atol=1e-9)


def test_attention_on_a_cpu_stays_in_float32_under_autocast(monkeypatch):
    dtypes = []
    attention = F.scaled_dot_product_attention

    def recorded(*args: torch.Tensor, **kwargs: bool) -> torch.Tensor:
        attended = attention(*args, **kwargs)
        dtypes.append(attended.dtype)
        return attended

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    block = TransformerBlock(8, num_heads=2, dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        h = block(torch.randn(2, 4, 8), causal=True)
    assert h.dtype == torch.float32
    assert dtypes == [torch.float32]


def test_jacobi_is_exact_after_as_many_iterations_as_tokens():
    bijection = perturbed(perturbed(tokens()))
    bijection.jacobi = True
    bijection.tolerance = 0.0
    z = torch.randn(5, 4, 4, 2, dtype=torch.float64)
    x, _ = bijection.inverse(z)
    assert bijection.num_iterations == 8
    assert (bijection(x)[0] - z).abs().max() < 1e-9


def test_jacobi_needs_one_iteration_if_tokens_are_independent():
    bijection = tokens()
    bijection.jacobi = True
    bijection.inverse(torch.randn(5, 4, 4, 2))
    assert bijection.num_iterations == 1


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("tarflow")])
def test_both_inverses_of_a_whole_model_agree(name):
    model = initialized(name)
    z = torch.randn(2, 192)
    cached, _ = model.bijection.inverse(z)
    for module in model.modules():
        if isinstance(module, TokenAutoregressive):
            module.jacobi = True
    assert (model.bijection.inverse(z)[0] - cached).abs().max() < 1e-4


def test_masks_of_jet_are_halves_of_the_patches_each_with_its_complement():
    masks = token_masks(3, 4, 4)
    assert len({tuple(mask[0].flatten().tolist()) for mask in masks}) == 6
    for mask in masks:
        assert mask.shape == (3, 4, 4)
        assert torch.equal(mask[0], mask[2])
        assert mask[0].sum() == 8
    for mask, complement in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(mask, ~complement)


@pytest.mark.parametrize(("rows", "columns", "count"), [(2, 6, 6), (1, 4, 4), (4, 1, 4)])
def test_masks_of_jet_for_images_that_are_not_square(rows, columns, count):
    masks = token_masks(3, rows, columns)
    assert len(masks) == count
    for mask in masks:
        assert mask.shape == (3, rows, columns)
        assert mask[0].sum() == rows * columns / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "patch=3 does not divide"),
        ({"num_heads": 3}, "not a multiple of (num_)?heads=3"),
        ({"dropout": 1.0}, "below 1"),
        ({"num_layers": 2}, "(one for|number per) each block|list"),
        ({"num_layers": [2, 0]}, "whole number"),
        ({"permutation": "all"}, "none, actnorm, plu"),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model("tarflow", **changes)


def affine_with_classes() -> TarFlow:
    model = build_model("tarflow", num_layers=[1, 1], transform="affine", num_classes=3)
    model.initialize(random_images(5), torch.arange(64) % 3)
    perturb(model, 0.1)
    return model.double().eval()


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_guided_affine_has_the_density_of_the_guided_gaussian(weight):
    """The density is proportional to p(x | class)^(1 + weight) / p(x)^weight."""
    affine = Affine()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    class_params = torch.tensor([[0.5, 0.3]], dtype=torch.float64)
    free_params = torch.tensor([[-0.4, -0.2]], dtype=torch.float64)

    def log_density(transform, params, x):
        z, log_slope = transform.forward(x, params)
        return -0.5 * z.square() + log_slope

    params = torch.cat((class_params.expand(9, -1), free_params.expand(9, -1)))
    guided = log_density(GuidedAffine(affine, weight), params, x.repeat(2, 1))
    assert torch.equal(guided[:9], guided[9:])
    class_term = (1 + weight) * log_density(affine, class_params, x)
    expected = class_term - weight * log_density(affine, free_params, x)
    difference = expected - guided[:9]
    assert (difference - difference.mean()).abs().max() < 1e-12
    z = torch.randn(18, 1, dtype=torch.float64)
    inverse, _ = GuidedAffine(affine, weight).inverse(z, params)
    assert (GuidedAffine(affine, weight).forward(inverse, params)[0] - z).abs().max() < 1e-12


def test_guidance_does_not_widen_a_gaussian_that_is_wider_given_the_class():
    wide = torch.tensor([[-1.0, 0.0]])
    narrow = torch.tensor([[1.0, 0.0]])
    params = torch.cat((wide, narrow))
    _, log_slope = GuidedAffine(Affine(), 5.0).forward(torch.zeros(2, 1), params)
    assert torch.allclose(log_slope[0], Affine().forward(torch.zeros(1, 1), wide)[1])


def test_guidance_is_gradual_and_independent_of_the_inverse():
    model = affine_with_classes()

    def sample(**kwargs: float) -> torch.Tensor:
        return model.sample(6, 0.7, torch.Generator().manual_seed(0), label=1, **kwargs)[0].float()

    unguided = sample(guidance=0.0)
    guided = sample(guidance=3.0)
    assert torch.equal(unguided, sample(guidance=1e-9))
    assert not torch.equal(unguided, guided)
    assert torch.equal(sample(guidance=3.0, jacobi=True), guided)
    assert torch.equal(sample(jacobi=True), unguided)
    assert all(1 <= block.num_iterations <= 4 for block in blocks(model))


def blocks(model: TarFlow) -> list[TokenAutoregressive]:
    return [module for module in model.modules() if isinstance(module, TokenAutoregressive)]


def test_guidance_moves_away_from_the_mean_of_all_classes():
    """At the start the networks ignore the class, and guidance acts on the latents' means alone.

    p(x | y)^(1 + w) / p(x)^w is then the Gaussian about (1 + w) means[y] - w mean(means).
    """
    model = build_model(
        "tarflow",
        image_shape=(1, 4, 4),
        patch=2,
        num_layers=[1, 1],
        num_classes=3,
        transform="affine",
    )
    model.initialize(torch.randint(32, (64, 1, 4, 4), dtype=torch.uint8))
    model.double().eval().guidance = 2.0
    noise = torch.randn(5, 16, dtype=torch.float64)
    one_hot = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]]
    x, _ = model._invert(noise + one_hot @ model.means, one_hot)
    z, _ = model.bijection(x, one_hot)
    expected = noise + 3 * one_hot @ model.means - 2 * model.means.mean(0)
    assert torch.allclose(z, expected, atol=1e-9)


def test_training_drops_some_labels_and_evaluation_drops_none():
    model = affine_with_classes()
    labels = torch.arange(3).repeat(100)
    one_hot = model.one_hot(labels)
    assert torch.equal(one_hot.argmax(1), labels)
    assert one_hot.amax() == 1
    dropped = model.train().one_hot(labels).amax(1) < 0.5
    assert 0.03 < dropped.double().mean() < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": None},
        {"num_classes": 3, "condition_networks": False},
        {"num_classes": 3, "transform": "mixture"},
    ],
)
def test_guidance_needs_classes_and_affine_transforms(changes):
    model = build_model("tarflow", **{"num_layers": [1], "transform": "affine"} | changes)
    with pytest.raises(ValueError, match="guidance needs"):
        model.sample(2, guidance=1.0)


def test_sample_logs_the_number_of_jacobi_iterations(command, images, tmp_path):
    run = tmp_path / "run"
    overrides = [override for override in SMALL if "steps_per_level" not in override]
    status, _, error = command(
        "train",
        "model=tarflow",
        *overrides,
        f"data.root={images}",
        "trainer.steps=2",
        f"output_dir={run}",
    )
    assert status == 0, error
    sample = ["sample", "--run", run, "--jacobi", "--count", 2]
    status, _, error = command(*sample)
    assert status == 0, error
    assert "Jacobi iterations per block: " in error
    status, _, error = command(*sample, "--out", tmp_path / "two.zip")
    assert status == 0, error
    assert error.count("Jacobi iterations per block: ") == 1
    status, _, error = command("sample", "--run", run, "--guidance", 1)
    assert status == 1
    assert "model.num_classes=10" in error
    assert len(error.splitlines()) == 1
    for options in (["--jacobi", "--steps", 3], ["--guidance", 1, "--sampler", "gibbs"]):
        assert command("sample", *options)[0] == 1


def test_jacobi_needs_a_model_of_tokens(tiny_run, command):
    status, _, error = command("sample", "--run", tiny_run, "--jacobi")
    assert status == 1
    assert "model=tarflow" in error
    assert len(error.splitlines()) == 1
