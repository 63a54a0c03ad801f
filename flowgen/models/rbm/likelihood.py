"""The mean log-likelihood of images under an RBM: which estimate of log Z, with which error, and whether it may be quoted."""

import math
from dataclasses import dataclass, field, replace

from torch import Generator, Tensor

from flowgen.measures import LOG_LIKELIHOOD, Judgement, Measured, Metric
from flowgen.models.base import Evaluation
from flowgen.models.rbm.annealing import ais, reverse_ais, scout
from flowgen.models.rbm.bridge import bridge
from flowgen.models.rbm.machine import Machine
from flowgen.models.rbm.partition import ENUMERABLE, Estimate, exact_log_z
from flowgen.progress import Progress, unseen

LADDER = {"burn_in": 200, "sweeps": 400}  # of the ladder between base rates and machine
LOG_Z, EFFECTIVE_SIZE = Metric("log_z", "nats"), Metric("effective_size", "samples", higher_is_better=True)
FAR_APART, FEW = 1.0, 10  # nats between estimates, and effective samples, beyond which nothing is quoted


@dataclass(frozen=True)
class LogZ:
    """log Z in nats with its standard error, the estimates that it is made of, and whether it may be quoted, where that was judged."""

    value: float
    error: float
    estimates: dict[str, Estimate] = field(default_factory=dict)
    quotable: bool | None = None
    verdict: str = ""


def estimate_log_z(machine: Machine, how: Evaluation, generator: Generator, progress: Progress = unseen) -> LogZ:
    """Exact where a layer can be enumerated; else a short look is at forward AIS alone, a thorough one at the whole sandwich.

    Forward AIS tends to err on one side, reverse AIS on the other: the middle is taken, with half their distance as an error.
    """
    if min(machine.visible, machine.hidden) <= ENUMERABLE - (0 if how.thorough else 4):
        exact = exact_log_z(machine)
        return LogZ(exact, 0.0, {}, math.isfinite(exact) if how.thorough else None, "log Z is exact, by enumeration")
    if not how.thorough:
        look = ais(machine, betas=how.betas, chains=how.chains, generator=generator, progress=progress)
        return LogZ(look.log_z, look.error)
    found = scout(machine, how.chains, generator, progress)
    way = found.way(how.betas)
    forward = ais(machine, betas=way, chains=how.chains, generator=generator, progress=progress)
    by_bridge, samples = bridge(machine, **LADDER, chains=how.chains, start=found, generator=generator, progress=progress)
    reverse = reverse_ais(machine, samples, betas=way, generator=generator, progress=progress)
    middle, half = (forward.log_z + reverse.log_z) / 2, abs(forward.log_z - reverse.log_z) / 2
    error = math.hypot(half, forward.error / 2, reverse.error / 2)
    estimates = {"forward": forward, "reverse": reverse, "bridge": by_bridge}
    return LogZ(middle, error, estimates, *_verdict(**estimates))


def _verdict(forward: Estimate, reverse: Estimate, bridge: Estimate) -> tuple[bool, str]:
    apart = abs(forward.log_z - reverse.log_z)
    smallest = min(forward.effective_size, reverse.effective_size, bridge.effective_size)
    beside = max(abs(bridge.log_z - forward.log_z), abs(bridge.log_z - reverse.log_z))
    if not all(map(math.isfinite, (*forward, *reverse, *bridge))):
        return False, "an estimate of log Z or of its error is not finite: the machine has diverged, or chains=1"
    if apart > FAR_APART:
        return False, f"forward and reverse AIS are {apart:.1f} nats apart, give them more betas"
    if smallest < FEW:
        return False, f"the effective sample size is only {smallest:.1f}, give them more betas or chains"
    if beside > max(FAR_APART, 3 * bridge.error):
        return False, f"bridge sampling lies {beside:.1f} nats from AIS: the chains do not mix"
    return True, f"forward and reverse AIS are {apart:.2f} nats apart, and effective sample sizes are {smallest:.0f} or more"


def log_likelihood(free: Tensor, log_z: LogZ) -> Judgement:
    """Mean log P(v) in nats of images with these free energies, with the errors of the mean and of log Z together."""
    mean, spread = -free.double().mean().item(), (free.double().std() / math.sqrt(len(free))).item()
    measured = [Measured(LOG_LIKELIHOOD, mean - log_z.value, math.hypot(spread, log_z.error)), Measured(LOG_Z, log_z.value, log_z.error)]
    for name, estimate in log_z.estimates.items():
        measured += [
            Measured(named(LOG_LIKELIHOOD, name), mean - estimate.log_z, math.hypot(spread, estimate.error)),
            Measured(named(LOG_Z, name), estimate.log_z, estimate.error),
            Measured(named(EFFECTIVE_SIZE, name), estimate.effective_size),
        ]
    if log_z.quotable is None:
        return Judgement.of(*measured)
    quotable, why = log_z.quotable, log_z.verdict
    if not math.isfinite(mean - log_z.value):
        quotable, why = False, "the machine has diverged"
    return Judgement.of(*measured, quotable=quotable, verdict=f"{'quotable' if quotable else 'do not quote'}: {why}")


def named(metric: Metric, estimator: str) -> Metric:
    """The same by one estimator of several."""
    return replace(metric, name=f"{metric.name}_{estimator}")
