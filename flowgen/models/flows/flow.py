"""Normalizing flows of images."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.bijections.elementwise import EmpiricalCDF, Logit
from flowgen.bijections.networks import batch_norm_layers
from flowgen.models.base import (
    QUICK_EVAL,
    ClassConditional,
    EvalConfig,
    InpaintingResult,
    Likelihood,
    LinearMeasurement,
    Observation,
    SupportsInpainting,
)
from flowgen.models.flows.dequantization import (
    GaussianDequantizer,
    gaussian_deviation,
    make_dequantizer,
)
from flowgen.models.flows.inpainting import (
    NUM_CHAINS,
    NUM_STEPS,
    ClassPrior,
    InpaintingChains,
    sample_posterior,
)
from flowgen.models.flows.ood_statistics import ood_statistics, standard_normal_log_prob
from flowgen.utils.distributed import evaluate_sharded
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.metrics import BITS_PER_DIM, NOISY_BITS_PER_DIM, Metrics, MetricValue

CLASS_MEAN_DEVIATION = 0.3  # standard deviation of each latent of the class means at the start


@torch.enable_grad()
def denoise(y: Tensor, deviation: float, log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """Return E[x | y] = y + s^2 grad log p(y) of y = x + s e, e ~ N(0, I), by Tweedie's formula.

    Efron (2011), section 2.

    Args:
        y: noisy points, (batch, ...).
        deviation: the standard deviation s.
        log_density: returns log p(y), (batch,).

    Example:
        >>> standard_normal = torch.distributions.Normal(0.0, 1.0)
        >>> denoise(torch.ones(1, 1), 1.0, lambda y: standard_normal.log_prob(y).sum(1))
        tensor([[0.]])
    """
    y = y.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(y).sum(), y)
    return y.detach() + deviation**2 * gradient


class Flow(ClassConditional, SupportsInpainting):
    """A normalizing flow: a bijection from dequantized images to latents under N(0, I).

    Dequantized images are x = (images + u) / 2^bits in [0, 1), where the dequantizer draws the
    noise u. Latents are vectors (batch, D), where D is the product of `image_shape`. The likelihood
    is a lower bound, which is tighter if p(x) / q(u) is averaged over several importance samples of
    u: Burda et al. (1509.00519).

    With `num_classes`, the latents of class y are distributed as N(means[y], I), p(x) is the mean
    of p(x | y) over the classes, and `classify` applies Bayes' rule: Izmailov et al. (1912.13025),
    section 3. With `condition_networks`, the class, one-hot, is also the condition of all networks
    in the bijection. The latents of `encode` then end with it: (batch, D + num_classes).

    With Gaussian noise the flow models noisy images. It then has no likelihood of images, and its
    samples are denoised.

    Args:
        bijection: maps images (batch, channels, height, width) to vectors (batch, D).
        image_shape: (channels, height, width).
        bits: bits per pixel value.
        dequantization: "uniform", "variational" (a learned flow, as in Flow++) or
            "gaussian:DEVIATION".
        num_classes: number of classes, or None.
        condition_networks: with classes, make the class the condition of the bijection.

    Example:
        >>> from flowgen.bijections.base import Chain
        >>> from flowgen.bijections.elementwise import Standardize
        >>> from flowgen.bijections.reshape import Flatten
        >>> _ = torch.manual_seed(0)
        >>> flow = Flow(Chain(Flatten(1, 2, 2), Standardize(4)), (1, 2, 2), bits=8)
        >>> flow.initialize(torch.randint(256, (64, 1, 2, 2), dtype=torch.uint8))
        >>> images, log_prob = flow.sample(5)
        >>> images.shape, log_prob.shape
        (torch.Size([5, 1, 2, 2]), torch.Size([5]))
    """

    likelihood: Likelihood = "bound"
    metric = BITS_PER_DIM
    samplers: ClassVar[tuple[str, ...]] = ("hmc",)
    # Report the mean of log p (an ELBO), if a log-mean-exp would not be a valid bound.
    elbo_only = False

    def __init__(
        self,
        bijection: Bijection,
        image_shape: Sequence[int],
        bits: int,
        dequantization: str = "uniform",
        num_classes: int | None = None,
        condition_networks: bool = False,
    ):
        super().__init__()
        check_whole(bits=bits)
        channels, height, width = image_shape
        self.image_shape = (channels, height, width)
        self.dimensions = channels * height * width
        self.bits = bits
        self.bins = 2**bits
        self.num_classes = num_classes
        self.condition_networks = condition_networks and num_classes is not None
        self.bijection = bijection
        self.dequantizer = make_dequantizer(dequantization, image_shape, bits)
        if isinstance(self.dequantizer, GaussianDequantizer):
            # Noise leaves [0, 1), to which these bijections are restricted.
            if any(isinstance(part, EmpiricalCDF | Logit) for part in bijection.modules()):
                raise UserError(
                    "model.dequantization=gaussian:... needs model.gaussianize=false, "
                    "and does not work with model=realnvp"
                )
            self.likelihood = "none"
            self.metric = NOISY_BITS_PER_DIM
            self.elbo_only = True
        # With classes the loss is that of p(x | y); batch normalization makes it no likelihood.
        if num_classes is None and not batch_norm_layers(bijection):
            self.loss_metric = self.metric
        self.means = (
            None
            if num_classes is None
            else nn.Parameter(CLASS_MEAN_DEVIATION * torch.randn(num_classes, self.dimensions))
        )

    @classmethod
    def supports(cls, capability: type, arguments: Mapping[str, Any]) -> bool:
        if capability is ClassConditional:
            return arguments.get("num_classes") is not None
        if capability is SupportsInpainting:
            return gaussian_deviation(arguments.get("dequantization")) is None
        return super().supports(capability, arguments)

    # Training and likelihood

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bits/dim of a batch, with one sample of the noise per image."""
        return self._bits_per_dim(self.log_prob(images, labels=labels)).mean()

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.dequantizer.initialize(images, self.dtype)
        if labels is None and self.num_classes is not None:
            labels = torch.arange(len(images), device=images.device) % self.num_classes
        x, _ = self._dequantize(images)
        self.bijection.initialize(x, self._condition(self._one_hot(labels)))

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return log p(x) - log q(u) - D log 2^bits in nats, (batch,), for one noise sample u.

        Its mean over u is a lower bound of the log-probability of the images. Theis, van den Oord
        and Bethge (1511.01844), section 3.1; Flow++ (1902.00275), section 3.1.

        Args:
            images: (batch, channels, height, width).
            generator: source of the noise.
            labels: classes (batch,), which select p(x | labels); None selects p(x).
        """
        x, log_q = self._dequantize(images, generator)
        return self.log_density(x, labels) - log_q - self.dimensions * math.log(self.bins)

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return log p(x), or log p(x | labels), in nats: (batch,).

        Args:
            x: points in [0, 1), (batch, channels, height, width).
            labels: classes (batch,), or None.
        """
        if labels is None and self.means is not None:
            return self.class_log_density(x).logsumexp(1) - math.log(len(self.means))
        one_hot = self._one_hot(labels)
        z, log_det = self.bijection(x, self._condition(one_hot))
        return self._log_base(z, one_hot) + log_det

    def class_log_density(self, x: Tensor) -> Tensor:
        """Return log p(x | y) in nats for every class y: (batch, classes)."""
        num_classes = len(self._class_means())
        if self.condition_networks:
            labels = [x.new_full((len(x),), y, dtype=torch.long) for y in range(num_classes)]
            return torch.stack([self.log_density(x, label) for label in labels], 1)
        z, log_det = self.bijection(x)
        return self._class_log_base(z) + log_det[:, None]

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return log p(x) of each image in nats, (batch,).

        It is the logarithm of the mean of p(x + u) / q(u) over importance samples of u. Flows of
        noisy images raise a UserError.
        """
        self._check_likelihood()
        return self._importance_log_prob(images, labels, num_importance_samples, generator)

    def _importance_log_prob(
        self, images: Tensor, labels: Tensor | None, samples: int, generator: torch.Generator | None
    ) -> Tensor:
        steps = self.progress(range(samples), "importance samples", samples)
        log_prob = torch.stack([self.log_prob(images, generator, labels) for _ in steps])
        if self.elbo_only:
            return log_prob.mean(0)
        return log_prob.logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        reference: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the bits/dim of `batches` with its standard error over images.

        The dequantization noise is the same in every call.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        samples = eval_config.num_importance_samples

        def bits_per_dim(images: Tensor) -> Tensor:
            return self._bits_per_dim(self._importance_log_prob(images, None, samples, generator))

        def skip_noise(images: Tensor) -> None:
            for _ in range(samples):
                self.dequantizer.draw_noise(images, self.dtype, generator)

        values = evaluate_sharded(batches, bits_per_dim, skip_noise)
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return Metrics.of(
            MetricValue(self.metric, values.mean().item(), error),
            bits=self.bits,
            num_importance_samples=samples,
            images=len(values),
        )

    @torch.no_grad()
    def statistics(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return log p(x) as `log_prob` and its terms, see `ood_statistics`: (batch,) each."""
        self._check_likelihood()
        x, log_q = self._dequantize(images, generator)
        log_density, terms = ood_statistics(self.bijection, x, self.means, self.condition_networks)
        return {"log_prob": log_density - log_q - self.dimensions * math.log(self.bins), **terms}

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return log p(y | x), (batch, classes), under a uniform prior over the classes."""
        return self.class_log_density(self._bin_centers(images)).log_softmax(1)

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw images, and return them with the log-density of their points in nats, (count,).

        It is log p(x | label) if the class conditions the networks, else log p(x).

        Args:
            count: number of images.
            temperature: standard deviation of every latent around its mean.
            generator: random generator, or None for the global one.
            label: the class; None cycles through the classes, if the flow has any.
            start_index: index of the first image in this cycle.
        """
        z = temperature * torch.randn(
            count, self.dimensions, generator=generator, device=self.device, dtype=self.dtype
        )
        one_hot = self._one_hot(self._sample_labels(count, label, start_index))
        if one_hot is not None:
            z = z + one_hot @ self._class_means()
        x, log_density = self._invert(z, one_hot)
        images = self._quantize(self._denoise(x, one_hot))
        return images, log_density - self.dimensions * math.log(self.bins)

    def _sample_labels(self, count: int, label: int | None, start_index: int) -> Tensor | None:
        """Return the classes of samples, (count,), or None for a flow without classes."""
        if label is None and self.num_classes is None:
            return None
        num_classes = len(self._class_means())
        if label is None:
            return torch.arange(start_index, start_index + count, device=self.device) % num_classes
        if not 0 <= label < num_classes:
            raise UserError(
                f"label {label} is not one of the model's {num_classes} classes: "
                f"choose a number from 0 to {num_classes - 1}"
            )
        return torch.full((count,), label, device=self.device)

    @torch.no_grad()
    def decode_continuous(self, z: Tensor) -> Tensor:
        """Return x in [0, 1), before quantization and without noise, of latents (batch, D)."""
        return self._denoise(self._invert(z, None)[0], None)

    def _invert(self, z: Tensor, one_hot: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the points x of these latents and their log-density.

        It is log p(x | label) if the class conditions the networks, else log p(x).
        """
        x, log_det = self.bijection.inverse(z, self._condition(one_hot))
        return x, self._log_base(z, self._condition(one_hot)) - log_det

    def _denoise(self, x: Tensor, one_hot: Tensor | None) -> Tensor:
        if not isinstance(self.dequantizer, GaussianDequantizer):
            return x
        labels = None if one_hot is None else one_hot.argmax(1)
        return denoise(x, self.dequantizer.deviation, lambda y: self.log_density(y, labels))

    # Latents

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents of images, (batch, D) or (batch, D + num_classes).

        Without a generator x is the center of each bin, which is farthest from the neighboring
        bins, so that `decode` returns the same images.
        """
        x = self._dequantize(images, generator)[0] if generator else self._bin_centers(images)
        if not self.condition_networks:
            return self.bijection(x)[0]
        one_hot = self._one_hot(self.classify(images).argmax(1))
        return torch.cat((self.bijection(x, one_hot)[0], one_hot), 1)  # type: ignore[arg-type]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        z = latent[:, : self.dimensions]
        one_hot = latent[:, self.dimensions :].clamp(0, 1)
        return self._quantize(self.bijection.inverse(z, self._condition(one_hot))[0])

    def class_latents(self) -> Tensor:
        means = self._class_means()
        if not self.condition_networks:
            return means
        return torch.cat((means, torch.eye(len(means)).to(means)), 1)

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
        """Sample one image given its known part, by Hamiltonian Monte Carlo.

        Args:
            images: one image, (1, channels, height, width).
            known: a mask (channels, height, width) or a `LinearMeasurement`.
            sampler: "hmc".
            steps: gradients per chain.
            generator: random generator, or None for the global one.
        """
        check_choice(self.samplers, sampler=sampler)
        chains = self.inpainting_chains(images, known, NUM_CHAINS, steps or NUM_STEPS, generator)
        pixels = (chains.samples * self.bins).floor().clamp(0, self.bins - 1)
        deviation = pixels.std(0)
        if not isinstance(known, LinearMeasurement):
            deviation = deviation[~known.to(pixels.device)]
        log_prob = self.score(pixels.to(torch.uint8), generator=generator).mean().item()
        metrics = {
            "acceptance": chains.acceptance,
            "spread": deviation.mean().item() / (self.bins - 1),
            "bits_per_dim": -log_prob / (self.dimensions * math.log(2)),
        }
        brightness = pixels / (self.bins - 1)
        return InpaintingResult(brightness, brightness.mean(0), metrics)

    def inpainting_chains(
        self,
        images: Tensor,
        known: Observation,
        num_chains: int,
        num_steps: int,
        generator: torch.Generator | None = None,
    ) -> InpaintingChains:
        """Run chains that sample the unknown part of each image.

        Args:
            images: (batch, channels, height, width).
            known: a mask (channels, height, width) or a `LinearMeasurement`.
            num_chains: chains per image.
            num_steps: gradients per chain.
            generator: random generator, or None for the global one.
        """
        class_prior = None
        if self.means is not None:
            class_prior = ClassPrior(self.means, self.condition_networks, self.class_log_density)
        return sample_posterior(
            self.bijection,
            class_prior,
            images.to(self.dtype),
            known,
            self.bins,
            num_chains=num_chains,
            num_steps=num_steps,
            generator=generator,
            progress=self.progress,
        )

    # Helpers

    def _check_likelihood(self) -> None:
        if self.likelihood == "none":
            raise UserError(
                "this flow was trained on noisy images (model.dequantization=gaussian:...) and has "
                "no likelihood of images"
            )

    def _bits_per_dim(self, log_prob: Tensor) -> Tensor:
        return -log_prob / (self.dimensions * math.log(2))

    def _bin_centers(self, images: Tensor) -> Tensor:
        return (images + 0.5) / self.bins

    def _dequantize(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x in [0, 1), and log q(u) in nats, (batch,)."""
        noise, log_q = self.dequantizer(images, self.dtype, generator)
        return (images + noise) / self.bins, log_q

    def _quantize(self, x: Tensor) -> Tensor:
        return (x * self.bins).floor().nan_to_num(0.0).clamp(0, self.bins - 1).to(torch.uint8)

    def _one_hot(self, labels: Tensor | None) -> Tensor | None:
        """Return (batch, classes), or None without labels or without classes."""
        if labels is None or self.num_classes is None:
            return None
        return F.one_hot(labels, self.num_classes).to(self.dtype)

    def _condition(self, one_hot: Tensor | None) -> Tensor | None:
        return one_hot if self.condition_networks else None

    def _log_base(self, z: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """Return log p(z | class), or without a class its mean over the classes: (batch,)."""
        if self.means is None:
            return standard_normal_log_prob(z)
        if one_hot is None:
            return self._class_log_base(z).logsumexp(1) - math.log(len(self.means))
        return standard_normal_log_prob(z - one_hot @ self.means)

    def _class_log_base(self, z: Tensor) -> Tensor:
        return torch.stack([standard_normal_log_prob(z - mean) for mean in self._class_means()], 1)

    def _class_means(self) -> Tensor:
        if self.means is None:
            raise UserError(
                "this model has no classes: train one with model.num_classes=10 on data that has "
                "labels"
            )
        return self.means
