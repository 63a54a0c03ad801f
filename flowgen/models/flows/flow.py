"""Normalizing flows of images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection
from flowgen.bijections.elementwise import EmpiricalCDF, Logit
from flowgen.bijections.networks import batch_norm_layers
from flowgen.models.base import (
    ClassConditional,
    InpaintingResult,
    LinearMeasurement,
    Observation,
    SupportsCompression,
    SupportsInpainting,
)
from flowgen.models.flows.density import FlowDensity
from flowgen.models.flows.dequantization import (
    GaussianDequantizer,
    denoise,
    gaussian_std,
    make_dequantizer,
)
from flowgen.models.flows.inpainting import (
    NUM_CHAINS,
    NUM_STEPS,
    InpaintingChains,
    sample_posterior,
)
from flowgen.utils.errors import UserError, check_choice
from flowgen.utils.metrics import (
    CONDITIONAL_LOG_PROB,
    EFFECTIVE_SAMPLE_SIZE,
    NOISY_BITS_PER_DIM,
    Likelihood,
    Metrics,
    MetricValue,
)

# With a smaller effective size of the 40 chains, the standard error is itself unreliable.
MIN_EFFECTIVE_SIZE = 8


class Flow(FlowDensity, ClassConditional, SupportsInpainting, SupportsCompression):
    """A normalizing flow: a bijection from dequantized images to latents with base N(0, I).

    Dequantized images are x = (images + u) / 2^bits in [0, 1], where the dequantizer draws the
    noise u. Latents are vectors (batch, D), where D is the product of `image_shape`. The likelihood
    is a lower bound. It is tighter if p(x) / q(u) is averaged over several importance samples of u:
    Burda et al. (1509.00519).

    With `num_classes`, the latents of class y are distributed as N(means[y], I). All classes have
    the same prior probability, so p(x) is the mean of p(x | y) over the classes y, and `classify`
    applies Bayes' rule: Izmailov et al. (1912.13025), section 3. With `condition_networks`, the
    class, one-hot, is also the condition of all networks in the bijection. The latents of `encode`
    then end with it: (batch, D + num_classes).

    With Gaussian noise, the flow models noisy images. It has no likelihood of images, and its
    samples are denoised.

    Args:
        bijection: Maps images (batch, channels, height, width) to vectors (batch, D).
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        dequantization: "uniform", "variational" (a learned flow, as in Flow++) or "gaussian:STD".
        num_classes: Number of classes, or None.
        condition_networks: With classes, make the class the condition of the bijection.

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
    samplers: ClassVar[tuple[str, ...]] = ("hmc",)
    # `coding.layers` has a rule for every bijection, which inverts it up to rounding.
    is_compressible: ClassVar[bool] = True

    def __init__(
        self,
        bijection: Bijection,
        image_shape: Sequence[int],
        bits: int,
        dequantization: str = "uniform",
        num_classes: int | None = None,
        condition_networks: bool = False,
    ):
        dequantizer = make_dequantizer(dequantization, image_shape, bits)
        super().__init__(bijection, image_shape, bits, num_classes, condition_networks)
        self.dequantizer = dequantizer
        if isinstance(dequantizer, GaussianDequantizer):
            # Gaussian noise moves points out of [0, 1), where these bijections are not defined.
            if any(isinstance(part, EmpiricalCDF | Logit) for part in bijection.modules()):
                raise UserError(
                    "model.dequantization=gaussian:... needs model.gaussianize=false, "
                    "and does not work with model=realnvp"
                )
            self.likelihood = "none"
            self.metric = NOISY_BITS_PER_DIM
            self.averages_log_probs = True
        # The loss of a flow with classes is that of p(x | y) instead of p(x). With batch
        # normalization, the loss depends on the other images of the batch.
        if num_classes is None and not batch_norm_layers(bijection):
            self.loss_metric = self.metric

    @classmethod
    def supports(cls, capability: type, arguments: Mapping[str, Any]) -> bool:
        is_noisy = gaussian_std(arguments.get("dequantization")) is not None
        if capability is SupportsInpainting:
            return not is_noisy
        if capability is SupportsCompression:
            return cls.is_compressible and not is_noisy
        return super().supports(capability, arguments)

    # Training and likelihood

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bits/dim of a batch, with one sample of the noise per image."""
        return self.bits_per_dim(self.log_prob(images, labels=labels)).mean()

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.dequantizer.initialize(images, self.dtype)
        if labels is None and self.num_classes is not None:
            labels = torch.arange(len(images), device=images.device) % self.num_classes
        self.bijection.initialize(
            self._dequantize(images)[0], self.network_condition(self.one_hot(labels))
        )

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return log p(x) - log q(u) - D log 2^bits in nats, (batch,), for one noise sample u.

        Its mean over u is a lower bound of the log-probability of the images. Theis, van den Oord
        and Bethge (1511.01844), section 3.1; Flow++ (1902.00275), section 3.1.

        Args:
            images: (batch, channels, height, width).
            generator: Source of the noise.
            labels: Classes (batch,), which select p(x | labels); None selects p(x).
        """
        x, log_q = self._dequantize(images, generator)
        return self.log_density(x, labels) - log_q - self.dimensions * math.log(self.bins)

    def draw_noise(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.dequantizer.draw_noise(images, self.dtype, generator)

    @torch.no_grad()
    def statistics(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return log p(x) as `log_prob`, and its terms, see `FlowDensity.log_density_terms`."""
        self.check_likelihood()
        x, log_q = self._dequantize(images, generator)
        log_density, terms = self.log_density_terms(x)
        return {"log_prob": log_density - log_q - self.dimensions * math.log(self.bins), **terms}

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return log p(y | x), (batch, classes), under a uniform prior over the classes."""
        self.check_classes()
        return self.class_log_density((images + 0.5) / self.bins).log_softmax(1)

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw images, and return them with the log-density of their points in nats, (count,).

        It is log p(x | label) if the class conditions the networks, else log p(x), and None for a
        flow of images with noise, which has no likelihood of images.

        Args:
            count: Number of images.
            temperature: Standard deviation of every latent around its mean.
            generator: Random generator, or None for the global one.
            label: The class; None cycles through the classes, if the flow has any.
            start_index: Index of the first image in this cycle.
        """
        z = temperature * torch.randn(
            count, self.dimensions, generator=generator, device=self.device, dtype=self.dtype
        )
        labels = self.sample_labels(count, label, start_index)
        one_hot = self.one_hot(labels)
        if one_hot is not None:
            z = z + one_hot @ self.means
        x, log_density = self._invert(z, one_hot)
        images = self._quantize(self._denoise(x, labels))
        if self.likelihood == "none":
            return images, None
        return images, log_density - self.dimensions * math.log(self.bins)

    @torch.no_grad()
    def decode_continuous(self, z: Tensor) -> Tensor:
        """Return x in [0, 1), before quantization and without noise, of latents (batch, D)."""
        return self._denoise(self.bijection.inverse(z)[0], None)

    def _invert(self, z: Tensor, one_hot: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the points x of these latents and their log-density.

        It is log p(x | label) if the class conditions the networks, else log p(x).
        """
        x, log_det = self.bijection.inverse(z, self.network_condition(one_hot))
        return x, self.log_base(z, self.network_condition(one_hot)) - log_det

    def _denoise(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if not isinstance(self.dequantizer, GaussianDequantizer):
            return x
        return denoise(x, self.dequantizer.std, lambda y: self.log_density(y, labels))

    # Latents

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents of images, (batch, D) or (batch, D + num_classes).

        Args:
            images: (batch, channels, height, width).
            generator: Source of the dequantization noise. None uses bin centers, so that `decode`
                inverts `encode` exactly.
        """
        x = self._dequantize(images, generator)[0] if generator else (images + 0.5) / self.bins
        if not self.condition_networks:
            return self.bijection(x)[0]
        one_hot = self.one_hot(self.classify(images).argmax(1))
        return torch.cat((self.bijection(x, one_hot)[0], one_hot), 1)  # type: ignore[arg-type]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of latents (batch, D) or, with the class, (batch, D + num_classes)."""
        # Sums of latents can move the one-hot class out of [0, 1], where the networks are trained.
        z, one_hot = latent.tensor_split([self.dimensions], 1)
        return self._quantize(
            self.bijection.inverse(z, self.network_condition(one_hot.clamp(0, 1)))[0]
        )

    def class_latents(self) -> Tensor:
        self.check_classes()
        if not self.condition_networks:
            return self.means
        return torch.cat((self.means, torch.eye(len(self.means)).to(self.means)), 1)

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
            images: One image, (1, channels, height, width).
            known: A mask (channels, height, width) or a `LinearMeasurement`.
            sampler: "hmc".
            steps: Gradients per chain.
            generator: Random generator, or None for the global one.
        """
        check_choice(self.samplers, sampler=sampler)
        chains = self.inpainting_chains(images, known, NUM_CHAINS, steps or NUM_STEPS, generator)
        pixels = self._quantize(chains.samples)
        unknown = slice(None) if isinstance(known, LinearMeasurement) else ~known.to(pixels.device)
        log_prob = self.score(pixels, generator=generator).mean()
        brightness = pixels / (self.bins - 1)
        metrics = {
            "acceptance": chains.acceptance,
            "std": brightness.std(0)[unknown].mean().item(),
            "bits_per_dim": self.bits_per_dim(log_prob).item(),
        }
        std = brightness.std(0, correction=0)
        return InpaintingResult(brightness, brightness.mean(0), std, metrics)

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
            known: A mask (channels, height, width) or a `LinearMeasurement`.
            num_chains: Chains per image.
            num_steps: Gradients per chain.
            generator: Random generator, or None for the global one.
        """
        return sample_posterior(
            self, images.to(self.dtype), known, num_chains, num_steps, generator
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
        """Return log P(unknown | known) = log P(image) - log P(known).

        Both are estimated by annealed importance sampling, see `marginal.log_marginal`, so that
        the value is no bound.

        Args:
            images: One image, (1, channels, height, width).
            known: Mask of the known pixels, (channels, height, width).
            steps: Inverse temperatures.
            generator: Random generator, or None for the global one.

        Raises:
            UserError: If few chains dominate the estimate.
        """
        from flowgen.models.flows import marginal  # few commands need it

        steps = steps or marginal.NUM_STEPS
        num_chains = len(self.means) * marginal.chains_per_class(len(self.means))
        images = images.to(self.device, self.dtype)
        known = known.to(self.device)
        image, part = (
            marginal.log_marginal(self, images, mask, steps, generator)
            for mask in (torch.ones_like(known), known)
        )
        effective_size = min(image.effective_sample_size, part.effective_sample_size)
        # Also true of NaN
        if not effective_size >= MIN_EFFECTIVE_SIZE:
            raise UserError(
                f"log P(unknown | known) cannot be estimated reliably with {steps} steps, because "
                f"the effective sample size is only {effective_size:.1f}: increase --steps"
            )
        log_prob = MetricValue(
            CONDITIONAL_LOG_PROB,
            image.log_mean - part.log_mean,
            math.hypot(image.error, part.error),
            likelihood="estimate",
        )
        return Metrics.of(
            log_prob,
            MetricValue(EFFECTIVE_SAMPLE_SIZE, effective_size),
            method=f"annealed importance sampling in {steps} steps of {num_chains} chains",
        )

    # Helpers

    def check_likelihood(self) -> None:
        if self.likelihood == "none":
            raise UserError(
                "this flow was trained on noisy images (model.dequantization=gaussian:...) and has "
                "no likelihood of images: choose another run with --run (`flowgen runs` lists them)"
            )

    def _dequantize(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x in [0, 1], and log q(u) in nats, (batch,)."""
        noise, log_q = self.dequantizer(images, self.dtype, generator)
        return (images + noise) / self.bins, log_q

    def _quantize(self, x: Tensor) -> Tensor:
        return (x * self.bins).floor().nan_to_num(0.0).clamp(0, self.bins - 1).to(torch.uint8)
