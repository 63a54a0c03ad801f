"""Log partition function of an RBM in nats: exact enumeration, AIS, bridge sampling, verdict."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from flowgen.models.base import EvalConfig
from flowgen.models.likelihood import estimate_log_mean, standard_error
from flowgen.models.rbm.energy import EnergyModel
from flowgen.models.rbm.sampling import ReplicaExchange, bernoulli_from_logits, space_betas
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import (
    EFFECTIVE_SAMPLE_SIZE,
    LOG_LIKELIHOOD,
    LOG_Z,
    Metrics,
    MetricValue,
)

MAX_ENUMERATED_UNITS = 20  # of the smaller layer
MAX_QUICK_ENUMERATED_UNITS = 16  # during training, where seconds count
STATES_PER_BLOCK = 2**14

PILOT_INTERVALS = 40
PILOT_STEPS = 25  # per interval
MIN_RELATIVE_LENGTH = 0.1  # of an interval, relative to the mean: a short pilot run underestimates

BRIDGE_BURN_IN_STEPS = 1000  # long enough that resampled chains forget their common origin
BRIDGE_STEPS = 400
ACCEPTANCE_RATIO_ITERATIONS = 50
MAX_INTERMEDIATE_TEMPERATURES = 100

MAX_DISAGREEMENT_NATS = 1.0  # between two estimates of a reliable log Z
MIN_EFFECTIVE_SIZE = 10  # of each estimate of a reliable log Z


class Estimate(NamedTuple):
    """Estimate of log Z in nats, with its standard error.

    The effective sample size is the number of independent samples with the same variance; it is
    infinite for an exact value.
    """

    log_z: float
    error: float
    effective_sample_size: float

    @property
    def exact(self) -> bool:
        """True if the value was computed by enumeration."""
        return math.isinf(self.effective_sample_size)


@torch.no_grad()
def exact_log_z(rbm: EnergyModel, layer: str | None = None) -> float:
    """Return log Z in nats by summing over all states of one layer, in double precision.

    The states of the other layer are summed out: for the hidden layer
    log Z = log sum_h exp(c.h + sum_i softplus(b_i + sum_j W_ij h_j)).

    Args:
        rbm: The model.
        layer: Layer to enumerate, "visible" or "hidden"; the smaller one by default.

    Raises:
        UserError: If the layer has more than `MAX_ENUMERATED_UNITS` units.

    Example:
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> _ = torch.nn.init.zeros_(rbm.weight)
        >>> round(exact_log_z(rbm), 4), round(7 * math.log(2), 4)  # 2^7 states of energy 0
        (4.852, 4.852)
    """
    layer = layer or ("hidden" if rbm.hidden <= rbm.visible else "visible")
    weight = (rbm.weight if layer == "hidden" else rbm.weight.T).double()
    biases = [rbm.hidden_bias.double(), rbm.visible_bias.double()]
    bias, other_bias = biases if layer == "hidden" else biases[::-1]
    if len(bias) > MAX_ENUMERATED_UNITS:
        raise UserError(
            f"{len(bias)} {layer} units are too many to enumerate (at most "
            f"{MAX_ENUMERATED_UNITS}): estimate log Z with ais"
        )
    total = weight.new_tensor(-math.inf)
    for block in torch.arange(2 ** len(bias), device=weight.device).split(STATES_PER_BLOCK):
        states = (block[:, None] >> torch.arange(len(bias), device=block.device) & 1).double()
        log_weights = states @ bias + F.softplus(states @ weight.T + other_bias).sum(1)
        total = torch.logaddexp(total, log_weights.logsumexp(0))
    return total.item()


def base_log_z(rbm: EnergyModel) -> float:
    """Return log Z at beta = 0, where hidden units are uniform and pixels independent."""
    return rbm.hidden * math.log(2) + F.softplus(rbm.base.double()).sum().item()


class AnnealingState:
    """Visible units of chains between the independent-pixel model and the RBM.

    The hidden units are summed out. The intermediate distribution P_beta(v) ~ exp(-F_beta(v)) has
    the free energy
    F_beta(v) = -((1 - beta) base + beta b).v - sum_j softplus(beta (c_j + sum_i W_ij v_i)).
    `beta` is a number, or a tensor of shape (chains, 1).

    Args:
        rbm: The model.
        visible: Visible units of the chains, (chains, visible).
        generator: Random generator, or None for the global one.
    """

    def __init__(self, rbm: EnergyModel, visible: Tensor, generator: Generator | None):
        self.rbm = rbm
        self.generator = generator
        self._set_visible(visible)

    @classmethod
    def at_beta_zero(
        cls, rbm: EnergyModel, chains: int, generator: Generator | None
    ) -> "AnnealingState":
        """Draw independent chains from the independent-pixel model."""
        return cls(rbm, bernoulli_from_logits(rbm.base.expand(chains, -1), generator), generator)

    def _set_visible(self, visible: Tensor) -> None:
        """Store the visible units, with the terms of the free energy that do not depend on beta."""
        self.visible = visible
        self.hidden_input = self.rbm.hidden_input(visible)
        self.base_term = (visible @ self.rbm.base)[:, None]
        self.bias_term = (visible @ self.rbm.visible_bias)[:, None]

    def free_energy(self, beta: float | Tensor) -> Tensor:
        """Return F_beta(v) in nats, (chains,)."""
        linear = (1 - beta) * self.base_term + beta * self.bias_term
        return -linear.squeeze(1) - F.softplus(beta * self.hidden_input).sum(1)

    def gibbs_step(self, beta: float | Tensor) -> None:
        """Update the chains by one Gibbs step that leaves P_beta invariant."""
        hidden = bernoulli_from_logits(beta * self.hidden_input, self.generator)
        log_odds = torch.lerp(self.rbm.base, self.rbm.visible_input(hidden), beta)
        self._set_visible(bernoulli_from_logits(log_odds, self.generator))

    def anneal(self, beta: float, next_beta: float) -> Tensor:
        """Move the chains from one inverse temperature to the next.

        Args:
            beta: Inverse temperature of the chains.
            next_beta: Inverse temperature after the step.

        Returns:
            The log weights of the step in double precision, (chains,).
        """
        log_weights = self.free_energy(beta) - self.free_energy(next_beta)
        self.gibbs_step(next_beta)
        return log_weights.double()


@torch.no_grad()
def ais(
    rbm: EnergyModel,
    *,
    betas: int | Sequence[float] = 10000,
    chains: int = 256,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Estimate log Z by annealed importance sampling from the independent-pixel model to the RBM.

    Salakhutdinov and Murray, On the quantitative analysis of deep belief networks (2008),
    section 4.1. The estimate of Z is unbiased. By Jensen's inequality the estimate of log Z is
    biased low, so that the log-likelihood is overestimated on average.

    Args:
        rbm: The model.
        betas: Number of equal AIS steps, or the inverse temperatures from 0 to 1.
        chains: Number of independent chains.
        generator: Random generator, or None for the global one.
        progress: Progress bar.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> estimate = ais(rbm, betas=100, chains=50)
        >>> abs(estimate.log_z - exact_log_z(rbm)) < 0.05
        True
    """
    state = AnnealingState.at_beta_zero(rbm, chains, generator)
    steps = progress(_ais_steps(betas), "forward AIS")
    log_weights = sum((state.anneal(*step) for step in steps), torch.zeros(()))
    return _estimate(log_weights, base_log_z(rbm), 1)


@torch.no_grad()
def reverse_ais(
    rbm: EnergyModel,
    start: Tensor,
    *,
    betas: int | Sequence[float] = 10000,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> Estimate:
    """Estimate log Z by annealing samples of the RBM back to the independent-pixel model.

    Burda, Grosse and Salakhutdinov, Accurate and conservative estimates of MRF log-likelihood
    using reverse annealing (arXiv:1412.8566). If `start` are exact samples, the estimate is biased
    high, so that forward and reverse AIS bracket the true value.

    Args:
        rbm: The model.
        start: Samples of the RBM, (chains, visible).
        betas: Number of equal AIS steps, or the inverse temperatures from 0 to 1; they are
            visited in reverse order.
        generator: Random generator, or None for the global one.
        progress: Progress bar.
    """
    state = AnnealingState(rbm, start, generator)
    log_weights = torch.zeros(len(start), dtype=torch.double, device=rbm.base.device)
    for next_beta, beta in progress(_ais_steps(betas)[::-1], "reverse AIS"):
        state.gibbs_step(beta)
        log_weights += state.free_energy(beta) - state.free_energy(next_beta)
    return _estimate(log_weights, base_log_z(rbm), -1)


def _ais_steps(betas: int | Sequence[float]) -> list[tuple[float, float]]:
    """Return the inverse temperatures before and after each step, from 0 to 1."""
    if isinstance(betas, int):
        betas = torch.linspace(0, 1, betas + 1, dtype=torch.double).tolist()
    return list(pairwise(betas))


def _estimate(log_weights: Tensor, log_z_base: float, sign: int) -> Estimate:
    """Return log Z from log importance weights.

    The mean weight estimates Z / Z_base if the sign is 1, and Z_base / Z if it is -1.
    """
    log_mean, error, effective_sample_size = estimate_log_mean(log_weights)
    return Estimate(log_z_base + sign * log_mean, error, effective_sample_size)


class PilotRun(NamedTuple):
    """Result of a short annealing run, which shows where the path from beta = 0 to 1 is hard."""

    betas: Tensor  # ends of the intervals, (intervals + 1,)
    # Standard deviation over chains of dF/dbeta, times the width of the interval, (intervals,).
    # It is proportional to the rejection rate of swaps (the communication barrier).
    barrier: Tensor
    # Standard deviation of the log weight that an interval adds, (intervals,): the error of AIS.
    log_weight_std: Tensor
    # Chains at the ends of the intervals, boolean, (intervals + 1, chains, visible), and their log
    # importance weights, (intervals + 1, chains).
    visible: Tensor
    log_weights: Tensor


@torch.no_grad()
def run_pilot(
    rbm: EnergyModel,
    chains: int,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> PilotRun:
    """Anneal chains in equal steps and measure the spread of each interval.

    Args:
        rbm: The model.
        chains: Number of chains.
        generator: Random generator, or None for the global one.
        progress: Progress bar.
    """
    state = AnnealingState.at_beta_zero(rbm, chains, generator)
    visible = [state.visible.bool()]
    log_weights = [torch.zeros(chains, dtype=torch.double, device=rbm.base.device)]
    lengths = []
    betas = torch.linspace(0, 1, PILOT_INTERVALS * PILOT_STEPS + 1, dtype=torch.double)
    # Each window holds the betas of one interval with both of its ends.
    for window in progress(betas.unfold(0, PILOT_STEPS + 1, PILOT_STEPS).tolist(), "pilot run"):
        steps = [state.anneal(*step) for step in pairwise(window)]
        total = sum(steps, torch.zeros(()))
        lengths.append(torch.stack((PILOT_STEPS * steps[-1].std(), total.std())))
        log_weights.append(log_weights[-1] + total)
        visible.append(state.visible.bool())
    spread = torch.stack(lengths, 1)
    barrier, log_weight_std = spread.clamp(
        min=MIN_RELATIVE_LENGTH * spread.mean(1, keepdim=True) + 1e-12
    )
    return PilotRun(
        betas[::PILOT_STEPS].to(spread),
        barrier,
        log_weight_std,
        torch.stack(visible),
        torch.stack(log_weights),
    )


@torch.no_grad()
def bridge(
    rbm: EnergyModel,
    *,
    chains: int,
    burn_in: int,
    steps: int,
    num_temperatures: int | None = None,
    pilot: PilotRun | None = None,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> tuple[Estimate, Tensor]:
    """Estimate log Z by bridge sampling between neighboring temperatures of replica exchange.

    Replicas have visible units only and swap by their free energies F_beta. The hidden units are
    summed out, so that fewer swaps are rejected than with the energies of both layers. log Z is
    the sum of the log ratios of neighbors, each by Bennett's acceptance ratio (Bennett, Efficient
    estimation of free energy differences from Monte Carlo data, 1976). The error is the standard
    error of the mean over the chains, which are independent.

    Args:
        rbm: The model.
        chains: Number of independent chains, each with one replica at every temperature.
        burn_in: Number of steps during which the betas adapt; the estimate does not use them.
        steps: Number of sampling steps after the burn-in, rounded down to an even number.
        num_temperatures: Number of inverse temperatures. By default half of the swaps are
            accepted (Syed et al., arXiv:1905.02939, section 5).
        pilot: Pilot run; by default a new one. The replicas start at its chains, drawn by their
            importance weights.
        generator: Random generator, or None for the global one.
        progress: Progress bar.

    Returns:
        The estimate, and samples of the RBM, (chains, visible).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> estimate, samples = bridge(rbm, chains=20, burn_in=10, steps=20, num_temperatures=3)
        >>> abs(estimate.log_z - exact_log_z(rbm)) < 0.05, samples.shape
        (True, torch.Size([20, 4]))
    """
    pilot = pilot or run_pilot(rbm, chains, generator, progress)
    if num_temperatures is None:
        # Sum of the rejection rates along the path, where F_beta is nearly normal. The sum is not
        # finite for a diverged model, which gets two temperatures.
        barrier = pilot.barrier.sum().nan_to_num(0.0, posinf=0.0).item() / math.sqrt(math.pi)
        num_temperatures = 2 + math.ceil(min(2 * barrier, MAX_INTERMEDIATE_TEMPERATURES))
    replicas = ReplicaExchange(num_temperatures, chains, adapt=True).to(rbm.base)
    replicas.betas.copy_(space_betas(pilot.betas, pilot.barrier, num_temperatures - 1))
    nearest = (pilot.betas[:, None] - replicas.betas).abs().argmin(0)
    # Unweighted chains of the pilot run miss modes that gain weight after the chains freeze. The
    # weights of a diverged model are not finite: it draws all chains equally.
    weights = pilot.log_weights[nearest].softmax(1).nan_to_num(1.0)
    drawn = torch.multinomial(weights, chains, replacement=True, generator=generator)
    start = pilot.visible[nearest[:, None], drawn].flatten(0, 1).to(rbm.base)
    state = AnnealingState(rbm, start, generator)
    for _ in progress(range(burn_in), "tempering"):
        _bridge_step(state, replicas)
    replicas.adapt = False
    differences = [
        _bridge_step(state, replicas) for _ in progress(range(2 * (steps // 2)), "bridge")
    ]
    # Rounds alternate between the even and the odd pairs of neighbors.
    even, even_influence = _log_ratios(*torch.stack(differences[::2], 2))
    odd, odd_influence = _log_ratios(*torch.stack(differences[1::2], 2))
    influence = even_influence + odd_influence
    chain_influence = influence.mean(0)
    estimate = Estimate(
        log_z=base_log_z(rbm) + (even + odd),
        error=(chain_influence.std() / math.sqrt(chains)).item(),
        effective_sample_size=min(
            (influence.var() * chains / chain_influence.var()).item(), influence.numel()
        ),
    )
    return estimate, replicas.at_beta_one(state.visible.view(*replicas.beta_index.shape, -1))


def _bridge_step(state: AnnealingState, replicas: ReplicaExchange) -> Tensor:
    """Update every replica by a Gibbs step, then swap neighbors.

    Returns:
        F_k+1 - F_k before the swaps, of the samples at k and of those at k + 1,
        (2, pairs, chains).
    """
    lower = replicas.lower_indices()
    pairs = torch.stack((lower, lower + 1))
    neighbor_betas = replicas.betas.clone()
    neighbor_betas[pairs] = replicas.betas[pairs.flip(0)]
    beta = replicas.betas[replicas.beta_index].view(-1, 1)
    neighbor_beta = neighbor_betas[replicas.beta_index].view(-1, 1)
    state.gibbs_step(beta)
    difference = state.free_energy(neighbor_beta) - state.free_energy(beta)
    at_lower, at_upper = replicas.by_beta(difference.view_as(replicas.beta_index))[pairs]
    replicas.exchange(lower, -at_upper - at_lower, state.generator)
    return torch.stack((at_lower, -at_upper)).double()


def _log_ratios(at_lower: Tensor, at_upper: Tensor) -> tuple[float, Tensor]:
    """Return the sum over pairs of log Z_k+1 / Z_k by Bennett's acceptance ratio.

    Args:
        at_lower: F_k+1 - F_k of the samples at k, (pairs, steps, chains).
        at_upper: F_k+1 - F_k of the samples at k + 1, (pairs, steps, chains).

    Returns:
        The sum, and the influence of each sample on it, (steps, chains).
    """
    samples = (1, 2)
    shift = (at_lower.mean(samples, keepdim=True) + at_upper.mean(samples, keepdim=True)) / 2
    for _ in range(ACCEPTANCE_RATIO_ITERATIONS):
        forward = (shift - at_lower).sigmoid()
        backward = (at_upper - shift).sigmoid()
        forward_mean = forward.mean(samples, keepdim=True)
        backward_mean = backward.mean(samples, keepdim=True)
        shift = shift + (backward_mean / forward_mean).log()
    influence = forward / forward_mean - backward / backward_mean
    return -shift.sum().item(), influence.sum(0)


class LogZ(NamedTuple):
    """Result of `estimate_log_z`.

    Attributes:
        estimates: Estimates by the suffix of their metrics. The empty suffix is the final result,
            and the others are the estimates that it combines.
        reliable: True if the final result can be trusted, or None without a cross-check.
        verdict: The reason.
    """

    estimates: dict[str, Estimate]
    reliable: bool | None = None
    verdict: str = ""


def estimate_log_z(
    rbm: EnergyModel,
    eval_config: EvalConfig,
    generator: Generator | None = None,
    progress: Progress = no_progress,
) -> LogZ:
    """Return log Z exactly if a layer is small enough to enumerate, otherwise estimate it.

    Without `eval_config.cross_check` the estimate is that of forward AIS. Otherwise forward AIS,
    reverse AIS and bridge sampling check each other. Forward AIS is biased low, reverse AIS high:
    the result is their midpoint, and half of their distance is part of the error.

    Args:
        rbm: The model.
        eval_config: Numbers of steps and chains, and whether to cross-check.
        generator: Random generator, or None for the global one.
        progress: Progress bar.

    Example:
        >>> result = estimate_log_z(EnergyModel(4, 3), EvalConfig(cross_check=True))
        >>> result.reliable, result.verdict
        (True, 'log Z is exact (enumeration)')
    """
    check = eval_config.cross_check
    chains = eval_config.ais_chains
    max_units = MAX_ENUMERATED_UNITS if check else MAX_QUICK_ENUMERATED_UNITS
    if min(rbm.visible, rbm.hidden) <= max_units:
        value = exact_log_z(rbm)
        is_finite = math.isfinite(value)
        verdict = f"log Z is {'exact (enumeration)' if is_finite else 'not finite'}"
        return LogZ({"": Estimate(value, 0.0, math.inf)}, is_finite if check else None, verdict)
    steps = eval_config.ais_steps
    if not check:
        forward = ais(rbm, betas=steps, chains=chains, generator=generator, progress=progress)
        return LogZ({"": forward})
    pilot = run_pilot(rbm, chains, generator, progress)
    # Steps with the same variance of the log weight minimize the variance of their sum (Sivak and
    # Crooks, Thermodynamic metrics and optimal paths, arXiv:1201.4166).
    betas = space_betas(pilot.betas, pilot.log_weight_std, steps).tolist()
    forward = ais(rbm, betas=betas, chains=chains, generator=generator, progress=progress)
    bridge_estimate, samples = bridge(
        rbm,
        chains=chains,
        burn_in=BRIDGE_BURN_IN_STEPS,
        steps=BRIDGE_STEPS,
        pilot=pilot,
        generator=generator,
        progress=progress,
    )
    reverse = reverse_ais(rbm, samples, betas=betas, generator=generator, progress=progress)
    return _cross_check(forward, reverse, bridge_estimate)


def _cross_check(forward: Estimate, reverse: Estimate, bridge: Estimate) -> LogZ:
    """Combine three estimates, and decide if they agree well enough to report log Z."""
    methods = {"_forward": forward, "_reverse": reverse, "_bridge": bridge}
    distance = abs(forward.log_z - reverse.log_z)
    bridge_distance = max(abs(bridge.log_z - forward.log_z), abs(bridge.log_z - reverse.log_z))
    smallest = min(estimate.effective_sample_size for estimate in methods.values())
    checks = (
        (
            not all(math.isfinite(value) for estimate in methods.values() for value in estimate),
            "an estimate of log Z or its error is not finite: the model has diverged, "
            "or evaluation.ais_chains is 1; use more",
        ),
        (
            distance > MAX_DISAGREEMENT_NATS,
            f"forward and reverse AIS differ by {distance:.1f} nats: increase evaluation.ais_steps",
        ),
        (
            smallest < MIN_EFFECTIVE_SIZE,
            f"the effective sample size is only {smallest:.1f}: "
            "increase evaluation.ais_steps or evaluation.ais_chains",
        ),
        (
            bridge_distance > MAX_DISAGREEMENT_NATS,
            f"bridge sampling differs from AIS by {bridge_distance:.1f} nats: "
            "the chains do not mix",
        ),
    )
    problems = [problem for occurs, problem in checks if occurs]
    agreement = (
        f"forward and reverse AIS differ by {distance:.2f} nats, bridge sampling from them by at "
        f"most {bridge_distance:.2f}, and all effective sample sizes are at least {smallest:.0f}"
    )
    verdict = problems[0] if problems else agreement
    error = math.hypot(distance / 2, forward.error / 2, reverse.error / 2)
    result = Estimate((forward.log_z + reverse.log_z) / 2, error, smallest)
    return LogZ({"": result} | methods, reliable=not problems, verdict=verdict)


def log_likelihood_metrics(free_energy: Tensor, log_z: LogZ) -> Metrics:
    """Return the mean log P(v) = -F(v) - log Z in nats, and log Z.

    The error of the log-likelihood combines the standard error of the mean over images with the
    error of log Z. Each estimate that log Z combines adds metrics with the suffix _forward,
    _reverse or _bridge, including its effective sample size.

    Args:
        free_energy: F(v) of the images in nats, (images,).
        log_z: Result of `estimate_log_z`.
    """
    mean = -free_energy.double().mean().item()
    mean_error = standard_error(free_energy.double())
    values: list[MetricValue] = []
    for suffix, estimate in log_z.estimates.items():
        values += [
            MetricValue(
                replace(LOG_LIKELIHOOD, name=LOG_LIKELIHOOD.name + suffix),
                mean - estimate.log_z,
                math.hypot(mean_error, estimate.error),
                likelihood="exact" if estimate.exact else "estimate",
            ),
            MetricValue(replace(LOG_Z, name=LOG_Z.name + suffix), estimate.log_z, estimate.error),
        ]
        if suffix:
            name = EFFECTIVE_SAMPLE_SIZE.name + suffix
            effective_sample_size = replace(EFFECTIVE_SAMPLE_SIZE, name=name)
            values.append(MetricValue(effective_sample_size, estimate.effective_sample_size))
    if log_z.reliable is None:
        return Metrics.of(*values)
    reliable = log_z.reliable and math.isfinite(mean)
    reason = log_z.verdict if math.isfinite(mean) else "the model has diverged"
    verdict = f"{'reliable' if reliable else 'not reliable'}: {reason}"
    return Metrics.of(*values, reliable=reliable, verdict=verdict)
