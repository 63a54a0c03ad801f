"""Hamiltonian Monte Carlo with a learned step size, for many chains in parallel."""

import math
from collections.abc import Callable
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
    """The state of the chains.

    Attributes:
        position: (chains, D).
        log_density: the log-density there, (chains,).
        gradient: the gradient of the log-density there, (chains, D).
    """

    position: Tensor
    log_density: Tensor
    gradient: Tensor


class StepSize:
    """The step size of the chains, adapted during warm-up and fixed afterwards.

    Update n adds (acceptance - TARGET_ACCEPTANCE) / sqrt(n) to its logarithm: Robbins and Monro
    (1951). The weights n^(-1/2) let it forget its start. Only a fixed step size leaves the density
    invariant.
    """

    def __init__(self) -> None:
        self.value = INITIAL_STEP_SIZE
        self.num_updates = 0

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
            _, log_ratio = _leapfrog(
                state, density, step_size.value, PILOT_LEAPFROG_STEPS, generator
            )
            if _mean_acceptance(state, log_ratio) >= 0.5:
                break
            step_size.value *= 0.5
        return step_size

    def update(self, acceptance: float) -> None:
        """Adapt the step size to the mean acceptance probability of a trajectory."""
        self.num_updates += 1
        self.value *= math.exp((acceptance - TARGET_ACCEPTANCE) / math.sqrt(self.num_updates))


def initial_state(position: Tensor, density: LogDensity) -> ChainState:
    """Return the state of chains that start at `position`, (chains, D)."""
    return ChainState(position, *_log_density_and_gradient(position, density))


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
        state: the state of the chains.
        density: the log-density to sample from.
        step_size: the step size e.
        leapfrog_steps: steps of a trajectory.
        adapt: adapt the step size to the acceptance of this trajectory.
        generator: random generator, or None for the global one.

    Returns:
        The new state, and the share of chains that accepted the end of their trajectory.
    """
    proposal, log_ratio = _leapfrog(state, density, step_size.value, leapfrog_steps, generator)
    uniform = torch.rand(
        log_ratio.shape, generator=generator, device=log_ratio.device, dtype=log_ratio.dtype
    )
    accepted = uniform.log() < log_ratio
    if adapt:
        step_size.update(_mean_acceptance(state, log_ratio))
    new_state = ChainState(
        torch.where(accepted[:, None], proposal.position, state.position),
        torch.where(accepted, proposal.log_density, state.log_density),
        torch.where(accepted[:, None], proposal.gradient, state.gradient),
    )
    return new_state, accepted.float().mean().item()


def _leapfrog(
    state: ChainState,
    density: LogDensity,
    step_size: float,
    leapfrog_steps: int,
    generator: torch.Generator | None,
) -> tuple[ChainState, Tensor]:
    """Return the end of a trajectory, and the logarithm of the acceptance ratio, (chains,)."""
    position, log_density, gradient = state
    momentum = torch.randn(
        position.shape, generator=generator, device=position.device, dtype=position.dtype
    )
    start_energy = log_density - 0.5 * momentum.square().sum(1)
    for _ in range(leapfrog_steps):
        momentum = momentum + 0.5 * step_size * gradient
        position = position + step_size * momentum
        log_density, gradient = _log_density_and_gradient(position, density)
        momentum = momentum + 0.5 * step_size * gradient
    log_ratio = log_density - 0.5 * momentum.square().sum(1) - start_energy
    return ChainState(position, log_density, gradient), log_ratio.nan_to_num(-torch.inf)


def _mean_acceptance(state: ChainState, log_ratio: Tensor) -> float:
    """Return the mean acceptance probability of log-ratios (chains,).

    Chains outside the support of the density are ignored: they accept every step that leads into
    it, which says nothing about the step size. TARGET_ACCEPTANCE is returned if all chains are
    outside, so that the step size does not change.
    """
    inside = state.log_density.isfinite()
    if not inside.any():
        return TARGET_ACCEPTANCE
    return log_ratio[inside].exp().clamp(max=1).mean().item()


@torch.enable_grad()
def _log_density_and_gradient(position: Tensor, density: LogDensity) -> tuple[Tensor, Tensor]:
    """Return the log-density, -inf for chains that diverged, and its gradient."""
    diverged = ~(position.abs().amax(1) < MAX_COORDINATE)
    position = position.detach().masked_fill(diverged[:, None], 0.0).requires_grad_(True)
    value = density(position)
    (gradient,) = torch.autograd.grad(value.sum(), position)
    log_density = value.detach().masked_fill(diverged | value.isnan(), -torch.inf)
    return log_density, gradient.nan_to_num(0.0, 0.0, 0.0)
