"""The mean log-likelihood of images under an RBM: which estimate of log Z, with which error, and whether it may be quoted."""

import math
from typing import Any

from torch import Generator, Tensor

from flowgen.models.base import Evaluation
from flowgen.models.rbm.annealing import ais, reverse_ais, scout
from flowgen.models.rbm.bridge import bridge
from flowgen.models.rbm.machine import Machine
from flowgen.models.rbm.partition import ENUMERABLE, Estimate, exact_log_z
from flowgen.progress import Progress, unseen

LADDER = {"burn_in": 100, "sweeps": 200}  # of the ladder between base rates and machine
FAR_APART, FEW = 1.0, 10  # nats between the two directions of AIS, and effective samples, beyond which nothing is quoted


def log_likelihood(machine: Machine, free: Tensor, how: Evaluation, generator: Generator, progress: Progress = unseen) -> dict[str, Any]:
    """Mean log P(v) in nats of images with these free energies, and the errors of the mean and of log Z together.

    Where a layer can be enumerated, log Z is exact. Else a short look is at forward AIS alone, and a thorough one at the whole sandwich:
    forward AIS tends to err on one side, reverse AIS on the other, their middle is quoted with half their distance as
    an error, and a verdict says whether it may be.
    """
    mean, spread = -free.double().mean().item(), (free.double().std() / math.sqrt(len(free))).item()
    if min(machine.visible, machine.hidden) <= ENUMERABLE - (0 if how.thorough else 4):
        log_z = exact_log_z(machine)
        fine = math.isfinite(mean - log_z)
        why = "quotable: log Z is exact, by enumeration" if fine else "do not quote: the machine has diverged"
        verdict = {"quotable": fine, "verdict": why} if how.thorough else {}
        return {"log_likelihood": mean - log_z, "log_likelihood_error": spread, "log_z": log_z, "log_z_error": 0.0, **verdict}
    if not how.thorough:
        forward = ais(machine, betas=how.betas, chains=how.chains, generator=generator, progress=progress)
        error = math.hypot(spread, forward.error)
        return {"log_likelihood": mean - forward.log_z, "log_likelihood_error": error, "log_z": forward.log_z, "log_z_error": forward.error}
    found = scout(machine, how.chains, generator, progress)
    way = found.way(how.betas)
    forward = ais(machine, betas=way, chains=how.chains, generator=generator, progress=progress)
    by_bridge, samples = bridge(machine, **LADDER, chains=how.chains, start=found, generator=generator, progress=progress)
    reverse = reverse_ais(machine, samples, betas=way, generator=generator, progress=progress)
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
        return False, "an estimate of log Z or of its error is not finite: the machine has diverged, or chains=1"
    if apart > FAR_APART:
        return False, f"forward and reverse AIS are {apart:.1f} nats apart, give them more betas"
    if smallest < FEW:
        return False, f"the effective sample size is only {smallest:.1f}, give them more betas or chains"
    if beside > FAR_APART + 3 * bridge.error:
        return False, f"bridge sampling lies {beside:.1f} nats from AIS: the chains do not mix"
    return True, f"forward and reverse AIS are {apart:.2f} nats apart, and effective sample sizes are {smallest:.0f} or more"
