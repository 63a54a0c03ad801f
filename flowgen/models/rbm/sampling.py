"""Samplers of an RBM: block Gibbs sampling, mean field and parallel tempering."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from flowgen.models.rbm.energy import EnergyModel
from flowgen.utils.errors import check_choice, check_whole

# Visible units after a step of the chains and the probabilities P(v = 1 | h) that they were drawn
# with, each of shape (chains, visible).
ChainStep = tuple[Tensor, Tensor]

ADAPTATION_INTERVAL = 100  # steps over which swaps are counted before the betas are moved
MIN_REJECTION_RATE = 1e-3  # keeps neighboring betas apart where every swap is accepted
TEMPERING_BURN_IN_STEPS = 400  # steps of `tempering` during which the betas adapt


def bernoulli_from_logits(log_odds: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw independent binary units with these log-odds, as 0 or 1 in the same dtype."""
    # In place: half the cost of a comparison that is converted afterwards.
    return torch.rand(
        log_odds.shape, generator=generator, device=log_odds.device, dtype=log_odds.dtype
    ).lt_(log_odds.sigmoid())


def white_noise(rbm: EnergyModel, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` vectors of visible units with P(v = 1) = 1/2, (count, visible)."""
    return bernoulli_from_logits(rbm.visible_bias.new_zeros(count, rbm.visible), generator)


def clamp_known(visible: Tensor, start: Tensor | None, known: Tensor | None) -> Tensor:
    """Return `visible` with the values of `start` at the known units, if any are known.

    Args:
        visible: Visible units, (chains, visible).
        start: Values of the known units, (chains, visible), or None.
        known: Mask of the known units, (visible,), or None.
    """
    return visible if start is None or known is None else torch.where(known, start, visible)


def gibbs(
    rbm: EnergyModel,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[ChainStep]:
    """Run block Gibbs sampling without end: h ~ P(h | v), then v ~ P(v | h).

    Args:
        rbm: The model.
        start: Initial visible units of the chains, (chains, visible).
        beta: Inverse temperature; the chains sample from P(v, h)^beta up to normalization.
        known: Mask of the units that keep their value in `start`, (visible,).
        generator: Random generator, or None for the global one.

    Returns:
        An iterator over the steps. A step has the visible units and their probabilities given the
        hidden units, each of shape (chains, visible).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> chains = gibbs(rbm, white_noise(rbm, 10))
        >>> visible, probabilities = next(chains)
        >>> visible.shape, bool(((visible == 0) | (visible == 1)).all())
        (torch.Size([10, 4]), True)
    """
    visible = start
    while True:
        hidden = bernoulli_from_logits(beta * rbm.hidden_input(visible), generator)
        log_odds = beta * rbm.visible_input(hidden)
        visible = clamp_known(bernoulli_from_logits(log_odds, generator), start, known)
        yield visible, clamp_known(log_odds.sigmoid(), start, known)


def mean_field(
    rbm: EnergyModel,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[ChainStep]:
    """Run naive mean-field updates without end: coordinate ascent on the ELBO of log Z.

    Each step computes lambda = sigmoid(beta (c + W'mu)) and mu = sigmoid(beta (b + W lambda))
    without random draws. Arguments and result are those of `gibbs`; visible units are the means mu.
    """
    visible = start
    while True:
        hidden = (beta * rbm.hidden_input(visible)).sigmoid()
        visible = clamp_known((beta * rbm.visible_input(hidden)).sigmoid(), start, known)
        yield visible, visible


class ReplicaExchange(nn.Module):
    """Replica exchange between inverse temperatures from beta = 0 to beta = 1.

    Each of `num_chains` independent ensembles has one replica at every temperature. A swap
    exchanges the temperatures of two replicas; their states stay in place. Even and odd pairs of
    neighbors alternate (Okabe et al., 2001), which lets a replica drift from one end to the other
    (Syed et al., Non-reversible parallel tempering, arXiv:1905.02939). With `adapt` the betas move
    every `ADAPTATION_INTERVAL` steps so that all pairs swap equally often (section 5.1 of the same
    paper).

    All state is in buffers, so that a checkpoint contains it.

    Args:
        num_temperatures: Number of inverse temperatures, at least 2.
        num_chains: Number of independent ensembles.
        adapt: Adapt the betas to the swap rates.
    """

    def __init__(self, num_temperatures: int, num_chains: int, adapt: bool):
        super().__init__()
        check_whole(2, 10**4, num_temperatures=num_temperatures)
        check_whole(num_chains=num_chains)
        check_choice((True, False), adapt=adapt)
        self.adapt = adapt
        self.betas = nn.Buffer(torch.linspace(0, 1, num_temperatures))  # increasing
        # Index into `betas` of each replica, (temperatures, chains).
        self.beta_index = nn.Buffer(torch.arange(num_temperatures)[:, None].repeat(1, num_chains))
        self.num_steps = nn.Buffer(torch.zeros((), dtype=torch.long))  # rounds of swaps so far
        # Acceptance rates, summed, and rounds of each pair since the last adaptation
        self.accepted_swaps = nn.Buffer(torch.zeros(num_temperatures - 1))
        self.proposed_swaps = nn.Buffer(torch.zeros(num_temperatures - 1))
        # True if a replica visited beta = 0 after beta = 1, (temperatures, chains).
        self.came_from_zero = nn.Buffer(torch.zeros_like(self.beta_index, dtype=torch.bool))
        # Number of times that a replica moved from beta = 0 to beta = 1.
        self.round_trips = nn.Buffer(torch.zeros((), dtype=torch.long))

    def at_beta_one(self, states: Tensor) -> Tensor:
        """Return the states at beta = 1, (chains, ...), of `states` (temperatures, chains, ...)."""
        return self.by_beta(states)[-1]

    def by_beta(self, states: Tensor) -> Tensor:
        """Return `states` (temperatures, chains, ...) of the replicas in the order of `betas`."""
        replica = self.beta_index.argsort(0)
        return states[replica, torch.arange(states.shape[1], device=states.device)]

    def lower_indices(self) -> Tensor:
        """Return the index of the lower beta of each pair that may swap in this round, (pairs,)."""
        first = int(self.num_steps) % 2
        return torch.arange(first, len(self.betas) - 1, 2, device=self.betas.device)

    def exchange(
        self, lower: Tensor, log_ratio: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Swap neighbors with probability min(1, exp(log_ratio)) and count the swaps.

        Args:
            lower: Result of `lower_indices`, (pairs,).
            log_ratio: Log of the Metropolis ratio of each swap, (pairs, chains).
            generator: Random generator, or None for the global one.
        """
        replica = self.beta_index.argsort(0)
        self.num_steps.add_(1)
        accepted = log_ratio.exp() > torch.rand(
            log_ratio.shape, generator=generator, device=log_ratio.device, dtype=log_ratio.dtype
        )
        self.beta_index.scatter_(0, replica[lower], lower[:, None] + accepted.long())
        self.beta_index.scatter_(0, replica[lower + 1], lower[:, None] + 1 - accepted.long())
        self.accepted_swaps[lower] += accepted.to(self.accepted_swaps).mean(1)
        self.proposed_swaps[lower] += 1
        is_at_one = self.beta_index == len(self.betas) - 1
        self.round_trips.add_((is_at_one & self.came_from_zero).sum())
        self.came_from_zero.logical_and_(~is_at_one).logical_or_(self.beta_index == 0)
        if self.adapt and int(self.num_steps) % ADAPTATION_INTERVAL == 0:
            rejection_rates = (1 - self.swap_rates()).clamp(min=MIN_REJECTION_RATE)
            self.betas.copy_(space_betas(self.betas, rejection_rates, len(rejection_rates)))
            self.accepted_swaps.zero_()
            self.proposed_swaps.zero_()

    def swap_rates(self) -> Tensor:
        """Return the share of accepted swaps of each pair of neighbors, (temperatures - 1,).

        The counts start again after each adaptation of the betas.
        """
        return self.accepted_swaps / self.proposed_swaps.clamp(min=1)


def space_betas(betas: Tensor, lengths: Tensor, num_intervals: int) -> Tensor:
    """Return inverse temperatures that divide a path into intervals of equal length.

    Args:
        betas: Increasing inverse temperatures, (n + 1,).
        lengths: Positive lengths of the intervals between them, (n,), such as rejection rates.
        num_intervals: Number of intervals of the result.

    Returns:
        Inverse temperatures, (num_intervals + 1,), with the same ends as `betas`. The length is
        interpolated linearly within each interval.

    Example:
        >>> space_betas(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0, 1.0]), 4)
        tensor([0.0000, 0.1667, 0.3333, 0.5000, 1.0000])
    """
    cumulative = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    positions = cumulative[-1] * torch.linspace(
        0, 1, num_intervals + 1, device=lengths.device, dtype=lengths.dtype
    )
    right = torch.searchsorted(cumulative, positions).clamp(1, len(lengths))
    left = right - 1
    share = (positions - cumulative[left]) / (cumulative[right] - cumulative[left])
    result = torch.lerp(betas[left], betas[right], share)
    result[[0, -1]] = betas[[0, -1]]
    return result


class ParallelTempering(ReplicaExchange):
    """Parallel tempering of (v, h): a Gibbs step at every temperature, then swaps of neighbors.

    Two neighbors swap with probability min(1, exp(dbeta dU)), where U = dE_beta/dbeta in nats and
    E_beta = beta E(v, h) - (1 - beta) base.v. The buffer `hidden` (temperatures, chains, hidden)
    is the state of the replicas.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> replicas = ParallelTempering(num_temperatures=5, num_chains=10, adapt=True)
        >>> replicas.allocate(rbm.hidden)
        >>> for _ in range(20):
        ...     visible, hidden_input = replicas.step(rbm)
        >>> replicas.at_beta_one(visible).shape
        torch.Size([10, 4])
    """

    def allocate(self, hidden: int) -> None:
        """Create the buffer of the replicas' hidden units, all zero."""
        self.hidden = nn.Buffer(torch.zeros(*self.beta_index.shape, hidden))

    # The bookkeeping of swaps is not worth compiling. `torch.compiler.disable` would do the same
    # but imports the compiler, which takes a second.
    @_disable_dynamo
    def step(
        self,
        rbm: EnergyModel,
        beta: float = 1.0,
        start: Tensor | None = None,
        known: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw v ~ P(v | h) and h ~ P(h | v) at every temperature, then swap.

        Args:
            rbm: The model.
            beta: Factor on the energy of the model; 1 is the model itself.
            start: Values of the clamped units, (chains, visible).
            known: Mask of the clamped units, (visible,).
            generator: Random generator, or None for the global one.

        Returns:
            The visible units (temperatures, chains, visible) and hidden inputs
            (temperatures, chains, hidden) of all replicas.
        """
        replica_beta = self.betas[self.beta_index][..., None]
        log_odds = (
            rbm.visible_input(self.hidden)
            .mul_(replica_beta * beta)
            .addcmul_(1 - replica_beta, rbm.base)
        )
        visible = clamp_known(bernoulli_from_logits(log_odds, generator), start, known)
        inputs = rbm.hidden_input(visible)
        # In place, so that restoring the buffers restores the chains.
        self.hidden.copy_(bernoulli_from_logits(inputs * (replica_beta * beta), generator))
        slopes = self.by_beta(  # U of each replica
            visible @ (rbm.base - beta * rbm.visible_bias)
            - beta * torch.linalg.vecdot(inputs, self.hidden)
        )
        lower = self.lower_indices()
        log_ratios = self.betas.diff()[:, None] * slopes.diff(dim=0)
        self.exchange(lower, log_ratios[lower], generator)
        return visible, inputs


def tempering(
    rbm: EnergyModel,
    start: Tensor,
    *,
    beta: float = 1.0,
    known: Tensor | None = None,
    generator: torch.Generator | None = None,
    num_temperatures: int = 20,
) -> Iterator[ChainStep]:
    """Run parallel tempering without end and yield the replicas at the model's own temperature.

    All replicas start at `start`. The betas adapt during the first `TEMPERING_BURN_IN_STEPS`
    steps only: if they depended on the chains forever, the distribution would be biased. Other
    arguments and the result are those of `gibbs`.
    """
    replicas = ParallelTempering(num_temperatures, len(start), adapt=True)
    replicas.allocate(rbm.hidden)
    replicas.to(start)
    replicas.hidden.copy_(bernoulli_from_logits(beta * rbm.hidden_input(start), generator))
    while True:
        replicas.adapt = int(replicas.num_steps) < TEMPERING_BURN_IN_STEPS
        visible, _ = replicas.step(rbm, beta, start, known, generator)
        log_odds = beta * rbm.visible_input(replicas.at_beta_one(replicas.hidden))
        yield replicas.at_beta_one(visible), clamp_known(log_odds.sigmoid(), start, known)


SAMPLERS: dict[str, Callable[..., Iterator[ChainStep]]] = {
    "gibbs": gibbs,
    "tempering": tempering,
    "mean-field": mean_field,
}
