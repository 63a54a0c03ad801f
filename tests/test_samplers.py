"""Samplers of restricted Boltzmann machines: started in the exact law, they stay in it."""

from itertools import islice

import pytest
import torch
from enumeration import CHAINS, SAMPLERS, distance, draw, floor, law, machine, states

from flowgen.models.rbm.log_z import AnnealingState, _sweep, exact_log_z
from flowgen.models.rbm.sampling import (
    ParallelTempering,
    ReplicaExchange,
    bernoulli_from_logits,
    equal_parts,
    gibbs,
    mean_field,
    white_noise,
)


@pytest.mark.parametrize("method", ["gibbs", "tempering"])
def test_samplers_started_in_the_law_stay_in_it(method):
    rbm = machine(scale=1.5)
    visible, _ = next(islice(SAMPLERS[method](rbm, draw(law(rbm))), 20, None))
    assert distance(visible, law(rbm)) < 1.8 * floor(law(rbm))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("method", ["gibbs", "tempering"])
def test_temperature_is_one_over_beta(method, temperature):
    rbm = machine(scale=0.5)
    beta = 1 / temperature
    visible, _ = next(islice(SAMPLERS[method](rbm, white_noise(rbm, CHAINS), beta=beta), 60, None))
    expected = law(rbm, beta=beta)
    assert distance(visible, expected) < 1.8 * floor(expected)


def test_tempering_keeps_the_law_of_every_rung():
    """A swap by beta times the free energy, rather than by (v, h) or by the scaled machine's own, fails here."""
    rbm = machine(5, 4, scale=1.5)
    ladder = ParallelTempering(4, CHAINS, adapt=False)
    ladder.allocate(4)
    ladder.double()
    starts = torch.stack([draw(law(rbm, rung=float(beta))) for beta in ladder.betas])
    ladder.hidden.copy_(
        bernoulli_from_logits(ladder.betas[:, None, None] * rbm.hidden_input(starts))
    )
    for _ in range(20):
        before = ladder.place.clone()
        visible, _ = ladder.sweep(rbm)
    assert not torch.equal(before, ladder.place)
    for beta, found in zip(ladder.betas, ladder.at(visible), strict=True):
        assert distance(found, law(rbm, rung=float(beta))) < 1.8 * floor(law(rbm, rung=float(beta)))


def test_swaps_by_free_energies_keep_the_law_of_every_rung():
    """A swap by beta times the free energy, rather than by that of the scaled machine, fails here."""
    rbm = machine(5, 4, scale=1.5)
    rungs = ReplicaExchange(4, CHAINS, adapt=False).double()
    starts = torch.stack([draw(law(rbm, rung=float(beta))) for beta in rungs.betas])
    chains = AnnealingState(rbm, starts.flatten(0, 1), None)
    for _ in range(20):
        before = rungs.place.clone()
        _sweep(chains, rungs)
    assert not torch.equal(before, rungs.place)
    for beta, found in zip(rungs.betas, rungs.at(chains.visible.view_as(starts)), strict=True):
        assert distance(found, law(rbm, rung=float(beta))) < 1.8 * floor(law(rbm, rung=float(beta)))


def test_tempering_swaps_whole_states():
    """Visible units and hidden inputs of a replica stay together, so that the next sweep starts from its own hidden units."""
    rbm = machine(5, 4)
    ladder = ParallelTempering(6, 50, adapt=False)
    ladder.allocate(4)
    ladder.double()
    for _ in range(5):
        visible, inputs = ladder.sweep(rbm)
        assert torch.allclose(ladder.top(inputs), rbm.hidden_input(ladder.top(visible)))
        assert torch.equal(ladder.place.sort(0).values, torch.arange(6)[:, None].expand(6, 50))


def test_the_way_is_cut_in_equal_parts():
    cuts = equal_parts(torch.tensor([0.0, 0.2, 1.0]), torch.tensor([3.0, 1.0]), 8)
    assert torch.allclose(
        cuts, torch.tensor([0, 1 / 30, 2 / 30, 0.1, 4 / 30, 5 / 30, 0.2, 0.6, 1.0])
    )


def test_an_adapted_ladder_swaps_evenly_and_counts_round_trips():
    rbm = machine(12, 10, scale=2.0)
    ladder = ParallelTempering(6, 200, adapt=True)
    ladder.allocate(10)
    ladder.double()
    spread = []
    for _ in range(10):
        for _ in range(99):
            ladder.sweep(rbm)
        spread.append((ladder.swap_rates().max() - ladder.swap_rates().min()).item())
        ladder.sweep(rbm)
    assert spread[-1] < 0.08 < spread[0]
    assert ladder.betas[0] == 0 and ladder.betas[-1] == 1 and (ladder.betas.diff() > 0).all()
    assert ladder.round_trips > 100


@pytest.mark.parametrize("method", SAMPLERS)
def test_clamped_pixels_never_change(method):
    rbm = machine(6, 5)
    known = torch.tensor([True, False, True, False, False, True])
    start = white_noise(rbm, 40)
    for visible, expected in islice(SAMPLERS[method](rbm, start, known=known), 10):
        assert torch.equal(visible[:, known], start[:, known]) and torch.equal(
            expected[:, known], start[:, known]
        )
    assert not torch.equal(visible, start)


@pytest.mark.parametrize("method", ["gibbs", "tempering"])
def test_clamped_chains_reach_the_exact_conditional(method):
    rbm = machine(5, 4)
    known = torch.tensor([True, True, False, False, False])
    start = torch.where(known, torch.tensor([1.0, 0, 0, 0, 0]).double(), white_noise(rbm, CHAINS))
    visible, _ = next(islice(SAMPLERS[method](rbm, start, known=known), 40, None))
    fits = (states(5)[:, :2] == torch.tensor([1.0, 0.0])).all(1)
    conditional = law(rbm) * fits / law(rbm)[fits].sum()
    assert distance(visible, conditional) < 1.8 * floor(conditional)


def test_the_chains_of_a_batch_are_independent():
    """One uniform vector for all of them would make them equal from the same start."""
    rbm = machine(8, 6, scale=0.1)
    visible, _ = next(gibbs(rbm, torch.zeros(2000, 8).double()))
    pairs = torch.stack((visible[:1000].flatten(), visible[1000:].flatten()))
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.05


def elbo(machine, visible):
    """The bound in nats, (batch,), where the hidden units are at their best for `visible`."""
    inputs = machine.hidden_input(visible)
    hidden = inputs.sigmoid()
    entropies = [torch.special.entr(p) + torch.special.entr(1 - p) for p in (visible, hidden)]
    return (
        visible @ machine.visible_bias
        + (inputs * hidden).sum(1)
        + entropies[0].sum(1)
        + entropies[1].sum(1)
    )


def test_mean_field_climbs_to_a_bound_below_log_z():
    rbm = machine(6, 5, scale=1.5)
    bounds = torch.stack(
        [elbo(rbm, mu) for mu, _ in islice(mean_field(rbm, torch.rand(10, 6).double()), 50)]
    )
    assert (bounds.diff(dim=0) > -1e-10).all() and (bounds[-1] > bounds[0]).all()
    assert bounds.max() <= exact_log_z(rbm)
    fixed, again = islice(mean_field(rbm, torch.rand(10, 6).double()), 400, 402)
    assert torch.allclose(fixed[0], again[0], atol=1e-8)
