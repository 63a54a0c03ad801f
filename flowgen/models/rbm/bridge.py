"""Bridge sampling of log Z, in nats, between the neighbours of a tempering ladder."""

import math

import torch
from torch import Tensor

from flowgen.models.rbm.annealing import Scout, States, scout
from flowgen.models.rbm.exchange import Rungs, equal_parts
from flowgen.models.rbm.machine import Machine
from flowgen.models.rbm.partition import Estimate, log_base
from flowgen.progress import Progress, unseen

RATIO_ITERATIONS = 50
MOST = 100  # temperatures, however hard the machine


@torch.no_grad()
def bridge(
    machine: Machine,
    *,
    chains: int,
    burn_in: int,
    sweeps: int,
    temperatures: int | None = None,
    start: Scout | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = unseen,
) -> tuple[Estimate, Tensor]:
    """log Z by bridge sampling between the neighbours of a ladder that begins at the stops of a scout, and its samples (chains, visible).

    Replicas swap v by the free energies of the scaled machines, which sum h out and so reject less than energies do. By default there
    are as many `temperatures` as let half of the swaps through (Syed et al., 1905.02939, section 5). Bennett's acceptance ratio (1976).
    The error is that of the mean over the chains, which are independent.
    """
    start = start or scout(machine, chains, generator, progress)
    barrier = start.barrier.sum().item() / math.sqrt(math.pi)  # the rejections that add up along the way, where F_beta is near normal
    temperatures = temperatures or (2 + math.ceil(min(2 * barrier, MOST)) if math.isfinite(barrier) else 2)
    rungs = Rungs(temperatures, chains, adapt=True).to(machine.base)
    rungs.betas.copy_(equal_parts(start.betas, start.barrier, temperatures - 1))
    nearest = (start.betas[:, None] - rungs.betas).abs().argmin(0)
    states = States(machine, start.visible[nearest].flatten(0, 1).to(machine.base), generator)
    for _ in progress(range(burn_in), "tempering"):
        _sweep(states, rungs)
    rungs.adapt = False
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for sweep in progress(range(2 * (sweeps // 2)), "bridge"):
        pairs[sweep % 2].append(_sweep(states, rungs))
    ratios, influences = zip(*(_acceptance_ratio(*torch.stack(found, 2)) for found in pairs), strict=True)
    influence = influences[0] + influences[1]
    of_chains = influence.mean(0)
    error = (of_chains.std() / math.sqrt(chains)).item()
    effective = min(influence.var() * chains / of_chains.var(), torch.tensor(influence.numel())).item()
    return Estimate(log_base(machine) + sum(ratios), error, effective), rungs.top(states.visible.unflatten(0, rungs.place.shape))


def _sweep(states: States, rungs: Rungs) -> Tensor:
    """A Gibbs sweep on every rung, then swaps; F_k+1 - F_k of the samples at k and at k+1 of each pair, before: (2, pairs, chains)."""
    lower = rungs.lower()
    neighbour = torch.arange(len(rungs.betas), device=lower.device)
    neighbour[lower], neighbour[lower + 1] = lower + 1, lower.clone()
    here, there = (betas[rungs.place].view(-1, 1) for betas in (rungs.betas, rungs.betas[neighbour]))
    states.move(here)
    difference = rungs.at((states.free_energy(there) - states.free_energy(here)).view_as(rungs.place))
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
