"""Hamiltonian Monte Carlo with an adaptive step size, for many chains in parallel."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Log-density of positions (chains, D), up to a constant, in nats: (chains,).
LogDensity = Callable[[Tensor], Tensor]

TARGET_ACCEPTANCE = 0.65  # the cheapest trajectories: Beskos et al. (1001.4460), section 1
INITIAL_STEP_SIZE = 0.1
MIN_STEP_SIZE = 1e-6
PILOT_LEAPFROG_STEPS = 5  # of the trajectories that select the first step size
MAX_COORDINATE = 1e6  # trajectories beyond this have diverged


class ChainState(NamedTuple):
    """Positions of the chains (chains, D), their log-density (chains,) and its gradient."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


@dataclass
class StepSize:
    """The step size of the chains, adapted during warm-up and fixed afterwards.

    Update n adds (acceptance - TARGET_ACCEPTANCE) / sqrt(n) to its logarithm: Robbins and Monro
    (1951). The weights n^(-1/2) let it forget its start. Only a fixed step size leaves the density
    invariant.
    """

    value: float = INITIAL_STEP_SIZE
    num_updates: int = 0

    @classmethod
    def find_reasonable(
        cls, state: ChainState, density: LogDensity, generator: torch.Generator | None = None
    ) -> "StepSize":
        """Halve the initial step size until half of short trajectories are accepted.

        Hoffman and Gelman (1111.4246), algorithm 4. Unlike there, it is never doubled: far from
        the mode, steps that are much too long are accepted as well.
        """
        step_size = cls()
        while step_size.value > MIN_STEP_SIZE:
            _, _, acceptance = _leapfrog(
                state, density, step_size.value, PILOT_LEAPFROG_STEPS, generator
            )
            if acceptance >= 0.5:
                break
            step_size.value *= 0.5
        return step_size

    def update(self, acceptance: float) -> None:
        """Adapt the step size to the mean acceptance probability of a trajectory."""
        self.num_updates += 1
        self.value *= math.exp((acceptance - TARGET_ACCEPTANCE) / math.sqrt(self.num_updates))


def hmc_step(
    state: ChainState,
    density: LogDensity,
    step_size: StepSize,
    leapfrog_steps: int,
    adapt: bool,
    generator: torch.Generator | None = None,
) -> tuple[ChainState, float]:
    """Run one Hamiltonian trajectory per chain, and accept or reject its end.

    The momentum is m ~ N(0, I). A leapfrog step of size e is m += e/2 grad log p(x), x += e m,
    m += e/2 grad log p(x); with a single one, this is Metropolis-adjusted Langevin dynamics. Neal,
    MCMC using Hamiltonian dynamics (1206.1901), sections 3 and 5.2. Proposals that are not finite
    are rejected.

    Args:
        state: The state of the chains, from `make_state` or the last step for this density.
        density: The log-density to sample from.
        step_size: The step size e.
        leapfrog_steps: Steps of a trajectory.
        adapt: Adapt the step size to the acceptance of this trajectory.
        generator: Random generator, or None for the global one.

    Returns:
        The new state, and the share of chains that accepted the end of their trajectory.
    """
    proposal, log_ratio, acceptance = _leapfrog(
        state, density, step_size.value, leapfrog_steps, generator
    )
    uniform = torch.rand(
        log_ratio.shape, generator=generator, device=log_ratio.device, dtype=log_ratio.dtype
    )
    accepted = uniform.log() < log_ratio
    if adapt:
        step_size.update(acceptance)
    position, log_density, gradient = (
        torch.where(accepted.view(-1, *[1] * (old.dim() - 1)), new, old)
        for new, old in zip(proposal, state, strict=True)
    )
    return ChainState(position, log_density, gradient), accepted.float().mean().item()


def _leapfrog(
    state: ChainState,
    density: LogDensity,
    step_size: float,
    leapfrog_steps: int,
    generator: torch.Generator | None,
) -> tuple[ChainState, Tensor, float]:
    """Run one trajectory per chain.

    Returns:
        The states at the ends of the trajectories, the logarithms of the acceptance ratios,
        (chains,), and the mean acceptance probability. The mean ignores chains that start outside
        the support of the density: they accept every step that leads into it, which says nothing
        about the step size. If all chains do, it is TARGET_ACCEPTANCE, so that the step size does
        not change.
    """
    inside = state.log_density.isfinite()
    momentum = torch.randn(
        state.position.shape,
        generator=generator,
        device=state.position.device,
        dtype=state.position.dtype,
    )
    start = state.log_density - 0.5 * momentum.square().sum(1)
    for _ in range(leapfrog_steps):
        momentum = momentum + 0.5 * step_size * state.gradient
        state = make_state(state.position + step_size * momentum, density)
        momentum = momentum + 0.5 * step_size * state.gradient
    end = state.log_density - 0.5 * momentum.square().sum(1)
    log_ratio = (end - start).nan_to_num(-torch.inf, neginf=-torch.inf)
    if not inside.any():
        return state, log_ratio, TARGET_ACCEPTANCE
    return state, log_ratio, log_ratio[inside].exp().clamp(max=1).mean().item()


@torch.enable_grad()
def make_state(position: Tensor, density: LogDensity) -> ChainState:
    """Return the state at positions (chains, D); the density of chains that diverged is 0."""
    diverged = ~(position.abs().amax(1) < MAX_COORDINATE)
    inputs = position.detach().masked_fill(diverged[:, None], 0.0).requires_grad_(True)
    value = density(inputs)
    (gradient,) = torch.autograd.grad(value.sum(), inputs)
    log_density = value.detach().masked_fill(diverged | value.isnan(), -torch.inf)
    return ChainState(position, log_density, gradient.nan_to_num(0.0, 0.0, 0.0))
