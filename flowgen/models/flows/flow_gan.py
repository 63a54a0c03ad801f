"""Flow-GAN: Grover, Dhar and Ermon, Maximum Likelihood and Adversarial Learning (1705.08868)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from flowgen.bijections.networks import RandomSource
from flowgen.models.flows.builders import split_shape
from flowgen.models.flows.glow import Glow
from flowgen.utils.errors import check_number, check_whole

FINAL_SIZE = 4  # pixels; the discriminator halves images until both sides are as small
SLOPE = 0.2  # of the leaky ReLU for negative numbers


class Discriminator(nn.Module):
    """A convolutional network without normalization that rates images, higher for real ones.

    Each convolution with stride 2 halves the image and doubles the channels, until it has at most
    4x4 pixels, where a linear layer computes the rating.

    Args:
        image_shape: (channels, height, width).
        width: Channels of the first convolution.

    Example:
        >>> Discriminator((3, 8, 8), width=4)(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5])
    """

    def __init__(self, image_shape: Sequence[int], width: int):
        super().__init__()
        channels, (height, width_pixels) = split_shape(image_shape)
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])
        while len(self.convolutions) < 2 or max(height, width_pixels) > FINAL_SIZE:
            self.convolutions.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
            width = 2 * width
            height = -(-height // 2)
            width_pixels = -(-width_pixels // 2)
        # Without a bias, because the loss contains only differences of ratings.
        self.linear = nn.Linear(width * height * width_pixels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the ratings (batch,) of images in [0, 1), (batch, channels, height, width)."""
        h = 2 * x - 1
        for convolution in self.convolutions:
            h = F.leaky_relu(convolution(h), SLOPE)
        return self.linear(h.flatten(1))[:, 0]


class FlowGAN(Glow):
    """A Glow trained by maximum likelihood and, at the same time, as the generator of a GAN.

    The flow draws points y = f^-1(z) of latents z ~ N(0, I), and the discriminator D compares them
    with dequantized images x. The loss is

        bits/dim + w (L_G + L_D),
        L_G = E softplus(D(x) - D(y)),
        L_D = E softplus(D(y) - D(x)) + g/2 E(|grad D(x)|^2 + |grad D(y)|^2).

    L_G changes only the flow and L_D only the discriminator, because the weights of D are constants
    in L_G, and y is one in L_D. Both players take a step at the same time, with one optimizer.

    Grover, Dhar and Ermon (1705.08868), section 3, add an adversarial loss to the likelihood of a
    flow. The loss of the game here is the relativistic one with gradient penalties of Huang et al.,
    The GAN Is Dead; Long Live the GAN! (2501.05441).

    The likelihood, the latents and the samples are those of the flow, without the discriminator,
    which does not see classes.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        adversarial_weight: The weight w; at 0 the model trains like a Glow.
        discriminator_width: Channels of the first convolution of the discriminator, see
            `Discriminator`.
        gradient_penalty: The weight g.
        levels: Number of levels of the flow, see `Glow`.
        steps_per_level: Steps of flow in each level, or a list with one number per level.
        width: Channels of the coupling networks.
        network: Network of the couplings: "conv", "resnet" or "gated".
        num_blocks: Blocks of network="resnet" or "gated".
        transform: "additive", "multiplicative", "affine", "spline" or "mixture".
        log_scale: How log-scales are bounded: "bounded", "sigmoid" or "tanh".
        convolution: Parameterization of the 1x1 convolutions: "plu" or "plain".
        split_prior: Prior of the factored-out half of a split: "predicted" or "standard".
        base: Base of the last latents: "standard" or "learned".
        final_actnorm: Add an ActNorm before the base.
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        dequantization: "uniform", "variational" or "gaussian:STD".
        num_classes: Number of classes of a class-conditional model, or None.
        condition_networks: With classes, make the class an input of all networks of the flow.

    Example:
        >>> model = FlowGAN(image_shape=(3, 8, 8), bits=5, levels=2, steps_per_level=1, width=8)
        >>> images = torch.randint(32, (16, 3, 8, 8), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model(images).backward()
        >>> model.log_prob(images).shape, model.sample(4)[0].shape
        (torch.Size([16]), torch.Size([4, 3, 8, 8]))
    """

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        adversarial_weight: float = 0.1,
        discriminator_width: int = 16,
        gradient_penalty: float = 1.0,
        levels: int | None = None,
        steps_per_level: int | list[int] = 8,
        width: int = 64,
        network: str = "conv",
        num_blocks: int = 1,
        transform: str = "affine",
        log_scale: str = "bounded",
        convolution: str = "plu",
        split_prior: str = "predicted",
        base: str = "standard",
        final_actnorm: bool = True,
        gaussianize: bool = True,
        dequantization: str = "uniform",
        num_classes: int | None = None,
        condition_networks: bool = True,
    ):
        check_number(adversarial_weight=adversarial_weight, gradient_penalty=gradient_penalty)
        check_whole(discriminator_width=discriminator_width)
        super().__init__(
            image_shape=image_shape,
            bits=bits,
            levels=levels,
            steps_per_level=steps_per_level,
            width=width,
            network=network,
            num_blocks=num_blocks,
            transform=transform,
            log_scale=log_scale,
            convolution=convolution,
            split_prior=split_prior,
            base=base,
            final_actnorm=final_actnorm,
            gaussianize=gaussianize,
            dequantization=dequantization,
            num_classes=num_classes,
            condition_networks=condition_networks,
        )
        self.adversarial_weight = adversarial_weight
        self.gradient_penalty = gradient_penalty
        self.discriminator = Discriminator(self.image_shape, discriminator_width)
        self.random_source = RandomSource()
        self.loss_metric = None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bits/dim plus the weighted losses of both players, a scalar."""
        bits_per_dim = super().forward(images, labels)
        if not self.adversarial_weight:
            return bits_per_dim
        with torch.no_grad():
            real, _ = self._dequantize(images)
        return bits_per_dim + self.adversarial_weight * self.adversarial_loss(
            real, self.draw_points(len(images), labels)
        )

    def draw_points(self, count: int, labels: Tensor | None = None) -> Tensor:
        """Draw points y (count, channels, height, width) with gradients for the flow.

        Args:
            count: Number of points.
            labels: Their classes (count,); None cycles through the classes, if the flow has any.
        """
        z = self.random_source(
            torch.randn, (count, self.dimensions), device=self.device, dtype=self.dtype
        )
        one_hot = self.one_hot(self.sample_labels(count, None, 0) if labels is None else labels)
        if one_hot is not None:
            z = z + one_hot @ self.means
        return self.bijection.inverse(z, self.network_condition(one_hot))[0]

    # The compiler cannot differentiate gradients. `torch.compiler.disable` would do the same as
    # this function, but importing it takes a second.
    @_disable_dynamo
    def adversarial_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return L_G + L_D, whose gradients are those of each player's own loss.

        Args:
            real: Dequantized images x, (batch, channels, height, width).
            fake: Points y of the flow, like `real`.
        """
        # In float32, because gradients of gradients are too coarse in bfloat16.
        with torch.autocast(real.device.type, enabled=False):
            weights = {
                name: weight.detach() for name, weight in self.discriminator.named_parameters()
            }
            real_rating, real_penalty = self._rate(real)
            fake_rating, fake_penalty = self._rate(fake)
            rating_for_flow = torch.func.functional_call(self.discriminator, weights, (fake,))
            generator_loss = F.softplus(real_rating.detach() - rating_for_flow).mean()
            discriminator_loss = F.softplus(fake_rating - real_rating).mean()
            penalty = self.gradient_penalty / 2 * (real_penalty + fake_penalty)
            return generator_loss + discriminator_loss + penalty

    @torch.enable_grad()
    def _rate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return D(x), (batch,), and the mean of |grad D(x)|^2, for constant points x."""
        x = x.detach().requires_grad_()
        rating = self.discriminator(x)
        (gradient,) = torch.autograd.grad(rating.sum(), x, create_graph=True)
        return rating, gradient.square().flatten(1).sum(1).mean()
