"""Inpainting with flows: HMC chains for an image given some of its pixels, or sums of them.

The chains start near the most probable latents, are annealed in the latent space, and finally
sample the exact posterior in (almost) pixel space. `sample_posterior` runs all three stages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.elementwise import EmpiricalCDF, Logit, MarginalGaussianization
from flowgen.models.base import LinearMeasurement, Observation
from flowgen.models.flows.hmc import LogDensity, StepSize, hmc_step, initial_state
from flowgen.models.flows.ood_statistics import standard_normal_log_prob
from flowgen.utils.console import Progress
from flowgen.utils.errors import UserError

NUM_CHAINS = 20
NUM_STEPS = 400  # gradients per chain
LEAPFROG_STEPS = 20  # shorter trajectories, with a new momentum each, would stay near their start

BIN_MARGIN = 1e-3  # in bins, so that rounding does not lead into the next bin
START_MARGIN = 0.02  # in bins: chains start at least this far from the edges of a bin
MEASUREMENT_DEVIATION = 0.5  # in bins: measured sums are rounded, and so are the pixels
CONDITIONAL_RATIO = 0.1  # typical deviation of a pixel given the others, over that of all pixels

MODE_STEPS = 20  # Adam steps towards the most probable latents
MODE_LR = 0.1
START_TOLERANCE = 0.3  # tolerance of the known part, in units of its spread over images
MIN_TOLERANCE = 0.25  # the tolerance at the end of annealing, in the same unit
MAX_HALVINGS = 5  # of a perturbation that leads too far from the known part
MAX_VIOLATION_RATIO = 4.0  # "too far" is this many times the median of the chains


class ClassPrior(NamedTuple):
    """The classes of a flow.

    Attributes:
        means: means of the latents of each class, (classes, D).
        condition_networks: the class, one-hot, is the condition of the bijection.
        class_log_density: returns log p(x | y), (batch, classes), of points x.
    """

    means: Tensor
    condition_networks: bool
    class_log_density: Callable[[Tensor], Tensor]

    def condition(self, labels: Tensor) -> Tensor | None:
        """Return the condition of the bijection for these classes."""
        one_hot = F.one_hot(labels, len(self.means)).to(self.means.dtype)
        return one_hot if self.condition_networks else None


@dataclass
class Posterior:
    """Base class of posteriors of images.

    Args:
        head: an elementwise bijection, the first one of the flow.
        body: the rest of the flow.
        images: pixel values, (chains, channels, height, width).
        known: the known part.
        bins: number of pixel values, 2^bits.
    """

    head: Bijection
    body: Bijection
    images: Tensor
    known: Any
    bins: int


@dataclass
class PixelPosterior(Posterior):
    """The posterior of images x = (images + u) / bins whose known pixel values are fixed.

    Unknown pixels are sampled in the space h = head(x), and known ones as s, where u = sigmoid(s),
    so that the positions of the chains are unbounded. `known` is True for known pixels,
    (channels, height, width).
    """

    def __post_init__(self) -> None:
        self.low, _ = self.head((self.images + BIN_MARGIN) / self.bins)
        self.high, _ = self.head((self.images + (1 - BIN_MARGIN)) / self.bins)

    def spread(self, h: Tensor) -> float:
        """Return the standard deviation of the known part over images h."""
        return h.std().item()

    def violation(self, h: Tensor) -> Tensor:
        """Return the squared distance of h from the bins of the known pixels: (chains,)."""
        distance = (self.low - h).clamp(min=0) + (h - self.high).clamp(min=0)
        return (distance * self.known).square().flatten(1).sum(1)

    def initial_position(self, h: Tensor) -> Tensor:
        """Return positions (chains, D) near h, with the known pixels inside their bins."""
        inside = torch.where(self.known, h.clamp(self.low, self.high), h)
        u = self.head.inverse(inside)[0] * self.bins - self.images
        logits = u.clamp(START_MARGIN, 1 - START_MARGIN).logit()
        return torch.where(self.known, logits, h).flatten(1)

    def points(self, position: Tensor) -> Tensor:
        """Return the points x at these positions; unknown pixels may lie outside (0, 1)."""
        position = position.view(self.images.shape)
        inside = (self.images + position.sigmoid()) / self.bins
        return torch.where(self.known, inside, self.head.inverse(position)[0])

    def decode(self, position: Tensor) -> Tensor:
        """Return the images x in (0, 1) at these positions."""
        x = self.points(position)
        return torch.where(self.known, x, _clamp_to_unit(x, self.bins))

    def log_density(self, position: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """Return the log-density of positions given the known pixels, up to a constant: (chains,).

        Args:
            position: (chains, D).
            mean: mean of the latents.
            condition: condition of the bijection.
        """
        position = position.view(self.images.shape)
        inside = (self.images + position.sigmoid()) / self.bins
        h, head_log_det = self.head(torch.where(self.known, inside, 0.5))
        z, log_det = self.body(torch.where(self.known, h, position), condition)
        # log|du/ds| of the known pixels
        log_slope = (F.logsigmoid(position) + F.logsigmoid(-position)) * self.known
        log_base = standard_normal_log_prob(z - mean)
        return log_base + log_det + head_log_det + log_slope.flatten(1).sum(1)


@dataclass
class MeasurementPosterior(Posterior):
    """The posterior of images x given the measurement y = known.apply(x) + N(0, s^2).

    s is MEASUREMENT_DEVIATION bins. The posterior is much narrower along the measured sums than
    across. So the position q of a chain is a stretched version of h = head(x):
    h = q - (1 - t) d <d, q> in each group of pixels. d is the direction in which the sum grows at
    the start of the chain, and t makes the posterior about as wide along d as across. `known` is
    the `LinearMeasurement`.
    """

    def __post_init__(self) -> None:
        self.value = self.known.apply((self.images + 0.5) / self.bins)
        self.direction = torch.zeros_like(self.images)
        self.shrinkage = torch.ones_like(self.images)

    def spread(self, h: Tensor) -> float:
        """Return the standard deviation of the measured sums over images h.

        It is at least that of the measurement, since a single sum has no spread: the mean of one
        gray image.
        """
        return max(self._measure(h).std().item(), MEASUREMENT_DEVIATION / self.bins)

    def violation(self, h: Tensor) -> Tensor:
        """Return the squared distance of the sums of h from the measured ones: (chains,)."""
        return self.known.sum_groups((self._measure(h) - self.value).square())

    def initial_position(self, h: Tensor) -> Tensor:
        """Return positions (chains, D) near h that match the measured sums, and select d and t."""
        x, _ = self.head.inverse(h)
        x = _clamp_to_unit(x + self.value - self.known.apply(x), self.bins)
        with torch.enable_grad():
            h = self.head(x)[0].detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.known.sum_groups(self._measure(h)).sum(), h)
        h = h.detach()
        length = self.known.pool(gradient.square()).sqrt().clamp(min=1e-12)
        self.direction = gradient / length
        ratio = length * CONDITIONAL_RATIO * h.std() * self.bins / MEASUREMENT_DEVIATION
        self.shrinkage = (1 + ratio.square()).rsqrt()
        return (h + (1 / self.shrinkage - 1) * self._project(h)).flatten(1)

    def points(self, position: Tensor) -> Tensor:
        """Return the points x at these positions, which may lie outside (0, 1)."""
        return self.head.inverse(self._unstretch(position))[0]

    def decode(self, position: Tensor) -> Tensor:
        """Return the images x in (0, 1) at these positions."""
        return _clamp_to_unit(self.points(position), self.bins)

    def log_density(self, position: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """Return log p(h) + log p(y | h), up to a constant: (chains,).

        Args:
            position: (chains, D).
            mean: mean of the latents.
            condition: condition of the bijection.
        """
        h = self._unstretch(position)
        z, log_det = self.body(h, condition)
        log_likelihood = 0.5 * self.violation(h) * (self.bins / MEASUREMENT_DEVIATION) ** 2
        return standard_normal_log_prob(z - mean) + log_det - log_likelihood

    def _measure(self, h: Tensor) -> Tensor:
        return self.known.apply(self.head.inverse(h)[0])

    def _unstretch(self, position: Tensor) -> Tensor:
        position = position.view(self.images.shape)
        return position - (1 - self.shrinkage) * self._project(position)

    def _project(self, position: Tensor) -> Tensor:
        """Project onto the direction d in each group."""
        return self.direction * self.known.pool(self.direction * position)


def _clamp_to_unit(x: Tensor, bins: int) -> Tensor:
    """Keep x off 0 and 1, which rounding may reach and the head maps to infinity."""
    return x.clamp(BIN_MARGIN / bins, 1 - BIN_MARGIN / bins)


class InpaintingChains:
    """Chains that sample a posterior, one chain per image of `posterior`.

    Args:
        posterior: the posterior of all images.
        class_prior: the classes of the flow, or None.
        labels: the current class of each chain, (chains,).
        generator: random generator, or None for the global one.
        progress: reports the steps, see `GenerativeModel.set_progress`.

    Attributes:
        position: (chains, D). The offset of the latents from their mean, until `anneal` ends; then
            the coordinates of `posterior`.
        acceptance: mean acceptance rate of `sample_posterior` after its warm-up.
    """

    def __init__(
        self,
        posterior: PixelPosterior | MeasurementPosterior,
        class_prior: ClassPrior | None,
        labels: Tensor,
        generator: torch.Generator | None,
        progress: Progress,
    ):
        self.posterior = posterior
        self.class_prior = class_prior
        self.labels = labels
        self.generator = generator
        self.progress = progress
        self.position = torch.zeros_like(posterior.images).flatten(1)
        with torch.no_grad():
            self.spread = posterior.spread(self._decode(self._noise()))
        self.acceptance = 0.0

    @property
    def samples(self) -> Tensor:
        """The current images x in (0, 1), (chains, channels, height, width)."""
        return self.posterior.decode(self.position)

    def find_mode(self) -> Tensor:
        """Move to the most probable latents by Adam, and return their log-density, (chains,).

        The density is N(z; mean, I) exp(-violation / 2 s^2) with s = START_TOLERANCE spreads. The
        start at z = mean keeps the path among probable images: Asim et al. (1905.11672), section 3.
        """
        density = self._latent_density(START_TOLERANCE * self.spread)
        with torch.enable_grad():
            position = self.position.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([position], MODE_LR)
            for _ in self.progress(range(MODE_STEPS), "most probable", MODE_STEPS):
                optimizer.zero_grad()
                value = density(position)
                (-value.sum()).backward(inputs=[position])
                optimizer.step()
        self.position = position.detach()
        return value.detach()

    @torch.no_grad()
    def perturb(self, num_images: int) -> None:
        """Add N(0, I) to the latents, so that chains start as far apart as samples of the flow.

        The noise of chains that it leads too far from the known part is halved up to MAX_HALVINGS
        times. The chains of an image are consecutive.
        """
        noise = self._noise()
        min_violation = self.spread**2
        for _ in range(MAX_HALVINGS):
            violation = self.posterior.violation(self._decode(self.position + noise))
            violation = violation.view(num_images, -1)
            median = violation.nanmedian(1, keepdim=True).values.clamp(min=min_violation)
            too_far = ~(violation < MAX_VIOLATION_RATIO * median).flatten()
            noise = torch.where(too_far[:, None], 0.5 * noise, noise)
        self.position = self.position + noise

    @torch.no_grad()
    def anneal(self, num_trajectories: int, leapfrog_steps: int) -> None:
        """Sample latents while the tolerance shrinks from one spread to MIN_TOLERANCE spreads."""
        density = self._latent_density(self.spread)
        state = initial_state(self.position, density)
        step_size = StepSize.find_reasonable(state, density, self.generator)
        for index in self.progress(range(num_trajectories), "annealing", num_trajectories):
            progress = index / max(1, num_trajectories - 1)
            density = self._latent_density(self.spread * MIN_TOLERANCE**progress)
            state = initial_state(self.position, density)
            state, _ = hmc_step(state, density, step_size, leapfrog_steps, True, self.generator)
            self.position = state.position
        h = self._decode(self.position).nan_to_num(0.0, 0.0, 0.0)
        self.position = self.posterior.initial_position(h)

    @torch.no_grad()
    def sample_posterior(self, num_trajectories: int, leapfrog_steps: int) -> None:
        """Sample the exact posterior and, before each trajectory, a class from p(y | x).

        The step size is adapted in the first half only, so that the second half leaves the
        posterior invariant.
        """
        state = initial_state(self.position, self._posterior_density())
        step_size = StepSize.find_reasonable(state, self._posterior_density(), self.generator)
        acceptance = []
        for index in self.progress(range(num_trajectories), "exact steps", num_trajectories):
            if self.class_prior:
                points = self.posterior.points(self.position)
                weights = self.class_prior.class_log_density(points).softmax(1)
                self.labels = torch.multinomial(weights, 1, generator=self.generator)[:, 0]
                state = initial_state(self.position, self._posterior_density())
            adapt = index < num_trajectories // 2
            density = self._posterior_density()
            state, share_accepted = hmc_step(
                state, density, step_size, leapfrog_steps, adapt, self.generator
            )
            self.position = state.position
            acceptance.append(share_accepted)
        self.acceptance = fmean(acceptance[num_trajectories // 2 :])

    def _noise(self) -> Tensor:
        return torch.randn(
            self.position.shape,
            generator=self.generator,
            device=self.position.device,
            dtype=self.position.dtype,
        )

    def _mean_and_condition(self) -> tuple[Tensor, Tensor | None]:
        if self.class_prior is None:
            return self.position.new_zeros(()), None
        return self.class_prior.means[self.labels], self.class_prior.condition(self.labels)

    def _decode(self, offset: Tensor) -> Tensor:
        """Return h for latents at this offset from their mean."""
        mean, condition = self._mean_and_condition()
        return self.posterior.body.inverse(offset + mean, condition)[0]

    def _latent_density(self, tolerance: float) -> LogDensity:
        return lambda offset: (
            standard_normal_log_prob(offset)
            - self.posterior.violation(self._decode(offset)) / (2 * tolerance * tolerance)
        )

    def _posterior_density(self) -> LogDensity:
        mean, condition = self._mean_and_condition()
        return lambda position: self.posterior.log_density(position, mean, condition)


@torch.no_grad()
def sample_posterior(
    bijection: Bijection,
    class_prior: ClassPrior | None,
    images: Tensor,
    known: Observation,
    bins: int,
    *,
    num_chains: int,
    num_steps: int,
    generator: torch.Generator | None,
    progress: Progress,
) -> InpaintingChains:
    """Run chains that sample the posterior of images under a flow, given a known part.

    The search for the most probable latents and for the first step sizes takes gradients on top
    of `num_steps`.

    Args:
        bijection: the bijection of the flow.
        class_prior: the classes of the flow, or None.
        images: pixel values as floats, (batch, channels, height, width).
        known: the known part of each image.
        bins: number of pixel values, 2^bits.
        num_chains: chains per image.
        num_steps: gradients per chain, half of them in the latent space.
        generator: random generator, or None for the global one.
        progress: reports the steps.

    Returns:
        The chains; those of an image are consecutive.
    """
    head, body = _split_head(bijection)

    def make_chains(chains_per_image: int, labels: Tensor) -> InpaintingChains:
        repeated = images.repeat_interleave(chains_per_image, 0)
        posterior = (
            MeasurementPosterior(head, body, repeated, known, bins)
            if isinstance(known, LinearMeasurement)
            else PixelPosterior(head, body, repeated, known, bins)
        )
        return InpaintingChains(posterior, class_prior, labels, generator, progress)

    num_classes = 1 if class_prior is None else len(class_prior.means)
    all_labels = torch.arange(num_classes, device=images.device).repeat(len(images))
    modes = make_chains(num_classes, all_labels)
    log_density = modes.find_mode().view(len(images), num_classes).nan_to_num(nan=-torch.inf)
    if not log_density.isfinite().any(1).all():
        raise UserError(
            "the model finds no image near the known pixels: keep other pixels, "
            "or use another model"
        )
    labels = torch.multinomial(
        log_density.softmax(1), num_chains, replacement=True, generator=generator
    )
    chains = make_chains(num_chains, labels.flatten())
    mode_positions = modes.position.view(len(images), num_classes, -1)
    chains.position = mode_positions.take_along_dim(labels[:, :, None], 1).flatten(0, 1)
    chains.perturb(len(images))
    leapfrog_steps = max(1, min(LEAPFROG_STEPS, num_steps // 4))
    num_trajectories = max(4, num_steps // leapfrog_steps)
    chains.anneal(num_trajectories // 2, leapfrog_steps)
    chains.sample_posterior(num_trajectories - num_trajectories // 2, leapfrog_steps)
    return chains


def _split_head(bijection: Bijection) -> tuple[Chain, Chain]:
    """Split off a leading elementwise bijection, if there is one."""
    parts: list[Any] = list(bijection.bijections) if isinstance(bijection, Chain) else [bijection]
    split = int(isinstance(parts[0], EmpiricalCDF | MarginalGaussianization | Logit))
    return Chain(*parts[:split]), Chain(*parts[split:])
