"""Flow-GAN: Grover, Dhar and Ermon, Maximum Likelihood and Adversarial Learning (1705.08868)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgen.bijections.networks import RandomSource
from flowgen.models.flows.glow import Glow
from flowgen.models.gan import Discriminator, adversarial_losses
from flowgen.utils.errors import check_number, check_whole


class FlowGAN(Glow):
    """A Glow trained by maximum likelihood and, at the same time, as the generator of a GAN.

    The flow draws points y = f^-1(z) of latents z ~ N(0, I), and the discriminator D compares them
    with dequantized images x. The loss is

        bits/dim + w (L_G + L_D),
        L_G = E softplus(D(x) - D(y)),
        L_D = E softplus(D(y) - D(x)) + g/2 E(|grad D(x)|^2 + |grad D(y)|^2).

    L_G changes only the flow and L_D only the discriminator, see `adversarial_losses` in
    flowgen.models.gan. Both players take a step at the same time, with one optimizer.

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
            `flowgen.models.gan.Discriminator`.
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
        generator_loss, discriminator_loss = adversarial_losses(
            self.discriminator,
            real,
            self.draw_points(len(images), labels),
            loss="r3gan",
            gradient_penalty=self.gradient_penalty,
            random_source=self.random_source,
        )
        return bits_per_dim + self.adversarial_weight * (generator_loss + discriminator_loss)

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
