"""Token-autoregressive bijections: what depends on what, and that every way back leads to the same image."""

import pytest
import torch
from conftest import SMALL
from test_bijections import tokens
from test_models import MODELS, load_from_checkpoint, noise, started

from flowgen.bijections.autoregressive import TokenAutoregressive
from flowgen.bijections.univariate import Affine, GuidedAffine
from flowgen.models.flows.jet import token_masks
from flowgen.models.flows.tarflow import TarFlow


def pushed(bijection: TokenAutoregressive) -> TokenAutoregressive:
    """In float64, and pushed off its start."""
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return bijection.double().eval()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_the_jacobian_is_triangular_in_the_tokens_and_with_a_local_head_in_their_numbers(
    local, backwards
):
    bijection = pushed(tokens(local=local, backwards=backwards))
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: bijection(x)[0], x).view(
        4, 8, 4, 8
    )  # number, token of z; of x
    by_token = jacobian.permute(1, 0, 3, 2).reshape(32, 32)
    by_token = by_token.flip(0, 1) if backwards else by_token
    token = torch.arange(32) // 4
    assert (
        not by_token.triu(1).any() and (by_token[token[:, None] > token] != 0).float().mean() > 0.9
    )
    within = by_token.view(8, 4, 8, 4)[range(8), :, range(8)].tril(-1)
    assert within.any() == local


@pytest.mark.parametrize("name", ["affine", "spline", "mixture"])
@pytest.mark.parametrize("local", [False, True])
def test_kept_keys_sweeps_and_reading_all_anew_give_the_same_image(name, local):
    bijection = pushed(tokens(name, local, seen=3))
    z, condition = (
        torch.randn(5, 4, 4, 2, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]],
    )
    kept, log_det = bijection.inverse(z, condition)
    plain = torch.zeros(5, 8, 4, dtype=torch.float64)
    for i in range(8):
        context = bijection.network(plain, condition)[:, i]
        plain[:, i] = bijection.head.inverse(z.flatten(2)[:, :, i], context)[0]
    assert (plain.transpose(1, 2).view_as(z) - kept).abs().max() < 1e-9
    bijection.jacobi = True
    swept, its_log_det = bijection.inverse(z, condition)
    assert (swept - kept).abs().max() < 1e-4 and (its_log_det - log_det).abs().max() < 1e-3
    assert 1 < bijection.sweeps <= 8 and (bijection(swept, condition)[0] - z).abs().max() < 1e-4


@pytest.mark.parametrize("seed", [1, 2])
def test_kept_keys_and_sweeps_agree_in_float32_however_strongly_tokens_depend(seed):
    """What rounding does to a token it passes on to those after it."""
    torch.manual_seed(seed)
    bijection = tokens("mixture")
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
        z = torch.randn(50, 4, 4, 2)
        kept, _ = bijection.inverse(z)
        bijection.jacobi = True
        swept, _ = bijection.inverse(z)
    assert (swept - kept).abs().max() < 1e-5


def test_exact_numbers_are_those_of_float64():
    bijection, x = tokens("mixture", seen=3), torch.randn(5, 4, 4, 2)
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    condition = torch.eye(3)[[0, 1, 2, 0, 1]]
    bijection.exact = True
    z, log_det = bijection(x, condition)
    (gradient,) = torch.autograd.grad(z.sum(), bijection.network.embed.weight)
    assert gradient.any() and z.dtype == log_det.dtype == torch.float32
    bijection.exact, bijection = False, bijection.double()
    assert torch.equal(bijection(x.double(), condition.double())[0].float(), z)


def test_an_encoded_image_comes_back_nearer_than_by_float32_forward():
    model = load_from_checkpoint(
        "tarflow", bits=8, num_layers=[1, 1], width=16, permutation="actnorm"
    )
    model.initialize(noise(8, 256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        images = noise(8)
        centres = (images + 0.5) / 256
        encoded, forward = (
            (model.bijection.inverse(z)[0] - centres).abs().max()
            for z in (model.eval().encode(images), model.bijection(centres)[0])
        )
    assert encoded < 0.6 * forward


def test_after_as_many_sweeps_as_tokens_the_image_is_exact_however_strongly_they_depend():
    bijection = pushed(pushed(tokens()))
    bijection.jacobi, bijection.close = True, 0.0
    z = torch.randn(5, 4, 4, 2, dtype=torch.float64)
    x, _ = bijection.inverse(z)
    assert bijection.sweeps == 8 and (bijection(x)[0] - z).abs().max() < 1e-9


def test_sweeps_are_few_where_tokens_hardly_depend_on_each_other():
    bijection = tokens()
    bijection.jacobi = True
    bijection.inverse(torch.randn(5, 4, 4, 2))
    assert bijection.sweeps == 1  # at the start each token is left as it is


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("tarflow")])
def test_of_a_whole_model_too(name):
    model = started(name)
    z = torch.randn(2, 192)
    kept, _ = model.bijection.inverse(z)
    for module in model.modules():
        if isinstance(module, TokenAutoregressive):
            module.jacobi = True
    assert (model.bijection.inverse(z)[0] - kept).abs().max() < 1e-4


def test_masks_of_jet_are_halves_of_the_patches_each_with_its_inverse():
    masks = token_masks(3, 4)
    assert len({tuple(mask[0].flatten().tolist()) for mask in masks}) == 6
    assert all(
        mask.shape == (3, 4, 4) and torch.equal(mask[0], mask[2]) and mask[0].sum() == 8
        for mask in masks
    )
    assert all(torch.equal(one, ~other) for one, other in zip(masks[::2], masks[1::2], strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 3}, "patch=3 does not divide"),
        ({"num_heads": 3}, "not a multiple of heads=3"),
        ({"dropout": 1.0}, "below 1"),
        ({"num_layers": 2}, "one for each block"),
        ({"num_layers": [2, 0]}, "whole number"),
        ({"permutation": "all"}, "none, actnorm, plu"),
    ],
)
def test_arguments_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        load_from_checkpoint("tarflow", **changes)


def affine_with_classes() -> TarFlow:
    model = load_from_checkpoint("tarflow", num_layers=[1, 1], transform="affine", num_classes=3)
    model.initialize(noise(5), torch.arange(64) % 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_guided_map_is_that_of_the_gaussian_given_the_class_over_that_without(weight):
    affine, x = Affine(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    given, without = (
        torch.tensor([[0.5, 0.3]], dtype=torch.float64),
        torch.tensor([[-0.4, -0.2]], dtype=torch.float64),
    )

    def log_density(transform, parameters, x):
        z, log_slope = transform.forward(x, parameters)
        return -0.5 * z.square() + log_slope

    both = torch.cat((given.expand(9, -1), without.expand(9, -1)))
    guided = log_density(GuidedAffine(affine, weight), both, x.repeat(2, 1))
    assert torch.equal(guided[:9], guided[9:])
    expected = (1 + weight) * log_density(affine, given, x) - weight * log_density(
        affine, without, x
    )
    difference = expected - guided[:9]
    assert (difference - difference.mean()).abs().max() < 1e-12
    z = torch.randn(18, 1, dtype=torch.float64)
    there, _ = GuidedAffine(affine, weight).inverse(z, both)
    assert (GuidedAffine(affine, weight).forward(there, both)[0] - z).abs().max() < 1e-12


def test_guidance_never_widens_a_gaussian_where_the_class_is_the_vaguer_one():
    vague, sharp = torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    _, log_slope = GuidedAffine(Affine(), 5.0).forward(torch.zeros(2, 1), torch.cat((vague, sharp)))
    assert torch.allclose(log_slope[0], Affine().forward(torch.zeros(1, 1), vague)[1])


def test_guidance_moves_away_from_the_mean_of_all_classes():
    """Where maps see no class, p(x | y)^(1 + w) / p(x)^w is the Gaussian about (1 + w) means[y] - w mean(means)."""
    model = load_from_checkpoint(
        "tarflow",
        image_shape=(1, 4, 4),
        patch=2,
        num_layers=[1, 1],
        num_classes=3,
        transform="affine",
    )
    model.initialize(torch.randint(32, (64, 1, 4, 4), dtype=torch.uint8))
    model.double().eval().guidance = 2.0
    z, one_hot = (
        torch.randn(5, 16, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]],
    )
    x, _ = model._carry(z + one_hot @ model.means, one_hot)
    found, _ = model.bijection(x, one_hot)
    assert torch.allclose(found, z + 3 * one_hot @ model.means - 2 * model.means.mean(0), atol=1e-9)


def test_guidance_is_gradual_and_the_same_by_sweeps():
    model = affine_with_classes()

    def drawn(**how: float) -> torch.Tensor:
        return model.sample(6, 0.7, torch.Generator().manual_seed(0), label=1, **how)[0].float()

    none, little, much = (drawn(guidance=weight) for weight in (0.0, 1e-9, 3.0))
    assert torch.equal(none, little) and not torch.equal(none, much)
    assert torch.equal(drawn(guidance=3.0, jacobi=True), much) and torch.equal(
        drawn(jacobi=True), none
    )
    assert all(1 <= sweeps <= 4 for sweeps in model.sweeps())


def test_training_tells_the_networks_no_class_now_and_then_and_judging_always_tells():
    model, labels = affine_with_classes(), torch.arange(3).repeat(100)
    assert (
        torch.equal(model._one_hot(labels).argmax(1), labels) and model._one_hot(labels).amax() == 1
    )
    told = model.train()._one_hot(labels).amax(1)
    assert 0.03 < (told < 0.5).double().mean() < 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": None},
        {"num_classes": 3, "condition_networks": False},
        {"num_classes": 3, "transform": "mixture"},
    ],
)
def test_guidance_says_what_it_needs(changes):
    model = load_from_checkpoint("tarflow", **{"num_layers": [1], "transform": "affine"} | changes)
    with pytest.raises(ValueError, match="guidance needs classes and affine maps"):
        model.sample(2, guidance=1.0)


def test_sample_tells_how_many_sweeps_it_took(command, images, tmp_path):
    words = [word for word in SMALL if "steps_per_level" not in word]
    status, _, error = command(
        "train",
        "model=tarflow",
        *words,
        f"data.root={images}",
        "trainer.steps=2",
        f"output_dir={tmp_path / 'run'}",
    )
    assert status == 0, error
    status, _, error = command("sample", "--run", tmp_path / "run", "--jacobi", "--count", 2)
    assert status == 0 and "Jacobi iterations per block: " in error
    status, _, error = command(
        "sample", "--run", tmp_path / "run", "--jacobi", "--count", 2, "--out", tmp_path / "two.zip"
    )
    assert status == 0 and error.count("Jacobi iterations per block: ") == 1
    status, _, error = command("sample", "--run", tmp_path / "run", "--guidance", 1)
    assert status == 1 and "model.num_classes=10" in error and len(error.splitlines()) == 1
    for words in (["--jacobi", "--steps", 3], ["--guidance", 1, "--sampler", "gibbs"]):
        assert command("sample", *words)[0] == 1


def test_jacobi_is_for_models_of_tokens(tiny_run, command):
    status, _, error = command("sample", "--run", tiny_run, "--jacobi")
    assert status == 1 and "model=tarflow" in error and len(error.splitlines()) == 1
