"""Samplers of RBMs: chains that start in the exact distribution keep it."""

from itertools import islice

import pytest
import torch
from enumeration import (
    CHAINS,
    SAMPLERS,
    all_states,
    draw_states,
    exact_distribution,
    expected_variation,
    small_rbm,
    total_variation,
)
from torch import Tensor

from flowgen.models.rbm.log_z import AnnealingState, _bridge_step, exact_log_z
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import (
    ParallelTempering,
    ReplicaExchange,
    bernoulli_from_logits,
    gibbs,
    mean_field,
    space_betas,
    white_noise,
)


def assert_distribution(visible: Tensor, probabilities: Tensor) -> None:
    assert total_variation(visible, probabilities) < 1.8 * expected_variation(probabilities)


def parallel_tempering(num_temperatures: int, chains: int, hidden: int, adapt: bool):
    replicas = ParallelTempering(num_temperatures, chains, adapt=adapt)
    replicas.allocate(hidden)
    return replicas.double()


@pytest.mark.parametrize("sampler", ["gibbs", "tempering"])
def test_samplers_keep_the_exact_distribution(sampler):
    rbm = small_rbm(scale=1.5)
    probabilities = exact_distribution(rbm)
    visible, _ = next(islice(SAMPLERS[sampler](rbm, draw_states(probabilities)), 20, None))
    assert_distribution(visible, probabilities)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("sampler", ["gibbs", "tempering"])
def test_temperature_is_one_over_beta(sampler, temperature):
    rbm = small_rbm(scale=0.5)
    beta = 1 / temperature
    chains = SAMPLERS[sampler](rbm, white_noise(rbm, CHAINS), beta=beta)
    visible, _ = next(islice(chains, 60, None))
    assert_distribution(visible, exact_distribution(rbm, beta=beta))


def test_parallel_tempering_keeps_the_distribution_at_every_temperature():
    """Swaps by beta F(v), or that ignore the hidden units, fail here."""
    rbm = small_rbm(5, 4, scale=1.5)
    replicas = parallel_tempering(4, CHAINS, 4, adapt=False)
    start = torch.stack([draw_states(exact_distribution(rbm, float(b))) for b in replicas.betas])
    log_odds = replicas.betas[:, None, None] * rbm.hidden_input(start)
    replicas.hidden.copy_(bernoulli_from_logits(log_odds))
    for _ in range(20):
        before = replicas.beta_index.clone()
        visible, _ = replicas.step(rbm)
    assert not torch.equal(before, replicas.beta_index)
    for beta, states in zip(replicas.betas, replicas.by_beta(visible), strict=True):
        assert_distribution(states, exact_distribution(rbm, float(beta)))


def test_swaps_by_free_energy_keep_the_distribution_at_every_temperature():
    """Swaps by beta F(v), rather than by F_beta(v), fail here."""
    rbm = small_rbm(5, 4, scale=1.5)
    replicas = ReplicaExchange(4, CHAINS, adapt=False).double()
    start = torch.stack([draw_states(exact_distribution(rbm, float(b))) for b in replicas.betas])
    state = AnnealingState(rbm, start.flatten(0, 1), None)
    for _ in range(20):
        before = replicas.beta_index.clone()
        _bridge_step(state, replicas)
    assert not torch.equal(before, replicas.beta_index)
    visible = replicas.by_beta(state.visible.view_as(start))
    for beta, states in zip(replicas.betas, visible, strict=True):
        assert_distribution(states, exact_distribution(rbm, float(beta)))


def test_parallel_tempering_swaps_whole_states():
    """Visible units and hidden inputs of a replica stay together."""
    rbm = small_rbm(5, 4)
    replicas = parallel_tempering(6, 50, 4, adapt=False)
    for _ in range(5):
        visible, inputs = replicas.step(rbm)
        expected = rbm.hidden_input(replicas.at_beta_one(visible))
        assert torch.allclose(replicas.at_beta_one(inputs), expected)
        indices = replicas.beta_index.sort(0).values
        assert torch.equal(indices, torch.arange(6)[:, None].expand(6, 50))


def test_space_betas_makes_intervals_of_equal_length():
    betas = space_betas(torch.tensor([0.0, 0.2, 1.0]), torch.tensor([3.0, 1.0]), 8)
    expected = torch.tensor([0, 1 / 30, 2 / 30, 0.1, 4 / 30, 5 / 30, 0.2, 0.6, 1.0])
    assert torch.allclose(betas, expected)


def test_adapted_temperatures_swap_evenly_and_make_round_trips():
    rbm = small_rbm(12, 10, scale=2.0)
    replicas = parallel_tempering(6, 200, 10, adapt=True)
    spread = []
    for _ in range(10):
        for _ in range(99):
            replicas.step(rbm)
        spread.append((replicas.swap_rates().max() - replicas.swap_rates().min()).item())
        replicas.step(rbm)
    assert spread[-1] < 0.08 < spread[0]
    assert replicas.betas[0] == 0
    assert replicas.betas[-1] == 1
    assert (replicas.betas.diff() > 0).all()
    assert replicas.round_trips > 100


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clamped_pixels_never_change(sampler):
    rbm = small_rbm(6, 5)
    known = torch.tensor([True, False, True, False, False, True])
    start = white_noise(rbm, 40)
    for visible, probabilities in islice(SAMPLERS[sampler](rbm, start, known=known), 10):
        assert torch.equal(visible[:, known], start[:, known])
        assert torch.equal(probabilities[:, known], start[:, known])
    assert not torch.equal(visible, start)


@pytest.mark.parametrize("sampler", ["gibbs", "tempering"])
def test_clamped_chains_reach_the_exact_conditional(sampler):
    rbm = small_rbm(5, 4)
    known = torch.tensor([True, True, False, False, False])
    image = torch.tensor([1.0, 0, 0, 0, 0]).double()
    start = torch.where(known, image, white_noise(rbm, CHAINS))
    visible, _ = next(islice(SAMPLERS[sampler](rbm, start, known=known), 40, None))
    is_consistent = (all_states(5)[:, :2] == torch.tensor([1.0, 0.0])).all(1)
    joint = exact_distribution(rbm) * is_consistent
    assert_distribution(visible, joint / joint.sum())


def test_the_chains_of_a_batch_are_independent():
    """Shared random numbers would make chains with the same start equal."""
    rbm = small_rbm(8, 6, scale=0.1)
    visible, _ = next(gibbs(rbm, torch.zeros(2000, 8).double()))
    pairs = torch.stack((visible[:1000].flatten(), visible[1000:].flatten()))
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.05


def elbo(rbm: RBM, visible: Tensor) -> Tensor:
    """Return the lower bound of log Z in nats, (batch,), with optimal hidden means."""
    inputs = rbm.hidden_input(visible)
    hidden = inputs.sigmoid()
    entropies = [torch.special.entr(p) + torch.special.entr(1 - p) for p in (visible, hidden)]
    negative_energy = visible @ rbm.visible_bias + (inputs * hidden).sum(1)
    return negative_energy + entropies[0].sum(1) + entropies[1].sum(1)


def test_mean_field_increases_a_lower_bound_of_log_z():
    rbm = small_rbm(6, 5, scale=1.5)
    chains = islice(mean_field(rbm, torch.rand(10, 6).double()), 50)
    bounds = torch.stack([elbo(rbm, means) for means, _ in chains])
    assert (bounds.diff(dim=0) > -1e-10).all()
    assert (bounds[-1] > bounds[0]).all()
    assert bounds.max() <= exact_log_z(rbm)
    (before, _), (after, _) = islice(mean_field(rbm, torch.rand(10, 6).double()), 400, 402)
    assert torch.allclose(before, after, atol=1e-8)
