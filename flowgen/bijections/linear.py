"""Affine maps of the channels: ActNorm, invertible 1x1 convolutions and batch normalization."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, Chain
from flowgen.bijections.networks import MIN_STD, batch_norm_layers, temporary_attributes

# Pixels per channel that `Invertible1x1.init_from_data` needs. The covariance of fewer pixels would
# have eigenvalues near zero where the data has variance.
MIN_PIXELS_PER_CHANNEL = 16


class ChannelAffine(Bijection):
    """Base class of affine maps of the channels: z = M x + c at each pixel.

    log|det| = height * width * log|det M|. Subclasses define M and c. Inputs have shape (batch,
    channels) or (batch, channels, height, width). Autocast is disabled, because bfloat16 is too
    coarse for a log-det.
    """

    supports_reversible = True

    @abstractmethod
    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return M of shape (channels, channels), c of shape (channels,), and log|det M|."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return _apply(x, *self.affine())

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            return _apply(z, *_invert(*self.affine()))

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            affine = self.affine()  # serves both directions
            with torch.no_grad():
                x = _apply(z, *_invert(*affine))[0].requires_grad_()
            return (x,), *_apply(x, *affine)


def _apply(x: Tensor, matrix: Tensor, shift: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """Return M x + c at each pixel, and its log-det of shape (batch,)."""
    log_det = (log_det * x[0, 0].numel()).expand(len(x))
    if x.dim() == 2:
        return F.linear(x, matrix, shift), log_det
    return F.conv2d(x, matrix[:, :, None, None], shift), log_det


def _invert(matrix: Tensor, shift: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return matrix, shift and log-det of the inverse map."""
    # In float64, because later layers amplify the error.
    inverse = torch.linalg.inv(matrix.double())
    return inverse.to(matrix.dtype), -(inverse @ shift.double()).to(shift.dtype), -log_det


class ActNorm(ChannelAffine):
    """Scale and shift of each channel: z = exp(log_scale) x + shift.

    log|det| = height * width * sum(log_scale). `init_from_data` sets both parameters so that every
    channel of the output has zero mean and unit variance. The parameter is the logarithm of the
    scale, because the scale itself could cross zero. Glow (1807.03039), section 3.1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = ActNorm(3)
        >>> x = 5 + 2 * torch.randn(16, 3, 4, 4)
        >>> z = bijection.initialize(x)
        >>> bool(z.mean((0, 2, 3)).abs().max() < 1e-5)
        True
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.diag(self.log_scale.exp()), self.shift, self.log_scale.sum()

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        std, mean = torch.std_mean(x.transpose(0, 1).flatten(1), dim=1, correction=0)
        self.log_scale.copy_(-std.clamp(min=MIN_STD).log())
        self.shift.copy_(-mean * self.log_scale.exp())


class FusedAffine(ChannelAffine):
    """A composition of affine maps of the channels, multiplied out into a single map.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = FusedAffine(ActNorm(3), InvertibleConv1x1LU(3))
        >>> x = torch.randn(5, 3, 4, 4)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, *bijections: ChannelAffine):
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        matrix, shift, log_det = self.bijections[0].affine()  # type: ignore[operator]
        for bijection in list(self.bijections)[1:]:
            next_matrix, next_shift, change = bijection.affine()  # type: ignore[operator]
            matrix = next_matrix @ matrix
            shift = next_matrix @ shift + next_shift
            log_det = log_det + change
        return matrix, shift, log_det

    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return Chain(*self.bijections).initialize(x)


class Invertible1x1(ChannelAffine):
    """Base class of invertible 1x1 convolutions, which start as a random rotation.

    `init_from_data` replaces the rotation with the principal axes of a batch, in random order. The
    channels of the output are then uncorrelated, which saves hundreds of optimizer steps at the
    start. Glow (1807.03039), section 3.2; Laparra et al., Iterative Gaussianization (1602.00229).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Buffer(torch.zeros(channels), persistent=False)

    @abstractmethod
    def set_rotation(self, rotation: Tensor) -> None:
        """Set the matrix to an orthogonal matrix of shape (channels, channels)."""

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        pixels = x.transpose(0, 1).flatten(1).double()  # (channels, batch * height * width)
        if pixels.shape[1] >= MIN_PIXELS_PER_CHANNEL * len(pixels):
            axes = torch.linalg.eigh(torch.cov(pixels)).eigenvectors.T
            self.set_rotation(axes[torch.randperm(len(axes), device=axes.device)].to(x.dtype))


class InvertibleConv1x1(Invertible1x1):
    """A 1x1 convolution with a dense matrix W, whose log-det needs an LU factorization.

    Glow (1807.03039), section 3.2.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = InvertibleConv1x1(3)
        >>> x = torch.randn(5, 3, 4, 4)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Parameter(_random_rotation(channels))

    @torch.no_grad()
    def set_rotation(self, rotation: Tensor) -> None:
        self.weight.copy_(rotation)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.shift, torch.linalg.slogdet(self.weight).logabsdet


class InvertibleConv1x1LU(Invertible1x1):
    """A 1x1 convolution with W = P L (U + diag(s)), so that log|det W| = sum(log|s|).

    P is a fixed permutation, L is unit lower triangular, U is strictly upper triangular, and the
    signs of s are fixed. Glow (1807.03039), equation 10.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = InvertibleConv1x1LU(3)
        >>> x = torch.randn(5, 3, 4, 4)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.lower = nn.Parameter(torch.empty(channels, channels))
        self.upper = nn.Parameter(torch.empty(channels, channels))
        self.log_s = nn.Parameter(torch.empty(channels))
        self.permutation = nn.Buffer(torch.empty(channels, channels))
        self.sign = nn.Buffer(torch.empty(channels))
        self.identity = nn.Buffer(torch.eye(channels), persistent=False)
        self.set_rotation(_random_rotation(channels))

    def set_rotation(self, rotation: Tensor) -> None:
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.load_state_dict(
            {
                "permutation": permutation,
                "lower": lower.tril(-1),
                "upper": upper.triu(1),
                "log_s": diagonal.abs().log(),
                "sign": diagonal.sign(),
            }
        )

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        lower = self.lower.tril(-1) + self.identity
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())
        return self.permutation @ lower @ upper, self.shift, self.log_s.sum()


def _random_rotation(channels: int) -> Tensor:
    """Return a random orthogonal matrix, uniform under the Haar measure."""
    rotation, triangular = torch.linalg.qr(torch.randn(channels, channels))
    return rotation * triangular.diagonal().sign()


class BatchNorm(Bijection):
    """Batch normalization as a bijection: z = (x - mean) / sqrt(variance + eps) per channel.

    log|det| = -height * width / 2 * sum(log(variance + eps)). Real NVP (1605.08803), section 3.7.

    In training mode, mean and variance are those of the batch. The output for an image then depends
    on the other images, so log-likelihoods are not exact. In evaluation mode, and for the inverse,
    mean and variance are running averages, in which a new batch has the weight `momentum`.

    x and z have shape (batch, channels) or (batch, channels, height, width).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = BatchNorm(3)
        >>> x = 5 + 2 * torch.randn(64, 3)
        >>> z = bijection.initialize(x)
        >>> bool(z.mean(0).abs().max() < 1e-5)
        True
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    eps = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        self.momentum = 0.1
        self.mean = nn.Buffer(torch.zeros(channels))
        self.variance = nn.Buffer(torch.ones(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self._normalize(x, self.mean, self.variance)
        mean, variance, count = self.batch_moments(x)
        if count < 2:
            # The message of the batch norm layers of torch.
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size {tuple(x.shape)}"
            )
        self.mean.lerp_(mean.detach(), self.momentum)
        self.variance.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        return self._normalize(x, mean, variance)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_std = 0.5 * (self.variance + self.eps).log()
        x = torch.addcmul(_per_channel(self.mean, z), z, _per_channel(log_std.exp(), z))
        return x, (log_std.sum() * z[0, 0].numel()).expand(len(z))

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        mean, variance, _ = self.batch_moments(x)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        return self._normalize(x, mean, variance)[0]

    def batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the batch statistics that `forward` uses in training mode.

        Subclasses for training in several processes override this method.

        Returns:
            Mean and biased variance, each of shape (channels,), and the number of values per
            channel.
        """
        values = x.transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        return mean, variance, values.shape[1]

    def reset_running_stats(self) -> None:
        """Reset the running statistics, as in the batch norm layers of torch."""
        self.mean.zero_()
        self.variance.fill_(1.0)

    def _normalize(self, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        log_std = 0.5 * (variance + self.eps).log()
        z = (x - _per_channel(mean, x)) * _per_channel((-log_std).exp(), x)
        return z, -(log_std.sum() * x[0, 0].numel()).expand(len(x))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values of shape (channels,) so that they broadcast over x."""
    return values.view(-1, *[1] * (x.dim() - 2))


@torch.no_grad()
def update_bn(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
    """Set the running statistics of all batch norm layers to their means over `batches`.

    Running averages lag behind the weights during training, and averaged weights have no running
    averages. Unlike `torch.optim.swa_utils.update_bn`, this function supports batches of several
    arguments and `BatchNorm`. Izmailov et al. (1803.05407), section 3.2.

    Args:
        model: Model whose statistics are updated. Without batch norm layers, no batch is drawn.
        batches: Positional arguments of `model`, one tuple per batch.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = BatchNorm(1)
        >>> update_bn(bijection, [(torch.tensor([[1.0], [3.0]]),), (torch.tensor([[3.0], [5.0]]),)])
        >>> bijection.mean.item()
        3.0
    """
    layers = batch_norm_layers(model)
    if not layers:
        return
    for layer in layers:
        layer.reset_running_stats()
    with temporary_attributes(model.modules(), training=True):
        for index, batch in enumerate(batches, start=1):
            with temporary_attributes(layers, momentum=1 / index):  # gives batches equal weights
                model(*batch)
