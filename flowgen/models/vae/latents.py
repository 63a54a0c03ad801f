"""Distributions of the latents of a variational autoencoder: posteriors and priors."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowgen.bijections.amortized import Amortized
from flowgen.bijections.autoregressive import MADE, Autoregressive
from flowgen.bijections.base import Bijection, Chain, Flip, standard_normal_log_prob
from flowgen.bijections.residual import Planar, Sylvester
from flowgen.bijections.univariate import Affine
from flowgen.models.flows.builders import dense_couplings
from flowgen.utils.errors import UserError, check_choice

POSTERIORS = ("gaussian", "planar", "sylvester", "iaf")
PRIORS = ("standard", "vamp", "flow")
SYLVESTER_WIDTH = 16  # orthogonal directions of each transform
PSEUDO_INPUT_NOISE = 0.01  # standard deviation; equal images get different pseudo-inputs

Encoder = Callable[[Tensor], "Encoding"]


class Encoding(NamedTuple):
    """Outputs of the encoder for each image.

    Attributes:
        mean: Means m of the Gaussian, (batch, latent_dim).
        log_std: Logarithms l of its standard deviations, (batch, latent_dim).
        context: Condition h of the flow of the posterior, (batch, context).
    """

    mean: Tensor
    log_std: Tensor
    context: Tensor

    def kl_from_standard_normal(self) -> Tensor:
        """Return KL(N(m, e^2l) || N(0, 1)) = (m^2 + e^2l - 1) / 2 - l of each latent, in nats.

        Kingma and Welling (1312.6114), appendix B.
        """
        return (self.mean.square() + (2 * self.log_std).exp() - 1) / 2 - self.log_std

    def repeat(self, count: int) -> "Encoding":
        """Return the encoding with each image `count` times in a row."""
        return Encoding(*(tensor.repeat_interleave(count, 0) for tensor in self))


class Posterior(nn.Module):
    """q(z | x): z = g(m + e^l eps; h) with eps ~ N(0, I), where the flow g depends on the image.

    log q(z | x) = log N(eps; 0, I) - sum l - log|det dg|. Rezende and Mohamed (1505.05770),
    section 3.

    Args:
        flow: Bijection g of vectors, whose condition is h. An empty chain gives a Gaussian.
    """

    def __init__(self, flow: Chain):
        super().__init__()
        self.flow = flow

    def forward(self, encoding: Encoding, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, (batch, latent_dim), and log q(z | x) in nats, (batch,), of the noise eps."""
        z, log_det = self.flow(
            torch.addcmul(encoding.mean, encoding.log_std.exp(), noise), encoding.context
        )
        return z, standard_normal_log_prob(noise) - encoding.log_std.sum(1) - log_det


def make_posterior(
    name: str, latent_dim: int, num_transforms: int, width: int, context: int
) -> Posterior:
    """Return a posterior whose flow starts as the identity.

    Args:
        name: "gaussian"; "planar" (Rezende and Mohamed, 1505.05770) or "sylvester" (van den Berg et
            al., 1803.05649), whose parameters are linear functions of the context; or "iaf", an
            inverse autoregressive flow (Kingma et al., 1606.04934), whose networks read it.
        latent_dim: Number of latents.
        num_transforms: Transforms of the flow.
        width: Hidden units of the networks of "iaf".
        context: Values of the context.
    """
    check_choice(POSTERIORS, posterior=name)

    def layers() -> Iterator[Bijection]:
        for _ in range(0 if name == "gaussian" else num_transforms):
            if name == "planar":
                yield Amortized(Planar(latent_dim), context)
            elif name == "sylvester":
                directions = min(SYLVESTER_WIDTH, latent_dim)
                yield Amortized(Sylvester(latent_dim, directions), context)
            else:
                transform = Affine()
                network = MADE(latent_dim, width, 1, transform.num_params, context)
                yield Autoregressive(network, transform)
                yield Flip()

    return Posterior(Chain(*layers()))


class FlowPrior(nn.Module):
    """log p(z) = log N(f(z); 0, I) + log|det df|.

    Args:
        flow: Bijection f. An empty chain gives a standard normal distribution.
    """

    def __init__(self, flow: Chain):
        super().__init__()
        self.flow = flow

    def log_prob(self, z: Tensor, encoder: Encoder) -> Tensor:
        """Return log p(z) in nats, (batch,), of z (batch, latent_dim); `encoder` is unused."""
        base, log_det = self.flow(z)
        return standard_normal_log_prob(base) + log_det

    def sample(
        self, noise: Tensor, encoder: Encoder, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the latents of noise (batch, latent_dim)."""
        return self.flow.inverse(noise)[0]

    def initialize(self, images_scaled: Tensor) -> None:
        """Do nothing, because no parameter starts from data."""


class VampPrior(nn.Module):
    """The mixture of the Gaussians of learned pseudo-inputs u_c, which are images.

    log p(z) = logsumexp_c log N(z; m(u_c), e^2l(u_c)) - log C. The best prior is the mean of
    q(z | x) over all images, which this mixture approximates. Tomczak and Welling, VAE with a
    VampPrior (1705.07120), section 3.

    Args:
        num_components: Number C of pseudo-inputs.
        image_shape: (channels, height, width).
    """

    def __init__(self, num_components: int, image_shape: tuple[int, int, int]):
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.zeros(num_components, *image_shape))

    def log_prob(self, z: Tensor, encoder: Encoder) -> Tensor:
        """Return log p(z) in nats, (batch,).

        Args:
            z: Latents (batch, latent_dim).
            encoder: The encoder of the VAE, which computes the Gaussians of the pseudo-inputs.
        """
        components = encoder(self.pseudo_inputs)
        noise = (z[:, None] - components.mean) * (-components.log_std).exp()
        log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)) - components.log_std
        return log_prob.sum(2).logsumexp(1) - math.log(len(self.pseudo_inputs))

    def sample(
        self, noise: Tensor, encoder: Encoder, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return latents (batch, latent_dim), each from a random component.

        Args:
            noise: Standard normal noise times the temperature, (batch, latent_dim).
            encoder: The encoder of the VAE.
            generator: Random generator of the components, or None for the global one.
        """
        components = encoder(self.pseudo_inputs)
        choice = torch.randint(
            len(self.pseudo_inputs), noise.shape[:1], generator=generator, device=noise.device
        )
        return torch.addcmul(components.mean[choice], components.log_std[choice].exp(), noise)

    def initialize(self, images_scaled: Tensor) -> None:
        """Start from images, (batch, channels, height, width), with a little noise."""
        index = torch.arange(len(self.pseudo_inputs), device=images_scaled.device)
        start = images_scaled[index % len(images_scaled)]
        self.pseudo_inputs.copy_(start + PSEUDO_INPUT_NOISE * torch.randn_like(start))


def make_prior(
    name: str,
    latent_dim: int,
    num_transforms: int,
    width: int,
    num_pseudo_inputs: int,
    image_shape: tuple[int, int, int],
) -> FlowPrior | VampPrior:
    """Return a prior: "standard", "vamp", or "flow", a chain of affine couplings of vectors.

    Args:
        name: Name of the prior.
        latent_dim: Number of latents.
        num_transforms: Couplings of the flow.
        width: Hidden units of their networks.
        num_pseudo_inputs: Components of the VampPrior.
        image_shape: (channels, height, width).
    """
    check_choice(PRIORS, prior=name)
    if name == "vamp":
        return VampPrior(num_pseudo_inputs, image_shape)
    if name == "standard":
        return FlowPrior(Chain())
    if latent_dim < 2:
        raise UserError("prior=flow needs latent_dim of at least 2: a coupling has two halves")
    return FlowPrior(Chain(*dense_couplings(latent_dim, num_transforms, width, 1, Affine())))
