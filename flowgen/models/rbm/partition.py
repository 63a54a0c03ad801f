"""log Z of an RBM: exactly, by annealed importance sampling in either direction, and by bridge sampling; all in nats."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.errors import FlowgenError
from flowgen.models.rbm.gibbs import draw_bits
from flowgen.models.rbm.machine import Machine
from flowgen.models.rbm.tempering import Ladder
from flowgen.progress import Progress, unseen

ENUMERABLE = 20  # units of the smaller layer, at most
BLOCK = 2**14  # states at a time
RATIO_ITERATIONS = 50


class Estimate(NamedTuple):
    log_z: float
    error: float  # standard error
    effective_size: float  # independent samples that would do as well


def exact_log_z(machine: Machine, layer: str | None = None) -> float:
    """Sum over all states of `layer`, "visible" or "hidden" (by default the smaller one), the other summed by its softplus.

    Raises FlowgenError for layers of more than `ENUMERABLE` units.
    """
    layer = layer or ("hidden" if machine.hidden <= machine.visible else "visible")
    weight, here, there = machine.weight.detach().double(), machine.hidden_bias.detach().double(), machine.visible_bias.detach().double()
    if layer == "visible":
        weight, here, there = weight.T, there, here
    if len(here) > ENUMERABLE:
        raise FlowgenError(f"{len(here)} {layer} units are too many to enumerate, {ENUMERABLE} at most: estimate log Z with ais")
    digits = torch.arange(len(here), device=weight.device)
    total = weight.new_tensor(-math.inf)
    for numbers in torch.arange(2 ** len(here), device=weight.device).split(BLOCK):
        states = (numbers[:, None] >> digits & 1).double()
        total = torch.logaddexp(total, (states @ here + F.softplus(states @ weight.T + there).sum(1)).logsumexp(0))
    return total.item()


def _log_base(machine: Machine) -> float:
    """log Z at beta = 0: hidden log 2 + sum softplus(base)."""
    return machine.hidden * math.log(2) + F.softplus(machine.base.double()).sum().item()


class _Path:
    """States v between base rates and machine, with F_beta(v) of P_beta(v) ~ exp(-F_beta(v)).

    F_beta(v) = -((1 - beta) base + beta visible_bias).v - sum softplus(beta (hidden_bias + weight' v)).
    """

    def __init__(self, machine: Machine, visible: Tensor, generator: torch.Generator | None):
        self.machine, self.visible, self.generator = machine, visible, generator
        self._look()

    def _look(self) -> None:
        self.inputs = self.machine.hidden_input(self.visible)
        self.base = self.visible @ self.machine.base
        self.bias = self.visible @ self.machine.visible_bias

    def free_energy(self, beta: float) -> Tensor:
        return -((1 - beta) * self.base + beta * self.bias) - F.softplus(beta * self.inputs).sum(1)

    def move(self, beta: float) -> None:
        """One Gibbs sweep at `beta`."""
        hidden = draw_bits(beta * self.inputs, self.generator)
        self.visible = draw_bits(torch.lerp(self.machine.base, self.machine.visible_input(hidden), beta), self.generator)
        self._look()


@torch.no_grad()
def ais(
    machine: Machine, *, betas: int = 10000, chains: int = 256, generator: torch.Generator | None = None, progress: Progress = unseen
) -> Estimate:
    """Annealed importance sampling from the base rates to the machine. Salakhutdinov and Murray (2008), section 4.1.

    By Jensen it tends to give too low a log Z, so too good a likelihood.
    """
    path = _Path(machine, draw_bits(machine.base.expand(chains, -1), generator), generator)
    log_weights = torch.zeros(chains, dtype=torch.double, device=machine.base.device)
    steps = torch.linspace(0, 1, betas + 1, dtype=torch.double).tolist()
    for before, beta in progress(list(pairwise(steps)), "forward AIS"):
        log_weights += path.free_energy(before) - path.free_energy(beta)
        path.move(beta)
    return _estimate(log_weights, _log_base(machine), 1)


@torch.no_grad()
def reverse_ais(
    machine: Machine, start: Tensor, *, betas: int = 10000, generator: torch.Generator | None = None, progress: Progress = unseen
) -> Estimate:
    """Annealing from samples `start` (chains, visible) of the machine back to its base rates.

    Where they are exact, it tends to give too high a log Z. Burda, Grosse and Salakhutdinov (1412.8566).
    """
    path = _Path(machine, start, generator)
    log_weights = torch.zeros(len(start), dtype=torch.double, device=machine.base.device)
    steps = torch.linspace(1, 0, betas + 1, dtype=torch.double).tolist()
    for before, beta in progress(list(pairwise(steps)), "reverse AIS"):
        path.move(before)
        log_weights += path.free_energy(before) - path.free_energy(beta)
    return _estimate(log_weights, _log_base(machine), -1)


def _estimate(log_weights: Tensor, log_base: float, sign: int) -> Estimate:
    """From log importance weights of Z / Z_base (sign 1) or of Z_base / Z (sign -1)."""
    count = len(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    log_mean = log_weights.logsumexp(0).item() - math.log(count)
    error = (weights.std() / weights.mean() / math.sqrt(count)).item() if count > 1 else math.inf
    return Estimate(log_base + sign * log_mean, error, (weights.sum().square() / weights.square().sum()).item())


@torch.no_grad()
def bridge(
    machine: Machine,
    *,
    temperatures: int,
    chains: int,
    burn_in: int,
    sweeps: int,
    generator: torch.Generator | None = None,
    progress: Progress = unseen,
) -> tuple[Estimate, Tensor]:
    """log Z by bridge sampling between the neighbours of a tempering ladder, and the ladder's samples (chains, visible).

    Bennett's acceptance ratio (1976) on the energies that swapping needs anyway, beta spaced by the swaps of the burn-in. The error
    is that of the mean over the chains, which are independent.
    """
    ladder = Ladder(temperatures, chains, adapt=True)
    ladder.allocate(machine.hidden)
    ladder.to(machine.visible_bias)
    ladder.hidden.copy_(draw_bits(torch.zeros_like(ladder.hidden), generator))
    for _ in progress(range(burn_in), "tempering"):
        ladder.sweep(machine, generator=generator)
    ladder.adapt = False
    slopes = []
    for _ in progress(range(sweeps), "bridge"):
        visible, _ = ladder.sweep(machine, generator=generator)
        slopes.append(ladder.slopes.double())
    slope = torch.stack(slopes, 1)  # (temperatures, sweeps, chains)
    steps = ladder.betas.double().diff()[:, None, None]
    log_ratio, influence = _acceptance_ratio(steps * slope[:-1], steps * slope[1:])
    of_chains = influence.mean(0)
    error = (of_chains.std() / math.sqrt(chains)).item()
    effective = min(influence.var() * chains / of_chains.var(), torch.tensor(influence.numel())).item()
    return Estimate(_log_base(machine) + log_ratio, error, effective), ladder.top(visible)


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
