"""The probability of the known pixels of an image under a flow, by annealed importance sampling."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.flows import hmc
from flowgen.models.flows.density import FlowDensity
from flowgen.models.flows.inpainting import PixelChains
from flowgen.models.likelihood import ImportanceEstimate, estimate_log_mean_of_groups

NUM_CHAINS = 40
MIN_CHAINS_PER_CLASS = 16  # one class can have nearly all of the probability
NUM_PILOT_CHAINS = 8  # only they adapt the step size, which would bias the weights of the others
NUM_STEPS = 100  # inverse temperatures
LEAPFROG_STEPS = 3
NUM_BASE_SAMPLES = 256  # of the flow, which determine the base distribution
MIN_BASE_STD = 1e-2
BETA_POWER = 3  # small inverse temperatures are dense, because the weights vary most there


def chains_per_class(num_classes: int) -> int:
    """Return the number of annealed chains of each class."""
    return max(MIN_CHAINS_PER_CLASS, -(-NUM_CHAINS // num_classes))


def base_moments(
    flow: FlowDensity, images: Tensor, known: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each pixel over samples of the flow, each (D,).

    Pixels are those that `PixelChains` moves, h.

    Args:
        flow: The flow.
        images: One image as floats, (1, channels, height, width).
        known: True for known pixels, (channels, height, width).
        generator: Random generator, or None for the global one.
    """
    labels = torch.arange(NUM_BASE_SAMPLES, device=images.device) % len(flow.means)
    samples = PixelChains(flow, images, known, labels, generator)
    h = samples.decode_noise().flatten(1).nan_to_num(0.0, 0.0, 0.0)
    return h.mean(0), h.std(0).clamp(min=MIN_BASE_STD)


class AnnealedChains:
    """Chains between independent pixels and the flow, with the known pixels inside their bins.

    The positions are those of `PixelChains`. At the inverse temperature 0, known pixels are uniform
    within their bins, and unknown pixels are independent and normal with the moments of samples of
    the flow. At 1, the density is that of the flow. Neal, Annealed importance sampling (1998).

    Args:
        flow: The flow.
        images: Pixel values as floats, (1, channels, height, width).
        known: True for known pixels, (channels, height, width).
        moments: The result of `base_moments`.
        per_class: Number of chains of each class.
        generator: Random generator, or None for the global one.
    """

    def __init__(
        self,
        flow: FlowDensity,
        images: Tensor,
        known: Tensor,
        moments: tuple[Tensor, Tensor],
        per_class: int,
        generator: torch.Generator | None,
    ):
        labels = torch.arange(len(flow.means), device=images.device).repeat(per_class)
        self.target = PixelChains(flow, images, known, labels, generator)
        self.known = known.flatten()
        self.mean, self.std = moments
        self.generator = generator
        position = self.target.position
        uniform = torch.rand(
            position.shape, generator=generator, device=position.device, dtype=position.dtype
        )
        tiny = torch.finfo(position.dtype).eps
        normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(tiny - 1, 1 - tiny))
        logistic = uniform.clamp(tiny, 1 - tiny).logit()
        self.position = torch.where(self.known, logistic, self.mean + self.std * normal)

    def log_base(self, position: Tensor) -> Tensor:
        """Return the log-density at the inverse temperature 0, (chains,)."""
        logistic = F.logsigmoid(position) + F.logsigmoid(-position)
        z = (position - self.mean) / self.std
        normal = -0.5 * (z.square() + math.log(2 * math.pi)) - self.std.log()
        return torch.where(self.known, logistic, normal).sum(1)

    def density(self, beta: float) -> hmc.LogDensity:
        """Return the log-density at an inverse temperature, up to a constant."""
        return lambda position: (
            (1 - beta) * self.log_base(position) + beta * self.target.log_density(position)
        )

    def step(self, beta: float, step_size: hmc.StepSize, adapt: bool) -> None:
        """Move the chains by one trajectory that leaves the density at `beta` invariant.

        Args:
            beta: Inverse temperature.
            step_size: Step size of the integrator.
            adapt: Whether to adapt the step size.
        """
        density = self.density(beta)
        state = hmc.make_state(self.position, density)
        state, _ = hmc.hmc_step(state, density, step_size, LEAPFROG_STEPS, adapt, self.generator)
        self.position = state.position

    def log_ratio(self) -> Tensor:
        """Return the log-density of the flow minus that at 0, in double precision, (chains,)."""
        with torch.no_grad():
            ratio = self.target.log_density(self.position) - self.log_base(self.position)
        return ratio.double().nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def is_inside(self) -> Tensor:
        """Return which chains have all unknown pixels in [0, 1), (chains,)."""
        x = self.target.points(self.position).flatten(1)
        return (self.known | ((x >= 0) & (x < 1))).all(1)


@torch.no_grad()
def log_marginal(
    flow: FlowDensity,
    images: Tensor,
    known: Tensor,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> ImportanceEstimate:
    """Estimate log P(known pixels) in nats, or log P(image) if all pixels are known.

    P(known) is the integral of the density of the flow over the bins of the known pixels and, for
    the unknown pixels, over [0, 1).

    Args:
        flow: The flow.
        images: One image as floats, (1, channels, height, width).
        known: True for known pixels, (channels, height, width).
        num_steps: Inverse temperatures, each with one Hamiltonian trajectory.
        generator: Random generator, or None for the global one.
    """
    num_classes = len(flow.means)
    moments = base_moments(flow, images, known, generator)
    per_class = -(-NUM_PILOT_CHAINS // num_classes)
    pilot = AnnealedChains(flow, images, known, moments, per_class, generator)
    per_class = chains_per_class(num_classes)
    chains = AnnealedChains(flow, images, known, moments, per_class, generator)
    step_size = hmc.StepSize()
    log_weights = torch.zeros(len(chains.position), dtype=torch.double, device=images.device)
    betas = [(index / num_steps) ** BETA_POWER for index in range(num_steps + 1)]
    for index in flow.progress(range(1, num_steps + 1), "annealing", num_steps):
        log_weights += (betas[index] - betas[index - 1]) * chains.log_ratio()
        pilot.step(betas[index], step_size, adapt=True)
        chains.step(betas[index], step_size, adapt=False)
    log_weights[~chains.is_inside()] = -torch.inf
    by_class = log_weights.view(per_class, num_classes)  # the order of the labels of the chains
    estimate = estimate_log_mean_of_groups(by_class)
    volume = int(known.sum()) * math.log(flow.bins) + chains.target.head_log_det_of_unknown()
    return estimate._replace(log_mean=estimate.log_mean - volume)
