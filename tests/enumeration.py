"""RBMs small enough for exact enumeration, and their exact distributions."""

import math
from functools import partial

import torch
from torch import Tensor

from flowgen.models.rbm import rbm as rbm_module
from flowgen.models.rbm.rbm import RBM
from flowgen.models.rbm.sampling import tempering

CHAINS = 40_000
SAMPLERS = rbm_module.SAMPLERS | {"tempering": partial(tempering, num_temperatures=4)}


def small_rbm(visible: int = 4, hidden: int = 3, scale: float = 1.0, **arguments: object) -> RBM:
    """Return an RBM in float64 with random parameters and `base` of order `scale`."""
    rbm = RBM(visible, hidden, **arguments).double()
    with torch.no_grad():
        for parameter in (*rbm.parameters(), rbm.base):
            parameter.copy_(scale * torch.randn_like(parameter))
    return rbm


def all_states(units: int) -> Tensor:
    """Return all states of binary units (2^units, units)."""
    return (torch.arange(2**units)[:, None] >> torch.arange(units) & 1).double()


def exact_distribution(rbm: RBM, path_beta: float = 1.0, beta: float = 1.0) -> Tensor:
    """Return P(v) of every state by enumerating both layers.

    `path_beta` is the position between the independent-pixel model and the RBM, and `beta` scales
    the energy of the RBM.
    """
    v = all_states(rbm.visible)
    h = all_states(rbm.hidden)
    energy = rbm.energy(v[:, None].expand(-1, len(h), -1), h.expand(len(v), -1, -1))
    log_base = ((1 - path_beta) * v @ rbm.base)[:, None]
    return (-path_beta * beta * energy + log_base).logsumexp(1).softmax(0).detach()


def draw_states(probabilities: Tensor, count: int = CHAINS) -> Tensor:
    """Draw independent states (count, units)."""
    units = len(probabilities).bit_length() - 1
    return all_states(units)[torch.multinomial(probabilities, count, replacement=True)]


def total_variation(visible: Tensor, probabilities: Tensor) -> float:
    """Return the total variation distance of an empirical distribution from the exact one."""
    indices = (visible.long() << torch.arange(visible.shape[1])).sum(1)
    frequencies = torch.bincount(indices, minlength=len(probabilities)) / len(indices)
    return 0.5 * (frequencies - probabilities).abs().sum().item()


def expected_variation(probabilities: Tensor, count: int = CHAINS) -> float:
    """Return the approximate expected total variation of `count` independent draws.

    It is 1/2 sum sqrt(2 p (1 - p) / (pi count)).
    """
    return 0.5 * (2 * probabilities * (1 - probabilities) / (torch.pi * count)).sqrt().sum().item()


def all_images(image_shape: tuple[int, int, int], bits: int) -> Tensor:
    """Return all images of this shape, (count, channels, height, width), in order of their values.

    The first number varies slowest.
    """
    values = torch.arange(2**bits, dtype=torch.uint8)
    return torch.cartesian_prod(*[values] * math.prod(image_shape)).view(-1, *image_shape)
