"""Restoring what is missing of an image: chains whose known pixels are held."""

from itertools import islice

import torch
from torch import Tensor

from flowgen.models.rbm.gibbs import Sampler, white_noise
from flowgen.models.rbm.machine import Machine
from flowgen.progress import Progress, unseen

CHAINS, SWEEPS = 64, 1000


@torch.no_grad()
def restore(
    machine: Machine,
    image: Tensor,
    known: Tensor,
    sampler: Sampler,
    sweeps: int = SWEEPS,
    generator: torch.Generator | None = None,
    progress: Progress = unseen,
) -> tuple[Tensor, Tensor]:
    """P(v = 1) of every chain at its end, (chains, visible), and their mean over all chains and the second half of the sweeps.

    The chains begin with white noise where pixels of `image` (1, visible) are not `known` (visible,).
    """
    start = torch.where(known, image, white_noise(machine, CHAINS, generator))
    total, count = torch.zeros_like(start[0]), 0
    states = islice(sampler(machine, start, known=known, generator=generator), sweeps)
    for sweep, (_, expected) in enumerate(progress(states, "completion", sweeps)):
        if sweep >= sweeps // 2:
            total, count = total + expected.mean(0), count + 1
    return expected, total / count
