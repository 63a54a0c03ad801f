"""log Z of an RBM: exactly, by annealed importance sampling in either direction, and by bridge sampling; all in nats."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flowgen.errors import FlowgenError
from flowgen.models.chains import Ladder, draw_bits

if TYPE_CHECKING:
    from flowgen.models.rbm import RBM

ENUMERABLE = 20  # units of the smaller layer, at most
BLOCK = 2**14  # states at a time
QUICK = 1000  # betas of the estimate that training looks at
LADDER = {"temperatures": 30, "burn_in": 1000, "sweeps": 1000}  # of the ladder between base rates and machine


RATIO_ITERATIONS = 50
FAR_APART, FEW = 1.0, 10  # nats between the two directions of AIS, and effective samples, beyond which nothing is quoted


class Estimate(NamedTuple):
    log_z: float
    error: float  # standard error
    effective_size: float  # independent samples that would do as well


def exact_log_z(rbm: "RBM", layer: str | None = None) -> float:
    """Sum over all states of `layer`, "visible" or "hidden" (by default the smaller one), the other summed by its softplus.

    Raises FlowgenError for layers of more than `ENUMERABLE` units.
    """
    layer = layer or ("hidden" if rbm.hidden <= rbm.visible else "visible")
    weight, here, there = rbm.weight.detach().double(), rbm.hidden_bias.detach().double(), rbm.visible_bias.detach().double()
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


def _log_base(rbm: "RBM") -> float:
    """log Z at beta = 0: hidden log 2 + sum softplus(base)."""
    return rbm.hidden * math.log(2) + F.softplus(rbm.base.double()).sum().item()


class _Path:
    """States v between base rates and machine, with F_beta(v) of P_beta(v) ~ exp(-F_beta(v)).

    F_beta(v) = -((1 - beta) base + beta visible_bias).v - sum softplus(beta (hidden_bias + weight' v)).
    """

    def __init__(self, rbm: "RBM", visible: Tensor, generator: torch.Generator | None):
        self.rbm, self.visible, self.generator = rbm, visible, generator
        self._look()

    def _look(self) -> None:
        self.inputs = self.rbm.hidden_input(self.visible)
        self.base = self.visible @ self.rbm.base
        self.bias = self.visible @ self.rbm.visible_bias

    def free_energy(self, beta: float) -> Tensor:
        return -((1 - beta) * self.base + beta * self.bias) - F.softplus(beta * self.inputs).sum(1)

    def move(self, beta: float) -> None:
        """One Gibbs sweep at `beta`."""
        hidden = draw_bits(beta * self.inputs, self.generator)
        self.visible = draw_bits(torch.lerp(self.rbm.base, self.rbm.visible_input(hidden), beta), self.generator)
        self._look()


@torch.no_grad()
def ais(rbm: "RBM", *, betas: int = 10000, chains: int = 256, generator: torch.Generator | None = None, progress: bool = False) -> Estimate:
    """Annealed importance sampling from the base rates to the machine. Salakhutdinov and Murray (2008), section 4.1.

    By Jensen it tends to give too low a log Z, so too good a likelihood.
    """
    path = _Path(rbm, draw_bits(rbm.base.expand(chains, -1), generator), generator)
    log_weights = torch.zeros(chains, dtype=torch.double, device=rbm.device)
    steps = torch.linspace(0, 1, betas + 1, dtype=torch.double).tolist()
    for before, beta in _bar(list(pairwise(steps)), "forward AIS", progress):
        log_weights += path.free_energy(before) - path.free_energy(beta)
        path.move(beta)
    return _estimate(log_weights, _log_base(rbm), 1)


@torch.no_grad()
def reverse_ais(
    rbm: "RBM", start: Tensor, *, betas: int = 10000, generator: torch.Generator | None = None, progress: bool = False
) -> Estimate:
    """Annealing from samples `start` (chains, visible) of the machine back to its base rates.

    Where they are exact, it tends to give too high a log Z. Burda, Grosse and Salakhutdinov (1412.8566).
    """
    path = _Path(rbm, start, generator)
    log_weights = torch.zeros(len(start), dtype=torch.double, device=rbm.device)
    steps = torch.linspace(1, 0, betas + 1, dtype=torch.double).tolist()
    for before, beta in _bar(list(pairwise(steps)), "reverse AIS", progress):
        path.move(before)
        log_weights += path.free_energy(before) - path.free_energy(beta)
    return _estimate(log_weights, _log_base(rbm), -1)


def _bar(steps: Sequence[Any], what: str, progress: bool) -> Iterable[Any]:
    return tqdm(steps, desc=what, unit="sweep", disable=None if progress else True, leave=False)


def _estimate(log_weights: Tensor, log_base: float, sign: int) -> Estimate:
    """From log importance weights of Z / Z_base (sign 1) or of Z_base / Z (sign -1)."""
    count = len(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    log_mean = log_weights.logsumexp(0).item() - math.log(count)
    error = (weights.std() / weights.mean() / math.sqrt(count)).item() if count > 1 else math.inf
    return Estimate(log_base + sign * log_mean, error, (weights.sum().square() / weights.square().sum()).item())


@torch.no_grad()
def bridge(
    rbm: "RBM",
    *,
    temperatures: int,
    chains: int,
    burn_in: int,
    sweeps: int,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> tuple[Estimate, Tensor]:
    """log Z by bridge sampling between the neighbours of a tempering ladder, and the ladder's samples (chains, visible).

    Bennett's acceptance ratio (1976) on the energies that swapping needs anyway, beta spaced by the swaps of the burn-in. The error
    is that of the mean over the chains, which are independent.
    """
    ladder = Ladder(temperatures, chains, adapt=True)
    ladder.allocate(rbm.hidden)
    ladder.to(rbm.visible_bias)
    ladder.hidden.copy_(draw_bits(torch.zeros_like(ladder.hidden), generator))
    for _ in _bar(range(burn_in), "tempering", progress):
        ladder.sweep(rbm, generator=generator)
    ladder.adapt = False
    slopes = []
    for _ in _bar(range(sweeps), "bridge", progress):
        visible, _ = ladder.sweep(rbm, generator=generator)
        slopes.append(ladder.slopes.double())
    slope = torch.stack(slopes, 1)  # (temperatures, sweeps, chains)
    steps = ladder.betas.double().diff()[:, None, None]
    log_ratio, influence = _acceptance_ratio(steps * slope[:-1], steps * slope[1:])
    of_chains = influence.mean(0)
    error = (of_chains.std() / math.sqrt(chains)).item()
    effective = min(influence.var() * chains / of_chains.var(), torch.tensor(influence.numel())).item()
    return Estimate(_log_base(rbm) + log_ratio, error, effective), ladder.top(visible)


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


def log_likelihood(rbm: "RBM", free: Tensor, generator: torch.Generator, thorough: bool) -> dict[str, Any]:
    """Mean log P(v) in nats of images with these free energies, and the errors of the mean and of log Z together.

    Where a layer can be enumerated, log Z is exact. Else training looks at a short forward AIS, and `thorough` goes on to the whole
    sandwich: forward AIS tends to err on one side, reverse AIS on the other, their middle is quoted with half their distance as
    an error, and a verdict says whether it may be.
    """
    mean, spread = -free.double().mean().item(), (free.double().std() / math.sqrt(len(free))).item()
    if min(rbm.visible, rbm.hidden) <= ENUMERABLE - (0 if thorough else 4):
        log_z = exact_log_z(rbm)
        fine = math.isfinite(mean - log_z)
        why = "quotable: log Z is exact, by enumeration" if fine else "do not quote: the machine has diverged"
        verdict = {"quotable": fine, "verdict": why} if thorough else {}
        return {"log_likelihood": mean - log_z, "log_likelihood_error": spread, "log_z": log_z, "log_z_error": 0.0, **verdict}
    forward = ais(
        rbm, betas=rbm.betas if thorough else QUICK, chains=rbm.chains if thorough else 100, generator=generator, progress=thorough
    )
    if not thorough:
        error = math.hypot(spread, forward.error)
        return {"log_likelihood": mean - forward.log_z, "log_likelihood_error": error, "log_z": forward.log_z, "log_z_error": forward.error}
    by_bridge, samples = bridge(rbm, **LADDER, chains=rbm.chains, generator=generator, progress=True)
    reverse = reverse_ais(rbm, samples, betas=rbm.betas, generator=generator, progress=True)
    estimates = {"forward": forward, "reverse": reverse, "bridge": by_bridge}
    log_z, half = (forward.log_z + reverse.log_z) / 2, abs(forward.log_z - reverse.log_z) / 2
    log_z_error = math.hypot(half, forward.error / 2, reverse.error / 2)
    figures: dict[str, Any] = {
        "log_likelihood": mean - log_z,
        "log_likelihood_error": math.hypot(spread, log_z_error),
        "log_z": log_z,
        "log_z_error": log_z_error,
    }
    for name, estimate in estimates.items():
        figures[f"log_likelihood_{name}"] = mean - estimate.log_z
        figures[f"log_likelihood_{name}_error"] = math.hypot(spread, estimate.error)
        figures[f"log_z_{name}"], figures[f"log_z_{name}_error"] = estimate.log_z, estimate.error
        figures[f"effective_size_{name}"] = estimate.effective_size
    quotable, why = _verdict(**estimates)
    return figures | {"quotable": quotable, "verdict": ("quotable: " if quotable else "do not quote: ") + why}


def _verdict(forward: Estimate, reverse: Estimate, bridge: Estimate) -> tuple[bool, str]:
    apart = abs(forward.log_z - reverse.log_z)
    smallest = min(forward.effective_size, reverse.effective_size, bridge.effective_size)
    beside = max(abs(bridge.log_z - forward.log_z), abs(bridge.log_z - reverse.log_z))
    if not all(map(math.isfinite, (*forward, *reverse, *bridge))):
        return False, "an estimate of log Z or of its error is not finite: the machine has diverged, or model.chains is 1"
    if apart > FAR_APART:
        return False, f"forward and reverse AIS are {apart:.1f} nats apart, give them more model.betas"
    if smallest < FEW:
        return False, f"the effective sample size is only {smallest:.1f}, give them more model.betas or model.chains"
    if beside > FAR_APART + 3 * bridge.error:
        return False, f"bridge sampling lies {beside:.1f} nats from AIS: the chains do not mix"
    return True, f"forward and reverse AIS are {apart:.2f} nats apart, and effective sample sizes are {smallest:.0f} or more"
