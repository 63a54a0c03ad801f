"""VQ-VAE: van den Oord, Vinyals and Kavukcuoglu (1711.00937), with a prior and a likelihood."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.autoregressive import MADE
from flowgen.bijections.networks import CausalTransformer, Transformer, zero_init
from flowgen.models.base import QUICK_EVAL, ClassConditional, EvalConfig
from flowgen.models.categorical import draw_values
from flowgen.models.likelihood import LikelihoodModel
from flowgen.models.logistic_mixture import (
    LogisticMixture,
    initial_parameters,
    num_parameters,
    scale_values,
)
from flowgen.models.shapes import MAX_DEPTH, check_transformer, choose_patch, split_shape, squeezed
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.distributed import all_gather_rows, evaluate_sharded
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.metrics import BITS_PER_DIM, Likelihood, Metric, Metrics, MetricValue

EMA_DECAY = 0.99  # of the codebook, as in appendix A.1 of the VQ-VAE
DEAD_USAGE = 0.1  # codes used less than this share of the mean usage are restarted
NEAR_SHARE = 0.01  # of the variance of z: no code restarts nearer than this to a code vector
MAX_CODES = 2**16  # the prior computes as many probabilities
MADE_WIDTH = 2  # hidden units of the MADE of the prior per unit of its transformer
CLASS_SAMPLES = 64  # samples of each class whose mean is its latent
CODE_PERPLEXITY = Metric("code_perplexity", "codes")
PIXEL_BITS = Metric("pixel_bits_per_dim", "bits/dim", higher_is_better=False)
CODE_BITS = Metric("code_bits_per_dim", "bits/dim", higher_is_better=False)
UNIFORM_CODE_BITS = Metric("uniform_code_bits_per_dim", "bits/dim")


class Quantizer(nn.Module, ABC):
    """Maps vectors to the nearest of finitely many code vectors.

    A code consists of one or more digits, whole numbers from 0 to their number of levels - 1.

    Args:
        levels: Number of levels of each digit.
        dim: Numbers per code vector.
    """

    def __init__(self, levels: Sequence[int], dim: int):
        super().__init__()
        self.levels = tuple(levels)
        self.dim = dim

    def bound(self, x: Tensor) -> Tensor:
        """Return outputs of the encoder (..., dim), moved into the range of the code vectors."""
        return x

    @abstractmethod
    def codes(self, z: Tensor) -> Tensor:
        """Return the codes (..., digits) of the vectors that are nearest to z, (..., dim)."""

    @abstractmethod
    def vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (..., dim) of codes (..., digits)."""

    def initialize(self, z: Tensor) -> None:
        """Initialize the code vectors from outputs of the encoder (count, dim)."""

    def update(self, z: Tensor) -> None:
        """Adapt the code vectors to the outputs of the encoder (count, dim) for a batch."""


class FSQ(Quantizer):
    """Finite scalar quantization: each number of a vector is rounded to one of a few levels.

    Outputs x of the encoder become z = tanh(x). A number with L levels is rounded to the nearest of
    -1, -1 + 2 / (L - 1), ..., 1, and the number of this level is a digit of the code. Nothing is
    learned, so that no code can die. Mentzer, Minnen, Agustsson and Tschannen (2309.15505), section
    3.1.

    Args:
        levels: Number of levels of each number of a vector.

    Example:
        >>> quantizer = FSQ([3, 2])
        >>> codes = quantizer.codes(torch.tensor([[-0.9, 0.4], [0.1, -0.2]]))
        >>> codes, quantizer.vectors(codes)
        (tensor([[0, 1],
                [1, 0]]), tensor([[-1.,  1.],
                [ 0., -1.]]))
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__(levels, len(levels))
        self.highest = nn.Buffer(torch.tensor(levels) - 1.0, persistent=False)

    def bound(self, x: Tensor) -> Tensor:
        return x.tanh()

    def codes(self, z: Tensor) -> Tensor:
        return ((z.clamp(-1, 1) + 1) / 2 * self.highest).round().long()

    def vectors(self, codes: Tensor) -> Tensor:
        return 2 * codes / self.highest - 1


class EMACodebook(Quantizer):
    """Vector quantization with a codebook of moving averages.

    Code vector k is the moving average of the outputs of the encoder that are nearest to it: after
    each batch with n_k such outputs among n, whose sum is s_k,

        usage_k <- r usage_k + (1 - r) n_k / n,  sum_k <- r sum_k + (1 - r) s_k / n,

    and the vector is sum_k / usage_k, with r = 0.99. Van den Oord, Vinyals and Kavukcuoglu
    (1711.00937), appendix A.1. Codes of little usage restart at outputs of the encoder, chosen at
    random from the batch: Dhariwal et al. (Jukebox, 2005.00341). Unlike there, a code waits while
    its output is near a code vector, because it would only take over outputs of that code. A
    code has one digit.

    Several processes compute the same averages, over the outputs of all of them.

    Args:
        size: Number of code vectors.
        dim: Numbers per vector.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> codebook = EMACodebook(size=8, dim=2)
        >>> z = torch.randn(100, 2)
        >>> codebook.initialize(z)
        >>> codebook.update(z)
        >>> codebook.vectors(codebook.codes(z)).shape
        torch.Size([100, 2])
    """

    def __init__(self, size: int, dim: int):
        super().__init__([size], dim)
        self.usage = nn.Buffer(torch.full((size,), 1 / size))
        self.sums = nn.Buffer(torch.randn(size, dim) / size)

    def codes(self, z: Tensor) -> Tensor:
        book = self.sums / self.usage[:, None]
        with torch.autocast(z.device.type, enabled=False):
            # |z - e|^2 without |z|^2, which is the same for all codes
            return (book.square().sum(1) - 2 * z @ book.T).argmin(-1, keepdim=True)

    def vectors(self, codes: Tensor) -> Tensor:
        return (self.sums / self.usage[:, None])[codes[..., 0]]

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        self._restart(torch.ones_like(self.usage, dtype=torch.bool), self._draw_rows(z))

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        z = all_gather_rows(z)
        one_hot = F.one_hot(self.codes(z)[:, 0], len(self.usage)).to(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            # Unlike sums by index, a product of matrices gives all processes the same bits on GPUs.
            sums = one_hot.T @ z / len(z)
        self.usage.lerp_(one_hot.mean(0), 1 - EMA_DECAY)
        self.sums.lerp_(sums, 1 - EMA_DECAY)
        lowest = DEAD_USAGE / len(self.usage)
        rows = self._draw_rows(z)
        distance = (rows - self.vectors(self.codes(rows))).square().sum(1)
        is_far = distance > NEAR_SHARE * z.var(0, correction=0).sum()
        self._restart((self.usage < lowest) & is_far, rows)
        # The usage of codes that wait would underflow.
        scale = (lowest / self.usage).clamp(min=1)
        self.usage.mul_(scale)
        self.sums.mul_(scale[:, None])

    def _draw_rows(self, z: Tensor) -> Tensor:
        """Return a random row of z for every code, (size, dim)."""
        # Every process draws the same rows, because they share the seed and z.
        return z[torch.randint(len(z), self.usage.shape, device=z.device)]

    def _restart(self, restarted: Tensor, rows: Tensor) -> None:
        """Move these codes (size,) to their rows (size, dim) and give them the mean usage."""
        size = len(self.usage)
        self.usage.copy_(self.usage.masked_fill(restarted, 1 / size))
        self.sums.copy_(torch.where(restarted[:, None], rows / size, self.sums))


class CodePrior(nn.Module):
    """p(c) = prod_ij p(c_ij | c_ik for k < j, c_1, ..., c_{i-1}) of the digits c_ij of codes c_i.

    A causal transformer computes a context for code i from the codes before it. The logits of each
    digit are the sum of a linear function of the context and of the outputs of a `MADE`, which also
    sees the digits before it.

    Args:
        num_codes: Length of a sequence of codes.
        levels: Number of levels of each digit of a code.
        width: Width of the transformer.
        num_heads: Attention heads, a divisor of `width`.
        num_layers: Transformer blocks.
        dropout: Dropout of the transformer.
        cond_channels: Channels of the condition, 0 for no condition.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> prior = CodePrior(4, levels=[3, 2], width=8, num_heads=2, num_layers=1)
        >>> codes, log_prob = prior.sample(5)
        >>> codes.shape, log_prob.shape, torch.allclose(prior.log_prob(codes), log_prob)
        (torch.Size([5, 4, 2]), torch.Size([5]), True)
    """

    def __init__(
        self,
        num_codes: int,
        levels: Sequence[int],
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float = 0.0,
        cond_channels: int = 0,
    ):
        super().__init__()
        self.levels = tuple(levels)
        self.transformer = CausalTransformer(
            num_codes, sum(levels), width, num_heads, num_layers, dropout, cond_channels
        )
        num_logits = max(levels)
        self.linear = zero_init(nn.Linear(width, num_logits * len(levels)))
        self.made = MADE(len(levels), MADE_WIDTH * width, 1, num_logits, width)
        self.progress: Progress = no_progress
        numbers = torch.arange(num_logits)[:, None]
        self.impossible = nn.Buffer(numbers >= torch.tensor(levels), persistent=False)
        self.highest = nn.Buffer(torch.tensor(levels) - 1.0, persistent=False)

    def log_prob(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return log p(c) in nats, (batch,), of codes (batch, num_codes, digits).

        Args:
            codes: (batch, num_codes, digits).
            condition: (batch, cond_channels), or None.
        """
        contexts = self.transformer(self._one_hot(codes), condition)
        inputs = torch.cat((2 * codes / self.highest - 1, contexts), 2)
        logits = self.linear(contexts) + self.made(inputs)
        log_prob = self._log_softmax(logits.unflatten(2, self.impossible.shape), self.impossible)
        return log_prob.gather(2, codes[:, :, None]).sum((1, 2, 3))

    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw each digit with probabilities p^(1 / temperature).

        Args:
            count: Number of sequences of codes.
            temperature: Temperature; at 0 every digit is the most probable one.
            generator: Random generator, or None for the global one.
            condition: (count, cond_channels), or None.

        Returns:
            The codes, (count, num_codes, digits), and log p(c) in nats, (count,).
        """
        codes: list[Tensor] = []

        def draw_code(index: int, context: Tensor) -> tuple[Tensor, Tensor]:
            from_context = self.linear(context).unflatten(1, self.impossible.shape)

            def draw_digit(digit: int, logits: Tensor) -> tuple[Tensor, Tensor]:
                logits = logits + from_context[:, :, digit]
                log_prob = self._log_softmax(logits[:, :, None], self.impossible[:, [digit]])
                log_prob = log_prob[:, :, 0]
                choice = draw_values(log_prob, temperature, generator)[:, None]
                return 2 * choice / self.highest[digit] - 1, log_prob.gather(1, choice)

            values, log_prob = self.made.invert_sequentially(draw_digit, count, context)
            codes.append(((values + 1) / 2 * self.highest).round().long())
            return self._one_hot(codes[-1]), log_prob

        _, log_prob = self.transformer.invert_sequentially(
            draw_code, count, condition, self.progress
        )
        return torch.stack(codes, 1), log_prob

    def _one_hot(self, codes: Tensor) -> Tensor:
        """Return the digits, one-hot: (..., sum of the levels)."""
        digits = [F.one_hot(codes[..., j], level) for j, level in enumerate(self.levels)]
        return torch.cat(digits, -1).to(self.linear.weight.dtype)

    def _log_softmax(self, logits: Tensor, impossible: Tensor) -> Tensor:
        """Normalize logits (..., levels, digits)."""
        logits = logits.to(self.linear.weight.dtype)
        return logits.masked_fill(impossible, -math.inf).log_softmax(-2)


class VQVAE(LikelihoodModel, ClassConditional):
    """VQ-VAE: a discrete code per patch of an image, with a transformer as the prior of the codes.

    The encoder maps an image to one vector z_i per patch, and the quantizer maps each z_i to a code
    c_i. Given the codes, the pixels are independent mixtures of discretized logistics, whose
    parameters the decoder computes. The prior of the codes p(c) = prod_i p(c_i | c_1, ..., c_{i-1})
    is a `CodePrior`. As P(x) = sum_c p(c) P(x | c), the codes of an image give a bound of its
    log-probability:

        log P(x) >= log P(x | c) + log p(c).

    The loss is this bound in bits/dim. The gradient of log P(x | c) passes the quantizer unchanged
    (straight-through). Codes pass no gradient, so that the prior does not influence the encoder:
    autoencoder and prior are trained together, but as in the two stages of the paper. With
    quantizer="vq" the loss also has the term `commitment_cost` |z - e|^2 in nats, which keeps z
    near its code vectors e. Van den Oord, Vinyals and Kavukcuoglu (1711.00937), section 3.

    Latents are the vectors z before quantization. `decode` quantizes them.

    With `num_classes`, the class, one-hot, is the condition of the prior, and p(c) is the mean of
    p(c | y) over the classes y.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        patch: Side length of the patches; None selects the largest of 4, 2 and 1 that divides
            height and width.
        num_layers: Layers of the transformers of the encoder and of the decoder, each.
        prior_layers: Layers of the transformer of the prior.
        width: Width of the transformers, a multiple of `num_heads`.
        num_heads: Attention heads of the transformers.
        dropout: Dropout of the transformers, from 0 to 1.
        quantizer: "fsq" (finite scalar quantization) or "vq" (a codebook of moving averages).
        fsq_levels: Number of levels of each number of a code vector, for "fsq". Many numbers are
            possible, because the prior treats them one after the other.
        codebook_size: Number of code vectors, for "vq".
        code_dim: Numbers per code vector, for "vq".
        commitment_cost: Weight of the distance between vectors and their code vectors, for "vq".
        num_components: Components of the mixture of each pixel.
        num_classes: Number of classes of a class-conditional model, or None.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = VQVAE(image_shape=(1, 4, 4), bits=5, patch=2, width=8, fsq_levels=[5, 3])
        >>> images = torch.randint(32, (16, 1, 4, 4), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model(images).backward()
        >>> samples, log_prob = model.sample(3)
        >>> samples.shape, log_prob.shape, model.encode(images).shape
        (torch.Size([3, 1, 4, 4]), torch.Size([3]), torch.Size([16, 8]))
    """

    likelihood: Likelihood = "bound"
    restores_images: ClassVar[bool] = False

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        patch: int | None = None,
        num_layers: int = 2,
        prior_layers: int = 2,
        width: int = 64,
        num_heads: int = 2,
        dropout: float = 0.0,
        quantizer: str = "fsq",
        fsq_levels: Sequence[int] = (8, 5, 5),
        codebook_size: int = 128,
        code_dim: int = 16,
        commitment_cost: float = 0.25,
        num_components: int = 5,
        num_classes: int | None = None,
    ):
        super().__init__(image_shape, bits, num_classes)
        channels, resolution = split_shape(image_shape)
        check_transformer([num_layers], width, num_heads, dropout)
        check_whole(high=MAX_DEPTH, prior_layers=prior_layers, num_components=num_components)
        check_choice(("fsq", "vq"), quantizer=quantizer)
        check_whole(2, MAX_CODES, codebook_size=codebook_size)
        check_whole(high=MAX_CODES, code_dim=code_dim)
        check_number(commitment_cost=commitment_cost)
        self.patch = choose_patch(resolution, patch)
        self.grid = squeezed(resolution, self.patch)
        self.quantizer = (
            FSQ(check_levels(fsq_levels))
            if quantizer == "fsq"
            else EMACodebook(codebook_size, code_dim)
        )
        self.commitment_cost = commitment_cost if quantizer == "vq" else 0.0
        self.num_components = num_components
        code_dim = self.quantizer.dim
        tokens = self.grid[0] * self.grid[1]
        values = self.patch**2
        outputs = num_parameters(channels, num_components) * values
        sizes = (num_heads, num_layers, dropout)
        self.encoder = Transformer(tokens, channels * values, width, code_dim, *sizes)
        self.encoder.last.reset_parameters()  # with zeros all vectors would be equal
        self.decoder = Transformer(tokens, code_dim, width, outputs, *sizes)
        self.prior = CodePrior(
            tokens,
            self.quantizer.levels,
            width,
            num_heads,
            prior_layers,
            dropout,
            num_classes or 0,
        )
        # The loss of a model with classes is that of P(x | y) instead of P(x).
        if num_classes is None and not self.commitment_cost:
            self.loss_metric = BITS_PER_DIM

    # Training and likelihood

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bound of a batch in bits/dim, with the commitment term of "vq"."""
        z = self.encode_patches(images)
        codes = self.quantizer.codes(z)
        vectors = self.quantizer.vectors(codes)
        pixels = self.pixel_distribution(straight_through(z, vectors))
        log_prob = pixels.log_prob(images).sum((1, 2, 3)) + self.code_log_prob(codes, labels)
        if self.commitment_cost:
            distance = (z - vectors).square().sum((1, 2))
            log_prob = log_prob - self.commitment_cost * distance
        if self.training:
            self.quantizer.update(z.detach().flatten(0, 1))
        return self.bits_per_dim(log_prob).mean()

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Set code vectors to outputs of the encoder, and the pixels to their marginal."""
        self.quantizer.initialize(self.encode_patches(images).flatten(0, 1))
        marginal = initial_parameters(
            scale_values(images, self.bins, torch.float32), self.num_components, self.bits
        )
        self.decoder.last.bias.copy_(marginal.repeat_interleave(self.patch**2))

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the bound log P(x | c) + log p(c | labels) in nats, (batch,).

        Args:
            images: (batch, channels, height, width).
            generator: Unused, because nothing is random.
            labels: Classes (batch,); None selects p(c).
        """
        log_pixels, log_codes, _ = self.log_prob_terms(images, labels)
        return log_pixels + log_codes

    def log_prob_terms(
        self, images: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the terms of the bound, and the codes.

        Args:
            images: (batch, channels, height, width).
            labels: Classes (batch,), which select p(c | labels); None selects p(c).

        Returns:
            log P(x | c) and log p(c) in nats, (batch,) each, and c, (batch, patches, digits).
        """
        codes = self.quantizer.codes(self.encode_patches(images))
        pixels = self.pixel_distribution(self.quantizer.vectors(codes))
        log_pixels = pixels.log_prob(images).sum((1, 2, 3))
        return log_pixels, self.code_log_prob(codes, labels), codes

    def code_log_prob(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return log p(c), or log p(c | labels), in nats, (batch,).

        Args:
            codes: (batch, patches, digits).
            labels: Classes (batch,), or None.
        """
        if labels is None and self.num_classes is not None:
            return self._class_code_log_prob(codes).logsumexp(1) - math.log(self.num_classes)
        return self.prior.log_prob(codes, self.one_hot(labels))

    def _class_code_log_prob(self, codes: Tensor) -> Tensor:
        """Return log p(c | y) in nats for every class y, (batch, classes)."""
        classes = torch.eye(self.check_classes(), dtype=self.dtype, device=self.device)
        conditions = (one_hot.expand(len(codes), -1) for one_hot in classes)
        return torch.stack([self.prior.log_prob(codes, one_hot) for one_hot in conditions], 1)

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Return log p(y | c) of the codes, (batch, classes), if all classes are equally likely."""
        codes = self.quantizer.codes(self.encode_patches(images))
        return self._class_code_log_prob(codes).log_softmax(1)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the bound in bits/dim, its two terms, and the perplexity of the codes.

        - pixel_bits_per_dim and code_bits_per_dim: the terms -log P(x | c) and -log p(c), whose sum
          is the bound; uniform_code_bits_per_dim: the second term if all codes had the same
          probability, without a prior.
        - code_perplexity: exp of the entropy of the frequencies of the codes in all patches.
        """

        def terms(images: Tensor) -> Tensor:
            log_pixels, log_codes, codes = self.log_prob_terms(images)
            return torch.cat((log_pixels[:, None], log_codes[:, None], codes.flatten(1)), 1)

        levels = self.quantizer.levels
        patches = self.grid[0] * self.grid[1]
        columns = 2 + patches * len(levels)
        rows = evaluate_sharded(batches, terms, lambda images: None, columns)
        log_pixels, log_codes = rows[:, :2].T
        codes = rows[:, 2:].reshape(-1, len(levels))
        counts = codes.unique(dim=0, return_counts=True)[1]
        entropy = torch.special.entr(counts / len(codes)).sum()
        uniform = patches * math.log2(math.prod(levels)) / self.dimensions
        return self.likelihood_metrics(self.bits_per_dim(log_pixels + log_codes)) | Metrics.of(
            MetricValue(PIXEL_BITS, self.bits_per_dim(log_pixels).mean().item()),
            MetricValue(CODE_BITS, self.bits_per_dim(log_codes).mean().item()),
            MetricValue(UNIFORM_CODE_BITS, uniform),
            MetricValue(CODE_PERPLEXITY, entropy.exp().item()),
        )

    @property
    def has_noise(self) -> bool:
        return False  # the posterior is deterministic

    def diagnostics(self) -> dict[str, float]:
        """Return the perplexity of the codes in recent batches, for "vq"."""
        if not isinstance(self.quantizer, EMACodebook):
            return {}
        usage = self.quantizer.usage
        return {CODE_PERPLEXITY.name: torch.special.entr(usage / usage.sum()).sum().exp().item()}

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
        """Draw codes one by one, then pixel values given the codes.

        The temperature divides the logits of the prior, and multiplies the normal quantiles of the
        pixel values: at 0 the codes are the most probable ones, and the values are medians.

        Args:
            count: Number of images.
            temperature: Temperature of codes and pixel values.
            generator: Random generator, or None for the global one.
            label: The class; None cycles through the classes, if the model has any.
            start_index: Index of the first image in this cycle.

        Returns:
            The images, and their log P(x | c) + log p(c), or log p(c | label), with these codes in
            nats, (count,).
        """
        one_hot = self.one_hot(self.sample_labels(count, label, start_index))
        codes, log_codes = self.prior.sample(count, temperature, generator, one_hot)
        pixels = self.pixel_distribution(self.quantizer.vectors(codes))
        z = torch.randn(
            count, *self.image_shape, generator=generator, device=self.device, dtype=torch.double
        )
        images = pixels.quantile(torch.special.ndtr(temperature * z))
        return images, pixels.log_prob(images).sum((1, 2, 3)) + log_codes

    # Latents

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the vectors of all patches before quantization, (batch, patches * code_dim)."""
        return self.encode_patches(images).flatten(1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the medians of the pixel values given the nearest codes."""
        z = latent.unflatten(1, (-1, self.quantizer.dim))
        pixels = self.pixel_distribution(self.quantizer.vectors(self.quantizer.codes(z)))
        return pixels.quantile(torch.full((len(z), *self.image_shape), 0.5, device=z.device))

    @torch.no_grad()
    def class_latents(self) -> Tensor:
        """Return the mean code vectors of samples of each class, (classes, patches * code_dim)."""
        classes = torch.eye(self.check_classes(), dtype=self.dtype, device=self.device)
        conditions = classes.repeat_interleave(CLASS_SAMPLES, 0)
        generator = torch.Generator(self.device).manual_seed(0)
        codes, _ = self.prior.sample(len(conditions), 1.0, generator, conditions)
        return self.quantizer.vectors(codes).view(len(classes), CLASS_SAMPLES, -1).mean(1)

    # Networks

    def encode_patches(self, images: Tensor) -> Tensor:
        """Return the vectors before quantization, (batch, patches, code_dim), in full precision."""
        x = F.pixel_unshuffle(scale_values(images, self.bins, self.dtype), self.patch)
        outputs = self.encoder(x).flatten(2).transpose(1, 2)
        with torch.autocast(images.device.type, enabled=False):
            return self.quantizer.bound(outputs.to(self.dtype))

    def pixel_distribution(self, vectors: Tensor) -> LogisticMixture:
        """Return P(x | c) for the code vectors of all patches, (batch, patches, code_dim)."""
        x = vectors.transpose(1, 2).unflatten(2, self.grid)
        parameters = F.pixel_shuffle(self.decoder(x), self.patch)
        return LogisticMixture(parameters, self.image_shape[0], self.bits)


def straight_through(z: Tensor, vectors: Tensor) -> Tensor:
    """Return the vectors, with the gradient passed to z."""
    return vectors + (z - z.detach())  # the difference is exactly 0


def check_levels(levels: Sequence[int]) -> list[int]:
    """Return the levels as a list, or raise a UserError if FSQ cannot have them."""
    if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
        raise UserError(
            "fsq_levels must be a list with one number of levels per number of a code vector, as "
            f"in model.fsq_levels=[8,5,5], not {levels!r}"
        )
    for level in levels:
        check_whole(2, MAX_CODES, fsq_levels=level)
    return list(levels)
