"""Boltzmann machines small enough to be enumerated, and their exact laws."""

from functools import partial

import torch
from torch import Tensor

from flowgen.models.rbm.rbm import METHODS, RBM
from flowgen.models.rbm.sampling import tempering

CHAINS = 40_000
SAMPLERS = METHODS | {"tempering": partial(tempering, temperatures=4)}


def machine(visible: int = 4, hidden: int = 3, scale: float = 1.0, **arguments: object) -> RBM:
    """A small one in float64, with parameters and base rates of order `scale`."""
    rbm = RBM(visible, hidden, **arguments).double()
    with torch.no_grad():
        for parameter in (*rbm.parameters(), rbm.base):
            parameter.copy_(scale * torch.randn_like(parameter))
    return rbm


def states(units: int) -> Tensor:
    return (torch.arange(2**units)[:, None] >> torch.arange(units) & 1).double()


def law(rbm: RBM, rung: float = 1.0, beta: float = 1.0) -> Tensor:
    """P(v) of every state at a rung of the ladder, by enumerating both layers."""
    v, h = states(rbm.visible), states(rbm.hidden)
    energy = rbm.energy(v[:, None].expand(-1, len(h), -1), h.expand(len(v), -1, -1))
    return (
        (-rung * beta * energy + ((1 - rung) * v @ rbm.base)[:, None])
        .logsumexp(1)
        .softmax(0)
        .detach()
    )


def draw(probabilities: Tensor, count: int = CHAINS) -> Tensor:
    return states(len(probabilities).bit_length() - 1)[
        torch.multinomial(probabilities, count, replacement=True)
    ]


def distance(visible: Tensor, probabilities: Tensor) -> float:
    """Total variation between the states found and their law."""
    numbers = (visible.long() << torch.arange(visible.shape[1])).sum(1)
    found = torch.bincount(numbers, minlength=len(probabilities)) / len(numbers)
    return 0.5 * (found - probabilities).abs().sum().item()


def floor(probabilities: Tensor, count: int = CHAINS) -> float:
    """The total variation that as many independent draws would show, about: a mean of 1/2 sum sqrt(2 p (1-p) / (pi count))."""
    return 0.5 * (2 * probabilities * (1 - probabilities) / (torch.pi * count)).sqrt().sum().item()
