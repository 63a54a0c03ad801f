"""Annealed importance sampling of log Z, in nats: between base rates and machine, in either direction."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.rbm.exchange import equal_parts
from flowgen.models.rbm.gibbs import draw_bits
from flowgen.models.rbm.machine import Machine
from flowgen.models.rbm.partition import Estimate, log_base
from flowgen.progress import Progress, unseen

STOPS, STRIDE = 40, 25  # where a scout looks at its chains, and steps of annealing from one stop to the next
LEAST_SHARE = 0.1  # of the mean, below which no piece of the way is taken for easy


class States:
    """States v on the way from base rates to machine, each (rows, visible), with F_beta(v) of P_beta(v) ~ exp(-F_beta(v)).

    F_beta(v) = -((1 - beta) base + beta visible_bias).v - sum softplus(beta (hidden_bias + weight' v)); beta is one number, or (rows, 1).
    """

    def __init__(self, machine: Machine, visible: Tensor, generator: torch.Generator | None):
        self.machine, self.visible, self.generator = machine, visible, generator
        self._look()

    def _look(self) -> None:
        self.inputs = self.machine.hidden_input(self.visible)
        self.base = (self.visible @ self.machine.base)[:, None]
        self.bias = (self.visible @ self.machine.visible_bias)[:, None]

    def free_energy(self, beta: float | Tensor) -> Tensor:
        """F_beta(v) in nats, (rows,)."""
        return (-((1 - beta) * self.base + beta * self.bias) - F.softplus(beta * self.inputs).sum(1, keepdim=True)).squeeze(1)

    def move(self, beta: float | Tensor) -> None:
        """One Gibbs sweep at `beta`."""
        hidden = draw_bits(beta * self.inputs, self.generator)
        self.visible = draw_bits(torch.lerp(self.machine.base, self.machine.visible_input(hidden), beta), self.generator)
        self._look()


def _at_the_base(machine: Machine, chains: int, generator: torch.Generator | None) -> States:
    return States(machine, draw_bits(machine.base.expand(chains, -1), generator), generator)


@torch.no_grad()
def ais(
    machine: Machine,
    *,
    betas: int | Sequence[float] = 10000,
    chains: int = 256,
    generator: torch.Generator | None = None,
    progress: Progress = unseen,
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
    machine: Machine,
    start: Tensor,
    *,
    betas: int | Sequence[float] = 10000,
    generator: torch.Generator | None = None,
    progress: Progress = unseen,
) -> Estimate:
    """Annealing from samples `start` (chains, visible) of the machine back to its base rates, along `betas` from the last to the first.

    Where they are exact, it tends to give too high a log Z. Burda, Grosse and Salakhutdinov (1412.8566).
    """
    states = States(machine, start, generator)
    log_weights = torch.zeros(len(start), dtype=torch.double, device=machine.base.device)
    for before, beta in progress(list(pairwise(reversed(_way(betas)))), "reverse AIS"):
        states.move(before)
        log_weights += states.free_energy(before) - states.free_energy(beta)
    return _estimate(log_weights, log_base(machine), -1)


def _way(betas: int | Sequence[float]) -> Sequence[float]:
    return torch.linspace(0, 1, betas + 1, dtype=torch.double).tolist() if isinstance(betas, int) else betas


def _estimate(log_weights: Tensor, log_base: float, sign: int) -> Estimate:
    """From log importance weights of Z / Z_base (sign 1) or of Z_base / Z (sign -1)."""
    count = len(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    log_mean = log_weights.logsumexp(0).item() - math.log(count)
    error = (weights.std() / weights.mean() / math.sqrt(count)).item() if count > 1 else math.inf
    return Estimate(log_base + sign * log_mean, error, (weights.sum().square() / weights.square().sum()).item())


class Scout(NamedTuple):
    """What a short annealing finds on its way, between the `betas` (stops + 1,) of its stops."""

    betas: Tensor
    barrier: Tensor  # (stops,), deviation of dF/dbeta over the chains times the length in beta: what keeps neighbours from swapping
    friction: Tensor  # (stops,), deviation of the log weights gathered from stop to stop: what makes annealing err
    visible: Tensor  # (stops + 1, chains, visible), the chains at the stops, as booleans

    def way(self, count: int) -> list[float]:
        """`count` steps of beta, each of the same friction: the least variance of log weights. Sivak and Crooks (1201.4166)."""
        return equal_parts(self.betas, self.friction, count).tolist()


@torch.no_grad()
def scout(machine: Machine, chains: int, generator: torch.Generator | None = None, progress: Progress = unseen) -> Scout:
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
    return Scout(steps[::STRIDE].to(machine.base.device), lengths[0], lengths[1], torch.stack(visible))
