"""Variational autoencoders: Kingma and Welling (1312.6114)."""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flowgen.bijections.networks import RandomSource
from flowgen.models.base import QUICK_EVAL, EvalConfig
from flowgen.models.likelihood import LikelihoodModel
from flowgen.models.logistic_mixture import (
    LogisticMixture,
    initial_parameters,
    num_parameters,
    scale_values,
)
from flowgen.models.pixelcnn.networks import PixelCNNNetwork
from flowgen.models.shapes import MAX_DEPTH
from flowgen.models.vae.latents import Encoding, make_posterior, make_prior
from flowgen.models.vae.networks import conv_decoder, conv_encoder, set_output_bias
from flowgen.utils.distributed import all_reduce_sum, evaluate_sharded, rank_and_size
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.metrics import BITS_PER_DIM, Likelihood, Metric, Metrics, MetricValue

DECODERS = ("factorized", "pixelcnn")
ACTIVE_VARIANCE = 0.01  # the mean of an active latent has a larger variance over images
RECONSTRUCTION = Metric("reconstruction", "nats", higher_is_better=True)
KL = Metric("kl", "nats")
ACTIVE_UNITS = Metric("active_units", "latents")


class Terms(NamedTuple):
    """Terms of log w(x, z) = log p(x | z) + log p(z) - log q(z | x) in nats.

    Attributes:
        reconstruction: log p(x | z), (batch, samples).
        log_prior: log p(z), (batch, samples).
        log_posterior: log q(z | x), (batch, samples).
    """

    reconstruction: Tensor
    log_prior: Tensor
    log_posterior: Tensor

    @property
    def kl(self) -> Tensor:
        """log q(z | x) - log p(z), whose mean over z is the KL divergence."""
        return self.log_posterior - self.log_prior


class VAE(LikelihoodModel):
    """Variational autoencoder: latents z with prior p(z), and a decoder p(x | z) of pixel values.

    The encoder computes an approximate posterior q(z | x). If z is drawn from it, the mean of w =
    p(x | z) p(z) / q(z | x) is P(x). The mean of log w is therefore a lower bound of log P(x), and
    the logarithm of the mean of w over several samples is a tighter one: Burda, Grosse and
    Salakhutdinov (1509.00519). The decoder is a distribution of pixel values, a mixture of
    discretized logistics, so P(x) is the probability of an image.

    The training loss is -E[log p(x | z)] + beta KL(q(z | x) || p(z)), in bits per dimension.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        latent_dim: Number of latents.
        width: Channels of the convolutions of the encoder and the decoder at half the resolution of
            the images; hidden units of the networks of flows.
        num_blocks: Residual blocks at each resolution.
        num_components: Logistics in the mixture of each pixel.
        posterior: "gaussian", or its transformation by a flow that depends on the image: "planar",
            "sylvester" or "iaf".
        prior: "standard"; "vamp", a mixture of the Gaussians of learned pseudo-inputs; or "flow".
        num_transforms: Transforms of the flow of the posterior, and couplings of that of the prior.
        num_pseudo_inputs: Components of prior="vamp".
        decoder: "factorized": pixels are independent given z. "pixelcnn": each pixel also depends
            on the pixels before it (PixelVAE, 1611.05013).
        pixelcnn_layers: Layers of decoder="pixelcnn".
        beta: Weight of the KL divergence, 1 for the bound (beta-VAE).
        free_bits: The KL divergence of a latent, averaged over the batch, costs at least this many
            nats, so that removing its information gains nothing: Kingma et al. (1606.04934). The
            free bits of all latents apply to their sum unless the posterior is Gaussian and the
            prior standard.
        warmup_images: Training images over which the weight of the KL divergence rises from 0 to
            beta.
        train_importance_samples: Samples of z per image in training. With more than one, the loss
            is that of an importance-weighted autoencoder (1509.00519).

    Attributes:
        images_seen: Number of training images so far, a buffer.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = VAE(image_shape=(1, 4, 4), bits=5, latent_dim=2, width=8)
        >>> images = torch.randint(32, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model.score(images, num_importance_samples=8).shape, model.encode(images).shape
        (torch.Size([16]), torch.Size([16, 2]))
    """

    likelihood: Likelihood = "bound"
    restores_images: ClassVar[bool] = False

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        latent_dim: int = 32,
        width: int = 32,
        num_blocks: int = 1,
        num_components: int = 5,
        posterior: str = "gaussian",
        prior: str = "standard",
        num_transforms: int = 4,
        num_pseudo_inputs: int = 50,
        decoder: str = "factorized",
        pixelcnn_layers: int = 3,
        beta: float = 1.0,
        free_bits: float = 0.0,
        warmup_images: int = 0,
        train_importance_samples: int = 1,
    ):
        super().__init__(image_shape, bits)
        check_whole(
            latent_dim=latent_dim,
            width=width,
            num_components=num_components,
            num_pseudo_inputs=num_pseudo_inputs,
            train_importance_samples=train_importance_samples,
        )
        check_whole(high=MAX_DEPTH, num_transforms=num_transforms, pixelcnn_layers=pixelcnn_layers)
        check_whole(low=0, high=MAX_DEPTH, num_blocks=num_blocks)
        check_whole(low=0, warmup_images=warmup_images)
        check_number(beta=beta, free_bits=free_bits)
        check_choice(DECODERS, decoder=decoder)
        if free_bits and train_importance_samples > 1:
            raise UserError(
                "free_bits needs the KL divergence of each latent: set "
                "model.train_importance_samples=1, or model.free_bits=0"
            )
        self.latent_dim = latent_dim
        self.num_components = num_components
        self.beta = beta
        self.free_bits = free_bits
        self.warmup_images = warmup_images
        self.train_importance_samples = train_importance_samples
        context = 0 if posterior == "gaussian" else width
        self.encoder = conv_encoder(self.image_shape, width, num_blocks, 2 * latent_dim + context)
        self.posterior = make_posterior(posterior, latent_dim, num_transforms, width, context)
        self.prior = make_prior(
            prior, latent_dim, num_transforms, width, num_pseudo_inputs, self.image_shape
        )
        self.has_analytic_kl = posterior == "gaussian" and prior == "standard"
        outputs = num_parameters(self.image_shape[0], num_components)
        self.decoder = conv_decoder(
            self.image_shape,
            width,
            num_blocks,
            latent_dim,
            outputs if decoder == "factorized" else width,
        )
        self.pixelcnn = (
            PixelCNNNetwork(self.image_shape[0], bits, width, pixelcnn_layers, outputs, width)
            if decoder == "pixelcnn"
            else None
        )
        self.random_source = RandomSource()
        self.images_seen = nn.Buffer(torch.zeros((), dtype=torch.long))
        is_plain_bound = beta == 1 and not free_bits and not warmup_images
        if is_plain_bound and train_importance_samples == 1:
            self.loss_metric = BITS_PER_DIM

    # Training

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the training loss in bits/dim, a scalar."""
        encoding = self._encode(self._scale(images))
        samples = self.train_importance_samples
        noise = self._latent_noise(images, samples)
        terms = self._terms(images, encoding, noise)
        weight = self._kl_weight(images)
        if samples > 1:
            log_w = terms.reconstruction - weight * terms.kl
            bound = (log_w.logsumexp(1) - math.log(samples)).mean()
        else:
            kl = encoding.kl_from_standard_normal() if self.has_analytic_kl else terms.kl
            bound = terms.reconstruction.mean() - weight * self._with_free_bits(kl)
        return self.bits_per_dim(bound)

    def _kl_weight(self, images: Tensor) -> Tensor | float:
        """Return the weight of the KL divergence, and count the images in training."""
        weight: Tensor | float = self.beta
        if self.warmup_images:
            weight = self.beta * (self.images_seen / self.warmup_images).clamp(max=1)
        if self.training:
            _, num_processes = rank_and_size()
            self.images_seen.add_(num_processes * len(images))
        return weight

    def _with_free_bits(self, kl: Tensor) -> Tensor:
        """Return the mean over the batch of the KL divergence, at least the free bits, a scalar.

        Args:
            kl: KL divergence of each latent, or of all together, (batch, latents).
        """
        if not self.free_bits:
            return kl.sum(1).mean()
        _, num_processes = rank_and_size()
        mean = all_reduce_sum(kl.sum(0)) / (num_processes * len(kl))
        latents_per_column = self.latent_dim / len(mean)
        return mean.clamp(min=self.free_bits * latents_per_column).sum()

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Start the networks from data, and the decoder at the marginal distribution of values."""
        scaled = self._scale(images)
        self.encoder.initialize(scaled)
        self.prior.initialize(scaled)
        encoding = self._encode(scaled)
        z, _ = self.posterior(encoding, self._latent_noise(images, 1).flatten(0, 1))
        self.decoder.initialize(z)
        parameters = initial_parameters(
            scale_values(images, self.bins, torch.float32), self.num_components, self.bits
        )
        if self.pixelcnn is None:
            set_output_bias(self.decoder, parameters)
        else:
            self.pixelcnn.out.bias.copy_(parameters)  # type: ignore[union-attr]

    # Likelihood

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return log w = log p(x | z) + log p(z) - log q(z | x) in nats, (batch,), for one z.

        Args:
            images: (batch, channels, height, width).
            generator: Source of the noise of z.
            labels: Unused, because the model has no classes.
        """
        encoding = self._encode(self._scale(images))
        terms = self._terms(images, encoding, self.draw_noise(images, generator))
        return (terms.reconstruction - terms.kl)[:, 0]

    def draw_noise(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._latent_noise(images, 1, generator)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the bits/dim, the two terms of the bound with one sample, and the active units.

        - reconstruction: mean log p(x | z) over images and z, in nats.
        - kl: mean KL divergence of the posterior and the prior, in nats.
        - active_units: number of latents whose center, as in `encode`, has a variance over the
          images of more than 0.01: Burda et al. (1509.00519), where the center is the mean.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        samples = eval_config.num_importance_samples

        def terms_and_latents(images: Tensor) -> Tensor:
            encoding = self._encode(self._scale(images))
            draws = [
                self._terms(images, encoding, self.draw_noise(images, generator))
                for _ in range(samples)
            ]
            terms = Terms(*(torch.cat(tensors, 1) for tensors in zip(*draws, strict=True)))
            bound = (terms.reconstruction - terms.kl).logsumexp(1) - math.log(samples)
            means = (terms.reconstruction.mean(1), terms.kl.mean(1))
            latents, _ = self.posterior(encoding, torch.zeros_like(encoding.mean))
            return torch.cat((torch.stack((self.bits_per_dim(bound), *means), 1), latents), 1)

        def skip_noise(images: Tensor) -> None:
            for _ in range(samples):
                self.draw_noise(images, generator)

        values = evaluate_sharded(batches, terms_and_latents, skip_noise, 3 + self.latent_dim)
        bits_per_dim, reconstruction, kl = values[:, :3].unbind(1)
        variance = values[:, 3:].var(0, correction=0)
        active_units = int((variance > ACTIVE_VARIANCE).sum())
        return self.likelihood_metrics(bits_per_dim, samples) | Metrics.of(
            MetricValue(RECONSTRUCTION, reconstruction.mean().item()),
            MetricValue(KL, kl.mean().item()),
            MetricValue(ACTIVE_UNITS, active_units),
        )

    # Sampling and latents

    @torch.no_grad()
    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw images, and return them with log w of one sample of z in nats, (count,).

        Args:
            count: Number of images.
            temperature: Standard deviation of the noise of the latents, and of the normal variables
                whose quantiles are the pixel values; at 0 these are medians.
            generator: Random generator, or None for the global one.
        """

        def noise(*shape: int) -> Tensor:
            return temperature * torch.randn(
                count, *shape, generator=generator, device=self.device, dtype=self.dtype
            )

        z = self.prior.sample(noise(self.latent_dim), self._encode, generator)
        u = torch.special.ndtr(noise(*self.image_shape).double())
        images = self._decode(z, u)
        return images, self.log_prob(images, generator)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return latents (batch, latent_dim): draws of q(z | x), or without a generator its center.

        The center is the posterior mean, or its image under the flow of the posterior.

        Args:
            images: (batch, channels, height, width).
            generator: Source of the noise of the latents, or None.
        """
        encoding = self._encode(self._scale(images))
        if generator is None:
            noise = torch.zeros_like(encoding.mean)
        else:
            noise = self.draw_noise(images, generator)[:, 0]
        return self.posterior(encoding, noise)[0]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the median of p(x | z) for each pixel, (batch, channels, height, width)."""
        u = torch.full((len(latent), *self.image_shape), 0.5, device=latent.device)
        return self._decode(latent, u)

    # Helpers

    def _scale(self, images: Tensor) -> Tensor:
        return scale_values(images, self.bins, self.dtype)

    def _latent_noise(
        self, images: Tensor, samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the noise eps of the latents, (batch, samples, latent_dim)."""
        shape = (len(images), samples, self.latent_dim)
        return self.random_source(
            torch.randn, shape, generator, device=images.device, dtype=self.dtype
        )

    def _encode(self, images_scaled: Tensor) -> Encoding:
        outputs = self.encoder(images_scaled).to(self.dtype)
        return Encoding(*outputs.tensor_split([self.latent_dim, 2 * self.latent_dim], 1))

    def _terms(self, images: Tensor, encoding: Encoding, noise: Tensor) -> Terms:
        """Return the terms of log w for noise (batch, samples, latent_dim)."""
        samples = noise.shape[1]
        if samples > 1:
            images = images.repeat_interleave(samples, 0)
            encoding = encoding.repeat(samples)
        z, log_posterior = self.posterior(encoding, noise.flatten(0, 1))
        mixture = self._mixture(self.decoder(z), images)
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = mixture.log_prob(images).flatten(1).sum(1)
        terms = (reconstruction, self.prior.log_prob(z, self._encode), log_posterior)
        return Terms(*(term.view(-1, samples) for term in terms))

    def _mixture(self, features: Tensor, images: Tensor) -> LogisticMixture:
        """Return p(x | z) of each pixel.

        Args:
            features: Outputs of the decoder.
            images: The images x; only the PixelCNN reads them.
        """
        if self.pixelcnn is not None:
            features = self.pixelcnn(images, features)
        return LogisticMixture(features, self.image_shape[0], self.bits)

    def _decode(self, z: Tensor, u: Tensor) -> Tensor:
        """Return the quantiles of p(x | z) at u, numbers in [0, 1) like the images.

        The PixelCNN repeats this for all pixels in parallel until no pixel changes; after n
        repetitions at least the first n pixels are final.
        """
        features = self.decoder(z)
        images = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)
        _, height, width = self.image_shape
        for _ in range(1 if self.pixelcnn is None else height * width):
            updated = self._mixture(features, images).quantile(u)
            if torch.equal(updated, images):
                break
            images = updated
        return images
