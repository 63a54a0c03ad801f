"""Token-autoregressive bijections: what depends on what, and that every way back leads to the same image."""

import pytest
import torch
from test_bijections import tokens
from test_models import MODELS, model_of, started

from flowgen.bijections import TokenAutoregressive


def pushed(bijection: TokenAutoregressive) -> TokenAutoregressive:
    """In float64, and pushed off its start."""
    with torch.no_grad():
        for parameter in bijection.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return bijection.double().eval()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_the_jacobian_is_triangular_in_the_tokens_and_with_a_local_head_in_their_numbers(local, backwards):
    bijection = pushed(tokens(local=local, backwards=backwards))
    x = torch.randn(1, 4, 4, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: bijection(x)[0], x).view(4, 8, 4, 8)  # number, token of z; of x
    by_token = jacobian.permute(1, 0, 3, 2).reshape(32, 32)
    by_token = by_token.flip(0, 1) if backwards else by_token
    token = torch.arange(32) // 4
    assert not by_token.triu(1).any() and (by_token[token[:, None] > token] != 0).float().mean() > 0.9
    within = by_token.view(8, 4, 8, 4)[range(8), :, range(8)].tril(-1)
    assert within.any() == local


@pytest.mark.parametrize("name", ["affine", "spline", "mixture"])
@pytest.mark.parametrize("local", [False, True])
def test_kept_keys_sweeps_and_reading_all_anew_give_the_same_image(name, local):
    bijection = pushed(tokens(name, local, seen=3))
    z, condition = torch.randn(5, 4, 4, 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]]
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": 3}, "patch=3 does not divide"),
        ({"heads": 3}, "not a multiple of heads=3"),
        ({"dropout": 1.0}, "below 1"),
        ({"layers": 2}, "one for each block"),
        ({"layers": [2, 0]}, "whole number"),
        ({"mixing": "all"}, "none, actnorm, plu"),
    ],
)
def test_arguments_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        model_of("tarflow", **changes)
