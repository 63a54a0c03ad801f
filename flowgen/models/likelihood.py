"""Models whose log-probabilities are known, and their evaluation in bits/dim."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowgen.models.base import QUICK_EVAL, EvalConfig, GenerativeModel
from flowgen.utils.distributed import evaluate_sharded
from flowgen.utils.errors import check_whole
from flowgen.utils.metrics import BITS_PER_DIM, LOG_LIKELIHOOD, Metric, Metrics, MetricValue


class ImportanceEstimate(NamedTuple):
    """Logarithm of the mean of importance weights, with its standard error.

    The effective sample size is the number of equal weights with the same variance.
    """

    log_mean: float
    error: float
    effective_sample_size: float


def estimate_log_mean(log_weights: Tensor) -> ImportanceEstimate:
    """Return the logarithm of the mean weight.

    Args:
        log_weights: Logarithms of independent weights, (count,).

    Example:
        >>> estimate_log_mean(torch.zeros(4, dtype=torch.double))
        ImportanceEstimate(log_mean=0.0, error=0.0, effective_sample_size=4.0)
    """
    count = len(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    error = (weights.std() / weights.mean() / math.sqrt(count)).item() if count > 1 else math.inf
    return ImportanceEstimate(
        log_weights.logsumexp(0).item() - math.log(count),
        error,
        (weights.sum().square() / weights.square().sum()).item(),
    )


def estimate_log_mean_of_groups(log_weights: Tensor) -> ImportanceEstimate:
    """Return the logarithm of the mean weight of groups that have different means.

    Only the variance within the groups is an error. With the mean m_g, the relative error e_g and
    the effective sample size n_g of group g, and p_g = m_g / sum m, the error is
    sqrt(sum (p_g e_g)^2) and the effective sample size 1 / sum (p_g^2 / n_g).

    Args:
        log_weights: Logarithms of independent weights, (count, groups).

    Example:
        >>> estimate_log_mean_of_groups(torch.zeros(2, 2, dtype=torch.double))
        ImportanceEstimate(log_mean=0.0, error=0.0, effective_sample_size=4.0)
    """
    positive = [group for group in log_weights.unbind(1) if group.max() > -math.inf]
    if not positive:
        return ImportanceEstimate(-math.inf, math.nan, math.nan)
    groups = [estimate_log_mean(group) for group in positive]
    log_means = torch.tensor([group.log_mean for group in groups], dtype=torch.double)
    fractions = log_means.softmax(0).tolist()
    pairs = list(zip(fractions, groups, strict=True))
    return ImportanceEstimate(
        log_means.logsumexp(0).item() - math.log(log_weights.shape[1]),
        math.sqrt(sum((fraction * group.error) ** 2 for fraction, group in pairs)),
        1 / sum(fraction**2 / group.effective_sample_size for fraction, group in pairs),
    )


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of independent values (n,), infinite for one value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf


class LikelihoodModel(GenerativeModel):
    """A model that computes log P(image), or a random number whose expectation bounds it.

    `evaluate` and `score` treat all these models alike. If `likelihood` is "exact", `log_prob` is
    the log-probability. If it is "bound", `log_prob` is log w, where the mean of w over the noise
    is P(image) or less, so that the logarithm of the mean of several w is a tighter bound: Burda,
    Grosse and Salakhutdinov (1509.00519). If `averages_log_probs` is set, only the mean of log w is
    a bound. "estimate" is a value with an unknown sign of its error, and "none" that of a model of
    noisy images.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value, 1 to 8.
        num_classes: Number of classes of a class-conditional model, or None.

    Attributes:
        bins: Number of pixel values, 2^bits.
        dimensions: The product D of `image_shape`.
        averages_log_probs: Average log w over importance samples if only this is a valid bound.

    Example:
        >>> from flowgen.models import NICE
        >>> model = NICE(image_shape=(1, 2, 2), bits=1, num_layers=1)
        >>> images = torch.randint(2, (64, 1, 2, 2), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> metrics = model.evaluate(images.split(32))
        >>> list(metrics.measured)
        ['bits_per_dim', 'log_likelihood']
    """

    metric: Metric = BITS_PER_DIM
    averages_log_probs = False

    def __init__(self, image_shape: Sequence[int], bits: int, num_classes: int | None = None):
        super().__init__()
        check_whole(1, 8, bits=bits)  # images are uint8
        if num_classes is not None:
            check_whole(num_classes=num_classes)
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.dimensions = channels * height * width
        self.bits = bits
        self.bins = 2**bits
        self.num_classes = num_classes

    @abstractmethod
    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return log P(image), or log w of one noise draw, in nats: (batch,).

        Args:
            images: (batch, channels, height, width).
            generator: Source of the noise.
            labels: Classes (batch,), which select P(image | labels); None selects P(image).
        """

    def draw_noise(self, images: Tensor, generator: torch.Generator | None = None) -> object:
        """Draw the random numbers that `log_prob` uses for these images, if it uses any.

        In an evaluation by several processes it advances the generator for the batches of other
        processes.
        """

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return log P(image) of each image in nats, (batch,).

        It is the logarithm of the mean of w over importance samples of the noise.

        Args:
            images: (batch, channels, height, width).
            labels: Classes (batch,), which select P(image | labels); None selects P(image).
            num_importance_samples: Number of samples of the noise.
            generator: Source of the noise.
        """
        self.check_likelihood()
        return self.importance_log_prob(images, labels, num_importance_samples, generator)

    def importance_log_prob(
        self, images: Tensor, labels: Tensor | None, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Return the logarithm of the mean of w in nats, (batch,), or the mean of `log_prob`.

        Args:
            images: (batch, channels, height, width).
            labels: Classes (batch,), or None.
            samples: Number of samples of the noise.
            generator: Source of the noise.
        """
        samples = self._num_samples(samples)
        steps = self.progress(range(samples), "importance samples", samples)
        log_prob = torch.stack([self.log_prob(images, generator, labels) for _ in steps])
        if self.averages_log_probs:
            return log_prob.mean(0)
        return log_prob.logsumexp(0) - math.log(samples)

    @property
    def has_noise(self) -> bool:
        """True if `log_prob` draws random numbers, so that importance samples differ."""
        return self.likelihood != "exact"

    def _num_samples(self, samples: int) -> int:
        return samples if self.has_noise else 1

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """Return -log_prob / (D log 2)."""
        return -log_prob / (self.dimensions * math.log(2))

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the bits/dim of `batches` with its standard error over images.

        The noise is the same in every call. Models of binary images also report the
        log-likelihood in nats, -bits/dim D log 2, the usual figure of binary images.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        samples = self._num_samples(eval_config.num_importance_samples)

        def bits_per_dim(images: Tensor) -> Tensor:
            return self.bits_per_dim(self.importance_log_prob(images, None, samples, generator))

        def skip_noise(images: Tensor) -> None:
            for _ in range(samples):
                self.draw_noise(images, generator)

        values = evaluate_sharded(batches, bits_per_dim, skip_noise)
        return self.likelihood_metrics(values, samples)

    def likelihood_metrics(self, bits_per_dim: Tensor, samples: int = 1) -> Metrics:
        """Return the mean bits/dim of images, and the log-likelihood of binary ones in nats.

        Args:
            bits_per_dim: Bits/dim of each image, (count,).
            samples: Number of importance samples, which the result records.
        """
        error = standard_error(bits_per_dim)
        bits = MetricValue(
            self.metric, bits_per_dim.mean().item(), error, likelihood=self.likelihood
        )
        measured = [bits]
        if self.bits == 1 and self.metric == BITS_PER_DIM:
            nats = self.dimensions * math.log(2)
            measured.append(
                replace(bits, metric=LOG_LIKELIHOOD, value=-nats * bits.value, error=nats * error)
            )
        return Metrics.of(
            *measured, bits=self.bits, num_importance_samples=samples, images=len(bits_per_dim)
        )
