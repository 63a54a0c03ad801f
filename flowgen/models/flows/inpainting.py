"""Inpainting with flows: HMC chains for an image given some of its pixels, or sums of them.

The chains start near the most probable latents, are annealed in the latent space, and finally
sample the exact posterior in (almost) pixel space. `sample_posterior` runs all three stages.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.base import Chain, standard_normal_log_prob
from flowgen.bijections.elementwise import EmpiricalCDF, Logit, MarginalGaussianization
from flowgen.models.base import LinearMeasurement, Observation
from flowgen.models.flows import hmc
from flowgen.models.flows.density import FlowDensity
from flowgen.models.flows.dequantization import MAX_NOISE
from flowgen.utils.errors import UserError

NUM_CHAINS = 20
NUM_STEPS = 400  # gradients per chain
LEAPFROG_STEPS = 20  # shorter trajectories, with a new momentum each, would stay near their start

BIN_MARGIN = 1e-3  # in bins, so that rounding does not lead into the next bin
START_MARGIN = 0.02  # in bins: chains start at least this far from the edges of a bin
MEASUREMENT_STD = 0.5  # in bins: measured sums are rounded, and so are the pixels
CONDITIONAL_RATIO = 0.1  # typical std of a pixel given the others, over the std of all pixels

MODE_STEPS = 20  # Adam steps towards the most probable latents
MODE_LR = 0.1
START_TOLERANCE = 0.3  # tolerance of the known part, in units of `InpaintingChains.scale`
MIN_TOLERANCE = 0.25  # the tolerance at the end of annealing, in the same unit
MAX_HALVINGS = 5  # of a perturbation that leads too far from the known part
MAX_VIOLATION_RATIO = 4.0  # "too far" is this many times the median of the chains


@dataclass
class InpaintingChains(ABC):
    """HMC chains that sample the posterior of images given their known part.

    Subclasses define the known part, and the coordinates in which its posterior is sampled.
    The elementwise bijection at the start of the flow, if any, is the head; the rest is the body.
    Chains move through h = head(x).

    Args:
        flow: The flow.
        images: Pixel values as floats, (batch, channels, height, width). Each image is repeated, so
            that there is one per chain.
        known: The known part.
        labels: The current class of each chain, (chains,).
        generator: Random generator, or None for the global one.

    Attributes:
        position: (chains, D). The offset of the latents from their mean, until `anneal` ends; then
            the coordinates of the posterior.
        scale: Standard deviation of all pixels, or of all sums, of samples of the flow.
        acceptance: Mean acceptance rate of `sample_exactly` after its warm-up.
    """

    flow: FlowDensity
    images: Tensor
    known: Any
    labels: Tensor
    generator: torch.Generator | None
    acceptance: float = 0.0

    @torch.no_grad()
    def __post_init__(self) -> None:
        bijection = self.flow.bijection
        parts: list[Any] = [*bijection.bijections] if isinstance(bijection, Chain) else [bijection]
        split = int(isinstance(parts[0], EmpiricalCDF | MarginalGaussianization | Logit))
        self.head = Chain(*parts[:split])
        self.body = Chain(*parts[split:])
        self.images = self.images.repeat_interleave(len(self.labels) // len(self.images), 0)
        self.position = torch.zeros_like(self.images).flatten(1)
        self.scale = self.scale_of(self.decode_noise())

    @abstractmethod
    def scale_of(self, h: Tensor) -> float:
        """Return the standard deviation of all pixels, or of all sums, of images h."""

    @abstractmethod
    def violation(self, h: Tensor) -> Tensor:
        """Return the squared distance of images h from the known part: (chains,)."""

    @abstractmethod
    def initial_position(self, h: Tensor) -> Tensor:
        """Return positions (chains, D) near h that match the known part."""

    @abstractmethod
    def points(self, position: Tensor) -> Tensor:
        """Return the points x at these positions. Unknown pixels may lie outside (0, 1)."""

    @abstractmethod
    def log_density(self, position: Tensor) -> Tensor:
        """Return the log-density of the posterior up to a constant, (chains,)."""

    @property
    def samples(self) -> Tensor:
        """The current images x in (0, 1), (chains, channels, height, width)."""
        return self._clamp_to_unit(self.points(self.position))

    def find_mode(self) -> Tensor:
        """Move to the most probable latents by Adam, and return their log-density, (chains,).

        The density is N(z; mean, I) exp(-violation / 2 s^2) with s = START_TOLERANCE scales. The
        start at z = mean keeps the path among probable images: Asim et al. (1905.11672), section 3.
        """
        density = self._latent_density(START_TOLERANCE * self.scale)
        with torch.enable_grad():
            position = self.position.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([position], MODE_LR)
            for _ in self.flow.progress(range(MODE_STEPS), "most probable", MODE_STEPS):
                (position.grad,) = torch.autograd.grad(-density(position).sum(), position)
                optimizer.step()
        self.position = position.detach()
        with torch.no_grad():
            return density(self.position)

    @torch.no_grad()
    def perturb(self, num_images: int) -> None:
        """Add N(0, I) to the latents, so that chains start as far apart as samples of the flow.

        The noise of chains that it leads too far from the known part is halved up to MAX_HALVINGS
        times. The chains of an image are consecutive.
        """
        noise = self._noise()
        for _ in range(MAX_HALVINGS):
            violation = self.violation(self._decode(self.position + noise)).view(num_images, -1)
            median = violation.nanmedian(1, keepdim=True).values.clamp(min=self.scale**2)
            too_far = ~(violation < MAX_VIOLATION_RATIO * median).flatten()
            noise = torch.where(too_far[:, None], 0.5 * noise, noise)
        self.position = self.position + noise

    @torch.no_grad()
    def anneal(self, num_trajectories: int, leapfrog_steps: int) -> None:
        """Sample latents while the tolerance shrinks from one scale to MIN_TOLERANCE scales.

        Args:
            num_trajectories: Hamiltonian trajectories of each chain.
            leapfrog_steps: Steps of a trajectory.
        """
        density = self._latent_density(self.scale)
        step_size = hmc.StepSize.find_reasonable(
            hmc.make_state(self.position, density), density, self.generator
        )
        for index in self.flow.progress(range(num_trajectories), "annealing", num_trajectories):
            tolerance = self.scale * MIN_TOLERANCE ** (index / max(1, num_trajectories - 1))
            density = self._latent_density(tolerance)
            state, _ = hmc.hmc_step(
                hmc.make_state(self.position, density),
                density,
                step_size,
                leapfrog_steps,
                True,
                self.generator,
            )
            self.position = state.position
        self.position = self.initial_position(self._decode(self.position).nan_to_num(0.0, 0.0, 0.0))

    @torch.no_grad()
    def sample_exactly(self, num_trajectories: int, leapfrog_steps: int) -> None:
        """Sample the exact posterior and, before each trajectory, a class from p(y | x).

        The step size is adapted in the first half only, so that the second half leaves the
        posterior invariant.

        Args:
            num_trajectories: Hamiltonian trajectories of each chain.
            leapfrog_steps: Steps of a trajectory.
        """
        state = hmc.make_state(self.position, self.log_density)
        step_size = hmc.StepSize.find_reasonable(state, self.log_density, self.generator)
        acceptance = []
        for index in self.flow.progress(range(num_trajectories), "exact steps", num_trajectories):
            if self.flow.num_classes is not None:
                self._resample_classes(self.flow.num_classes)
                state = hmc.make_state(self.position, self.log_density)  # of the new classes
            state, share_accepted = hmc.hmc_step(
                state,
                self.log_density,
                step_size,
                leapfrog_steps,
                adapt=index < num_trajectories // 2,
                generator=self.generator,
            )
            self.position = state.position
            acceptance.append(share_accepted)
        self.acceptance = fmean(acceptance[num_trajectories // 2 :])

    def _resample_classes(self, num_classes: int) -> None:
        """Draw the class of each chain from p(y | position).

        The densities are those of the position. Rounding can move the point x there out of the
        domain of a logit.
        """
        log_densities = []
        for label in range(num_classes):
            self.labels = torch.full_like(self.labels, label)
            log_densities.append(self.log_density(self.position))
        weights = torch.stack(log_densities, 1).softmax(1)
        self.labels = torch.multinomial(weights, 1, generator=self.generator)[:, 0]

    def _noise(self) -> Tensor:
        return torch.randn(
            self.position.shape,
            generator=self.generator,
            device=self.position.device,
            dtype=self.position.dtype,
        )

    def decode_noise(self) -> Tensor:
        """Return images h of latents that are drawn from the flow's base distribution."""
        return self._decode(self._noise())

    def _decode(self, offset: Tensor) -> Tensor:
        """Return h for latents at this offset from their mean."""
        return self.body.inverse(offset + self.flow.means[self.labels], self._condition)[0]

    def _latent_density(self, tolerance: float) -> hmc.LogDensity:
        return lambda offset: (
            standard_normal_log_prob(offset)
            - self.violation(self._decode(offset)) / (2 * tolerance * tolerance)
        )

    def _prior_log_density(self, h: Tensor) -> Tensor:
        """Return log p(h | labels), (chains,)."""
        z, log_det = self.body(h, self._condition)
        return standard_normal_log_prob(z - self.flow.means[self.labels]) + log_det

    @property
    def _condition(self) -> Tensor | None:
        return self.flow.network_condition(self.flow.one_hot(self.labels))

    def _clamp_to_unit(self, x: Tensor) -> Tensor:
        """Keep x off 0 and 1, which rounding may reach and the head maps to infinity."""
        return x.clamp(BIN_MARGIN / self.flow.bins, 1 - BIN_MARGIN / self.flow.bins)


class PixelChains(InpaintingChains):
    """Chains for images x = (images + u) / bins whose known pixel values are fixed.

    Unknown pixels are sampled in the space h = head(x), and known ones as s, where u = sigmoid(s),
    so that the positions of the chains are unbounded. `known` is True for known pixels,
    (channels, height, width).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.low, _ = self.head((self.images + BIN_MARGIN) / self.flow.bins)
        self.high, _ = self.head((self.images + (1 - BIN_MARGIN)) / self.flow.bins)

    def scale_of(self, h: Tensor) -> float:
        return h.std().item()

    def violation(self, h: Tensor) -> Tensor:
        """Return the squared distance of h from the bins of the known pixels: (chains,)."""
        distance = (self.low - h).clamp(min=0) + (h - self.high).clamp(min=0)
        return (distance * self.known).square().flatten(1).sum(1)

    def initial_position(self, h: Tensor) -> Tensor:
        """Return positions (chains, D) near h, with the known pixels inside their bins."""
        inside = torch.where(self.known, h.clamp(self.low, self.high), h)
        u = self.head.inverse(inside)[0] * self.flow.bins - self.images
        logits = u.clamp(START_MARGIN, 1 - START_MARGIN).logit()
        return torch.where(self.known, logits, h).flatten(1)

    def points(self, position: Tensor) -> Tensor:
        position = position.view(self.images.shape)
        return torch.where(self.known, self._inside(position), self.head.inverse(position)[0])

    def log_density(self, position: Tensor) -> Tensor:
        position = position.view(self.images.shape)
        h, head_log_det = self.head(torch.where(self.known, self._inside(position), 0.5))
        # log|du/ds| of the known pixels
        log_slope = (F.logsigmoid(position) + F.logsigmoid(-position)) * self.known
        log_prior = self._prior_log_density(torch.where(self.known, h, position))
        return log_prior + head_log_det + log_slope.flatten(1).sum(1)

    def head_log_det_of_unknown(self) -> float:
        """Return the constant that `log_density` contains for the unknown pixels."""
        x = torch.full_like(self.images[:1], 0.5).requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.head(x)[0].sum(), x)
        return torch.where(self.known, 0.0, slope.double().log()).sum().item()

    def _inside(self, position: Tensor) -> Tensor:
        """Return points inside the bins of `images`."""
        return (self.images + position.sigmoid().clamp(max=MAX_NOISE)) / self.flow.bins


class MeasurementChains(InpaintingChains):
    """Chains for images x given the measurement y = known.apply(x) + N(0, s^2).

    s is MEASUREMENT_STD bins. The posterior is much narrower along the measured sums than
    across. So the position q of a chain is a stretched version of h = head(x):
    h = q - (1 - t) d <d, q> in each group of pixels. d is the direction in which the sum grows at
    the start of the chain, and t makes the posterior about as wide along d as across. `known` is
    a `LinearMeasurement`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.value = self.known.apply((self.images + 0.5) / self.flow.bins)

    def scale_of(self, h: Tensor) -> float:
        """Return the standard deviation of the measured sums over images h.

        It is at least that of the measurement, since a single sum has no spread: the mean of one
        gray image.
        """
        return max(self._measure(h).std().item(), MEASUREMENT_STD / self.flow.bins)

    def violation(self, h: Tensor) -> Tensor:
        """Return the squared distance of the sums of h from the measured ones: (chains,)."""
        return self.known.sum_groups((self._measure(h) - self.value).square())

    def initial_position(self, h: Tensor) -> Tensor:
        """Return positions (chains, D) near h that match the measured sums, and select d and t."""
        x, _ = self.head.inverse(h)
        x = self._clamp_to_unit(x + self.value - self.known.apply(x))
        with torch.enable_grad():
            h = self.head(x)[0].detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.known.sum_groups(self._measure(h)).sum(), h)
        h = h.detach()
        length = self.known.pool(gradient.square()).sqrt().clamp(min=1e-12)
        self.direction = gradient / length
        ratio = length * CONDITIONAL_RATIO * h.std() * self.flow.bins / MEASUREMENT_STD
        self.shrinkage = (1 + ratio.square()).rsqrt()
        return (h + (1 / self.shrinkage - 1) * self._project(h)).flatten(1)

    def points(self, position: Tensor) -> Tensor:
        return self.head.inverse(self._unstretch(position))[0]

    def log_density(self, position: Tensor) -> Tensor:
        """Return log p(h) + log p(y | h), up to a constant: (chains,)."""
        h = self._unstretch(position)
        log_likelihood = -0.5 * self.violation(h) * (self.flow.bins / MEASUREMENT_STD) ** 2
        return self._prior_log_density(h) + log_likelihood

    def _measure(self, h: Tensor) -> Tensor:
        return self.known.apply(self.head.inverse(h)[0])

    def _unstretch(self, position: Tensor) -> Tensor:
        position = position.view(self.images.shape)
        return position - (1 - self.shrinkage) * self._project(position)

    def _project(self, position: Tensor) -> Tensor:
        """Project onto the direction d in each group."""
        return self.direction * self.known.pool(self.direction * position)


@torch.no_grad()
def sample_posterior(
    flow: FlowDensity,
    images: Tensor,
    known: Observation,
    num_chains: int,
    num_steps: int,
    generator: torch.Generator | None,
) -> InpaintingChains:
    """Run chains that sample the posterior of images under a flow, given a known part.

    The search for the most probable latents and for the first step sizes, and the start of each
    trajectory, take gradients on top of `num_steps`.

    Args:
        flow: The flow.
        images: Pixel values as floats, (batch, channels, height, width).
        known: The known part of each image.
        num_chains: Chains per image.
        num_steps: Gradients per chain, half of them in the latent space.
        generator: Random generator, or None for the global one.

    Returns:
        The chains; those of an image are consecutive.
    """
    chains_class = MeasurementChains if isinstance(known, LinearMeasurement) else PixelChains
    num_classes = len(flow.means)
    labels = torch.arange(num_classes, device=images.device).repeat(len(images))
    modes = chains_class(flow, images, known, labels, generator)
    log_density = modes.find_mode().view(len(images), num_classes).nan_to_num(nan=-torch.inf)
    if not log_density.isfinite().any(1).all():
        raise UserError(
            "the model finds no image near the known pixels: keep other pixels, "
            "or use another model"
        )
    labels = torch.multinomial(
        log_density.softmax(1), num_chains, replacement=True, generator=generator
    )
    chains = chains_class(flow, images, known, labels.flatten(), generator)
    mode_positions = modes.position.view(len(images), num_classes, -1)
    chains.position = mode_positions.take_along_dim(labels[:, :, None], 1).flatten(0, 1)
    chains.perturb(len(images))
    leapfrog_steps = max(1, min(LEAPFROG_STEPS, num_steps // 4))
    num_trajectories = max(4, num_steps // leapfrog_steps)
    chains.anneal(num_trajectories // 2, leapfrog_steps)
    chains.sample_exactly(num_trajectories - num_trajectories // 2, leapfrog_steps)
    return chains
