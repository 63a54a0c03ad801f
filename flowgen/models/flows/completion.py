"""What is missing of an image, sampled by a flow given what is known."""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from flowgen.bijections import Bijection, Chain, Equalize, Gaussianize, Logit
from flowgen.errors import FlowgenError, check_choice
from flowgen.models.abilities import Completes, Completion
from flowgen.models.flows.langevin import LogDensity, StepSize, at, langevin
from flowgen.models.flows.posterior import Classes, Pixels, Sums
from flowgen.models.flows.statistics import log_normal
from flowgen.models.linear import Known, Linear
from flowgen.progress import Progress

CHAINS, SWEEPS = 20, 400
ASCENT, ASCENT_RATE = 20, 0.1  # steps to the most probable latents, and their length
START, COOLEST = 0.3, 0.25  # tolerances of what is known, over the spread of the pixels
HALVINGS, WILD = 5, 4.0  # of noise that leads further from what is known than so many times the usual
LEAPS = 20  # of a trajectory: many short ones, each with a new momentum, would stay near where they began


class Chains:
    """Chains that restore the images of `target`, one each, in the classes `labels`."""

    def __init__(
        self, target: Pixels | Sums, classes: Classes | None, labels: Tensor, generator: torch.Generator | None, progress: Progress
    ):
        self.target, self.classes, self.labels = target, classes, labels
        self.generator, self.progress = generator, progress
        self.place = torch.zeros_like(target.levels).flatten(1)  # in the latents, from their mean on, until `anneal` has come to an end
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
        for _ in range(HALVINGS):
            violation = self.target.violation(self._decode(self.place + noise))
            usual = violation.view(images, -1).nanmedian(1, keepdim=True).values.clamp(min=self.spread**2)
            wild = ~(violation.view(images, -1) < WILD * usual).flatten()
            noise = torch.where(wild[:, None], 0.5 * noise, noise)
        self.place = self.place + noise

    @torch.no_grad()
    def anneal(self, trajectories: int, leaps: int) -> None:
        """In the latents, while the tolerance s of what is known shrinks from one spread to `COOLEST`."""
        scales = [self.spread * COOLEST ** (number / max(1, trajectories - 1)) for number in range(trajectories)]
        step = None
        for scale in self.progress(scales, "annealing", trajectories):
            density = self._latents(scale)
            position = at(self.place, density)
            step = step or StepSize.reasonable(position, density, self.generator)
            self.place = langevin(position, density, step, leaps, True, self.generator).place
        self.place = self.target.start(self._decode(self.place).nan_to_num(0.0, 0.0, 0.0))

    @torch.no_grad()
    def settle(self, trajectories: int, leaps: int) -> None:
        """Under the posterior itself, and before each trajectory a class from p(y | x).

        The steps' length is learnt in the first half, so that the second half leaves the posterior invariant.
        """
        position, accepted = at(self.place, self._pixels()), []
        step = StepSize.reasonable(position, self._pixels(), self.generator)
        for number in self.progress(range(trajectories), "exact steps", trajectories):
            if self.classes:
                share = self.classes.posterior(self.points).softmax(1)
                self.labels = torch.multinomial(share, 1, generator=self.generator)[:, 0]
                position = at(self.place, self._pixels())
            learn = number < trajectories // 2
            position = langevin(position, self._pixels(), step, leaps, learn, self.generator)
            self.place = position.place
            accepted += [] if learn else [position.moved.float().mean().item()]
        self.acceptance = math.fsum(accepted) / len(accepted)

    def _noise(self) -> Tensor:
        return torch.randn(self.place.shape, generator=self.generator, device=self.place.device, dtype=self.place.dtype)

    def _class(self) -> tuple[Tensor, Tensor | None]:
        """The means of the chains' latents and the condition of their networks."""
        if self.classes is None:
            return self.place.new_zeros(()), None
        return self.classes.means[self.labels], self.classes.condition(self.labels)

    def _decode(self, noise: Tensor) -> Tensor:
        mean, condition = self._class()
        return self.target.body.inverse(noise + mean, condition)[0]

    def _latents(self, scale: float) -> LogDensity:
        return lambda noise: log_normal(noise) - self.target.violation(self._decode(noise)) / (2 * scale * scale)

    def _pixels(self) -> LogDensity:
        mean, condition = self._class()
        return lambda place: self.target.log_density(place, mean, condition)


class CompletesByLangevin(Completes):
    """How a flow completes: see `Chains`."""

    completions: ClassVar[tuple[str, ...]] = ("langevin",)
    bijection: Bijection
    bins: int
    means: Tensor | None
    class_networks: bool

    def complete(
        self, levels: Tensor, known: Known, *, method: str, sweeps: int | None = None, generator: torch.Generator | None = None
    ) -> Completion:
        """Chains' ends, half of the `sweeps`, gradients a chain, spent in the latents and half on exact steps."""
        check_choice(self.completions, method=method)
        chains = self.restore(levels, known, CHAINS, sweeps or SWEEPS, generator)
        found = (chains.points * self.bins).floor().clamp(0, self.bins - 1)
        spread = found.std(0) if isinstance(known, Linear) else found.std(0)[~known.to(found.device)]
        with torch.no_grad():
            bits = -self.score(found.to(torch.uint8), generator=generator).mean().item() / (levels[0].numel() * math.log(2))
        figures = {"acceptance": chains.acceptance, "spread": spread.mean().item() / (self.bins - 1), "bits_per_dim": bits}
        brightness = found / (self.bins - 1)
        return Completion(brightness, brightness.mean(0), figures)

    @torch.no_grad()
    def restore(self, levels: Tensor, known: Known, chains: int, steps: int, generator: torch.Generator | None = None) -> Chains:
        """So many chains for each image of levels (batch, channels, height, width), after `steps` gradients each.

        Beside them come those that find the most probable latents and the steps' first lengths. Raises FlowgenError where nothing is near.
        """
        parts = list(self.bijection.bijections) if isinstance(self.bijection, Chain) else [self.bijection]
        pixelwise = isinstance(parts[0], Equalize | Gaussianize | Logit)
        head, body = (Chain(*parts[:pixelwise]), Chain(*parts[pixelwise:]))
        classes = None if self.means is None else Classes(self.means, self.class_networks, self._log_density_of_classes)

        def start(repeats: int, labels: Tensor) -> Chains:
            images = levels.repeat_interleave(repeats, 0).to(self.dtype)
            of = (head, body, images)
            target = Sums(*of, known, self.bins) if isinstance(known, Linear) else Pixels(*of, known, self.bins)
            return Chains(target, classes, labels, generator, self.progress)

        count = len(self.means) if self.means is not None else 1
        tops = start(count, torch.arange(count, device=self.device).repeat(len(levels)))
        best = tops.ascend().view(len(levels), count).nan_to_num(nan=-torch.inf)
        if not best.isfinite().any(1).all():
            raise FlowgenError("the model finds no image near what is kept: keep other pixels, or take another model")
        share = best.softmax(1)
        labels = torch.multinomial(share, chains, replacement=True, generator=generator)
        found = start(chains, labels.flatten())
        tops_of = tops.place.view(len(levels), count, -1)[torch.arange(len(levels), device=self.device)[:, None], labels]
        found.place = tops_of.flatten(0, 1)
        found.scatter(len(levels))
        leaps = max(1, min(LEAPS, steps // 4))
        trajectories = max(4, steps // leaps)
        found.anneal(trajectories // 2, leaps)
        found.settle(trajectories - trajectories // 2, leaps)
        return found

    @abstractmethod
    def score(self, levels: Tensor, labels: Tensor | None = None, *, draws: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """log p(x) of each image in nats, (batch,)."""

    @abstractmethod
    def _log_density_of_classes(self, x: Tensor) -> Tensor:
        """log p(x | y) in nats for every class y: (batch, classes)."""
