"""The law of an image's pixels given some of them, or sums of them."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.elementwise import EmpiricalCDF, Logit, MarginalGaussianization
from flowgen.models.base import InpaintingResult, LinearMeasurement, Observation, SupportsInpainting
from flowgen.models.flows.hmc import LogDensity, StepSize, evaluate_density, hmc_step
from flowgen.models.flows.ood_statistics import standard_normal_log_prob
from flowgen.utils.console import Progress
from flowgen.utils.errors import UserError, check_choice

EDGE = 1e-3  # of a level, so that rounding does not lead into the next
TOLERANCE = 0.5  # levels, the deviation to which sums of pixels are known: they are rounded, and so are the pixels
FREEDOM = 0.1  # about the deviation of a pixel given the others, over that of all pixels


class ClassPrior(NamedTuple):
    """What a flow's classes change: the means of the latents (K, D), whether the networks see the class, and log p(y | x) of points x."""

    means: Tensor
    seen: bool
    posterior: Callable[[Tensor], Tensor]

    def condition(self, labels: Tensor) -> Tensor | None:
        return F.one_hot(labels, len(self.means)).to(self.means.dtype) if self.seen else None


class PixelPosterior:
    """The posterior of images x = (levels + u) / bins, (N, channels, height, width), where their levels are `known`, true or false.

    `head`, a bijection of single numbers that comes first in a flow, stretches what is between two levels; `body` is the rest. Chains
    live in the head's space h where it is not known, and where it is, in s with u = sigmoid(s): there nothing is out of bounds.
    """

    def __init__(self, head: Bijection, body: Bijection, images: Tensor, known: Tensor, bins: int):
        self.head, self.body, self.known, self.bins = head, body, known, bins
        self.images = images
        self.low, self.high = (head((images + u) / bins)[0] for u in (EDGE, 1 - EDGE))

    def spread(self, h: Tensor) -> float:
        """Over which what is known spreads among images."""
        return h.std().item()

    def violation(self, h: Tensor) -> Tensor:
        """The squared distance of h from the known levels' intervals: (batch,)."""
        outside = (self.low - h).clamp(min=0) + (h - self.high).clamp(min=0)
        return (outside * self.known).square().flatten(1).sum(1)

    def start(self, h: Tensor) -> Tensor:
        """The chains' coordinates at h, brought within what is known: (batch, D)."""
        inside = torch.where(self.known, h.clamp(self.low, self.high), h)
        u = (self.head.inverse(inside)[0] * self.bins - self.images).clamp(0.02, 0.98)
        return torch.where(self.known, u.logit(), h).flatten(1)

    def points(self, place: Tensor) -> Tensor:
        """x of chains, a thousandth of a level within all brightness."""
        place = place.view(self.images.shape)
        inside = (self.images + place.sigmoid()) / self.bins
        return torch.where(self.known, inside, _within(self.head.inverse(place)[0], self.bins))

    def log_density(self, place: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """log p(coordinates, what is known), up to a constant: (batch,)."""
        place = place.view(self.images.shape)
        inside = (self.images + place.sigmoid()) / self.bins
        h, stretch = self.head(torch.where(self.known, inside, 0.5))
        z, log_det = self.body(torch.where(self.known, h, place), condition)
        uniform = (F.logsigmoid(place) + F.logsigmoid(-place)) * self.known
        return standard_normal_log_prob(z - mean) + log_det + stretch + uniform.flatten(1).sum(1)


class MeasurementPosterior:
    """The posterior of images x given y = `known.of(x)` + N(0, s^2); y is what is known of the middles of `levels`, s `TOLERANCE` levels.

    Chains live in the head's space, h = q - (1 - t) d <d, q> within each group of pixels. d is the direction in which its sum grows where
    the chain starts, and t makes the posterior about as wide along it as across: it is far narrower in h.
    """

    def __init__(
        self, head: Bijection, body: Bijection, images: Tensor, known: LinearMeasurement, bins: int
    ):
        self.head, self.body, self.known, self.bins = head, body, known, bins
        self.images = images
        self.value = known.of((images + 0.5) / bins)
        self.direction, self.narrow = torch.zeros_like(images), torch.ones_like(images)

    def spread(self, h: Tensor) -> float:
        return self.known.of(self.head.inverse(h)[0]).std().item()

    def violation(self, h: Tensor) -> Tensor:
        """The squared distance of the sums from what is known: (batch,)."""
        return self.known.once((self.known.of(self.head.inverse(h)[0]) - self.value).square())

    def start(self, h: Tensor) -> Tensor:
        """The chains' coordinates at h, brought to what is known: (batch, D)."""
        x = self.head.inverse(h)[0]
        x = _within(x + self.value - self.known.of(x), self.bins)
        with torch.enable_grad():
            h = self.head(x)[0].detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(
                self.known.once(self.known.of(self.head.inverse(h)[0])).sum(), h
            )
        h = h.detach()
        length = self.known.pool(gradient.square()).sqrt().clamp(min=1e-12)
        self.direction = gradient / length
        self.narrow = (1 + (length * FREEDOM * h.std() * self.bins / TOLERANCE).square()).rsqrt()
        return (h + (1 / self.narrow - 1) * self._along(h)).flatten(1)

    def points(self, place: Tensor) -> Tensor:
        """x of chains."""
        return _within(self.head.inverse(self._wide(place))[0], self.bins)

    def log_density(self, place: Tensor, mean: Tensor, condition: Tensor | None) -> Tensor:
        """log p(h) p(y | h), up to a constant: (batch,)."""
        h = self._wide(place)
        z, log_det = self.body(h, condition)
        return (
            standard_normal_log_prob(z - mean)
            + log_det
            - 0.5 * self.violation(h) * (self.bins / TOLERANCE) ** 2
        )

    def _wide(self, place: Tensor) -> Tensor:
        place = place.view(self.images.shape)
        return place - (1 - self.narrow) * self._along(place)

    def _along(self, place: Tensor) -> Tensor:
        return self.direction * self.known.pool(self.direction * place)


def _within(x: Tensor, bins: int) -> Tensor:
    """Off 0 and 1, which rounding may reach and the head takes to infinity."""
    return x.clamp(EDGE / bins, 1 - EDGE / bins)


CHAINS, SWEEPS = 20, 400
ASCENT, ASCENT_RATE = 20, 0.1  # steps to the most probable latents, and their length
START, MIN_TEMPERATURE = 0.3, 0.25  # tolerances of what is known, over the spread of the pixels
MAX_HALVINGS, MAX_ACCEPTANCE_CHANGE = (
    5,
    4.0,
)  # of noise that leads further from what is known than so many times the usual
LEAPS = 20  # of a trajectory: many short ones, each with a new momentum, would stay near where they began


class InpaintingChains:
    """Chains that restore the images of `target`, one each, in the classes `labels`."""

    def __init__(
        self,
        target: PixelPosterior | MeasurementPosterior,
        classes: ClassPrior | None,
        labels: Tensor,
        generator: torch.Generator | None,
        progress: Progress,
    ):
        self.target, self.classes, self.labels = target, classes, labels
        self.generator, self.progress = generator, progress
        self.place = torch.zeros_like(target.images).flatten(
            1
        )  # in the latents, from their mean on, until `anneal` has come to an end
        with torch.no_grad():
            self.spread = target.spread(self._decode(self._noise()))
        self.acceptance = 0.0

    @property
    def points(self) -> Tensor:
        """x of the chains, (chains, channels, height, width)."""
        return self.target.points(self.place)

    def ascend(self) -> Tensor:
        """To the most probable latents under N(z; mean, I) exp(-violation / 2 s^2), s = `START` spreads, by Adam; its log, (chains,).

        From z = mean, which keeps the way to the likely: Asim et al. (1905.11672), section 3.
        """
        density = self._latents(START * self.spread)
        with torch.enable_grad():
            place = self.place.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([place], ASCENT_RATE)
            for _ in self.progress(range(ASCENT), "most probable", ASCENT):
                optimizer.zero_grad()
                value = density(place)
                (-value.sum()).backward(inputs=[place])
                optimizer.step()
        self.place = place.detach()
        return value.detach()

    @torch.no_grad()
    def scatter(self, images: int) -> None:
        """By N(0, I), so that chains begin as far out as draws are where what is known says nothing; by less where that makes no image.

        Of each image there are as many chains, one after the other.
        """
        noise = self._noise()
        for _ in range(MAX_HALVINGS):
            violation = self.target.violation(self._decode(self.place + noise))
            usual = (
                violation.view(images, -1)
                .nanmedian(1, keepdim=True)
                .values.clamp(min=self.spread**2)
            )
            wild = ~(violation.view(images, -1) < MAX_ACCEPTANCE_CHANGE * usual).flatten()
            noise = torch.where(wild[:, None], 0.5 * noise, noise)
        self.place = self.place + noise

    @torch.no_grad()
    def anneal(self, trajectories: int, leaps: int) -> None:
        """In the latents, while the tolerance s of what is known shrinks from one spread to `COOLEST`."""
        scales = [
            self.spread * MIN_TEMPERATURE ** (number / max(1, trajectories - 1))
            for number in range(trajectories)
        ]
        step = None
        for scale in self.progress(scales, "annealing", trajectories):
            density = self._latents(scale)
            position = evaluate_density(self.place, density)
            step = step or StepSize.reasonable(position, density, self.generator)
            self.place = hmc_step(position, density, step, leaps, True, self.generator).place
        self.place = self.target.start(self._decode(self.place).nan_to_num(0.0, 0.0, 0.0))

    @torch.no_grad()
    def settle(self, trajectories: int, leaps: int) -> None:
        """Under the posterior itself, and before each trajectory a class from p(y | x).

        The steps' length is learnt in the first half, so that the second half leaves the posterior invariant.
        """
        position, accepted = evaluate_density(self.place, self._pixels()), []
        step = StepSize.reasonable(position, self._pixels(), self.generator)
        for number in self.progress(range(trajectories), "exact steps", trajectories):
            if self.classes:
                share = self.classes.posterior(self.points).softmax(1)
                self.labels = torch.multinomial(share, 1, generator=self.generator)[:, 0]
                position = evaluate_density(self.place, self._pixels())
            learn = number < trajectories // 2
            position = hmc_step(position, self._pixels(), step, leaps, learn, self.generator)
            self.place = position.place
            accepted += [] if learn else [position.moved.float().mean().item()]
        self.acceptance = math.fsum(accepted) / len(accepted)

    def _noise(self) -> Tensor:
        return torch.randn(
            self.place.shape,
            generator=self.generator,
            device=self.place.device,
            dtype=self.place.dtype,
        )

    def _class(self) -> tuple[Tensor, Tensor | None]:
        """The means of the chains' latents and the condition of their networks."""
        if self.classes is None:
            return self.place.new_zeros(()), None
        return self.classes.means[self.labels], self.classes.condition(self.labels)

    def _decode(self, noise: Tensor) -> Tensor:
        mean, condition = self._class()
        return self.target.body.inverse(noise + mean, condition)[0]

    def _latents(self, scale: float) -> LogDensity:
        return lambda noise: (
            standard_normal_log_prob(noise)
            - self.target.violation(self._decode(noise)) / (2 * scale * scale)
        )

    def _pixels(self) -> LogDensity:
        mean, condition = self._class()
        return lambda place: self.target.log_density(place, mean, condition)


class HMCInpaintingMixin(SupportsInpainting):
    """How a flow completes: see `Chains`."""

    completions: ClassVar[tuple[str, ...]] = ("langevin",)
    bijection: Bijection
    bins: int
    means: Tensor | None
    condition_networks: bool

    def inpaint(
        self,
        images: Tensor,
        known: Observation,
        *,
        method: str,
        sweeps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> InpaintingResult:
        """Chains' ends, half of the `sweeps`, gradients a chain, spent in the latents and half on exact steps."""
        check_choice(self.completions, method=method)
        chains = self.restore(images, known, CHAINS, sweeps or SWEEPS, generator)
        found = (chains.points * self.bins).floor().clamp(0, self.bins - 1)
        spread = (
            found.std(0)
            if isinstance(known, LinearMeasurement)
            else found.std(0)[~known.to(found.device)]
        )
        with torch.no_grad():
            bits = -self.score(found.to(torch.uint8), generator=generator).mean().item() / (
                images[0].numel() * math.log(2)
            )
        figures = {
            "acceptance": chains.acceptance,
            "spread": spread.mean().item() / (self.bins - 1),
            "bits_per_dim": bits,
        }
        brightness = found / (self.bins - 1)
        return InpaintingResult(brightness, brightness.mean(0), figures)

    @torch.no_grad()
    def restore(
        self,
        images: Tensor,
        known: Observation,
        chains: int,
        steps: int,
        generator: torch.Generator | None = None,
    ) -> InpaintingChains:
        """So many chains for each image of levels (batch, channels, height, width), after `steps` gradients each.

        Beside them come those that find the most probable latents and the steps' first lengths. Raises FlowgenError where nothing is near.
        """
        parts = (
            list(self.bijection.bijections)
            if isinstance(self.bijection, Chain)
            else [self.bijection]
        )
        pixelwise = isinstance(parts[0], EmpiricalCDF | MarginalGaussianization | Logit)
        head, body = (Chain(*parts[:pixelwise]), Chain(*parts[pixelwise:]))
        classes = (
            None
            if self.means is None
            else ClassPrior(self.means, self.condition_networks, self._log_density_of_classes)
        )

        def start(repeats: int, labels: Tensor) -> InpaintingChains:
            repeated = images.repeat_interleave(repeats, 0).to(self.dtype)
            of = (head, body, repeated)
            target = (
                MeasurementPosterior(*of, known, self.bins)
                if isinstance(known, LinearMeasurement)
                else PixelPosterior(*of, known, self.bins)
            )
            return InpaintingChains(target, classes, labels, generator, self.progress)

        count = len(self.means) if self.means is not None else 1
        tops = start(count, torch.arange(count, device=self.device).repeat(len(images)))
        best = tops.ascend().view(len(images), count).nan_to_num(nan=-torch.inf)
        if not best.isfinite().any(1).all():
            raise UserError(
                "the model finds no image near what is kept: keep other pixels, or take another model"
            )
        share = best.softmax(1)
        labels = torch.multinomial(share, chains, replacement=True, generator=generator)
        found = start(chains, labels.flatten())
        tops_of = tops.place.view(len(images), count, -1)[
            torch.arange(len(images), device=self.device)[:, None], labels
        ]
        found.place = tops_of.flatten(0, 1)
        found.scatter(len(images))
        leaps = max(1, min(LEAPS, steps // 4))
        trajectories = max(4, steps // leaps)
        found.anneal(trajectories // 2, leaps)
        found.settle(trajectories - trajectories // 2, leaps)
        return found

    @abstractmethod
    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """log p(x) of each image in nats, (batch,)."""

    @abstractmethod
    def _log_density_of_classes(self, x: Tensor) -> Tensor:
        """log p(x | y) in nats for every class y: (batch, classes)."""
