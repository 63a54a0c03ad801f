"""PixelCNN: van den Oord et al. (1606.05328) and Salimans et al. (1701.05517)."""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from flowgen.models.base import (
    ClassConditional,
    InpaintingResult,
    LinearMeasurement,
    Observation,
    SupportsCompression,
    SupportsInpainting,
)
from flowgen.models.categorical import Categorical, initial_logits
from flowgen.models.likelihood import LikelihoodModel, estimate_log_mean
from flowgen.models.logistic_mixture import LogisticMixture
from flowgen.models.pixel_distribution import PixelDistribution
from flowgen.models.pixelcnn.networks import MixtureNetwork, PixelCNNNetwork
from flowgen.models.shapes import MAX_DEPTH
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.metrics import (
    BITS_PER_DIM,
    CONDITIONAL_LOG_PROB,
    EFFECTIVE_SAMPLE_SIZE,
    Likelihood,
    Metrics,
    MetricValue,
)

INPAINTING_CHAINS = 16
INPAINTING_STEPS = 100
IMPORTANCE_SAMPLES = 256  # draws of the unknown pixels that estimate P(known)
MIN_EFFECTIVE_SIZE = 10  # of a reliable estimate


class PixelCNN(LikelihoodModel, ClassConditional, SupportsInpainting, SupportsCompression):
    """PixelCNN: the exact distribution of pixel values, one pixel after the other.

    log P(x) = sum_i log P(x_i | x_1, ..., x_{i-1}) over the pixels in raster order and over the
    channels of each pixel. A `PixelCNNNetwork` computes the parameters of all conditional
    distributions at once, each `Categorical` or a `LogisticMixture`. No noise is added to pixel
    values, so the likelihood is exact. Van den Oord et al. (1606.05328); PixelCNN++ (1701.05517).

    Latents are z_i = Phi^-1(u_i), where Phi is the standard normal cumulative distribution function
    and u_i lies between P(value < x_i) and P(value <= x_i) given the earlier pixels. They follow
    N(0, I) if u_i is drawn there at random. `decode` inverts `encode` exactly: it repeats x <-
    quantiles at Phi(z) given x for all values at once. After n iterations the first n values are
    final, and the iterations end when no value changes: Song et al. (2002.03629), section 4.

    With `num_classes`, the class, one-hot, is the condition of the network, p(x) is the mean of
    p(x | y) over the classes y, and latents end with the class: (batch, D + num_classes).

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        width: Channels of each stack of the network.
        num_layers: Gated layers of the network.
        num_components: Logistic distributions in the mixture of each pixel, 10 for color images, or
            None for a softmax over all values, for digits.
        num_classes: Number of classes of a class-conditional model, or None.

    Attributes:
        num_iterations: Iterations of the last `solve`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = PixelCNN(image_shape=(1, 4, 4), bits=2, width=4, num_layers=1)
        >>> images = torch.randint(4, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.log_prob(images).shape
        torch.Size([16])
        >>> torch.equal(model.decode(model.encode(images)), images)
        True
    """

    likelihood: Likelihood = "exact"
    samplers: ClassVar[tuple[str, ...]] = ("metropolis",)

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        width: int = 32,
        num_layers: int = 8,
        num_components: int | None = None,
        num_classes: int | None = None,
    ):
        super().__init__(image_shape, bits, num_classes)
        check_whole(high=MAX_DEPTH, num_layers=num_layers)
        check_whole(width=width)
        channels = self.image_shape[0]
        settings = {"width": width, "num_layers": num_layers, "cond_channels": num_classes or 0}
        self.num_components = num_components
        if num_components is None:
            outputs = channels * self.bins
            self.network = PixelCNNNetwork(
                channels, bits, outputs=outputs, groups=channels, **settings
            )
        else:
            check_whole(num_components=num_components)
            self.network = MixtureNetwork(channels, bits, num_components, **settings)
        self.num_iterations = 0
        # The loss of a model with classes is that of p(x | y) instead of p(x).
        if num_classes is None:
            self.loss_metric = BITS_PER_DIM

    # Training and likelihood

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bits/dim of a batch."""
        return self.bits_per_dim(self.log_prob(images, labels=labels)).mean()

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Start at the marginal distribution of the values.

        A mixture starts at that of the errors of its linear prediction.
        """
        if isinstance(self.network, MixtureNetwork):
            self.network.initialize(images)
        else:
            bias = initial_logits(images, self.bits)
            self.network.out.bias.copy_(bias)  # type: ignore[union-attr]

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return log P(x), or log P(x | labels), in nats: (batch,).

        Args:
            images: (batch, channels, height, width).
            generator: Unused, because nothing is random.
            labels: Classes (batch,), or None.
        """
        if labels is None and self.num_classes is not None:
            return self._class_log_prob(images).logsumexp(1) - math.log(self.num_classes)
        return self.value_log_prob(images, self.one_hot(labels)).flatten(1).sum(1)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return log p(y | x), (batch, classes), under a uniform prior over the classes."""
        return self._class_log_prob(images).log_softmax(1)

    def _class_log_prob(self, images: Tensor) -> Tensor:
        """Return log P(x | y) in nats for every class y: (batch, classes)."""
        labels = torch.arange(self.check_classes(), device=images.device)
        return torch.stack([self.log_prob(images, None, y.expand(len(images))) for y in labels], 1)

    def value_log_prob(self, images: Tensor, one_hot: Tensor | None) -> Tensor:
        """Return log P of each value given the values before it, in nats.

        Args:
            images: (batch, channels, height, width).
            one_hot: Classes (batch, classes), or None.

        Returns:
            (batch, channels, height, width).
        """
        distribution = self.conditionals(images, one_hot)
        with torch.autocast(images.device.type, enabled=False):
            return distribution.log_prob(images)

    def conditionals(
        self, images: Tensor, one_hot: Tensor | None, network: nn.Module | None = None
    ) -> PixelDistribution:
        """Return the distribution of each value given the values before it.

        Args:
            images: (batch, channels, height, width).
            one_hot: Classes (batch, classes), or None.
            network: A copy of `self.network` in another precision, or None.
        """
        network = network or self.network
        dtype = next(network.parameters()).dtype
        parameters = network(images, None if one_hot is None else one_hot.to(dtype))
        with torch.autocast(images.device.type, enabled=False):
            if self.num_components is None:
                return Categorical(parameters, self.image_shape[0])
            return LogisticMixture(parameters, self.image_shape[0], self.bits)

    # Sampling and latents

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw images, and return them with log P(x), or log P(x | label), in nats: (count,).

        Args:
            count: Number of images.
            temperature: Standard deviation of every latent; at 0, all values are medians.
            generator: Random generator, or None for the global one.
            label: The class; None cycles through the classes, if the model has any.
            start_index: Index of the first image in this cycle.
        """
        z = temperature * torch.randn(
            count, self.dimensions, generator=generator, device=self.device, dtype=self.dtype
        )
        one_hot = self.one_hot(self.sample_labels(count, label, start_index))
        images, distribution = self.solve(self.network, normal_cdf(z), one_hot)
        return images, distribution.log_prob(images).flatten(1).sum(1)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents of images, (batch, D) or (batch, D + num_classes), in float64.

        Args:
            images: (batch, channels, height, width).
            generator: Source of the position u_i between P(value < x_i) and P(value <= x_i). None
                uses the middle.
        """
        one_hot = None
        if self.num_classes is not None:
            one_hot = self.one_hot(self.classify(images).argmax(1))
        low, high = self.conditionals(images, one_hot, self._double_network()).interval(images)
        position: Tensor | float = 0.5
        if generator is not None:
            # Not at the ends of the interval, which rounding errors could leave
            position = torch.rand(
                low.shape, generator=generator, device=low.device, dtype=low.dtype
            ).clamp(0.001, 0.999)
        z = torch.special.ndtri(low + position * (high - low)).flatten(1)
        return z if one_hot is None else torch.cat((z, one_hot.to(z.dtype)), 1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of latents (batch, D) or, with the class, (batch, D + num_classes)."""
        z, one_hot = latent.tensor_split([self.dimensions], 1)
        # Sums of latents can move the one-hot class out of [0, 1], where the network is trained.
        condition = None if self.num_classes is None else one_hot.clamp(0, 1)
        return self.solve(self._double_network(), normal_cdf(z), condition)[0]

    def class_latents(self) -> Tensor:
        classes = torch.eye(self.check_classes(), dtype=torch.float64, device=self.device)
        return torch.cat((classes.new_zeros(len(classes), self.dimensions), classes), 1)

    def _double_network(self) -> nn.Module:
        """Return the network in float64, so that rounding errors do not change decoded values."""
        return copy.deepcopy(self.network).double()

    def solve(
        self,
        network: nn.Module,
        u: Tensor,
        one_hot: Tensor | None,
        images: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> tuple[Tensor, PixelDistribution]:
        """Return the images whose values are the quantiles at u, and the conditional distributions.

        Args:
            network: The network, in the precision of the result.
            u: Numbers in [0, 1], of the size of the images.
            one_hot: Classes (batch, classes), or None.
            images: The images, whose unknown values are computed; None computes all.
            unknown: Mask of the unknown values, of the size of the images or one of them.
        """
        u = u.view(-1, *self.image_shape)
        if images is None:
            images = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)
        images = images.clone()
        if unknown is not None:
            unknown = unknown.expand(images.shape)
        self.num_iterations = 0
        changed = torch.arange(len(images), device=images.device)  # by the last iteration
        for _ in range(self.dimensions):
            self.num_iterations += 1
            current = images[changed]
            condition = None if one_hot is None else one_hot[changed]
            distribution = self.conditionals(current, condition, network)
            mask = None if unknown is None else unknown[changed]
            updated = distribution.quantile(u[changed], current, mask)
            images[changed] = updated
            changed = changed[(updated != current).flatten(1).any(1)]
            if not len(changed):
                break
        return images, self.conditionals(images, one_hot, network)

    # Inpainting

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        known: Observation,
        *,
        sampler: str,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> InpaintingResult:
        """Sample the unknown pixels of one image given the known ones.

        If all known pixels come before all unknown ones in raster order, the samples are exact and
        independent. Other masks need Metropolis steps, see `MetropolisChains`.

        Args:
            images: One image, (1, channels, height, width).
            known: A mask (channels, height, width).
            sampler: "metropolis".
            steps: Metropolis steps of each chain.
            generator: Random generator, or None for the global one.
        """
        check_choice(self.samplers, sampler=sampler)
        if isinstance(known, LinearMeasurement):
            raise UserError(
                "a PixelCNN can only inpaint missing pixels: "
                "choose other known pixels, or choose a flow with --run"
            )
        unknown = ~known.to(self.device)
        chains = MetropolisChains(
            self, images.to(self.device), unknown, INPAINTING_CHAINS, generator
        )
        steps = 0 if is_prefix(known) else steps or INPAINTING_STEPS
        burn_in = steps // 2
        total = torch.zeros(unknown.shape, device=self.device)
        for index in self.progress(range(steps + 1), "inpainting", steps + 1):
            if index > 0:
                chains.step()
            if index >= burn_in:
                total += chains.images.float().mean(0)
        pixels = chains.images.float()
        metrics = {
            "acceptance": chains.acceptance,
            "std": pixels.std(0)[unknown].mean().item() / (self.bins - 1),
            "bits_per_dim": self.bits_per_dim(self.log_prob(chains.images)).mean().item(),
        }
        brightness = pixels / (self.bins - 1)
        return InpaintingResult(
            brightness,
            total / ((steps + 1 - burn_in) * (self.bins - 1)),
            brightness.std(0, correction=0),
            metrics,
        )

    @torch.no_grad()
    def conditional_log_prob(
        self,
        images: Tensor,
        known: Tensor,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Metrics:
        """Return log P(unknown | known) = log P(x) - log P(known).

        P(known) is the mean of prod_k P(x_k | x_<k) over the known pixels k, where the unknown
        pixels before k are drawn in raster order. If all known pixels come before all unknown ones,
        each draw gives the same product, so that one is enough and the value is exact. The mean
        over the classes is exact too.

        Args:
            images: One image, (1, channels, height, width).
            known: A mask (channels, height, width).
            steps: Number of draws for other masks.
            generator: Random generator, or None for the global one.

        Raises:
            UserError: If few draws dominate the estimate.
        """
        images = images.to(self.device)
        known = known.to(self.device)
        is_exact = is_prefix(known)
        count = 1 if is_exact else steps or IMPORTANCE_SAMPLES
        log_weights = torch.cat(
            [
                self._known_log_prob(copies, known, generator)
                for copies in images.expand(count, -1, -1, -1).split(INPAINTING_CHAINS)
            ]
        ).double()
        log_known, error, effective_size = estimate_log_mean(log_weights)
        if not is_exact and effective_size < MIN_EFFECTIVE_SIZE:
            raise UserError(
                f"the estimate of log P(unknown | known) from {count} draws is unreliable, because "
                f"their effective sample size is only {effective_size:.1f}: use more --steps, or "
                "--known top, for which the value is exact"
            )
        value = self.log_prob(images).item() - log_known
        if is_exact:
            exact = MetricValue(CONDITIONAL_LOG_PROB, value, 0.0, likelihood="exact")
            return Metrics.of(exact, method="exact")
        return Metrics.of(
            MetricValue(CONDITIONAL_LOG_PROB, value, error, likelihood="estimate"),
            MetricValue(EFFECTIVE_SAMPLE_SIZE, effective_size),
            method=f"importance sampling with {count} draws",
        )

    def _known_log_prob(
        self, images: Tensor, known: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Draw the unknown pixels in raster order and return log prod_k P(x_k | x_<k): (batch,).

        The product over the known pixels k is averaged over the classes.
        """
        num_classes = self.num_classes or 1
        log_probs = []
        for label in range(num_classes):
            labels = torch.full((len(images),), label, device=self.device)
            _, log_prob = self.redraw(images, ~known, self.one_hot(labels), generator)
            log_probs.append(log_prob[:, known].sum(1))
        return torch.stack(log_probs).logsumexp(0) - math.log(num_classes)

    def redraw(
        self,
        images: Tensor,
        redrawn: Tensor,
        one_hot: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Draw values of images given all values before them, in raster order.

        Args:
            images: (batch, channels, height, width).
            redrawn: Mask of the values to draw, of the size of the images or one of them.
            one_hot: Classes (batch, classes), or None.
            generator: Random generator, or None for the global one.

        Returns:
            The new images, and log P of each of their values given the values before it.
        """
        u = torch.rand(images.shape, generator=generator, device=images.device, dtype=torch.float64)
        images, distribution = self.solve(self.network, u, one_hot, images, redrawn)
        return images, distribution.log_prob(images)


class MetropolisChains:
    """Markov chains of the unknown pixels of an image given the known ones, one per row.

    The chains start with unknown pixels drawn in raster order, each given the pixels before it.
    This is exact if no known pixel comes after an unknown one. With classes, each chain draws one
    candidate x per class y and keeps one with probability proportional to prod_k P(x_k | x_<k, y)
    over the known pixels k.

    Args:
        model: The model.
        images: One image, (1, channels, height, width).
        unknown: Mask of the unknown pixels, (channels, height, width).
        count: Number of chains.
        generator: Random generator, or None for the global one.

    Attributes:
        images: The states, (count, channels, height, width).
        labels: Their classes, (count,).
        log_prob: log P of each value given the values before it, in the shape of the images.
    """

    def __init__(
        self,
        model: PixelCNN,
        images: Tensor,
        unknown: Tensor,
        count: int,
        generator: torch.Generator | None,
    ):
        self.model = model
        self.unknown = unknown
        self.generator = generator
        self.steps = 0
        self.accepted = 0.0
        raster_order = unknown.permute(1, 2, 0)
        self.num_unknown = int(unknown.sum())
        # Index of each unknown value among all unknown values in raster order
        self.rank = (raster_order.flatten().cumsum(0) - 1).view_as(raster_order).permute(2, 0, 1)
        start = images.expand(count, -1, -1, -1)
        classes = torch.arange(model.num_classes or 1, device=images.device)
        candidates = [self._redraw(start, unknown, label.expand(count)) for label in classes]
        states = torch.stack([state for state, _ in candidates])
        log_probs = torch.stack([log_prob for _, log_prob in candidates])
        self.labels = self._draw_labels(log_probs[:, :, ~unknown].sum(2).T)
        chains = torch.arange(count, device=images.device)
        self.images = states[self.labels, chains]
        self.log_prob = log_probs[self.labels, chains]

    @property
    def acceptance(self) -> float:
        """Fraction of proposals that were accepted; 1 before the first step."""
        return self.accepted / self.steps if self.steps else 1.0

    def step(self) -> None:
        """Redraw some unknown pixels of each chain, and accept or reject them.

        Each chain draws a random range of the unknown pixels again, each given the pixels before
        it. The probabilities of the pixels in the range cancel in the Metropolis-Hastings ratio, so
        that the new pixels x' are accepted with probability

            min(1, prod_k P(x_k | x'_<k) / P(x_k | x_<k))  over all k outside of the range.

        Then each chain draws its class from P(y | x).
        """
        count = len(self.images)
        first = self._randint(self.num_unknown, count)
        # Ranges of all sizes: n, n/2, n/4, ..., 1
        length = self.num_unknown >> self._randint(self.num_unknown.bit_length(), count)
        redrawn = self.unknown & (self.rank >= first) & (self.rank < first + length)
        images, log_prob = self._redraw(self.images, redrawn, self.labels)
        change = (log_prob - self.log_prob).masked_fill(redrawn, 0).flatten(1).sum(1)
        uniform = torch.rand(count, generator=self.generator, device=images.device)
        accept = (uniform.log() < change).view(-1, 1, 1, 1)
        self.images = torch.where(accept, images, self.images)
        self.log_prob = torch.where(accept, log_prob, self.log_prob)
        self.accepted += accept.float().mean().item()
        self.steps += 1
        if self.model.num_classes is not None:
            self.labels = self._draw_labels(self.model.classify(self.images))
            one_hot = self.model.one_hot(self.labels)
            self.log_prob = self.model.value_log_prob(self.images, one_hot)

    def _redraw(self, images: Tensor, redrawn: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.redraw(images, redrawn, self.model.one_hot(labels), self.generator)

    def _randint(self, high: int, count: int) -> Tensor:
        return torch.randint(
            high, (count, 1, 1, 1), generator=self.generator, device=self.images.device
        )

    def _draw_labels(self, log_weights: Tensor) -> Tensor:
        """Draw one class per chain, (count,), with these log-weights (count, classes)."""
        return torch.multinomial(log_weights.softmax(1), 1, generator=self.generator)[:, 0]


def is_prefix(known: Tensor) -> bool:
    """Return whether all known values come before all unknown ones in raster order.

    Args:
        known: Mask (channels, height, width).
    """
    raster_order = known.permute(1, 2, 0).flatten()
    return bool(raster_order[: int(known.sum())].all())


def normal_cdf(z: Tensor) -> Tensor:
    """Return the cumulative distribution function of N(0, 1) in float64."""
    return torch.special.ndtr(z.double())
