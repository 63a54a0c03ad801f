"""Affine maps of the channels that are the same at every pixel: ActNorm and 1x1 convolutions."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.bijections.networks import MIN_DEVIATION

# Pixels per channel that `Invertible1x1.initialize` needs. The covariance of fewer pixels would
# have eigenvalues near zero where the data has variance.
MIN_PIXELS_PER_CHANNEL = 16


class ChannelAffine(Bijection):
    """Base class of affine maps of the channels: z = M x + c at each pixel.

    log|det| = height * width * log|det M|. Subclasses define M and c. Inputs are (batch, channels)
    or (batch, channels, height, width). All computations stay in float32 under autocast, because
    bfloat16 is too coarse for a log-determinant.
    """

    supports_reversible = True

    @abstractmethod
    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return M (channels, channels), c (channels,) and the scalar log|det M|."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return self._forward(x, *self.affine())

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            matrix, shift, log_det = self.affine()
            x = self._inverse(z, matrix, shift)
            return x, (-log_det * z[0, 0].numel()).expand(len(z))

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            matrix, shift, log_det = self.affine()
            x = self._inverse(z, matrix.detach(), shift.detach()).requires_grad_()
            return (x,), *self._forward(x, matrix, shift, log_det)

    @staticmethod
    def _forward(
        x: Tensor, matrix: Tensor, shift: Tensor, log_det: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = _apply_affine(x, matrix, shift)
        return z, (log_det * x[0, 0].numel()).expand(len(x))

    @staticmethod
    def _inverse(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
        # In float64, because the layers that follow amplify this error.
        inverse = torch.linalg.inv(matrix.double())
        return _apply_affine(z, inverse.to(z.dtype), -(inverse @ shift.double()).to(z.dtype))


def _apply_affine(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    if x.dim() == 2:
        return F.linear(x, matrix, shift)
    return F.conv2d(x, matrix[:, :, None, None], shift)


class ActNorm(ChannelAffine):
    """Scale and shift of each channel: z = exp(log_scale) x + shift.

    log|det| = height * width * sum(log_scale). `initialize` sets both parameters so that every
    channel of the output has zero mean and unit variance. The parameter is the logarithm because
    a scale could cross zero. Glow (1807.03039), section 3.1.

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

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        deviation, mean = torch.std_mean(x.transpose(0, 1).flatten(1), dim=1)
        self.log_scale.copy_(-deviation.clamp(min=MIN_DEVIATION).log())
        self.shift.copy_(-mean * self.log_scale.exp())
        return self(x)[0]


class FusedAffine(ChannelAffine):
    """A chain of channel-affine bijections, multiplied out so that the pixels are read once.

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

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for bijection in self.bijections:
            x = bijection.initialize(x)  # type: ignore[operator]
        return x


class Invertible1x1(ChannelAffine):
    """Base class of invertible 1x1 convolutions, which start as a random rotation.

    `initialize` replaces it by the principal axes of a batch, in random order: the channels of the
    output are uncorrelated, which saves the couplings the first hundreds of optimizer steps.
    Glow (1807.03039), section 3.2; Laparra et al., Iterative Gaussianization (1602.00229).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Buffer(torch.zeros(channels), persistent=False)

    @abstractmethod
    def rotate(self, rotation: Tensor) -> None:
        """Set the matrix to this orthogonal one, (channels, channels)."""

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        pixels = x.transpose(0, 1).flatten(1).double()  # (channels, batch * height * width)
        if pixels.shape[1] >= MIN_PIXELS_PER_CHANNEL * len(pixels):
            axes = torch.linalg.eigh(torch.cov(pixels)).eigenvectors.T
            self.rotate(axes[torch.randperm(len(axes), device=axes.device)].to(x.dtype))
        return self(x)[0]


class InvertibleConv1x1(Invertible1x1):
    """A 1x1 convolution with a dense matrix W, whose log|det W| costs an LU factorization.

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
    def rotate(self, rotation: Tensor) -> None:
        self.weight.copy_(rotation)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.shift, torch.linalg.slogdet(self.weight).logabsdet


class InvertibleConv1x1LU(Invertible1x1):
    """A 1x1 convolution with W = P L (U + diag(s)), so that log|det W| = sum(log|s|).

    P is a fixed permutation, L is unit lower triangular, U is strictly upper triangular, and s
    keeps its signs. Glow (1807.03039), equation 10.

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
        self.rotate(_random_rotation(channels))

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.permutation.copy_(permutation)
        self.lower.copy_(lower.tril(-1))
        self.upper.copy_(upper.triu(1))
        self.log_s.copy_(diagonal.abs().log())
        self.sign.copy_(diagonal.sign())

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        lower = self.lower.tril(-1) + self.identity
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())
        return self.permutation @ lower @ upper, self.shift, self.log_s.sum()


def _random_rotation(channels: int) -> Tensor:
    """Return a random orthogonal matrix, uniform under the Haar measure."""
    rotation, triangular = torch.linalg.qr(torch.randn(channels, channels))
    return rotation * triangular.diagonal().sign()
