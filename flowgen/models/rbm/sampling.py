"""Block Gibbs sampling and mean field of an RBM, each on a whole batch at once."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from flowgen.models.rbm.energy import EnergyModel
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError, check_choice, check_whole

Visible = tuple[
    Tensor, Tensor
]  # visible units, and the probabilities that they were drawn with: both (batch, visible)
Sampler = Callable[..., Iterator[Visible]]


def bernoulli_from_logits(log_odds: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent binary units with these log-odds."""
    uniform = torch.rand(
        log_odds.shape, generator=generator, device=log_odds.device, dtype=log_odds.dtype
    )
    return uniform.lt_(
        log_odds.sigmoid()
    )  # 0 or 1 in place: half the cost of a comparison that is then converted


def white_noise(
    machine: EnergyModel, count: int, generator: torch.Generator | None = None
) -> Tensor:
    return bernoulli_from_logits(machine.visible_bias.new_zeros(count, machine.visible), generator)


def clamp_known(visible: Tensor, start: Tensor, known: Tensor | None) -> Tensor:
    return visible if known is None else torch.where(known, start, visible)


def gibbs(
    machine: EnergyModel,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Visible]:
    """h ~ P(h|v), v ~ P(v|h), from `start` (batch, visible), at inverse temperature `beta`; pixels where `known` stay as they are."""
    visible = start
    while True:
        hidden = bernoulli_from_logits(beta * machine.hidden_input(visible), generator)
        log_odds = beta * machine.visible_input(hidden)
        visible = clamp_known(bernoulli_from_logits(log_odds, generator), start, known)
        yield visible, clamp_known(log_odds.sigmoid(), start, known)


def mean_field(
    machine: EnergyModel,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Visible]:
    """lambda = sigmoid(beta (c + W'mu)), mu = sigmoid(beta (b + W lambda)): coordinate ascent on the ELBO of log Z."""
    visible = start
    while True:
        visible = clamp_known(
            (
                beta * machine.visible_input((beta * machine.hidden_input(visible)).sigmoid())
            ).sigmoid(),
            start,
            known,
        )
        yield visible, visible


ADAPT_EVERY = 100  # sweeps over which swaps are counted before the rungs are spaced anew
LEAST_REJECTION = 1e-3  # so that two neighbours never fall into one


class ReplicaExchange(nn.Module):
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
            raise UserError("a ladder needs temperatures=2 at least: its ends")
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


BURN_IN = 400  # sweeps of `tempering` in which the ladder adapts


def tempering(
    machine: EnergyModel,
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
    ladder = ParallelTempering(temperatures, len(start), adapt=True)
    ladder.allocate(machine.hidden)
    ladder.to(start)
    ladder.hidden.copy_(bernoulli_from_logits(beta * machine.hidden_input(start), generator))
    while True:
        ladder.adapt = int(ladder.sweeps) < BURN_IN
        visible, _ = ladder.sweep(machine, beta, start, known, generator)
        log_odds = beta * machine.visible_input(ladder.top(ladder.hidden))
        yield ladder.top(visible), clamp_known(log_odds.sigmoid(), start, known)


class ParallelTempering(ReplicaExchange):
    """Parallel tempering of (v, h): a Gibbs sweep on every rung, then swaps with probability min(1, exp(dbeta dU)), U = dE/dbeta in nats.

    `hidden` (temperatures, chains, hidden), a buffer, is the state of each replica.
    """

    hidden: Tensor

    def allocate(self, hidden: int) -> None:
        self.register_buffer("hidden", torch.zeros(*self.place.shape, hidden))

    @_disable_dynamo  # the swaps' bookkeeping is no work for a compiler; torch.compiler.disable would import one, a second long
    def sweep(
        self,
        machine: EnergyModel,
        beta: float = 1.0,
        start: Tensor | None = None,
        known: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """v ~ P(v|h), h ~ P(h|v) on every rung, then swaps: the visible units and hidden inputs of all replicas.

        `beta` scales the machine at the top: 1 is the machine itself.
        """
        rung = self.betas[self.place][..., None]
        visible = bernoulli_from_logits(
            machine.visible_input(self.hidden).mul_(rung * beta).addcmul_(1 - rung, machine.base),
            generator,
        )
        if start is not None:
            visible = clamp_known(visible, start, known)
        inputs = machine.hidden_input(visible)
        self.hidden.copy_(
            bernoulli_from_logits(inputs * (rung * beta), generator)
        )  # in place, so that what restores buffers restores it
        slope = visible @ (machine.base - beta * machine.visible_bias) - beta * torch.linalg.vecdot(
            inputs, self.hidden
        )
        lower, slopes = self.lower(), self.at(slope)
        odds = (self.betas[lower + 1] - self.betas[lower])[:, None] * (
            slopes[lower + 1] - slopes[lower]
        )
        self.exchange(lower, odds, generator)
        return visible, inputs


CHAINS, SWEEPS = 64, 1000


@torch.no_grad()
def restore(
    machine: EnergyModel,
    image: Tensor,
    known: Tensor,
    sampler: Sampler,
    sweeps: int = SWEEPS,
    generator: torch.Generator | None = None,
    progress: Progress = no_progress,
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
