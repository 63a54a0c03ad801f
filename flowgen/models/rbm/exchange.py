"""Replica exchange between inverse temperatures."""

import torch
from torch import Tensor, nn

from flowgen.errors import FlowgenError, check_choice, check_whole

ADAPT_EVERY = 100  # sweeps over which swaps are counted before the rungs are spaced anew
LEAST_REJECTION = 1e-3  # so that two neighbours never fall into one


class Rungs(nn.Module):
    """Replica exchange: `chains` ensembles of `temperatures` replicas, which swap inverse temperatures rather than states.

    Even and odd pairs of neighbours take turns (Okabe et al. 2001), which lets a replica drift from end to end (Syed et al.,
    1905.02939). `adapt` spaces `betas` anew every so often, so that all pairs swap alike (section 5.1 there). Everything is a buffer:
    `betas`, `place` (temperatures, chains), the rung of each replica, and the counts of swaps and round trips.
    """

    betas: Tensor
    place: Tensor
    sweeps: Tensor
    swapped: Tensor
    tried: Tensor
    from_bottom: Tensor
    round_trips: Tensor

    def __init__(self, temperatures: int, chains: int, adapt: bool):
        super().__init__()
        check_whole(high=10**4, temperatures=temperatures)
        check_whole(chains=chains)
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

    def top(self, states: Tensor) -> Tensor:
        """What of `states` (temperatures, chains, ...) is at beta = 1: (chains, ...)."""
        return self.at(states)[-1]

    def at(self, states: Tensor) -> Tensor:
        """`states` in the order of the rungs."""
        return states[self.place.argsort(0), torch.arange(states.shape[1], device=states.device)]

    def lower(self) -> Tensor:
        """The lower rung of each pair whose turn it is."""
        return torch.arange(int(self.sweeps) % 2, len(self.betas) - 1, 2, device=self.betas.device)

    def exchange(self, lower: Tensor, odds: Tensor, generator: torch.Generator | None) -> None:
        """Swap the replicas at rungs `lower` with those above them with probability min(1, exp(odds)), (pairs, chains)."""
        replica = self.place.argsort(0)
        self.sweeps += 1
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
            rejected = (1 - self.swap_rates()).clamp(min=LEAST_REJECTION)
            self.betas.copy_(equal_parts(self.betas, rejected, len(rejected)))
            self.swapped.zero_()
            self.tried.zero_()

    def swap_rates(self) -> Tensor:
        """The share of swaps accepted, a pair of neighbours each, since they were last counted anew."""
        return self.swapped / self.tried.clamp(min=1)


def equal_parts(betas: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The count + 1 inverse temperatures, ends included, that cut the way along `betas` in parts of equal length.

    The pieces between `betas`, (n + 1,), are of these `lengths`, (n,), all above 0.
    """
    way = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    wanted = torch.linspace(0, 1, count + 1, device=way.device, dtype=way.dtype) * way[-1]
    right = torch.searchsorted(way, wanted).clamp(1, len(lengths))
    share = (wanted - way[right - 1]) / (way[right] - way[right - 1])
    cuts = torch.lerp(betas[right - 1], betas[right], share)
    cuts[0], cuts[-1] = betas[0], betas[-1]
    return cuts
