"""Bijections that are affine in the channels and alike at every pixel: y = M x + c."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection


class ChannelAffine(Bijection):
    """y = M x + c at each of the H*W pixels, log|det| = H W log|det M|.

    Subclasses say what M and c are. Everything here stays out of autocast: a log-det in bfloat16 is no log-det.
    """

    supports_reversible = True

    @abstractmethod
    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        """M of shape (C, C), c of shape (C,), and the scalar log|det M|."""

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return _forward(x, *self.affine())

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            matrix, shift, log_det = self.affine()
            return _undo(z, matrix, shift), (-log_det * z[0, 0].numel()).expand(len(z))

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            matrix, shift, log_det = self.affine()
            x = _undo(z, matrix.detach(), shift.detach()).requires_grad_()
            return (x,), *_forward(x, matrix, shift, log_det)


class FusedAffine(ChannelAffine):
    """Channel-affine bijections one after the other, multiplied out beforehand so that the pixels are visited once."""

    def __init__(self, *bijections: ChannelAffine):
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        matrix, shift, log_det = self.bijections[0].affine()  # type: ignore[operator]
        for bijection in list(self.bijections)[1:]:
            next_matrix, next_shift, change = bijection.affine()  # type: ignore[operator]
            matrix, shift, log_det = (
                next_matrix @ matrix,
                next_matrix @ shift + next_shift,
                log_det + change,
            )
        return matrix, shift, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for bijection in self.bijections:
            x = bijection.initialize(x)  # type: ignore[operator]
        return x


class Invertible1x1(ChannelAffine):
    """An invertible 1x1 convolution that starts as a rotation: a random one, or the principal axes of a batch.

    `initialize` turns the batch's channels into uncorrelated ones, in random order, which spares the couplings the first hundreds of
    steps. Glow (1807.03039), section 3.2; Laparra et al., Iterative Gaussianization (1602.00229).
    """

    shift: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels), persistent=False)

    @abstractmethod
    def rotate(self, rotation: Tensor) -> None:
        """Start from this orthogonal matrix, (C, C)."""

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        pixels = x.transpose(0, 1).flatten(1).double()  # (C, B*H*W)
        if pixels.shape[1] >= 16 * len(
            pixels
        ):  # fewer would show variances of zero where there are none
            axes = torch.linalg.eigh(torch.cov(pixels)).eigenvectors.T
            self.rotate(axes[torch.randperm(len(axes), device=axes.device)].to(x.dtype))
        return self(x)[0]


class InvertibleConv1x1(Invertible1x1):
    """A 1x1 convolution with a plain matrix W, and log|det W| at the cost of its LU factorisation."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.weight = nn.Parameter(_random_rotation(channels))

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        self.weight.copy_(rotation)

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.shift, torch.linalg.slogdet(self.weight).logabsdet


class InvertibleConv1x1LU(Invertible1x1):
    """A 1x1 convolution W = P L (U + diag(s)), so that log|det W| = sum log|s| costs nothing.

    P is a fixed permutation, L unit lower and U strictly upper triangular; s keeps its signs. Glow (1807.03039), equation 10.
    """

    permutation: Tensor
    sign: Tensor
    identity: Tensor

    def __init__(self, channels: int):
        super().__init__(channels)
        self.lower = nn.Parameter(torch.empty(channels, channels))
        self.upper = nn.Parameter(torch.empty(channels, channels))
        self.log_s = nn.Parameter(torch.empty(channels))
        self.register_buffer("permutation", torch.empty(channels, channels))
        self.register_buffer("sign", torch.empty(channels))
        self.register_buffer("identity", torch.eye(channels), persistent=False)
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


def _forward(x: Tensor, matrix: Tensor, shift: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    return _apply(x, matrix, shift), (log_det * x[0, 0].numel()).expand(len(x))


def _undo(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    inverse = torch.linalg.inv(
        matrix.double()
    )  # in float64: this error would be multiplied by every later layer
    return _apply(z, inverse.to(z.dtype), -(inverse @ shift.double()).to(z.dtype))


def _apply(x: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    if x.dim() == 2:
        return F.linear(x, matrix, shift)
    return F.conv2d(x, matrix[:, :, None, None], shift)


def _random_rotation(channels: int) -> Tensor:
    rotation, triangular = torch.linalg.qr(torch.randn(channels, channels))
    return (
        rotation * triangular.diagonal().sign()
    )  # the signs make it uniform over the orthogonal group
