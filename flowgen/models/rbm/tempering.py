"""Parallel tempering of an RBM: ensembles of replicas along the ladder of inverse temperatures from `Machine.base` to the machine."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from flowgen.errors import FlowgenError, check_choice, check_whole
from flowgen.models.rbm.gibbs import State, draw_bits, hold
from flowgen.models.rbm.machine import Machine

ADAPT_EVERY = 100  # sweeps over which swaps are counted before the ladder is spaced anew
LEAST_REJECTION = 1e-3  # so that two neighbours never fall into one


def tempering(
    machine: Machine,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
    temperatures: int = 20,
) -> Iterator[State]:
    """The machine's own rung of a ladder that adapts; every rung begins at `start`."""
    ladder = Ladder(temperatures, len(start), adapt=True)
    ladder.allocate(machine.hidden)
    ladder.to(start)
    ladder.hidden.copy_(draw_bits(beta * machine.hidden_input(start), generator))
    while True:
        visible, _ = ladder.sweep(machine, beta, start, known, generator)
        log_odds = beta * machine.visible_input(ladder.top(ladder.hidden))
        yield ladder.top(visible), hold(log_odds.sigmoid(), start, known)


class Ladder(nn.Module):
    """Parallel tempering: `chains` ensembles of `temperatures` replicas, which swap temperatures rather than states.

    Even and odd pairs of neighbours take turns (Okabe et al. 2001), which lets a replica drift from end to end (Syed et al.,
    1905.02939). `adapt` spaces beta anew every so often, so that all pairs swap alike (section 5.1 there). Everything is a buffer:
    `hidden` (temperatures, chains, hidden), `place`, the rung of each replica, `betas`, and the counts of swaps and round trips.
    """

    betas: Tensor
    hidden: Tensor
    place: Tensor
    sweeps: Tensor
    swapped: Tensor
    tried: Tensor
    from_bottom: Tensor
    round_trips: Tensor
    slopes: Tensor  # U = dE/dbeta in nats at each rung before the last swap, (temperatures, chains); made anew by every sweep

    def __init__(self, temperatures: int, chains: int, adapt: bool):
        super().__init__()
        check_whole(temperatures=temperatures, chains=chains)
        check_choice((True, False), adapt=adapt)
        if temperatures < 2:
            raise FlowgenError("a ladder needs temperatures=2 at least: its ends")
        self.adapt = adapt
        self.register_buffer("betas", torch.linspace(0, 1, temperatures))
        self.register_buffer("place", torch.arange(temperatures)[:, None].repeat(1, chains))
        self.register_buffer("sweeps", torch.zeros((), dtype=torch.long))
        self.register_buffer("swapped", torch.zeros(temperatures - 1))
        self.register_buffer("tried", torch.zeros(temperatures - 1))
        self.register_buffer("from_bottom", torch.zeros(temperatures, chains, dtype=torch.bool))
        self.register_buffer("round_trips", torch.zeros((), dtype=torch.long))

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
        self.hidden = draw_bits(inputs * (rung * beta), generator)
        slope = visible @ (machine.base - beta * machine.visible_bias) - beta * torch.linalg.vecdot(inputs, self.hidden)
        self._swap(slope, generator)
        return visible, inputs

    def top(self, states: Tensor) -> Tensor:
        """What of `states` (temperatures, chains, ...) is at beta = 1: (chains, ...)."""
        return self.at(states)[-1]

    def at(self, states: Tensor) -> Tensor:
        """`states` in the order of the rungs."""
        return states[self.place.argsort(0), torch.arange(states.shape[1], device=states.device)]

    def _swap(self, slope: Tensor, generator: torch.Generator | None) -> None:
        """Swap neighbours with probability min(1, exp((beta_k+1 - beta_k) (U_k+1 - U_k))), `slope` being U = dE/dbeta of each replica."""
        replica = self.place.argsort(0)
        self.slopes = slope.gather(0, replica)
        lower = torch.arange(int(self.sweeps) % 2, len(self.betas) - 1, 2, device=slope.device)
        self.sweeps += 1
        if len(lower):
            odds = (self.betas[lower + 1] - self.betas[lower])[:, None] * (self.slopes[lower + 1] - self.slopes[lower])
            uniform = torch.rand(odds.shape, generator=generator, device=odds.device, dtype=odds.dtype)
            accepted = uniform < odds.exp()
            self.place.scatter_(0, replica[lower], lower[:, None] + accepted.long())
            self.place.scatter_(0, replica[lower + 1], lower[:, None] + 1 - accepted.long())
            self.swapped[lower] += accepted.to(self.swapped).mean(1)
            self.tried[lower] += 1
            top = self.place == len(self.betas) - 1
            self.round_trips += (top & self.from_bottom).sum()
            self.from_bottom.logical_and_(~top).logical_or_(self.place == 0)
        if self.adapt and int(self.sweeps) % ADAPT_EVERY == 0:
            self._space_anew()

    def swap_rates(self) -> Tensor:
        """The share of swaps accepted, a pair of neighbours each, since they were last counted anew."""
        return self.swapped / self.tried.clamp(min=1)

    def _space_anew(self) -> None:
        """Put beta where the rejection that adds up along the ladder is cut into equal parts."""
        rejected = (1 - self.swap_rates()).clamp(min=LEAST_REJECTION)
        barrier = torch.cat((rejected.new_zeros(1), rejected.cumsum(0)))
        wanted = torch.linspace(0, 1, len(barrier), device=barrier.device, dtype=barrier.dtype) * barrier[-1]
        right = torch.searchsorted(barrier, wanted).clamp(1, len(rejected))
        share = (wanted - barrier[right - 1]) / (barrier[right] - barrier[right - 1])
        spaced = torch.lerp(self.betas[right - 1], self.betas[right], share)
        self.betas.copy_(spaced)
        self.betas[0], self.betas[-1] = 0.0, 1.0
        self.swapped.zero_()
        self.tried.zero_()
