"""Variational diffusion models: Kingma, Salimans, Poole and Ho (2107.00630)."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.networks import RandomSource, TransformerBlock, zero_init
from flowgen.models.categorical import count_values, draw_values
from flowgen.models.likelihood import LikelihoodModel
from flowgen.models.shapes import MAX_DEPTH, Resolution, resolve_levels, split_shape
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.metrics import BITS_PER_DIM, Likelihood

# Ends of the schedule of gamma = log(sigma^2 / alpha^2). At 8 bits, the standard deviation of the
# noise at time 0 is a sixth of the distance between pixel values. At time 1, little of the image
# is left: alpha = 0.08.
GAMMA_START_8_BITS = -13.3
GAMMA_END = 5.0
NEAR_VALUES = 4  # pixel values farther away have probability 0 in float32 given z_0
MAX_STEPS = 10**6  # rounding makes more steps meaningless
MAX_DEFAULT_LEVELS = 2  # the network halves the resolution at most twice by default
SCORE_SAMPLES = 8  # importance samples of the score of an image
CHUNK_SIZE = 2**18  # numbers in float32: 1 MiB
NUM_FREQUENCIES = 8  # of the time embedding
SAMPLERS = ("ddpm", "ddim")


class VariationalDiffusion(LikelihoodModel):
    """Variational diffusion model, whose training loss is its bound of the likelihood.

    The values v of the pixels lie between -1 and 1. Noise e ~ N(0, I) hides them more and more:
    z_t = alpha_t v + sigma_t e, with variances alpha_t^2 = sigmoid(-gamma_t) and sigma_t^2 =
    sigmoid(gamma_t), where gamma_t rises linearly from time t = 0 to 1. A network predicts e from
    z_t. The bound is

        -log P(x) <= reconstruction + diffusion + prior,
        reconstruction = E[-log P(x | z_0)],
        diffusion = (gamma_1 - gamma_0) / 2 E_t |e - prediction(z_t, t)|^2,
        prior = KL(q(z_1 | x) | N(0, I)):

    Kingma et al. (2107.00630), sections 3.5 and 5. With `num_steps`, time has T steps, and the
    factor of the diffusion loss is T/2 (exp(gamma_t - gamma_s) - 1), where s = t - 1/T: section 4.

    With `marginals`, the prediction starts from the best one for independent pixels, which follows
    from the frequencies of the pixel values. The network adds a correction, and P(x | z_0) uses the
    frequencies too. Otherwise it reads sines and cosines of z_t that show small differences of the
    pixel values, as in the paper, section 3.4.

    Latents are z_1. `encode` and `decode` follow the deterministic steps of DDIM and do not
    restore images exactly.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        width: Channels of the U-Net at the resolution of the images, and half of those below.
        num_blocks: Residual blocks per resolution on each side of the U-Net.
        num_layers: Transformer blocks at the lowest resolution.
        num_heads: Attention heads, a divisor of twice the width.
        levels: Number of times that the U-Net halves the resolution; None selects the largest one
            that height and width allow, at most 2.
        marginals: Start from the best prediction for independent pixels.
        num_steps: Time steps T of the bound; None selects continuous time.
        sampling_steps: Time steps of `sample`, `encode` and `decode`.
        sampler: "ddpm" (random steps, Ho et al., 2006.11239) or "ddim" (deterministic steps, Song
            et al., 2010.02502).
        eval_times: Times per image at which `log_prob` evaluates the diffusion loss.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = VariationalDiffusion(image_shape=(1, 4, 4), bits=5, width=8, sampling_steps=4)
        >>> images = torch.randint(32, (64, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model(images).backward()
        >>> samples, log_prob = model.sample(3)
        >>> samples.shape, log_prob.shape
        (torch.Size([3, 1, 4, 4]), torch.Size([3]))
    """

    likelihood: Likelihood = "bound"
    averages_log_probs = True
    restores_images: ClassVar[bool] = False

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        width: int = 32,
        num_blocks: int = 1,
        num_layers: int = 1,
        num_heads: int = 4,
        levels: int | None = None,
        marginals: bool = True,
        num_steps: int | None = None,
        sampling_steps: int = 100,
        sampler: str = "ddpm",
        eval_times: int = 8,
    ):
        super().__init__(image_shape, bits)
        if num_steps is not None:
            check_whole(high=MAX_STEPS, num_steps=num_steps)
        check_whole(high=MAX_STEPS, sampling_steps=sampling_steps, eval_times=eval_times)
        check_choice(SAMPLERS, sampler=sampler)
        check_choice((True, False), marginals=marginals)
        channels, resolution = split_shape(image_shape)
        features = 4 if marginals else 5  # of every value, see `predict_noise`
        self.network = UNet(
            features * channels,
            channels,
            resolution,
            width,
            num_blocks,
            num_layers,
            num_heads,
            levels,
        )
        self.num_steps = num_steps
        self.sampling_steps = sampling_steps
        self.sampler = sampler
        self.eval_times = eval_times
        self.gamma_start = GAMMA_START_8_BITS + 2 * (8 - bits) * math.log(2)
        self.gamma_end = GAMMA_END
        self.random_source = RandomSource()
        self.loss_metric = BITS_PER_DIM
        self.marginals = marginals
        # Logarithms of the frequencies of the pixel values.
        self.log_frequencies = nn.Buffer(torch.zeros(channels, self.bins))

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        if self.marginals:
            counts = count_values(images, self.bits)
            self.log_frequencies.copy_((counts / counts.sum(1, keepdim=True)).log())

    # The bound

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bits/dim of a batch, with one time per image.

        The times are evenly spread over the batch, which reduces the variance of the loss.
        """
        like_images = {"device": images.device, "dtype": self.dtype}
        noise_shape = (len(images), 2, *images.shape[1:])
        time = self.random_source(stratified_times, images.shape[:1], **like_images)
        noise = self.random_source(torch.randn, noise_shape, **like_images)
        return self.bits_per_dim(self.lower_bound(images, time, noise)).mean()

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the bound of log P(image) in nats, (batch,).

        It is a mean over `eval_times` times, one in each part of an even division of [0, 1).

        Args:
            images: (batch, channels, height, width).
            generator: Source of the times and the noise.
            labels: Unused, because the model has no classes.
        """
        noise = self._iter_noise(images, generator)
        bounds = [self.lower_bound(images, *draws) for draws in noise]
        return torch.stack(bounds).mean(0)

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = SCORE_SAMPLES,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the bound of log P(image) of each image in nats, (batch,).

        It is a mean over `num_importance_samples` * `eval_times` times. A single image needs more
        of them than the mean over many images.

        Args:
            images: (batch, channels, height, width).
            labels: Unused, because the model has no classes.
            num_importance_samples: Number of calls of `log_prob`.
            generator: Source of the times and the noise.
        """
        return super().score(
            images, labels, num_importance_samples=num_importance_samples, generator=generator
        )

    def draw_noise(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        for _ in self._iter_noise(images, generator):
            pass

    def _iter_noise(
        self, images: Tensor, generator: torch.Generator | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the times (batch,) and noise of every evaluation of the bound."""
        settings: dict[str, Any] = {
            "generator": generator,
            "device": images.device,
            "dtype": self.dtype,
        }
        for index in range(self.eval_times):
            time = (index + torch.rand(len(images), **settings)) / self.eval_times
            yield time, torch.randn((len(images), 2, *images.shape[1:]), **settings)

    def lower_bound(self, images: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Return the bound of log P(image) in nats, (batch,), at one time per image.

        Args:
            images: (batch, channels, height, width).
            time: Times from 0 to 1, (batch,).
            noise: Standard normal noise of z_t and of z_0, (batch, 2, channels, height, width).
        """
        noise_t, noise_0 = noise.unbind(1)
        values = self.pixel_values(images.to(self.dtype))
        losses = (
            self._reconstruction_loss(images, noise_0)
            + self._diffusion_loss(values, time, noise_t)
            + self._prior_loss(values)
        )
        return -losses.flatten(1).sum(1)

    def _reconstruction_loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return -log P(pixel | z_0) for every pixel value."""
        alpha, sigma = self.alpha_sigma(torch.zeros(1, device=self.device, dtype=self.dtype))
        z = alpha * self.pixel_values(images.to(self.dtype)) + sigma * noise
        logits, _ = self._value_logits(z, images)
        return logits.logsumexp(-1) - logits[..., NEAR_VALUES]

    def _diffusion_loss(self, values: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Return the weighted squared error of the predicted noise."""
        gamma_range = self.gamma_end - self.gamma_start
        weight = gamma_range / 2
        if self.num_steps is not None:
            # The end of the step that contains `time`.
            time = ((time * self.num_steps).floor() + 1).clamp(max=self.num_steps) / self.num_steps
            weight = self.num_steps / 2 * math.expm1(gamma_range / self.num_steps)
        alpha, sigma = self.alpha_sigma(time)
        prediction = self.predict_noise(alpha * values + sigma * noise, time)
        return weight * (noise - prediction).square()

    def _prior_loss(self, values: Tensor) -> Tensor:
        """Return KL(q(z_1 | x) | N(0, I)) of every pixel value."""
        alpha, sigma = self.alpha_sigma(torch.ones(1, device=values.device, dtype=values.dtype))
        return ((alpha * values).square() + sigma.square() - 1) / 2 - sigma.log()

    # Schedule and network

    def pixel_values(self, images: Tensor) -> Tensor:
        """Return the values v = (2 images + 1) / 2^bits - 1 between -1 and 1."""
        return (2 * images + 1) / self.bins - 1

    def gamma(self, time: Tensor) -> Tensor:
        """Return log(sigma^2 / alpha^2), the negative log signal-to-noise ratio."""
        return self.gamma_start + (self.gamma_end - self.gamma_start) * time

    def alpha_sigma(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of signal and noise at times (batch,): (batch, 1, 1, 1) each."""
        gamma = self.gamma(time)[:, None, None, None]
        return (-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt()

    def predict_noise(self, z: Tensor, time: Tensor) -> Tensor:
        """Return the expected noise in z_t given z_t, in the shape of z.

        Args:
            z: (batch, channels, height, width).
            time: (batch,).
        """
        alpha, sigma = self.alpha_sigma(time)
        if self.marginals:
            with torch.autocast(z.device.type, enabled=False):  # it would round sums
                shift, std = self._denoise_pixels(z / alpha, (alpha / sigma).square())
            first_prediction = -shift * alpha / sigma
            features = [z, z / alpha + shift, first_prediction, std * alpha / sigma]
        else:
            first_prediction = z
            angles = [2**bits * math.pi * z for bits in (self.bits - 1, self.bits)]
            waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
            features = [z, *waves]
        return first_prediction + self.network(torch.cat(features, 1), time).to(z.dtype)

    def _denoise_pixels(self, y: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean - y and standard deviation of independent pixel values v given y.

        Here y = v + N(0, 1 / precision), and v has the frequencies of the training images.

        Args:
            y: (batch, channels, height, width).
            precision: (batch, 1, 1, 1).
        """
        values = self.pixel_values(torch.arange(self.bins, device=y.device, dtype=y.dtype))
        rows = (
            y.flatten(0, 1).flatten(1),  # one row per channel of an image
            precision.flatten().repeat_interleave(y.shape[1]),
            self.log_frequencies.repeat(len(y), 1),
        )
        # Chunks that fit into the cache are four times as fast on a CPU.
        chunk = max(1, CHUNK_SIZE // (y[0, 0].numel() * self.bins))
        moments = []
        for part in zip(*(tensor.split(chunk) for tensor in rows), strict=True):
            part_y, part_precision, log_frequencies = part
            distance = values - part_y[..., None]
            squares = distance.square()
            logits = log_frequencies[:, None] - part_precision[:, None, None] / 2 * squares
            posterior = logits.softmax(2)
            shift = torch.linalg.vecdot(posterior, distance)
            variance = torch.linalg.vecdot(posterior, squares) - shift.square()
            moments.append(torch.stack((shift, variance.clamp(min=0).sqrt())))
        shift, std = torch.cat(moments, 1)
        return shift.view_as(y), std.view_as(y)

    # Samples and latents

    @torch.no_grad()
    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw images, and return them with their bound of log P(image) in nats, (count,).

        Args:
            count: Number of images.
            temperature: Standard deviation of all noise.
            generator: Random generator, or None for the global one.
        """
        z = temperature * self._randn((count, *self.image_shape), generator)
        for time, next_time in self._steps(1.0, 0.0, count):
            if self.sampler == "ddim":
                z = self.ddim_step(z, time, next_time)
            else:
                noise = temperature * self._randn(z.shape, generator)
                z = self.ddpm_step(z, time, next_time, noise)
        images = self._draw_images(z, temperature, generator)
        return images, self.log_prob(images, generator)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents z_1 of images, (batch, D), by steps of DDIM.

        Args:
            images: (batch, channels, height, width).
            generator: Source of the noise in z_0; None adds no noise.
        """
        alpha, sigma = self.alpha_sigma(torch.zeros(1, device=self.device, dtype=self.dtype))
        z = alpha * self.pixel_values(images.to(self.dtype))
        if generator is not None:
            z = z + sigma * self._randn(z.shape, generator)
        for time, next_time in self._steps(0.0, 1.0, len(images)):
            z = self.ddim_step(z, time, next_time)
        return z.flatten(1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the images of latents z_1, (batch, D), by steps of DDIM."""
        z = latent.unflatten(1, self.image_shape)
        for time, next_time in self._steps(1.0, 0.0, len(z)):
            z = self.ddim_step(z, time, next_time)
        return self._draw_images(z, 0.0, None)

    def ddpm_step(self, z: Tensor, time: Tensor, next_time: Tensor, noise: Tensor) -> Tensor:
        """Draw z at an earlier time: Kingma et al. (2107.00630), section 3.3.

        Args:
            z: z at `time`, (batch, channels, height, width).
            time: (batch,).
            next_time: An earlier time, (batch,).
            noise: Standard normal noise times the temperature, in the shape of z.
        """
        alpha, sigma = self.alpha_sigma(time)
        next_alpha, next_sigma = self.alpha_sigma(next_time)
        share = -torch.expm1(self.gamma(next_time) - self.gamma(time))[:, None, None, None]
        mean = next_alpha / alpha * (z - sigma * share * self.predict_noise(z, time))
        return mean + next_sigma * share.sqrt() * noise

    def ddim_step(self, z: Tensor, time: Tensor, next_time: Tensor) -> Tensor:
        """Return z at another time without noise: Song et al. (2010.02502), section 4.1.

        Args:
            z: z at `time`, (batch, channels, height, width).
            time: (batch,).
            next_time: An earlier or a later time, (batch,).
        """
        alpha, sigma = self.alpha_sigma(time)
        next_alpha, next_sigma = self.alpha_sigma(next_time)
        noise = self.predict_noise(z, time)
        return next_alpha * (z - sigma * noise) / alpha + next_sigma * noise

    def _steps(self, start: float, end: float, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the times before and after each sampling step, (count,) each."""
        times = torch.linspace(
            start, end, self.sampling_steps + 1, device=self.device, dtype=self.dtype
        )
        steps = pairwise(times[:, None].expand(-1, count))
        yield from self.progress(steps, "denoising", self.sampling_steps)

    def _draw_images(
        self, z: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """Draw pixel values from P(x | z_0); at temperature 0 take the most probable ones."""
        alpha, _ = self.alpha_sigma(torch.zeros(1, device=z.device, dtype=z.dtype))
        nearest = ((z / alpha + 1) * self.bins - 1) / 2
        nearest = nearest.round().nan_to_num(0.0).clamp(0, self.bins - 1)
        logits, candidates = self._value_logits(z, nearest)
        choice = draw_values(logits, temperature, generator)[..., None]
        return candidates.gather(-1, choice).squeeze(-1).to(torch.uint8)

    def _value_logits(self, z: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """Return unnormalized log P(value | z_0) for the values around `near`, and these values.

        Both have shape (batch, channels, height, width, 2 NEAR_VALUES + 1).
        """
        offsets = torch.arange(-NEAR_VALUES, NEAR_VALUES + 1, device=z.device)
        candidates = near.long()[..., None] + offsets
        alpha, sigma = self.alpha_sigma(torch.zeros(1, device=z.device, dtype=z.dtype))
        distance = (z / alpha)[..., None] - self.pixel_values(candidates.to(z.dtype))
        channels = torch.arange(z.shape[1], device=z.device)[:, None, None, None]
        log_frequencies = self.log_frequencies[channels, candidates.clamp(0, self.bins - 1)]
        logits = log_frequencies - (distance * (alpha / sigma)[..., None]).square() / 2
        exists = (candidates >= 0) & (candidates < self.bins)
        return logits.masked_fill(~exists, -math.inf), candidates

    def _randn(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)


def stratified_times(
    shape: Sequence[int], generator: torch.Generator | None = None, **kwargs: Any
) -> Tensor:
    """Draw one time from each part of an even division of [0, 1), in order.

    Example:
        >>> bool((stratified_times((4,)) * 4).floor().equal(torch.arange(4.0)))
        True
    """
    (count,) = shape
    uniform = torch.rand(shape, generator=generator, **kwargs)
    return (torch.arange(count, device=uniform.device) + uniform) / count


class UNet(nn.Module):
    """A U-Net that predicts a correction of the noise from an image and a time.

    Residual blocks work at every resolution, and transformer blocks at the lowest one. The output
    starts at zero. Ronneberger, Fischer and Brox (1505.04597); Ho et al. (2006.11239), appendix B.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        resolution: Height and width of the images.
        width: Channels at this resolution; lower ones have twice as many.
        num_blocks: Residual blocks per resolution on each side.
        num_layers: Transformer blocks at the lowest resolution.
        num_heads: Attention heads of these.
        levels: Number of times that the resolution is halved; None selects the largest possible
            one, at most 2.

    Example:
        >>> network = UNet(3, 1, (8, 8), width=8, num_blocks=1, num_layers=1, num_heads=2)
        >>> network(torch.randn(5, 3, 8, 8), torch.rand(5)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: Resolution,
        width: int,
        num_blocks: int,
        num_layers: int,
        num_heads: int,
        levels: int | None = None,
    ):
        super().__init__()
        check_whole(width=width, num_heads=num_heads)
        check_whole(high=MAX_DEPTH, num_blocks=num_blocks, num_layers=num_layers)
        if levels is None:
            levels = min(resolve_levels(resolution, None), MAX_DEFAULT_LEVELS)
        else:
            levels = resolve_levels(resolution, levels)
        widths = [width, *[2 * width] * levels]
        if widths[-1] % num_heads:
            raise UserError(
                f"num_heads={num_heads} does not divide the {widths[-1]} channels of the lowest "
                "resolution: change num_heads or width"
            )
        embedding = 2 * width

        def blocks(channels: int) -> TimeBlocks:
            return TimeBlocks(*(TimeBlock(channels, embedding) for _ in range(num_blocks)))

        self.embed_time = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, embedding),
            nn.SiLU(),
            nn.Linear(embedding, embedding),
            nn.SiLU(),
        )
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList(blocks(channels) for channels in widths)
        self.downsample = nn.ModuleList(
            nn.Conv2d(channels, below, 2, stride=2) for channels, below in pairwise(widths)
        )
        height, image_width = (side // 2**levels for side in resolution)
        self.place = nn.Parameter(0.02 * torch.randn(height * image_width, widths[-1]))
        self.transformer = nn.ModuleList(
            TransformerBlock(widths[-1], num_heads, dropout=0.0) for _ in range(num_layers)
        )
        self.up_blocks = nn.ModuleList(blocks(channels) for channels in widths)
        self.upsample = nn.ModuleList(
            nn.Conv2d(below, channels, 1) for channels, below in pairwise(widths)
        )
        self.last = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return (batch, out_channels, height, width) for x and times from 0 to 1, (batch,)."""
        multiples = torch.arange(1, NUM_FREQUENCIES + 1, device=x.device, dtype=x.dtype)
        angles = math.pi * time[:, None] * multiples
        embedding = self.embed_time(torch.cat((angles.cos(), angles.sin()), 1))
        h = self.first(x)
        skipped = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                skipped.append(h)
                h = self.downsample[level - 1](h)
            h = blocks(h, embedding)
        h = self._attend(h)
        for level in reversed(range(len(self.up_blocks))):
            h = self.up_blocks[level](h, embedding)
            if level > 0:
                h = F.interpolate(self.upsample[level - 1](h), scale_factor=2) + skipped.pop()
        return self.last(F.silu(h))

    def _attend(self, h: Tensor) -> Tensor:
        """Apply the transformer blocks to the pixels as tokens."""
        tokens = h.flatten(2).transpose(1, 2) + self.place
        for layer in self.transformer:
            tokens = layer(tokens)
        return tokens.transpose(1, 2).unflatten(2, h.shape[2:])


class TimeBlocks(nn.Sequential):
    """Blocks that all read the time embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for block in self:
            x = block(x, embedding)
        return x


class TimeBlock(nn.Module):
    """x + conv3x3(silu((1 + scale) conv3x3(silu(x)) + shift)), which starts as the identity.

    The time determines scale and shift per channel. Perez et al., FiLM (1709.07871); Dhariwal and
    Nichol (2105.05233), section 3.1.

    Args:
        channels: Channels of x.
        embedding: Values of the time embedding.
    """

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale_and_shift = zero_init(nn.Linear(embedding, 2 * channels))
        self.last = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift(embedding)[:, :, None, None].chunk(2, 1)
        h = self.first(F.silu(x))
        return x + self.last(F.silu(h + h * scale + shift))
