"""Block Gibbs sampling and mean field of an RBM, each on a whole batch at once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowgen.models.rbm.machine import Machine

Visible = tuple[Tensor, Tensor]  # visible units, and the probabilities that they were drawn with: both (batch, visible)
Sampler = Callable[..., Iterator[Visible]]


def draw_bits(log_odds: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent binary units with these log-odds."""
    uniform = torch.rand(log_odds.shape, generator=generator, device=log_odds.device, dtype=log_odds.dtype)
    return uniform.lt_(log_odds.sigmoid())  # 0 or 1 in place: half the cost of a comparison that is then converted


def white_noise(machine: Machine, count: int, generator: torch.Generator | None = None) -> Tensor:
    return draw_bits(machine.visible_bias.new_zeros(count, machine.visible), generator)


def hold(visible: Tensor, start: Tensor, known: Tensor | None) -> Tensor:
    return visible if known is None else torch.where(known, start, visible)


def gibbs(
    machine: Machine, start: Tensor, *, beta: float = 1.0, known: Tensor | None = None, generator: torch.Generator | None = None
) -> Iterator[Visible]:
    """h ~ P(h|v), v ~ P(v|h), from `start` (batch, visible), at inverse temperature `beta`; pixels where `known` stay as they are."""
    visible = start
    while True:
        hidden = draw_bits(beta * machine.hidden_input(visible), generator)
        log_odds = beta * machine.visible_input(hidden)
        visible = hold(draw_bits(log_odds, generator), start, known)
        yield visible, hold(log_odds.sigmoid(), start, known)


def mean_field(
    machine: Machine, start: Tensor, *, beta: float = 1.0, known: Tensor | None = None, generator: torch.Generator | None = None
) -> Iterator[Visible]:
    """lambda = sigmoid(beta (c + W'mu)), mu = sigmoid(beta (b + W lambda)): coordinate ascent on the ELBO of log Z."""
    visible = start
    while True:
        visible = hold((beta * machine.visible_input((beta * machine.hidden_input(visible)).sigmoid())).sigmoid(), start, known)
        yield visible, visible
