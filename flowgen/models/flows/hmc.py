"""Metropolis-adjusted Langevin dynamics, many chains side by side."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LogDensity = Callable[
    [Tensor], Tensor
]  # of states (chains, D), up to a constant, in nats: (chains,)
BEST = 0.65  # acceptance at which trajectories are cheapest: Beskos et al. (1001.4460), section 1
FIRST_STEP, SHORTEST, FIRST_LEAPS = 0.1, 1e-6, 5
FAR = 1e6


class ChainState(NamedTuple):
    """Where the chains are, (chains, D), with the log-density there and its gradient, and which of them have just moved."""

    place: Tensor
    value: Tensor
    gradient: Tensor
    moved: Tensor


class StepSize:
    """The length of the chains' steps, learnt while they are under way and then held, so that they leave the density invariant.

    The n-th lesson changes its logarithm by (accepted - `BEST`) / sqrt n: Robbins and Monro (1951), steps n^(-1/2) to forget the start.
    """

    def __init__(self) -> None:
        self.length, self.lessons = FIRST_STEP, 0

    @classmethod
    def reasonable(
        cls, position: ChainState, density: LogDensity, generator: torch.Generator | None = None
    ) -> "StepSize":
        """`FIRST_STEP`, halved until half of short trajectories are accepted, after Hoffman and Gelman (1111.4246), algorithm 4.

        Unlike theirs it is never doubled: on the way up to the likely, steps far too long are accepted.
        """
        step = cls()
        while (
            step.length > SHORTEST
            and _acceptance(
                position, _trajectory(position, density, step.length, FIRST_LEAPS, generator)[1]
            )
            < 0.5
        ):
            step.length *= 0.5
        return step

    def learn(self, accepted: float) -> None:
        self.lessons += 1
        self.length *= math.exp((accepted - BEST) / math.sqrt(self.lessons))


def evaluate_density(place: Tensor, density: LogDensity) -> ChainState:
    value, gradient = _look(place, density)
    return ChainState(place, value, gradient, torch.ones_like(value, dtype=torch.bool))


def hmc_step(
    position: ChainState,
    density: LogDensity,
    step: StepSize,
    leaps: int,
    learn: bool,
    generator: torch.Generator | None = None,
) -> ChainState:
    """One trajectory under Langevin's equation with momentum, accepted so that the density goes invariant.

    m ~ N(0, I), then `leaps` times m += e/2 grad log p(x), x += e m, m += e/2 grad log p(x); with one leap that is x + e^2/2 grad log p(x)
    + e N(0, I). Neal, MCMC using Hamiltonian dynamics (1206.1901), sections 3 and 5.2. What is not finite is rejected.
    """
    there, log_ratio = _trajectory(position, density, step.length, leaps, generator)
    accepted = (
        torch.rand(
            log_ratio.shape, generator=generator, device=log_ratio.device, dtype=log_ratio.dtype
        ).log()
        < log_ratio
    )
    if learn:
        step.learn(_acceptance(position, log_ratio))
    goes = accepted[:, None]
    return ChainState(
        torch.where(goes, there.place, position.place),
        torch.where(accepted, there.value, position.value),
        torch.where(goes, there.gradient, position.gradient),
        accepted,
    )


def _trajectory(
    position: ChainState,
    density: LogDensity,
    e: float,
    leaps: int,
    generator: torch.Generator | None,
) -> tuple[ChainState, Tensor]:
    """Where `leaps` steps of length e lead, and the logarithm of the ratio by which that is accepted, (chains,)."""
    momentum = torch.randn(
        position.place.shape,
        generator=generator,
        device=position.place.device,
        dtype=position.place.dtype,
    )
    before = position.value - 0.5 * momentum.square().sum(1)
    place, gradient = position.place, position.gradient
    for _ in range(leaps):
        momentum = momentum + 0.5 * e * gradient
        place = place + e * momentum
        value, gradient = _look(place, density)
        momentum = momentum + 0.5 * e * gradient
    log_ratio = (value - 0.5 * momentum.square().sum(1) - before).nan_to_num(-torch.inf)
    return ChainState(place, value, gradient, torch.ones_like(value, dtype=torch.bool)), log_ratio


def _acceptance(position: ChainState, log_ratio: Tensor) -> float:
    """The mean probability of accepting, of ratios (chains,); where no chain has a density `BEST`, at which a length is left as it is."""
    somewhere = position.value.isfinite()  # from where there is no density every step is accepted that leads to one: that teaches no length
    return log_ratio[somewhere].exp().clamp(max=1).mean().item() if somewhere.any() else BEST


@torch.enable_grad()
def _look(place: Tensor, density: LogDensity) -> tuple[Tensor, Tensor]:
    """The log-density and its gradient; -inf where a trajectory has left what floats hold, from where any other place is better."""
    lost = ~(place.abs().amax(1) < FAR)
    place = place.detach().masked_fill(lost[:, None], 0.0).requires_grad_(True)
    value = density(place)
    (gradient,) = torch.autograd.grad(value.sum(), place)
    return value.detach().masked_fill(lost | value.isnan(), -torch.inf), gradient.nan_to_num(
        0.0, 0.0, 0.0
    )
