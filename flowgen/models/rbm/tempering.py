"""Parallel tempering of an RBM, along the ladder of inverse temperatures from `Machine.base` to the machine."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from flowgen.models.rbm.exchange import Rungs
from flowgen.models.rbm.gibbs import Visible, draw_bits, hold
from flowgen.models.rbm.machine import Machine

BURN_IN = 400  # sweeps of `tempering` in which the ladder adapts


def tempering(
    machine: Machine,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperatures: int = 20,
) -> Iterator[Visible]:
    """The machine's own rung of a ladder that adapts to begin with; every rung begins at `start`.

    A ladder that went on to adapt to its own chains would not keep their law.
    """
    ladder = Ladder(temperatures, len(start), adapt=True)
    ladder.allocate(machine.hidden)
    ladder.to(start)
    ladder.hidden.copy_(draw_bits(beta * machine.hidden_input(start), generator))
    while True:
        ladder.adapt = int(ladder.sweeps) < BURN_IN
        visible, _ = ladder.sweep(machine, beta, start, known, generator)
        log_odds = beta * machine.visible_input(ladder.top(ladder.hidden))
        yield ladder.top(visible), hold(log_odds.sigmoid(), start, known)


class Ladder(Rungs):
    """Parallel tempering of (v, h): a Gibbs sweep on every rung, then swaps with probability min(1, exp(dbeta dU)), U = dE/dbeta in nats.

    `hidden` (temperatures, chains, hidden), a buffer, is the state of each replica.
    """

    hidden: Tensor

    def allocate(self, hidden: int) -> None:
        self.register_buffer("hidden", torch.zeros(*self.place.shape, hidden))

    @_disable_dynamo  # the swaps' bookkeeping is no work for a compiler; torch.compiler.disable would import one, a second long
    def sweep(
        self,
        machine: Machine,
        beta: float = 1.0,
        start: Tensor | None = None,
        known: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """v ~ P(v|h), h ~ P(h|v) on every rung, then swaps: the visible units and hidden inputs of all replicas.

        `beta` scales the machine at the top: 1 is the machine itself.
        """
        rung = self.betas[self.place][..., None]
        visible = draw_bits(machine.visible_input(self.hidden).mul_(rung * beta).addcmul_(1 - rung, machine.base), generator)
        if start is not None:
            visible = hold(visible, start, known)
        inputs = machine.hidden_input(visible)
        self.hidden.copy_(draw_bits(inputs * (rung * beta), generator))  # in place, so that what restores buffers restores it
        slope = visible @ (machine.base - beta * machine.visible_bias) - beta * torch.linalg.vecdot(inputs, self.hidden)
        lower, slopes = self.lower(), self.at(slope)
        odds = (self.betas[lower + 1] - self.betas[lower])[:, None] * (slopes[lower + 1] - slopes[lower])
        self.exchange(lower, odds, generator)
        return visible, inputs
