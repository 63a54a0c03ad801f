"""log Z of an RBM in nats: exactly, and what every estimate of it says."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from flowgen.errors import FlowgenError
from flowgen.models.rbm.machine import Machine

ENUMERABLE = 20  # units of the smaller layer, at most
BLOCK = 2**14  # states at a time


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


def log_base(machine: Machine) -> float:
    """log Z at beta = 0: hidden log 2 + sum softplus(base)."""
    return machine.hidden * math.log(2) + F.softplus(machine.base.double()).sum().item()
