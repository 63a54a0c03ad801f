"""Restricted Boltzmann machines, held to exact enumeration: energies, gradients, and what is refused."""

import pytest
import torch
from enumeration import CHAINS, distance, draw, floor, law, machine, states
from torch import Tensor

from flowgen.models.rbm.energy import ContrastiveLoss
from flowgen.models.rbm.log_z import exact_log_z
from flowgen.models.rbm.negative_phase import CD
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import ParallelTempering
from flowgen.utils.errors import UserError


def test_energy_free_energy_and_conditionals_are_one_law():
    rbm = machine()
    v, h = states(4), states(3)
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
def test_log_z_is_the_same_by_either_layer(visible, hidden):
    rbm = machine(visible, hidden)
    exact = exact_log_z(rbm)
    assert (
        exact == pytest.approx(exact_log_z(rbm, "visible"), abs=1e-10) == exact_log_z(rbm, "hidden")
    )
    assert exact == pytest.approx(
        (-rbm.free_energy(states(visible))).logsumexp(0).item(), abs=1e-10
    )


def test_layers_too_large_to_enumerate_are_refused():
    with pytest.raises(UserError, match="ais"):
        exact_log_z(RBM(30, 25))


def contrast_gradient(
    rbm: RBM, data: Tensor, negative: Tensor, offsets: tuple[Tensor, Tensor] | None = None
) -> list[Tensor]:
    loss = ContrastiveLoss.apply(
        rbm.weight,
        rbm.visible_bias,
        rbm.hidden_bias,
        data,
        rbm.hidden_input(data).detach(),
        negative,
        rbm.hidden_input(negative).detach(),
        offsets,
    )
    return list(torch.autograd.grad(loss, list(rbm.parameters())))


def test_loss_and_gradient_by_hand_are_those_of_autograd():
    rbm = machine(6, 5)
    data, negative = torch.rand(7, 6).double().round(), torch.rand(4, 6).double().round()
    plain = rbm.free_energy(data).mean() - rbm.free_energy(negative).mean()
    inputs = rbm.hidden_input(data).detach(), rbm.hidden_input(negative).detach()
    loss = ContrastiveLoss.apply(
        rbm.weight, rbm.visible_bias, rbm.hidden_bias, data, inputs[0], negative, inputs[1], None
    )
    assert torch.allclose(loss, plain)
    expected = torch.autograd.grad(plain, list(rbm.parameters()))
    for found, wanted in zip(contrast_gradient(rbm, data, negative), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_gradient_of_the_exact_likelihood_is_positive_minus_negative_phase():
    rbm = machine()
    data, every = draw(law(rbm), 9), states(4)
    exact = rbm.free_energy(data).mean() + (-rbm.free_energy(every)).logsumexp(0)
    exact_gradient = torch.autograd.grad(exact, list(rbm.parameters()))
    of_states = [contrast_gradient(rbm, data, state[None]) for state in every]
    for number, wanted in enumerate(exact_gradient):
        found = sum(p * gradient[number] for p, gradient in zip(law(rbm), of_states, strict=True))
        assert torch.allclose(found, wanted, atol=1e-10)


def test_centred_gradient_is_that_of_the_centred_parameters():
    """E = -(v - mu)'b' - c'(h - lambda) - (v - mu)'W(h - lambda), whose b' and c' the biases follow."""
    rbm = machine(6, 5)
    data, negative = torch.rand(7, 6).double().round(), torch.rand(4, 6).double().round()
    mu, lam = torch.rand(6).double(), torch.rand(5).double()
    weight, b, c = contrast_gradient(rbm, data, negative, (mu, lam))

    def statistics(v: Tensor) -> Tensor:
        return (v - mu).T @ (rbm.hidden_input(v).sigmoid() - lam) / len(v)

    expected = statistics(negative) - statistics(data)
    assert torch.allclose(weight, expected, atol=1e-12)
    assert torch.allclose(b, negative.mean(0) - data.mean(0) - expected @ lam, atol=1e-12)
    hidden = [rbm.hidden_input(v).sigmoid().mean(0) for v in (data, negative)]
    assert torch.allclose(c, hidden[1] - hidden[0] - expected.T @ mu, atol=1e-12)


def transition(rbm: RBM) -> Tensor:
    """P(v'|v) of one Gibbs sweep, by enumeration."""
    v, h = states(rbm.visible), states(rbm.hidden)

    def conditional(log_odds: Tensor, units: Tensor) -> Tensor:
        p = log_odds.sigmoid()
        return (units * p[:, None] + (1 - units) * (1 - p[:, None])).prod(2)

    return (conditional(rbm.hidden_input(v), h) @ conditional(rbm.visible_input(h), v)).detach()


def test_the_bias_of_cd_falls_with_its_sweeps_and_its_draws_follow_the_exact_kernel():
    rbm = machine(scale=0.7)
    data = states(4)[[3, 5, 9]]
    kernel, errors = transition(rbm), []
    counts = torch.zeros(16).double()
    counts[[3, 5, 9]] = 1 / 3
    model = states(4).T @ (law(rbm)[:, None] * rbm.hidden_input(states(4)).sigmoid())
    for sweeps in (1, 2, 5, 10):
        reached = counts @ torch.linalg.matrix_power(kernel, sweeps)
        expected = states(4).T @ (reached[:, None] * rbm.hidden_input(states(4)).sigmoid())
        errors.append(((expected - model).norm() / model.norm()).item())
        starts = data.repeat(CHAINS // 3, 1)
        negative, inputs = CD(gibbs_steps=sweeps)(rbm, starts, rbm.hidden_input(starts))
        assert distance(negative, reached) < 1.8 * floor(reached)
        assert torch.allclose(inputs, rbm.hidden_input(negative))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden": 0}, "whole number"),
        ({"visible": [28, 28]}, "channels, height and width"),
        ({"bits": 8}, "data.bits"),
        ({"l2": -1.0}, "l2"),
        ({"centred": "yes"}, "centred"),
        ({"sparsity": 1.0, "activity": 1.5}, "activity"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(UserError, match=words):
        RBM(**{"visible": 4, "hidden": 3} | arguments)
    with pytest.raises(UserError, match="temperatures=2"):
        ParallelTempering(1, 10, adapt=True)
