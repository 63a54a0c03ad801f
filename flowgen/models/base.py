"""The interface of all models, optional capabilities, evaluation settings, and sampling."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import pop_inversion_error
from flowgen.utils.console import Progress, no_progress, progress_bar
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole, log
from flowgen.utils.metrics import LOG_PROBABILITY, Likelihood, Metric, Metrics

MIN_SAMPLES = 100  # fewer hardly determine the covariance of 64 principal components
SAMPLE_BATCH_SIZE = 64
NO_LIKELIHOOD = (
    "this model has no likelihood of images: choose another run with --run (`flowgen runs` lists "
    "them)"
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `flowgen.evaluate` and `GenerativeModel.evaluate`.

    The defaults suit the short evaluations during training.

    Args:
        num_importance_samples: Samples per image of the dequantization noise of a flow, or of the
            latents of a VAE.
        ais_steps: Inverse temperatures of annealed importance sampling, which estimates log Z.
        ais_chains: Chains of annealed importance sampling.
        cross_check: Estimate log Z by several methods that check each other, which may take
            minutes.
        samples: Samples whose quality `flowgen.evaluate` measures, at least 100, or None.
        temperature: Temperature of these samples, or None for `trainer.sample_temperature`.
        compress: Also compress and decompress the images; only `flowgen evaluate` does.

    Example:
        >>> EvalConfig(num_importance_samples=8).num_importance_samples
        8
    """

    num_importance_samples: int = 1
    ais_steps: int = 1000
    ais_chains: int = 100
    cross_check: bool = False
    samples: int | None = None
    temperature: float | None = None
    compress: bool = False

    def __post_init__(self) -> None:
        check_choice((True, False), compress=self.compress, cross_check=self.cross_check)
        # The error of 10^5 importance samples is 1/300 of that of one.
        check_whole(high=10**5, num_importance_samples=self.num_importance_samples)
        check_whole(high=10**8, ais_steps=self.ais_steps)
        check_whole(high=10**6, ais_chains=self.ais_chains)
        if self.samples is not None:
            check_whole(MIN_SAMPLES, 10**6, samples=self.samples)
        if self.temperature is not None:
            check_number(temperature=self.temperature)


QUICK_EVAL = EvalConfig()


class GenerativeModel(nn.Module, ABC):
    """A distribution over images.

    Images are uint8 tensors of shape (batch, channels, height, width) with values 0..2^bits-1.

    Attributes:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        metric: The metric by which models are compared.
        likelihood: The kind of likelihood that `evaluate` and `score` report: "exact", "bound"
            (its expectation over the noise is a lower bound), "estimate" or "none".
        num_classes: Number of classes of a class-conditional model, or None.
        loss_metric: The metric that the training loss equals, or None.
        has_encoder: True if `encode` returns the latents of images.
        restores_images: True if `decode(encode(images))` returns the images.
        shares_batches: True if several processes can train the model, each on its rows of a batch.
        progress: Called as `progress(steps, description, total)` around long loops.
    """

    image_shape: tuple[int, int, int]
    bits: int
    metric: Metric
    likelihood: Likelihood
    num_classes: int | None = None
    loss_metric: Metric | None = None
    has_encoder: ClassVar[bool] = True
    restores_images: ClassVar[bool] = True
    shares_batches: ClassVar[bool] = True
    progress: Progress = staticmethod(no_progress)

    @classmethod
    def image_kwargs(
        cls, shape: tuple[int, int, int], bits: int, data: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the constructor arguments that describe the images.

        Args:
            shape: Channels, height and width.
            bits: Bits per pixel value.
            data: The data section of the configuration, if there is one.
        """
        return {"image_shape": list(shape), "bits": bits}

    @classmethod
    def supports(cls, capability: type, arguments: Mapping[str, Any]) -> bool:
        """Return whether a model built from these constructor arguments has the capability.

        Args:
            capability: A subclass of `Capability`.
            arguments: Arguments of the constructor, by name.
        """
        return issubclass(cls, capability)

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the training loss, a scalar.

        `forward` computes the loss so that `torch.compile` and hooks apply to it.

        Args:
            images: (batch, channels, height, width).
            labels: Classes (batch,); only class-conditional models use them.
        """

    @abstractmethod
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Initialize parameters from a few hundred images, once before training.

        Args:
            images: (batch, channels, height, width).
            labels: Classes (batch,), or None.
        """

    @abstractmethod
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return `metric` and further metrics of the images in `batches`.

        Args:
            batches: Batches of images.
            train_batches: Batches of as many training images, for metrics that compare both.
            eval_config: The settings.
        """

    @abstractmethod
    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the log-probability of each image in nats, (batch,); unnormalized without log Z.

        Args:
            images: (batch, channels, height, width).
            labels: Classes (batch,) to condition on, or None.
            num_importance_samples: Samples of the noise of `log_prob`, if the model has any.
            generator: Source of the noise.
        """

    def statistics(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return statistics for out-of-distribution detection, each of shape (batch,).

        Every model has `log_prob`, its `score`.

        Args:
            images: (batch, channels, height, width).
            generator: Source of the noise.
        """
        return {"log_prob": self.score(images, generator=generator)}

    @property
    def score_metric(self) -> Metric:
        """The metric that `score` returns."""
        return LOG_PROBABILITY

    def check_likelihood(self) -> None:
        """Raise a UserError if the model has no likelihood."""
        if self.likelihood == "none":
            raise UserError(NO_LIKELIHOOD)

    def load_eval_results(self, metrics: Mapping[str, Any]) -> None:
        """Restore results of an earlier evaluation of the same weights, such as log Z."""

    @abstractmethod
    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images.

        Args:
            count: Number of images.
            temperature: Standard deviation of the latents, relative to that of the base; of an RBM,
                the divisor of the energy. 1 samples from the model.
            generator: Random generator, or None for the global one.

        Returns:
            The images (count, channels, height, width), and their log-probabilities in nats,
            (count,): unnormalized for an RBM, the log-density of the point for a flow, one draw of
            the bound for other models with a bound. None if the model has no likelihood.
        """

    @abstractmethod
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents of images: (batch, latent).

        Args:
            images: (batch, channels, height, width).
            generator: Source of the dequantization noise. None uses the middle of each bin. Only
                with noise do the latents follow the base distribution: without it, equal pixels
                have equal latents.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Return the images that have these latents."""

    def set_progress(self, progress: Progress) -> None:
        """Report the steps of long computations in the model and its parts to `progress`."""
        for module in self.modules():
            if hasattr(module, "progress"):
                # mypy only knows modules and tensors as attributes of modules.
                setattr(module, "progress", progress)  # noqa: B010

    def diagnostics(self) -> dict[str, float]:
        """Return metrics of the training itself, such as the error of reversible activations."""
        error = pop_inversion_error(self)
        return {} if error is None else {"inversion_error": error}

    def filters(self) -> Tensor | None:
        """Return learned filters as signed images (count, channels, height, width), or None."""
        return None

    # Classes

    def one_hot(self, labels: Tensor | None) -> Tensor | None:
        """Return (batch, classes), or None without labels or without classes."""
        if labels is None or self.num_classes is None:
            return None
        return F.one_hot(labels, self.num_classes).to(self.dtype)

    def sample_labels(self, count: int, label: int | None, start_index: int) -> Tensor | None:
        """Return the classes of samples, (count,), or None for a model without classes.

        Args:
            count: Number of samples.
            label: Class of all samples; None cycles through the classes.
            start_index: Index of the first sample in this cycle.

        Raises:
            UserError: If the model has no such class.
        """
        if label is None and self.num_classes is None:
            return None
        num_classes = self.check_classes()
        if label is None:
            return torch.arange(start_index, start_index + count, device=self.device) % num_classes
        if label not in range(num_classes):
            raise UserError(
                f"label {label} is not one of the model's {num_classes} classes: "
                f"choose a number from 0 to {num_classes - 1}"
            )
        return torch.full((count,), label, device=self.device)

    def check_classes(self) -> int:
        """Return the number of classes, or raise a UserError if the model has none."""
        if self.num_classes is None:
            raise UserError(
                "this model has no classes: train one with model.num_classes=10 on data that has "
                "labels"
            )
        return self.num_classes

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the parameters."""
        return next(self.parameters()).dtype


class Capability(GenerativeModel):
    """Base class of optional capabilities, which commands ask for.

    Attributes:
        description: Completes the sentence "a model that ...".
        train_hint: Overrides of `flowgen train` that train a model with this capability.
    """

    description: ClassVar[str]
    train_hint: ClassVar[str]


class LinearMeasurement(NamedTuple):
    """A linear measurement of images: weighted sums over groups of pixels.

    A group is a block of `factor` x `factor` pixels of one channel or, with `grayscale`, of all
    channels. Sums have the shape of the images: each pixel holds the sum of its group.

    Args:
        weights: (channels, 1, 1); the weights of a group add up to 1.
        factor: Side length of a block in pixels.
        grayscale: Sum over the channels.

    Example:
        >>> half = LinearMeasurement(torch.full((1, 1, 1), 0.25), factor=2)
        >>> half.apply(torch.tensor([[[[0.0, 1.0], [1.0, 2.0]]]])).tolist()
        [[[[1.0, 1.0], [1.0, 1.0]]]]
    """

    weights: Tensor
    factor: int = 1
    grayscale: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """Return the weighted sums of images (batch, channels, height, width)."""
        return self.pool(self.weights.to(x) * x)

    def pool(self, x: Tensor) -> Tensor:
        """Return the unweighted sum over each group, in the shape of x."""
        if self.grayscale:
            x = x.sum(1, keepdim=True).expand_as(x)
        if self.factor > 1:
            sums = self.factor**2 * F.avg_pool2d(x, self.factor)
            return F.interpolate(sums, scale_factor=self.factor)
        return x

    def sum_groups(self, x: Tensor) -> Tensor:
        """Return the sum of x over groups, (batch,), where x is constant within each group."""
        return x.flatten(1).sum(1) / (self.factor**2 * (x.shape[1] if self.grayscale else 1))


# The known part of an image: a boolean mask (channels, height, width), or sums of pixels.
Observation = Tensor | LinearMeasurement


class InpaintingResult(NamedTuple):
    """Several inpaintings of one image, with brightness from 0 to 1.

    Attributes:
        draws: Samples of the posterior, (draws, channels, height, width); those of an RBM are
            P(v = 1) given its hidden units.
        mean: Mean over everything the sampler drew, (channels, height, width).
        std: Standard deviation of the posterior, (channels, height, width).
        metrics: Diagnostics of the sampler, if any.
    """

    draws: Tensor
    mean: Tensor
    std: Tensor
    metrics: Mapping[str, float]


class SupportsInpainting(Capability):
    """Samples the unknown pixels of an image given the known ones: P(unknown | known).

    `conditional_log_prob` returns the logarithm of this probability as a number.
    """

    description = "fills in missing pixels"
    train_hint = "model=glow"
    samplers: ClassVar[tuple[str, ...]]  # names of the samplers that `inpaint` accepts

    @abstractmethod
    def inpaint(
        self,
        images: Tensor,
        known: Observation,
        *,
        sampler: str,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> InpaintingResult:
        """Sample one image given its known part.

        Args:
            images: One image, (1, channels, height, width); unknown pixels are ignored.
            known: A mask that is True for known pixels, (channels, height, width), or a
                `LinearMeasurement` of all pixels, which only flows accept.
            sampler: One of `samplers`.
            steps: Steps of the sampler; None uses its default.
            generator: Random generator, or None for the global one.
        """

    def conditional_log_prob(
        self,
        images: Tensor,
        known: Tensor,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Metrics:
        """Return log P(unknown | known), the log-probability of the unknown pixels of an image.

        A model whose method is exact for some masks only estimates the value for others, or refuses
        them. `flowgen complete --log-prob` prints the result.

        Args:
            images: One image, (1, channels, height, width), with all of its pixels.
            known: A mask that is True for known pixels, (channels, height, width).
            steps: Steps of the method; None uses its default.
            generator: Random generator, or None for the global one.

        Returns:
            The value of `CONDITIONAL_LOG_PROB` in nats with its standard error (0 if it is exact)
            and its kind, further values such as an effective sample size, and the fact `method`, a
            description of the method.

        Raises:
            UserError: If the value cannot be computed or its estimate is unreliable.
        """
        raise UserError(
            f"{type(self).__name__} cannot compute log P(unknown | known): choose a run of "
            "another model, such as model=rbm"
        )


class ClassConditional(Capability):
    """Learns one distribution per class."""

    description = "is class-conditional"
    train_hint = "model.num_classes=10 data=mnist"

    @classmethod
    def supports(cls, capability: type, arguments: Mapping[str, Any]) -> bool:
        if capability is ClassConditional:
            return arguments.get("num_classes") is not None
        return super().supports(capability, arguments)

    @abstractmethod
    def classify(self, images: Tensor) -> Tensor:
        """Return log p(y | x), (batch, classes)."""

    @abstractmethod
    def class_latents(self) -> Tensor:
        """Return the mean of each class in the latent space of `encode`: (classes, latent)."""

    @abstractmethod
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images of class `label`, or of all classes in turn.

        Args:
            count: Number of images.
            temperature: See `GenerativeModel.sample`.
            generator: Random generator, or None for the global one.
            label: The class; None cycles through the classes.
            start_index: Index of the first image in this cycle, for samples in several batches.
        """


class SupportsMCMC(Capability):
    """Samples by Markov chains."""

    description = "samples with Markov chains"
    train_hint = "model=rbm"

    @abstractmethod
    def iter_chains(
        self, count: int, sampler: str, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield `count` chains at white noise, and then after every step, without end.

        Args:
            count: Number of chains.
            sampler: Name of the sampler.
            generator: Random generator, or None for the global one.

        Yields:
            Brightness from 0 to 1, (count, channels, height, width).
        """

    @abstractmethod
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        sampler: str = "tempering",
        steps: int = 500,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images by Markov chains that start at white noise.

        Args:
            count: Number of images.
            temperature: See `GenerativeModel.sample`.
            generator: Random generator, or None for the global one.
            sampler: Name of the sampler.
            steps: Steps of each chain.
        """


class SupportsCompression(Capability):
    """Compresses images with `flowgen.coding`: an RBM, a PixelCNN, or an invertible flow."""

    description = "compresses images"
    train_hint = "model=glow"


class SupportsTokenSampling(Capability):
    """Samples an image token by token, each token given the previous ones."""

    description = "samples images token by token"
    train_hint = "model=tarflow"

    @abstractmethod
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
        guidance: float = 0.0,
        jacobi: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images.

        Args:
            count: Number of images.
            temperature: See `GenerativeModel.sample`.
            generator: Random generator, or None for the global one.
            label: See `ClassConditional.sample`.
            start_index: See `ClassConditional.sample`.
            guidance: Weight of classifier-free guidance, which makes images more typical of
                their class.
            jacobi: Update all tokens in parallel until they converge (Jacobi iteration).
        """

    @abstractmethod
    def jacobi_iterations(self) -> list[int]:
        """Return the Jacobi iterations of each block for the last samples."""


def sample_images(
    model: GenerativeModel, count: int, temperature: float, seed: int, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Draw samples; the same seed gives the same latents at every temperature.

    Args:
        model: The model.
        count: Number of images.
        temperature: See `GenerativeModel.sample`.
        seed: Seed of the random numbers.
        **kwargs: Further arguments of `model.sample`.

    Returns:
        images: Samples (count, channels, height, width).
        log_probs: Their log-probabilities as far as the model knows them, (count,), or None.
    """
    images: list[Tensor] = []
    log_probs: list[Tensor] = []
    for batch, log_prob in sample_batches(model, count, temperature, seed, **kwargs):
        images.append(batch)
        if log_prob is not None:
            log_probs.append(log_prob)
    return torch.cat(images), torch.cat(log_probs) if log_probs else None


def sort_by_log_prob(images: Tensor, log_probs: Tensor | None) -> Tensor:
    """Return images from high to low log-probability, or as they are without log-probabilities."""
    return images if log_probs is None else images[log_probs.argsort(descending=True)]


def sample_batches(
    model: GenerativeModel, count: int, temperature: float, seed: int, **kwargs: Any
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the batches of `sample_images`; the cycle of classes continues across batches."""
    generator = torch.Generator(model.device).manual_seed(seed)
    iterations: list[list[int]] = []
    starts = range(0, count, SAMPLE_BATCH_SIZE)
    for start in progress_bar(starts, "samples", len(starts)):
        position = {"start_index": start} if isinstance(model, ClassConditional) else {}
        size = min(SAMPLE_BATCH_SIZE, count - start)
        yield model.sample(size, temperature, generator, **position, **kwargs)
        if isinstance(model, SupportsTokenSampling) and "jacobi" in kwargs:
            iterations.append(model.jacobi_iterations())
    if iterations:
        per_block = (str(max(counts)) for counts in zip(*iterations, strict=True))
        log.info("Jacobi iterations per block: %s", ", ".join(per_block))
