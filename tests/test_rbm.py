"""Restricted Boltzmann machines, held to exact enumeration on machines small enough for it."""

from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor

from flowgen.config import build
from flowgen.errors import FlowgenError
from flowgen.models import Evaluation
from flowgen.models.partition import ais, bridge, exact_log_z, reverse_ais
from flowgen.models.rbm import METHODS, RBM, likelihood
from flowgen.models.rbm.contrast import Contrast
from flowgen.models.rbm.gibbs import draw_bits, elbo, gibbs, mean_field, white_noise
from flowgen.models.rbm.likelihood import log_likelihood
from flowgen.models.rbm.negative_phase import CD, PCD, MeanField, NegativePhase, Tempering
from flowgen.models.rbm.tempering import Ladder, tempering

CHAINS = 40_000
SAMPLERS = METHODS | {"tempering": partial(tempering, temperatures=4)}


def machine(visible: int = 4, hidden: int = 3, scale: float = 1.0, **arguments: object) -> RBM:
    """A small one in float64, with parameters and base rates of order `scale`."""
    rbm = RBM(visible, hidden, **arguments).double()
    with torch.no_grad():
        for parameter in (*rbm.parameters(), rbm.base):
            parameter.copy_(scale * torch.randn_like(parameter))
    return rbm


def states(units: int) -> Tensor:
    return (torch.arange(2**units)[:, None] >> torch.arange(units) & 1).double()


def law(rbm: RBM, rung: float = 1.0, beta: float = 1.0) -> Tensor:
    """P(v) of every state at a rung of the ladder, by enumerating both layers."""
    v, h = states(rbm.visible), states(rbm.hidden)
    energy = rbm.energy(v[:, None].expand(-1, len(h), -1), h.expand(len(v), -1, -1))
    return (-rung * beta * energy + ((1 - rung) * v @ rbm.base)[:, None]).logsumexp(1).softmax(0).detach()


def draw(probabilities: Tensor, count: int = CHAINS) -> Tensor:
    return states(len(probabilities).bit_length() - 1)[torch.multinomial(probabilities, count, replacement=True)]


def distance(visible: Tensor, probabilities: Tensor) -> float:
    """Total variation between the states found and their law."""
    numbers = (visible.long() << torch.arange(visible.shape[1])).sum(1)
    found = torch.bincount(numbers, minlength=len(probabilities)) / len(numbers)
    return 0.5 * (found - probabilities).abs().sum().item()


def floor(probabilities: Tensor, count: int = CHAINS) -> float:
    """The total variation that as many independent draws would show, about: a mean of 1/2 sum sqrt(2 p (1-p) / (pi count))."""
    return 0.5 * (2 * probabilities * (1 - probabilities) / (torch.pi * count)).sqrt().sum().item()


def test_energy_free_energy_and_conditionals_are_one_law():
    rbm = machine()
    v, h = states(4), states(3)
    energy = rbm.energy(v[:, None].expand(-1, 8, -1), h.expand(16, -1, -1))
    direct = torch.stack([-(a @ rbm.visible_bias) - b @ rbm.hidden_bias - a @ rbm.weight @ b for a in v for b in h]).view(16, 8)
    assert torch.allclose(energy, direct)
    assert torch.allclose(rbm.free_energy(v), -(-direct).logsumexp(1))
    joint = (-direct).flatten().softmax(0).view(16, 8)
    assert torch.allclose(rbm.hidden_input(v).sigmoid(), (joint / joint.sum(1, keepdim=True)) @ h)
    assert torch.allclose(rbm.visible_input(h).sigmoid(), (joint / joint.sum(0)).T @ v)


@pytest.mark.parametrize(("visible", "hidden"), [(4, 3), (3, 7), (9, 2)])
def test_log_z_is_the_same_by_either_layer(visible, hidden):
    rbm = machine(visible, hidden)
    exact = exact_log_z(rbm)
    assert exact == pytest.approx(exact_log_z(rbm, "visible"), abs=1e-10) == exact_log_z(rbm, "hidden")
    assert exact == pytest.approx((-rbm.free_energy(states(visible))).logsumexp(0).item(), abs=1e-10)


def test_layers_too_large_to_enumerate_are_refused():
    with pytest.raises(FlowgenError, match="ais"):
        exact_log_z(RBM(30, 25))


def contrast_gradient(rbm: RBM, data: Tensor, negative: Tensor, offsets: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    loss = Contrast.apply(
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
    loss = Contrast.apply(rbm.weight, rbm.visible_bias, rbm.hidden_bias, data, inputs[0], negative, inputs[1], None)
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
        negative, inputs = CD(sweeps=sweeps)(rbm, starts, rbm.hidden_input(starts))
        assert distance(negative, reached) < 1.8 * floor(reached)
        assert torch.allclose(inputs, rbm.hidden_input(negative))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-2 * errors[0]


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
    ladder = Ladder(4, CHAINS, adapt=False)
    ladder.allocate(4)
    ladder.double()
    starts = torch.stack([draw(law(rbm, rung=float(beta))) for beta in ladder.betas])
    ladder.hidden.copy_(draw_bits(ladder.betas[:, None, None] * rbm.hidden_input(starts)))
    for _ in range(20):
        before = ladder.place.clone()
        visible, _ = ladder.sweep(rbm)
    assert not torch.equal(before, ladder.place)
    for beta, found in zip(ladder.betas, ladder.at(visible), strict=True):
        assert distance(found, law(rbm, rung=float(beta))) < 1.8 * floor(law(rbm, rung=float(beta)))


def test_tempering_swaps_whole_states():
    """Visible units and hidden inputs of a replica stay together, so that the next sweep starts from its own hidden units."""
    rbm = machine(5, 4)
    ladder = Ladder(6, 50, adapt=False)
    ladder.allocate(4)
    ladder.double()
    for _ in range(5):
        visible, inputs = ladder.sweep(rbm)
        assert torch.allclose(ladder.top(inputs), rbm.hidden_input(ladder.top(visible)))
        assert torch.equal(ladder.place.sort(0).values, torch.arange(6)[:, None].expand(6, 50))


def test_an_adapted_ladder_swaps_evenly_and_counts_round_trips():
    rbm = machine(12, 10, scale=2.0)
    ladder = Ladder(6, 200, adapt=True)
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
        assert torch.equal(visible[:, known], start[:, known]) and torch.equal(expected[:, known], start[:, known])
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


@pytest.mark.parametrize("name", ["flowgen.models.negative_phase.PCD", "flowgen.models.rbm.negative_phase.PCD"])
def test_negative_phases_are_built_by_the_names_that_checkpoints_hold(name):
    phase = {"_target_": name, "sweeps": 1, "chains": 3}
    rbm = build("model", {"_target_": "flowgen.models.RBM", "visible": 4, "hidden": 3, "negative_phase": phase})
    assert isinstance(rbm.negative_phase, PCD) and rbm.negative_phase.chains == 3


def test_the_chains_of_a_batch_are_independent():
    """One uniform vector for all of them would make them equal from the same start."""
    rbm = machine(8, 6, scale=0.1)
    visible, _ = next(gibbs(rbm, torch.zeros(2000, 8).double()))
    pairs = torch.stack((visible[:1000].flatten(), visible[1000:].flatten()))
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.05


def test_mean_field_climbs_to_a_bound_below_log_z():
    rbm = machine(6, 5, scale=1.5)
    bounds = torch.stack([elbo(rbm, mu) for mu, _ in islice(mean_field(rbm, torch.rand(10, 6).double()), 50)])
    assert (bounds.diff(dim=0) > -1e-10).all() and (bounds[-1] > bounds[0]).all()
    assert bounds.max() <= exact_log_z(rbm)
    fixed, again = islice(mean_field(rbm, torch.rand(10, 6).double()), 400, 402)
    assert torch.allclose(fixed[0], again[0], atol=1e-8)


def test_forward_and_reverse_ais_straddle_the_exact_value():
    """Short runs err on either side, long ones agree within their errors; so does bridge sampling."""
    rbm = machine(10, 8, scale=2.0)
    exact = exact_log_z(rbm)
    samples = draw(law(rbm), 400)
    short_forward = torch.tensor([ais(rbm, betas=5, chains=5).log_z for _ in range(60)])
    short_reverse = torch.tensor([reverse_ais(rbm, draw(law(rbm), 5), betas=5).log_z for _ in range(60)])
    assert short_forward.mean() < exact - 0.3 and short_reverse.mean() > exact + 0.3
    by_bridge, _ = bridge(rbm, temperatures=8, chains=100, burn_in=300, sweeps=400)
    for estimate in (ais(rbm, betas=1000, chains=400), reverse_ais(rbm, samples, betas=1000), by_bridge):
        assert 0 < estimate.error < 0.1 and abs(estimate.log_z - exact) < 4 * estimate.error
        assert estimate.effective_size > 10


def test_importance_weights_are_unbiased_however_short_the_annealing():
    rbm = machine(scale=0.7)
    exact = exact_log_z(rbm)
    for estimate in (ais(rbm, betas=3, chains=CHAINS), reverse_ais(rbm, draw(law(rbm)), betas=3)):
        assert estimate.error < 0.02 and abs(estimate.log_z - exact) < 4 * estimate.error


def test_errors_of_the_estimates_are_their_spread():
    rbm = machine(8, 6, scale=1.5)
    for estimates in (
        [ais(rbm, betas=100, chains=100) for _ in range(40)],
        [bridge(rbm, temperatures=4, chains=20, burn_in=100, sweeps=50)[0] for _ in range(40)],
    ):
        spread = torch.tensor([estimate.log_z for estimate in estimates]).std().item()
        stated = torch.tensor([estimate.error for estimate in estimates]).mean().item()
        assert 0.6 < spread / stated < 1.6


def test_the_sandwich_says_whether_it_may_be_quoted(monkeypatch):
    rbm = machine(30, 24, scale=0.3)
    monkeypatch.setattr(likelihood, "LADDER", {"burn_in": 200, "sweeps": 200})
    generator = torch.Generator().manual_seed(0)
    figures = log_likelihood(
        rbm, rbm.free_energy(white_noise(rbm, 50)).detach(), Evaluation(thorough=True, betas=300, chains=100), generator
    )
    assert figures["quotable"] and figures["verdict"].startswith("quotable")
    assert figures["log_likelihood_forward"] + 1 > figures["log_likelihood"] > figures["log_likelihood_reverse"] - 1
    hard = machine(30, 24, scale=6.0)
    figures = log_likelihood(
        hard, hard.free_energy(white_noise(hard, 50)).detach(), Evaluation(thorough=True, betas=2, chains=100), generator
    )
    assert not figures["quotable"] and figures["verdict"].startswith("do not quote")


def test_a_machine_that_diverged_is_not_quotable(monkeypatch):
    monkeypatch.setattr(likelihood, "LADDER", {"burn_in": 10, "sweeps": 10})
    rbm = machine(30, 24)
    rbm.weight.data[:] = float("nan")
    free = rbm.free_energy(white_noise(rbm, 20)).detach()
    figures = log_likelihood(rbm, free, Evaluation(thorough=True, betas=5, chains=10), torch.Generator().manual_seed(0))
    assert not figures["quotable"] and "diverged" in figures["verdict"]


def trained(negative_phase: NegativePhase, steps: int = 20, **arguments: object) -> RBM:
    torch.manual_seed(1)
    rbm = RBM([1, 4, 4], 6, negative_phase=negative_phase, **arguments)
    levels = (torch.rand(64, 1, 4, 4) < 0.3).to(torch.uint8)
    rbm.initialize(levels)
    optimizer = torch.optim.SGD(rbm.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        rbm(levels).backward()
        optimizer.step()
    return rbm


@pytest.mark.parametrize("phase", [PCD(sweeps=2, chains=7), Tempering(sweeps=1, chains=7, temperatures=4, adapt=True)])
def test_chains_survive_a_ragged_batch_and_go_on(phase):
    rbm = trained(phase, 3)
    holder, name = (phase, "hidden_units") if isinstance(phase, PCD) else (phase.ladder, "hidden")
    before = getattr(holder, name).clone()
    negative, inputs = phase(rbm, torch.zeros(3, 16), torch.zeros(3, 6))
    assert negative.shape == (7, 16) and inputs.shape == (7, 6) and getattr(holder, name).shape == before.shape
    assert not torch.equal(before, getattr(holder, name))
    rbm.weight.data.normal_(0, 3)
    draws = []
    for kept in (before, 1 - before):
        setattr(holder, name, kept)
        torch.manual_seed(5)
        draws.append(phase(rbm, torch.zeros(3, 16), torch.zeros(3, 6))[0])
    assert not torch.equal(*draws), "the next draw depends on the chains"


@pytest.mark.parametrize("phase", [CD(sweeps=1), PCD(sweeps=1, chains=20), MeanField(sweeps=3)])
def test_priors_and_only_they_act_on_the_weights(phase):
    """From the same random state the gradients of the biases are the same bits with and without them."""
    gradients = {}
    for l1, l2 in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.2)):
        rbm = trained(phase, 0, l1=l1, l2=l2)
        torch.manual_seed(2)
        rbm((torch.rand(8, 1, 4, 4) < 0.3).to(torch.uint8)).backward()
        gradients[l1, l2] = [parameter.grad for parameter in rbm.parameters()]
    weight, *biases = gradients[0.0, 0.0]
    for (l1, l2), (found, *found_biases) in gradients.items():
        assert all(map(torch.equal, biases, found_biases))
        assert torch.allclose(found - weight, l1 * rbm.weight.sign() + l2 * rbm.weight, atol=1e-6)


def test_sparsity_pulls_the_hidden_units_towards_their_target():
    levels = (torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.3).to(torch.uint8)
    loose = trained(CD(sweeps=1), 300)
    held = trained(CD(sweeps=1), 300, sparsity=1.0, activity=0.05)
    means = [rbm.encode(levels).mean().item() for rbm in (loose, held)]
    assert means[1] < 0.15 < means[0]


@pytest.mark.parametrize("phase", [CD(sweeps=10), PCD(sweeps=5, chains=200), Tempering(sweeps=2, chains=100, temperatures=5, adapt=True)])
def test_training_reaches_the_law_of_the_data(phase):
    """Four pixels with a law that three hidden units can hold: the likelihood comes within 0.05 nats of the entropy."""
    teacher = law(machine(scale=1.5))
    rbm = RBM([1, 2, 2], 4, negative_phase=phase)
    data = draw(teacher, 4000)
    rbm.initialize(data.view(-1, 1, 2, 2).to(torch.uint8))
    optimizer = torch.optim.SGD(rbm.parameters(), 0.1, momentum=0.5)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1500)
        optimizer.zero_grad()
        rbm(data[torch.randint(4000, (200,))].view(-1, 1, 2, 2).to(torch.uint8)).backward()
        optimizer.step()
    divergence = (teacher * (teacher.log() - law(rbm.double()).log())).sum()
    assert divergence < 0.05


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
    with pytest.raises(FlowgenError, match=words):
        RBM(**{"visible": 4, "hidden": 3} | arguments)
    with pytest.raises(FlowgenError, match="temperatures=2"):
        Ladder(1, 10, adapt=True)
