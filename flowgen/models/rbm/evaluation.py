"""What is measured of an RBM: its log-likelihood, and beside it figures that are none."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.base import Evaluation
from flowgen.models.rbm.gibbs import draw_bits
from flowgen.models.rbm.likelihood import estimate_log_z, log_likelihood
from flowgen.models.rbm.machine import Machine
from flowgen.progress import Progress


@torch.no_grad()
def figures_of(machine: Machine, data: Tensor, trained: Tensor | None, how: Evaluation, progress: Progress) -> dict[str, Any]:
    """Of images `data` (count, visible), with the same random numbers at every call.

    `free_energy_gap` is the mean F of `data` less that of `trained`, training images: above 0 it tells of over-fitting.
    """
    generator = torch.Generator(data.device).manual_seed(0)
    flipped = torch.randint(machine.visible, (len(data), 1), generator=generator, device=data.device)
    free = machine.free_energy(data)
    other = machine.free_energy(data.scatter(1, flipped, 1 - data.gather(1, flipped)))
    log_odds = machine.visible_input(draw_bits(machine.hidden_input(data), generator))
    return {
        **log_likelihood(free, estimate_log_z(machine, how, generator, progress)),
        "pseudo_log_likelihood": machine.visible * F.logsigmoid(other - free).mean().item(),
        "reconstruction_error": (data - draw_bits(log_odds, generator)).square().mean().item(),
        "reconstruction_error_expected": (data - log_odds.sigmoid()).square().mean().item(),
        **({} if trained is None else _gap(free, machine.free_energy(trained))),
        "images": len(data),
    }


def _gap(free: Tensor, trained: Tensor) -> dict[str, float]:
    error = (free.var() / len(free) + trained.var() / len(trained)).sqrt()
    return {"free_energy_gap": (free.mean() - trained.mean()).item(), "free_energy_gap_error": error.item()}
