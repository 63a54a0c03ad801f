"""Restricted Boltzmann machines against exact enumeration: energies, gradients, arguments."""

import pytest
import torch
from enumeration import (
    CHAINS,
    all_states,
    draw_states,
    exact_distribution,
    expected_variation,
    small_rbm,
    total_variation,
)
from torch import Tensor

from flowgen.models.rbm.energy import ContrastiveLoss
from flowgen.models.rbm.log_z import exact_log_z
from flowgen.models.rbm.negative_phase import CD, PCD
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import ParallelTempering
from flowgen.utils.errors import UserError


def test_energy_free_energy_and_conditionals_agree():
    rbm = small_rbm()
    v, h = all_states(4), all_states(3)
    energy = rbm.energy(v[:, None].expand(-1, 8, -1), h.expand(16, -1, -1))
    direct = torch.stack(
        [-(a @ rbm.visible_bias) - b @ rbm.hidden_bias - a @ rbm.weight @ b for a in v for b in h]
    ).view(16, 8)
    assert torch.allclose(energy, direct)
    assert torch.allclose(rbm.free_energy(v), -(-direct).logsumexp(1))
    joint = (-direct).flatten().softmax(0).view(16, 8)
    assert torch.allclose(rbm.hidden_input(v).sigmoid(), (joint / joint.sum(1, keepdim=True)) @ h)
    assert torch.allclose(rbm.visible_input(h).sigmoid(), (joint / joint.sum(0)).T @ v)


@pytest.mark.parametrize(("visible", "hidden"), [(4, 3), (3, 7), (9, 2)])
def test_log_z_is_the_same_for_both_layers(visible, hidden):
    rbm = small_rbm(visible, hidden)
    exact = exact_log_z(rbm)
    assert exact == pytest.approx(exact_log_z(rbm, "visible"), abs=1e-10)
    assert exact == pytest.approx(exact_log_z(rbm, "hidden"), abs=1e-10)
    by_states = (-rbm.free_energy(all_states(visible))).logsumexp(0).item()
    assert exact == pytest.approx(by_states, abs=1e-10)


def test_layers_too_large_to_enumerate_are_refused():
    with pytest.raises(UserError, match="estimate log Z with ais"):
        exact_log_z(RBM(30, 25))


def contrastive_gradient(
    rbm: RBM, data: Tensor, negative: Tensor, offsets: tuple[Tensor, Tensor] | None = None
) -> list[Tensor]:
    loss = contrastive_loss(rbm, data, negative, offsets)
    return list(torch.autograd.grad(loss, list(rbm.parameters())))


def contrastive_loss(
    rbm: RBM, data: Tensor, negative: Tensor, offsets: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    return ContrastiveLoss.apply(
        rbm.weight,
        rbm.visible_bias,
        rbm.hidden_bias,
        data,
        rbm.hidden_input(data).detach(),
        negative,
        rbm.hidden_input(negative).detach(),
        offsets,
    )


def test_contrastive_loss_and_its_gradient_equal_autograd():
    rbm = small_rbm(6, 5)
    data, negative = torch.rand(7, 6).double().round(), torch.rand(4, 6).double().round()
    by_autograd = rbm.free_energy(data).mean() - rbm.free_energy(negative).mean()
    assert torch.allclose(contrastive_loss(rbm, data, negative), by_autograd)
    expected = torch.autograd.grad(by_autograd, list(rbm.parameters()))
    for gradient, wanted in zip(contrastive_gradient(rbm, data, negative), expected, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-12)


def test_gradient_of_the_exact_likelihood_is_positive_minus_negative_phase():
    rbm = small_rbm()
    probabilities = exact_distribution(rbm)
    data, states = draw_states(probabilities, 9), all_states(4)
    exact = rbm.free_energy(data).mean() + (-rbm.free_energy(states)).logsumexp(0)
    exact_gradient = torch.autograd.grad(exact, list(rbm.parameters()))
    state_gradients = [contrastive_gradient(rbm, data, state[None]) for state in states]
    for index, wanted in enumerate(exact_gradient):
        pairs = zip(probabilities, state_gradients, strict=True)
        average = sum(p * gradients[index] for p, gradients in pairs)
        assert torch.allclose(average, wanted, atol=1e-10)


def test_centered_gradient_is_that_of_the_centered_parameters():
    """E = -(v - mu)'b' - c'(h - lambda) - (v - mu)'W(h - lambda); b and c follow b' and c'."""
    rbm = small_rbm(6, 5)
    data, negative = torch.rand(7, 6).double().round(), torch.rand(4, 6).double().round()
    mu, lam = torch.rand(6).double(), torch.rand(5).double()
    weight, b, c = contrastive_gradient(rbm, data, negative, (mu, lam))

    def centered_statistics(v: Tensor) -> Tensor:
        return (v - mu).T @ (rbm.hidden_input(v).sigmoid() - lam) / len(v)

    expected = centered_statistics(negative) - centered_statistics(data)
    assert torch.allclose(weight, expected, atol=1e-12)
    assert torch.allclose(b, negative.mean(0) - data.mean(0) - expected @ lam, atol=1e-12)
    hidden = [rbm.hidden_input(v).sigmoid().mean(0) for v in (data, negative)]
    assert torch.allclose(c, hidden[1] - hidden[0] - expected.T @ mu, atol=1e-12)


def gibbs_kernel(rbm: RBM) -> Tensor:
    """Return P(v'|v) of one Gibbs step, by enumeration."""
    v, h = all_states(rbm.visible), all_states(rbm.hidden)

    def conditional(log_odds: Tensor, units: Tensor) -> Tensor:
        p = log_odds.sigmoid()
        return (units * p[:, None] + (1 - units) * (1 - p[:, None])).prod(2)

    return (conditional(rbm.hidden_input(v), h) @ conditional(rbm.visible_input(h), v)).detach()


def test_cd_draws_from_the_exact_kernel_and_its_bias_falls_with_the_gibbs_steps():
    rbm = small_rbm(scale=0.7)
    states = all_states(4)
    data = states[[3, 5, 9]]
    kernel = gibbs_kernel(rbm)
    errors = []
    start = torch.zeros(16).double()
    start[[3, 5, 9]] = 1 / 3
    hidden = rbm.hidden_input(states).sigmoid()
    model_statistics = states.T @ (exact_distribution(rbm)[:, None] * hidden)
    for gibbs_steps in (1, 2, 5, 10):
        reached = start @ torch.linalg.matrix_power(kernel, gibbs_steps)
        statistics = states.T @ (reached[:, None] * hidden)
        error = (statistics - model_statistics).norm() / model_statistics.norm()
        errors.append(error.item())
        batch = data.repeat(CHAINS // 3, 1)
        negative, inputs = CD(gibbs_steps=gibbs_steps)(rbm, batch, rbm.hidden_input(batch))
        assert total_variation(negative, reached) < 1.8 * expected_variation(reached)
        assert torch.allclose(inputs, rbm.hidden_input(negative))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "whole number"),
        ({"visible": [28, 28]}, r"\(channels, height, width\)"),
        ({"bits": 8}, "data.bits"),
        ({"l2": -1.0}, "l2"),
        ({"centered": "yes"}, "centered"),
        ({"sparsity_cost": 1.0, "sparsity_target": 1.5}, "sparsity_target"),
        ({"negative_phase": "cd"}, "model/negative_phase=cd with a slash"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        RBM(**{"visible": 4, "hidden": 3} | arguments)
    with pytest.raises(UserError, match="num_temperatures must be a whole number of at least 2"):
        ParallelTempering(1, 10, adapt=True)


def test_the_default_rbm_has_binary_mnist_images_and_persistent_chains():
    rbm = RBM()
    assert rbm.image_shape == (1, 28, 28)
    assert rbm.weight.shape == (784, 500)
    assert rbm.visible_bias.shape == (784,)
    assert rbm.hidden_bias.shape == (500,)
    assert isinstance(rbm.negative_phase, PCD)
    assert rbm.negative_phase.gibbs_steps == 1
    assert rbm.negative_phase.num_chains == 100
