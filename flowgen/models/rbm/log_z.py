"""log Z of an RBM in nats: exactly, and what every estimate of it says."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from flowgen.models.base import EvalConfig
from flowgen.models.rbm.energy import EnergyModel
from flowgen.models.rbm.sampling import ReplicaExchange, bernoulli_from_logits, equal_parts
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import LOG_LIKELIHOOD, Metric, Metrics, MetricValue

ENUMERABLE = 20  # units of the smaller layer, at most
BLOCK = 2**14  # states at a time


class Estimate(NamedTuple):
    log_z: float
    error: float  # standard error
    effective_sample_size: float  # independent samples that would do as well


def exact_log_z(machine: EnergyModel, layer: str | None = None) -> float:
    """Sum over all states of `layer`, "visible" or "hidden" (by default the smaller one), the other summed by its softplus.

    Raises FlowgenError for layers of more than `ENUMERABLE` units.
    """
    layer = layer or ("hidden" if machine.hidden <= machine.visible else "visible")
    weight, here, there = (
        machine.weight.detach().double(),
        machine.hidden_bias.detach().double(),
        machine.visible_bias.detach().double(),
    )
    if layer == "visible":
        weight, here, there = weight.T, there, here
    if len(here) > ENUMERABLE:
        raise UserError(
            f"{len(here)} {layer} units are too many to enumerate, {ENUMERABLE} at most: estimate log Z with ais"
        )
    digits = torch.arange(len(here), device=weight.device)
    total = weight.new_tensor(-math.inf)
    for numbers in torch.arange(2 ** len(here), device=weight.device).split(BLOCK):
        states = (numbers[:, None] >> digits & 1).double()
        total = torch.logaddexp(
            total, (states @ here + F.softplus(states @ weight.T + there).sum(1)).logsumexp(0)
        )
    return total.item()


def log_base(machine: EnergyModel) -> float:
    """log Z at beta = 0: hidden log 2 + sum softplus(base)."""
    return machine.hidden * math.log(2) + F.softplus(machine.base.double()).sum().item()


STOPS, STRIDE = (
    40,
    25,
)  # where a scout looks at its chains, and steps of annealing from one stop to the next
LEAST_SHARE = 0.1  # of the mean, below which no piece of the way is taken for easy


class AnnealingState:
    """States v on the way from base rates to machine, each (rows, visible), with F_beta(v) of P_beta(v) ~ exp(-F_beta(v)).

    F_beta(v) = -((1 - beta) base + beta visible_bias).v - sum softplus(beta (hidden_bias + weight' v)); beta is one number, or (rows, 1).
    """

    def __init__(self, machine: EnergyModel, visible: Tensor, generator: torch.Generator | None):
        self.machine, self.visible, self.generator = machine, visible, generator
        self._look()

    def _look(self) -> None:
        self.inputs = self.machine.hidden_input(self.visible)
        self.base = (self.visible @ self.machine.base)[:, None]
        self.bias = (self.visible @ self.machine.visible_bias)[:, None]

    def free_energy(self, beta: float | Tensor) -> Tensor:
        """F_beta(v) in nats, (rows,)."""
        return (
            -((1 - beta) * self.base + beta * self.bias)
            - F.softplus(beta * self.inputs).sum(1, keepdim=True)
        ).squeeze(1)

    def move(self, beta: float | Tensor) -> None:
        """One Gibbs sweep at `beta`."""
        hidden = bernoulli_from_logits(beta * self.inputs, self.generator)
        self.visible = bernoulli_from_logits(
            torch.lerp(self.machine.base, self.machine.visible_input(hidden), beta), self.generator
        )
        self._look()


def _at_the_base(
    machine: EnergyModel, chains: int, generator: torch.Generator | None
) -> AnnealingState:
    return AnnealingState(
        machine, bernoulli_from_logits(machine.base.expand(chains, -1), generator), generator
    )


@torch.no_grad()
def ais(
    machine: EnergyModel,
    *,
    betas: int | Sequence[float] = 10000,
    chains: int = 256,
    generator: torch.Generator | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Annealed importance sampling from the base rates to the machine. Salakhutdinov and Murray (2008), section 4.1.

    `betas` rise from 0 to 1, or are so many equal steps. By Jensen it tends to give too low a log Z, so too good a likelihood.
    """
    states = _at_the_base(machine, chains, generator)
    log_weights = torch.zeros(chains, dtype=torch.double, device=machine.base.device)
    for before, beta in progress(list(pairwise(_way(betas))), "forward AIS"):
        log_weights += states.free_energy(before) - states.free_energy(beta)
        states.move(beta)
    return _estimate(log_weights, log_base(machine), 1)


@torch.no_grad()
def reverse_ais(
    machine: EnergyModel,
    start: Tensor,
    *,
    betas: int | Sequence[float] = 10000,
    generator: torch.Generator | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Annealing from samples `start` (chains, visible) of the machine back to its base rates, along `betas` from the last to the first.

    Where they are exact, it tends to give too high a log Z. Burda, Grosse and Salakhutdinov (1412.8566).
    """
    states = AnnealingState(machine, start, generator)
    log_weights = torch.zeros(len(start), dtype=torch.double, device=machine.base.device)
    for before, beta in progress(list(pairwise(reversed(_way(betas)))), "reverse AIS"):
        states.move(before)
        log_weights += states.free_energy(before) - states.free_energy(beta)
    return _estimate(log_weights, log_base(machine), -1)


def _way(betas: int | Sequence[float]) -> Sequence[float]:
    return (
        torch.linspace(0, 1, betas + 1, dtype=torch.double).tolist()
        if isinstance(betas, int)
        else betas
    )


def _estimate(log_weights: Tensor, log_base: float, sign: int) -> Estimate:
    """From log importance weights of Z / Z_base (sign 1) or of Z_base / Z (sign -1)."""
    count = len(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    log_mean = log_weights.logsumexp(0).item() - math.log(count)
    error = (weights.std() / weights.mean() / math.sqrt(count)).item() if count > 1 else math.inf
    return Estimate(
        log_base + sign * log_mean, error, (weights.sum().square() / weights.square().sum()).item()
    )


class PilotRun(NamedTuple):
    """What a short annealing finds on its way, between the `betas` (stops + 1,) of its stops."""

    betas: Tensor
    barrier: Tensor  # (stops,), deviation of dF/dbeta over the chains times the length in beta: what keeps neighbours from swapping
    friction: Tensor  # (stops,), deviation of the log weights gathered from stop to stop: what makes annealing err
    visible: Tensor  # (stops + 1, chains, visible), the chains at the stops, as booleans

    def way(self, count: int) -> list[float]:
        """`count` steps of beta, each of the same friction: the least variance of log weights. Sivak and Crooks (1201.4166)."""
        return equal_parts(self.betas, self.friction, count).tolist()


@torch.no_grad()
def run_pilot(
    machine: EnergyModel,
    chains: int,
    generator: torch.Generator | None = None,
    progress: Progress = no_progress,
) -> PilotRun:
    """Anneal `chains` in equal steps, and note at every stop how far they spread."""
    states = _at_the_base(machine, chains, generator)
    visible, barrier, friction = [states.visible.bool()], [], []
    steps = torch.linspace(0, 1, STOPS * STRIDE + 1, dtype=torch.double)
    for stop in progress(range(STOPS), "scout"):
        gathered = torch.zeros(chains, dtype=torch.double, device=machine.base.device)
        for before, beta in pairwise(steps[STRIDE * stop : STRIDE * (stop + 1) + 1].tolist()):
            step = states.free_energy(before) - states.free_energy(beta)
            gathered += step
            states.move(beta)
        barrier.append(STRIDE * step.double().std())
        friction.append(gathered.std())
        visible.append(states.visible.bool())
    lengths = [torch.stack(length) for length in (barrier, friction)]
    lengths = [length.clamp(min=LEAST_SHARE * length.mean().item() + 1e-12) for length in lengths]
    return PilotRun(
        steps[::STRIDE].to(machine.base.device), lengths[0], lengths[1], torch.stack(visible)
    )


RATIO_ITERATIONS = 50
MOST = 100  # temperatures, however hard the machine


@torch.no_grad()
def bridge(
    machine: EnergyModel,
    *,
    chains: int,
    burn_in: int,
    sweeps: int,
    temperatures: int | None = None,
    start: PilotRun | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = no_progress,
) -> tuple[Estimate, Tensor]:
    """log Z by bridge sampling between the neighbours of a ladder that begins at the stops of a scout, and its samples (chains, visible).

    Replicas swap v by the free energies of the scaled machines, which sum h out and so reject less than energies do. By default there
    are as many `temperatures` as let half of the swaps through (Syed et al., 1905.02939, section 5). Bennett's acceptance ratio (1976).
    The error is that of the mean over the chains, which are independent.
    """
    start = start or run_pilot(machine, chains, generator, progress)
    barrier = start.barrier.sum().item() / math.sqrt(
        math.pi
    )  # the rejections that add up along the way, where F_beta is near normal
    temperatures = temperatures or (
        2 + math.ceil(min(2 * barrier, MOST)) if math.isfinite(barrier) else 2
    )
    rungs = ReplicaExchange(temperatures, chains, adapt=True).to(machine.base)
    rungs.betas.copy_(equal_parts(start.betas, start.barrier, temperatures - 1))
    nearest = (start.betas[:, None] - rungs.betas).abs().argmin(0)
    states = AnnealingState(
        machine, start.visible[nearest].flatten(0, 1).to(machine.base), generator
    )
    for _ in progress(range(burn_in), "tempering"):
        _sweep(states, rungs)
    rungs.adapt = False
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for sweep in progress(range(2 * (sweeps // 2)), "bridge"):
        pairs[sweep % 2].append(_sweep(states, rungs))
    ratios, influences = zip(
        *(_acceptance_ratio(*torch.stack(found, 2)) for found in pairs), strict=True
    )
    influence = influences[0] + influences[1]
    of_chains = influence.mean(0)
    error = (of_chains.std() / math.sqrt(chains)).item()
    effective = min(
        influence.var() * chains / of_chains.var(), torch.tensor(influence.numel())
    ).item()
    return Estimate(log_base(machine) + sum(ratios), error, effective), rungs.top(
        states.visible.unflatten(0, rungs.place.shape)
    )


def _sweep(states: AnnealingState, rungs: ReplicaExchange) -> Tensor:
    """A Gibbs sweep on every rung, then swaps; F_k+1 - F_k of the samples at k and at k+1 of each pair, before: (2, pairs, chains)."""
    lower = rungs.lower()
    neighbour = torch.arange(len(rungs.betas), device=lower.device)
    neighbour[lower], neighbour[lower + 1] = lower + 1, lower.clone()
    here, there = (
        betas[rungs.place].view(-1, 1) for betas in (rungs.betas, rungs.betas[neighbour])
    )
    states.move(here)
    difference = rungs.at(
        (states.free_energy(there) - states.free_energy(here)).view_as(rungs.place)
    )
    below, above = difference[lower], -difference[lower + 1]
    rungs.exchange(lower, above - below, states.generator)
    return torch.stack((below, above)).double()


def _acceptance_ratio(below: Tensor, above: Tensor) -> tuple[float, Tensor]:
    """The sum over pairs of log Z_k+1 / Z_k, and what each sample adds to it: (sweeps, chains).

    `below` and `above`, (pairs, sweeps, chains), are E_k+1 - E_k of the samples at either rung.
    """
    shift = (below.mean((1, 2), keepdim=True) + above.mean((1, 2), keepdim=True)) / 2
    for _ in range(RATIO_ITERATIONS):
        forth, back = (shift - below).sigmoid(), (above - shift).sigmoid()
        shift = shift + (back.mean((1, 2), keepdim=True) / forth.mean((1, 2), keepdim=True)).log()
    influence = forth / forth.mean((1, 2), keepdim=True) - back / back.mean((1, 2), keepdim=True)
    return -shift.sum().item(), influence.sum(0)


LADDER = {"burn_in": 200, "sweeps": 400}  # of the ladder between base rates and machine
LOG_Z, EFFECTIVE_SIZE = (
    Metric("log_z", "nats"),
    Metric("effective_size", "samples", higher_is_better=True),
)
FAR_APART, FEW = (
    1.0,
    10,
)  # nats between estimates, and effective samples, beyond which nothing is quoted


@dataclass(frozen=True)
class LogZ:
    """log Z in nats with its standard error, the estimates that it is made of, and whether it may be quoted, where that was judged."""

    value: float
    error: float
    estimates: dict[str, Estimate] = field(default_factory=dict)
    reliable: bool | None = None
    verdict: str = ""


def estimate_log_z(
    machine: EnergyModel, how: EvalConfig, generator: Generator, progress: Progress = no_progress
) -> LogZ:
    """Exact where a layer can be enumerated; else a short look is at forward AIS alone, a thorough one at the whole sandwich.

    Forward AIS tends to err on one side, reverse AIS on the other: the middle is taken, with half their distance as an error.
    """
    if min(machine.visible, machine.hidden) <= ENUMERABLE - (0 if how.cross_check else 4):
        exact = exact_log_z(machine)
        return LogZ(
            exact,
            0.0,
            {},
            math.isfinite(exact) if how.cross_check else None,
            "log Z is exact, by enumeration",
        )
    if not how.cross_check:
        look = ais(
            machine,
            betas=how.ais_steps,
            chains=how.ais_chains,
            generator=generator,
            progress=progress,
        )
        return LogZ(look.log_z, look.error)
    found = run_pilot(machine, how.ais_chains, generator, progress)
    way = found.way(how.ais_steps)
    forward = ais(machine, betas=way, chains=how.ais_chains, generator=generator, progress=progress)
    by_bridge, samples = bridge(
        machine,
        **LADDER,
        chains=how.ais_chains,
        start=found,
        generator=generator,
        progress=progress,
    )
    reverse = reverse_ais(machine, samples, betas=way, generator=generator, progress=progress)
    middle, half = (forward.log_z + reverse.log_z) / 2, abs(forward.log_z - reverse.log_z) / 2
    error = math.hypot(half, forward.error / 2, reverse.error / 2)
    estimates = {"forward": forward, "reverse": reverse, "bridge": by_bridge}
    return LogZ(middle, error, estimates, *_verdict(**estimates))


def _verdict(forward: Estimate, reverse: Estimate, bridge: Estimate) -> tuple[bool, str]:
    apart = abs(forward.log_z - reverse.log_z)
    smallest = min(
        forward.effective_sample_size, reverse.effective_sample_size, bridge.effective_sample_size
    )
    concat_condition = max(abs(bridge.log_z - forward.log_z), abs(bridge.log_z - reverse.log_z))
    if not all(map(math.isfinite, (*forward, *reverse, *bridge))):
        return (
            False,
            "an estimate of log Z or of its error is not finite: the machine has diverged, or ais_chains=1",
        )
    if apart > FAR_APART:
        return False, f"forward and reverse AIS are {apart:.1f} nats apart, give them more betas"
    if smallest < FEW:
        return (
            False,
            f"the effective sample size is only {smallest:.1f}, give them more betas or chains",
        )
    if concat_condition > max(FAR_APART, 3 * bridge.error):
        return (
            False,
            f"bridge sampling lies {concat_condition:.1f} nats from AIS: the chains do not mix",
        )
    return (
        True,
        f"forward and reverse AIS are {apart:.2f} nats apart, and effective sample sizes are {smallest:.0f} or more",
    )


def log_likelihood(free: Tensor, log_z: LogZ) -> Metrics:
    """Mean log P(v) in nats of images with these free energies, with the errors of the mean and of log Z together."""
    mean, spread = -free.double().mean().item(), (free.double().std() / math.sqrt(len(free))).item()
    measured = [
        MetricValue(LOG_LIKELIHOOD, mean - log_z.value, math.hypot(spread, log_z.error)),
        MetricValue(LOG_Z, log_z.value, log_z.error),
    ]
    for name, estimate in log_z.estimates.items():
        measured += [
            MetricValue(
                named(LOG_LIKELIHOOD, name),
                mean - estimate.log_z,
                math.hypot(spread, estimate.error),
            ),
            MetricValue(named(LOG_Z, name), estimate.log_z, estimate.error),
            MetricValue(named(EFFECTIVE_SIZE, name), estimate.effective_sample_size),
        ]
    if log_z.reliable is None:
        return Metrics.of(*measured)
    reliable, why = log_z.reliable, log_z.verdict
    if not math.isfinite(mean - log_z.value):
        reliable, why = False, "the machine has diverged"
    return Metrics.of(
        *measured, reliable=reliable, verdict=f"{'reliable' if reliable else 'do not quote'}: {why}"
    )


def named(metric: Metric, estimator: str) -> Metric:
    """The same by one estimator of several."""
    return replace(metric, name=f"{metric.name}_{estimator}")
