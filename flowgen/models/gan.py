"""GAN: Goodfellow et al., Generative Adversarial Nets (1406.2661), with three losses."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from flowgen.bijections.networks import RandomSource
from flowgen.models.base import (
    NO_LIKELIHOOD,
    QUICK_EVAL,
    SAMPLE_BATCH_SIZE,
    ClassConditional,
    EvalConfig,
)
from flowgen.models.shapes import Resolution, split_shape
from flowgen.utils.distributed import evaluate_sharded
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.frechet import PrincipalComponents, frechet_distance
from flowgen.utils.metrics import FRECHET, Likelihood, Metric, Metrics, MetricValue

GRADIENT_PENALTIES = {"nonsaturating": 0.0, "wgan_gp": 10.0, "r3gan": 0.05}  # default by loss
FINAL_SIZE = 4  # pixels; images are halved until both sides are as small
SLOPE = 0.2  # of the leaky ReLU for negative numbers
EPSILON = 1e-8  # avoids a division by zero
COMPONENT_IMAGES = 5000  # at most as many images determine the principal components
NO_ENCODER = (
    "a GAN draws images, but cannot find the latents of an image: choose a run of another model "
    "with --run (`flowgen runs` lists them)"
)


def halved_sizes(size: Resolution) -> list[Resolution]:
    """Return the sizes of an image that is halved, at least once, until it has at most 4x4 pixels.

    Sizes are (height, width), rounded up.

    Example:
        >>> halved_sizes((28, 20))
        [(28, 20), (14, 10), (7, 5), (4, 3)]
    """
    sizes = [size]
    while len(sizes) < 2 or max(sizes[-1]) > FINAL_SIZE:
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


class Discriminator(nn.Module):
    """A convolutional network without normalization, whose logits are higher for real images.

    Each convolution with stride 2 halves the image and doubles the channels, until it has at most
    4x4 pixels, where a linear function of the features h computes the logit. With classes y, it
    has weights w + v_y: D(x, y) = (w + v_y)^T h(x). Miyato and Koyama, cGANs with Projection
    Discriminator (1802.05637), section 3.

    Args:
        image_shape: (channels, height, width).
        width: Channels of the first convolution.
        num_classes: Number of classes, or None.

    Example:
        >>> Discriminator((3, 8, 8), width=4)(torch.rand(5, 3, 8, 8)).shape
        torch.Size([5])
    """

    def __init__(self, image_shape: Sequence[int], width: int, num_classes: int | None = None):
        super().__init__()
        channels, size = split_shape(image_shape)
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1)])
        *_, (height, width_pixels) = sizes = halved_sizes(size)
        for _ in sizes[1:]:
            self.convolutions.append(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1))
            width = 2 * width
        features = width * height * width_pixels
        # Without a bias, because losses contain differences of logits.
        self.linear = nn.Linear(features, 1, bias=False)
        self.projection = nn.Linear(features, num_classes, bias=False) if num_classes else None

    def forward(self, x: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """Return the logits of images, (batch,).

        Args:
            x: Images in [0, 1], (batch, channels, height, width).
            one_hot: Their classes, (batch, classes), or None.
        """
        h = 2 * x - 1
        for convolution in self.convolutions:
            h = F.leaky_relu(convolution(h), SLOPE)
        h = h.flatten(1)
        logit = self.linear(h)[:, 0]
        if self.projection is None or one_hot is None:
            return logit
        return logit + (self.projection(h) * one_hot).sum(1)


class Generator(nn.Module):
    """A convolutional network that maps latents to images.

    A linear layer computes channels of at most 4x4 pixels. Each block then doubles the size
    (nearest neighbor), halves the channels with a convolution, and normalizes the channels of each
    pixel to unit mean square (Karras et al., Progressive Growing of GANs, 1710.10196, section 4.2).

    Args:
        image_shape: (channels, height, width).
        latent_dim: Number of inputs.
        width: Channels at the full size.

    Example:
        >>> Generator((3, 8, 8), latent_dim=5, width=4)(torch.randn(2, 5)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, width: int):
        super().__init__()
        channels, size = split_shape(image_shape)
        *self.sizes, (height, width_pixels) = halved_sizes(size)
        self.sizes.reverse()
        hidden = width * 2 ** len(self.sizes)
        self.first = nn.Sequential(
            nn.Linear(latent_dim, hidden * height * width_pixels),
            nn.Unflatten(1, (hidden, height, width_pixels)),
        )
        self.convolutions = nn.ModuleList()
        for _ in self.sizes:
            self.convolutions.append(nn.Conv2d(hidden, hidden // 2, 3, padding=1))
            hidden = hidden // 2
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Return images in [0, 1] (batch, channels, height, width) of latents (batch, latent)."""
        h = _activate(self.first(latent))
        for size, convolution in zip(self.sizes, self.convolutions, strict=True):
            h = _activate(convolution(F.interpolate(h, size)))
        return self.last(h).to(latent.dtype).sigmoid()


def _activate(h: Tensor) -> Tensor:
    """Apply a leaky ReLU, and normalize the channels of each pixel to unit mean square."""
    h = F.leaky_relu(h, SLOPE)
    return h * (h.square().mean(1, keepdim=True) + EPSILON).rsqrt()


# The compiler cannot differentiate gradients. `torch.compiler.disable` would do the same as this
# function, but importing it takes a second.
@_disable_dynamo
def adversarial_losses(
    discriminator: Discriminator,
    real: Tensor,
    fake: Tensor,
    one_hot: Tensor | None = None,
    *,
    loss: str,
    gradient_penalty: float,
    random_source: RandomSource,
) -> tuple[Tensor, Tensor]:
    """Return the losses of the generator and of the discriminator, two scalars.

    For real images x and fake images y, logits D and a weight g, they are

    - nonsaturating: L_G = E softplus(-D(y)) and
      L_D = E softplus(-D(x)) + E softplus(D(y)) + g/2 E |grad D(x)|^2.
      Goodfellow et al. (1406.2661), section 3; penalty of Mescheder et al. (1801.04406), section 4.
    - wgan_gp: L_G = -E D(y) and L_D = E D(y) - E D(x) + g E (|grad D(v)| - 1)^2
      at points v = x + u (y - x), with one u ~ U[0, 1) per image.
      Gulrajani et al. (1704.00028), section 4.
    - r3gan: L_G = E softplus(D(x) - D(y)) and
      L_D = E softplus(D(y) - D(x)) + g/2 E (|grad D(x)|^2 + |grad D(y)|^2).
      Huang et al. (2501.05441), section 2.

    The weights of D are constants in L_G, and y is one in L_D. The gradients of L_G + L_D are
    therefore those of each player's own loss, and one optimizer trains both.

    Args:
        discriminator: The discriminator D.
        real: Images x in [0, 1], (batch, channels, height, width).
        fake: Images y of the generator, like `real`.
        one_hot: Classes of both, (batch, classes), or None.
        loss: "nonsaturating", "wgan_gp" or "r3gan".
        gradient_penalty: The weight g.
        random_source: Source of u.
    """
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    # In float32, because gradients of gradients are too coarse in bfloat16.
    with torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
        x = real.detach().requires_grad_()
        y = fake.detach().requires_grad_()
        real_logit = discriminator(x, one_hot)
        fake_logit = discriminator(y, one_hot)
        generator_logit = torch.func.functional_call(discriminator, weights, (fake, one_hot))
        if loss == "wgan_gp":
            generator_loss = -generator_logit.mean()
            discriminator_loss = (fake_logit - real_logit).mean()
        elif loss == "r3gan":
            generator_loss = F.softplus(real_logit.detach() - generator_logit).mean()
            discriminator_loss = F.softplus(fake_logit - real_logit).mean()
        else:
            generator_loss = F.softplus(-generator_logit).mean()
            discriminator_loss = (F.softplus(-real_logit) + F.softplus(fake_logit)).mean()
        if not gradient_penalty:
            return generator_loss, discriminator_loss
        if loss == "wgan_gp":
            u = random_source(torch.rand, (len(x), 1, 1, 1), device=x.device, dtype=x.dtype)
            v = torch.lerp(x, y, u).detach().requires_grad_()
            norm = torch.linalg.vector_norm(_gradient(discriminator(v, one_hot), v), dim=1)
            penalty = (norm - 1).square()
        else:
            penalty = _gradient(real_logit, x).square().sum(1) / 2
            if loss == "r3gan":
                penalty = penalty + _gradient(fake_logit, y).square().sum(1) / 2
        return generator_loss, discriminator_loss + gradient_penalty * penalty.mean()


def _gradient(logit: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the logit of each image, (batch, channels * height * width)."""
    return torch.autograd.grad(logit.sum(), x, create_graph=True)[0].flatten(1)


class GAN(ClassConditional):
    """Generative adversarial network: a generator of images G, and a discriminator D.

    G maps latents z ~ N(0, I) to images with brightness in [0, 1]. D learns to tell them from real
    images. The training loss is the sum of the losses of both players, see `adversarial_losses`.
    Both take a step at the same time, with one optimizer.

    D sees images of both kinds with the noise u ~ U[0, 1) of dequantization: (i + u) / K for real
    pixel values i = 0..K-1, K = 2^bits, and ((K - 1) G(z) + u) / K. Without noise, whole numbers
    alone would tell real images.

    The model has no likelihood and no encoder. `evaluate` reports the squared Fréchet distance
    between images and as many samples, in the principal components of training images.

    With `num_classes`, the class, one-hot, is a part of the latents, and D is a projection
    discriminator.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        loss: "nonsaturating", "wgan_gp" or "r3gan".
        gradient_penalty: Weight of the gradient penalty; None selects 0 for "nonsaturating", 10 for
            "wgan_gp" and 0.05 for "r3gan".
        latent_dim: Number of latents z.
        width: Channels of the generator at the full size, see `Generator`.
        discriminator_width: Channels of the first convolution of the discriminator, see
            `Discriminator`.
        num_classes: Number of classes of a class-conditional model, or None.

    Example:
        >>> model = GAN(image_shape=(3, 8, 8), bits=5, width=4, discriminator_width=4)
        >>> images = torch.randint(32, (16, 3, 8, 8), dtype=torch.uint8)
        >>> model(images).backward()
        >>> samples, log_prob = model.sample(5)
        >>> samples.shape, log_prob
        (torch.Size([5, 3, 8, 8]), None)
    """

    metric: Metric = FRECHET
    likelihood: Likelihood = "none"
    has_encoder: ClassVar[bool] = False
    restores_images: ClassVar[bool] = False

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        loss: str = "nonsaturating",
        gradient_penalty: float | None = None,
        latent_dim: int = 64,
        width: int = 32,
        discriminator_width: int = 16,
        num_classes: int | None = None,
    ):
        super().__init__()
        check_whole(1, 8, bits=bits)  # images are uint8
        check_choice(GRADIENT_PENALTIES, loss=loss)
        check_whole(latent_dim=latent_dim, width=width, discriminator_width=discriminator_width)
        if gradient_penalty is None:
            gradient_penalty = GRADIENT_PENALTIES[loss]
        check_number(gradient_penalty=gradient_penalty)
        if num_classes is not None:
            check_whole(num_classes=num_classes)
        channels, height, width_pixels = image_shape
        self.image_shape = (channels, height, width_pixels)
        self.bits = bits
        self.bins = 2**bits
        self.loss = loss
        self.gradient_penalty = gradient_penalty
        self.latent_dim = latent_dim
        self.num_classes = num_classes
        self.generator = Generator(image_shape, latent_dim + (num_classes or 0), width)
        self.discriminator = Discriminator(image_shape, discriminator_width, num_classes)
        self.random_source = RandomSource()
        self._losses: dict[str, Tensor] = {}  # of the last micro-batch of this process

    # Training

    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Do nothing: the initial weights do not depend on images."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the sum of the losses of both players, a scalar."""
        if labels is None:
            labels = self.sample_labels(len(images), None, 0)
        one_hot = self.one_hot(labels)
        z = self._draw(torch.randn, (len(images), self.latent_dim))
        fake = self.generator(_concat(z, one_hot))
        generator_loss, discriminator_loss = adversarial_losses(
            self.discriminator,
            self._dequantize(images),
            self._dequantize((self.bins - 1) * fake),
            one_hot,
            loss=self.loss,
            gradient_penalty=self.gradient_penalty,
            random_source=self.random_source,
        )
        self._losses = {
            "generator_loss": generator_loss.detach(),
            "discriminator_loss": discriminator_loss.detach(),
        }
        return generator_loss + discriminator_loss

    def diagnostics(self) -> dict[str, float]:
        """Return the losses of both players on the last micro-batch of this process."""
        return {name: value.item() for name, value in self._losses.items()}

    # Samples

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        start_index: int = 0,
    ) -> tuple[Tensor, None]:
        """Draw images of latents z ~ N(0, T^2 I), where T is the temperature.

        Args:
            count: Number of images.
            temperature: Standard deviation of the latents.
            generator: Random generator, or None for the global one.
            label: The class; None cycles through the classes, if the model has any.
            start_index: Index of the first image in this cycle.

        Returns:
            The images (count, channels, height, width), and None, because a GAN has no likelihood.
        """
        one_hot = self.one_hot(self.sample_labels(count, label, start_index))
        latent = self._draw_latents(count, temperature, generator, one_hot)
        return self.decode(latent), None

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of latents (batch, latent): z and, with classes, a one-hot class."""
        return ((self.bins - 1) * self.generator(latent)).round().to(torch.uint8)

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the squared Fréchet distance between images and as many samples.

        The samples are drawn at temperature 1 and are the same in every call, except for the
        weights. The distance of a finite number of images is above 0 even for a perfect model.

        Args:
            batches: Batches of images.
            train_batches: Batches of training images, whose principal components are used; without
                any, those of the images.
            eval_config: Not used.
        """
        real = torch.cat(list(batches))
        train = torch.cat([*train_batches] or [real])
        components = PrincipalComponents(
            train[:: math.ceil(len(train) / COMPONENT_IMAGES)], self.bins - 1
        )
        generator = torch.Generator(self.device).manual_seed(0)
        one_hot = self.one_hot(self.sample_labels(len(real), None, 0))
        latent = self._draw_latents(len(real), 1.0, generator, one_hot)
        features = evaluate_sharded(
            latent.split(SAMPLE_BATCH_SIZE),
            lambda part: components(self.decode(part)).to(self.device),
            lambda part: None,
            columns=components.basis.shape[1],
        )
        distance = frechet_distance(features.cpu(), components(real).double())
        return Metrics.of(MetricValue(self.metric, distance), bits=self.bits, images=len(real))

    # Without likelihood and encoder

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Raise a UserError, because a GAN has no likelihood."""
        raise UserError(NO_LIKELIHOOD)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Raise a UserError, because a GAN has no encoder."""
        raise UserError(NO_ENCODER)

    def classify(self, images: Tensor) -> Tensor:
        """Raise a UserError, because a GAN has no likelihood."""
        raise UserError(NO_LIKELIHOOD)

    def class_latents(self) -> Tensor:
        """Raise a UserError, because a GAN has no encoder."""
        raise UserError(NO_ENCODER)

    # Helpers

    def _draw(self, draw: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        """Draw random numbers for a batch in training."""
        return self.random_source(draw, shape, device=self.device, dtype=self.dtype)

    def _draw_latents(
        self,
        count: int,
        temperature: float,
        generator: torch.Generator | None,
        one_hot: Tensor | None,
    ) -> Tensor:
        """Draw the latents of samples, (count, latent)."""
        z = torch.randn(
            count, self.latent_dim, generator=generator, device=self.device, dtype=self.dtype
        )
        return _concat(temperature * z, one_hot)

    def _dequantize(self, values: Tensor) -> Tensor:
        """Return (values + u) / 2^bits with u ~ U[0, 1)."""
        return (values + self._draw(torch.rand, values.shape)) / self.bins


def _concat(z: Tensor, one_hot: Tensor | None) -> Tensor:
    """Return the latents of G: z and, with classes, the one-hot class."""
    return z if one_hot is None else torch.cat((z, one_hot), 1)
