"""Bijections that act on each number by itself."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.utils.errors import UserError, check_whole

FAR = 80.0  # where float32's exp(-x) comes to its end


class Logit(Bijection):
    """y = logit(alpha + (1 - 2 alpha) x) for x in [0, 1]; log|dy/dx| = softplus(y) + softplus(-y) + log(1 - 2 alpha).

    Real NVP (1605.08803), section 4.1.
    """

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise UserError(f"alpha must lie between 0 and 0.5, not {alpha!r}")
        self.alpha = alpha

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.logit(self.alpha + (1 - 2 * self.alpha) * x)
        return y, self._log_det(y)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha), -self._log_det(z)

    def _log_det(self, y: Tensor) -> Tensor:
        return (F.softplus(y) + F.softplus(-y) + math.log(1 - 2 * self.alpha)).flatten(1).sum(1)


class EmpiricalCDF(Bijection):
    """Each channel of x in [0, 1) through the distribution function of its own levels, so that it comes out about uniform.

    With p_k the share of level k among n, y = sum of p_i for i < k, plus (n x - k) p_k; log|dy/dx| = log(n p_k). The shares come
    from the batch given to `initialize`, mixed with a tenth of the uniform law so that no level costs too much.
    """

    uniform_share = 0.1
    share: Tensor

    def __init__(self, channels: int, bins: int):
        super().__init__()
        check_whole(channels=channels, bins=bins)
        self.bins = bins
        self.register_buffer("share", torch.full((channels, bins), 1 / bins))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        level = (x * self.bins).floor().clamp(0, self.bins - 1).long()
        share, below = self._look_up(level)
        return below + (x * self.bins - level) * share, self._log_det(share)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        edges = self.share.cumsum(1)
        flat = z.transpose(0, 1).flatten(1).contiguous()
        level = torch.searchsorted(edges, flat, right=True).clamp(max=self.bins - 1)
        level = level.view(z.transpose(0, 1).shape).transpose(0, 1)
        share, below = self._look_up(level)
        return (level + (z - below) / share) / self.bins, -self._log_det(share)

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        level = (x * self.bins).floor().clamp(0, self.bins - 1).long().transpose(0, 1).flatten(1)
        counts = torch.stack(
            [torch.bincount(channel, minlength=self.bins) for channel in level]
        ).to(self.share)
        observed = counts / counts.sum(1, keepdim=True)
        self.share.copy_((1 - self.uniform_share) * observed + self.uniform_share / self.bins)
        return self(x)[0]

    def _look_up(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """The share of each pixel's level and the shares below it, in the shape of `level`."""
        channel = torch.arange(len(self.share), device=level.device).view(
            -1, *[1] * (level.dim() - 2)
        )
        below = self.share.cumsum(1) - self.share
        return self.share[channel, level], below[channel, level]

    def _log_det(self, share: Tensor) -> Tensor:
        return (share * self.bins).log().flatten(1).sum(1)


class MarginalGaussianization(Bijection):
    """Equalize and Logit, where that saves at least a bit for each number; else the identity.

    Digits are mostly black: their pixels' marginal entropy lies far below the bits that they are stored in, and a flow that starts
    there need not learn to stretch one level over most of the real line. Faces use all their levels and are left alone. Laparra et
    al., Iterative Gaussianization (1602.00229), section II.
    """

    worth = 1.0  # bits
    numbers_per_bin = 16
    active: Tensor

    def __init__(self, channels: int, bins: int):
        super().__init__()
        self.equalize, self.logit = EmpiricalCDF(channels, bins), Logit(1e-3)
        self.register_buffer("active", torch.tensor(False))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        uniform, stretch = self.equalize(x)
        z, log_det = self.logit(uniform)
        return torch.where(self.active, z, x), torch.where(self.active, stretch + log_det, 0.0)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        uniform, log_det = self.logit.inverse(z)
        x, stretch = self.equalize.inverse(uniform)
        return torch.where(self.active, x, z), torch.where(self.active, stretch + log_det, 0.0)

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.equalize.initialize(x)
        saved = self.equalize(x)[1].mean() / (x[0].numel() * math.log(2))
        enough = (
            x.transpose(0, 1).flatten(1).shape[1] >= self.numbers_per_bin * self.equalize.bins
        )  # else it would fit the noise
        self.active.copy_((saved > self.worth) & enough)
        return self(x)[0]


class Standardize(Bijection):
    """z = (x - mean) exp(-log_deviation) for each of the `size` numbers of a vector: learnt, as a Gaussian base, or as data started it."""

    supports_reversible = True
    mean: Tensor
    log_deviation: Tensor

    def __init__(self, size: int, learnt: bool = True):
        super().__init__()
        for name in ("mean", "log_deviation"):
            if learnt:
                self.register_parameter(name, nn.Parameter(torch.zeros(size)))
            else:
                self.register_buffer(name, torch.zeros(size))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x - self.mean) * (-self.log_deviation).exp(), -self.log_deviation.sum().expand(
            len(x)
        )

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.addcmul(
            self.mean, z, self.log_deviation.exp()
        ), self.log_deviation.sum().expand(len(z))

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        deviation, mean = torch.std_mean(x, dim=0, correction=0)
        self.mean.copy_(mean)
        self.log_deviation.copy_(
            deviation.clamp(min=0.1 * deviation.mean() + 1e-6).log()
        )  # one batch says little about a quiet pixel
        return self(x)[0]


class LogisticToNormal(Bijection):
    """z = Phi^-1(sigmoid(x)), which turns a standard logistic into a standard normal base. NICE (1410.8516), section 3.4.

    log|dz/dx| = log sigmoid(x) + log sigmoid(-x) + z^2 / 2 + log(2 pi) / 2. Both ways look at the lower tail, where floats are fine;
    beyond |x| = `FAR`, where they end, |z| = sqrt(edge^2 + 2 (|x| - FAR)), as the normal's tail goes on.
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        distance = x.abs()
        near = self._quantile(distance.clamp(max=FAR))
        far = (self._edge(x).square() + 2 * (distance - FAR).clamp(min=0)).sqrt()
        z = torch.where(distance < FAR, near, far) * x.sign()
        return z, self._log_det(x, z)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        edge = self._edge(z)
        near = z.clamp(-edge, edge)
        far = (FAR + (z.square() - edge.square()) / 2) * z.sign()
        x = torch.where(
            z.abs() < edge, torch.special.log_ndtr(near) - torch.special.log_ndtr(-near), far
        )
        return x, -self._log_det(x, z)

    @staticmethod
    def _quantile(distance: Tensor) -> Tensor:
        return -torch.special.ndtri(torch.sigmoid(-distance))

    def _edge(self, x: Tensor) -> Tensor:
        return self._quantile(x.new_tensor(FAR))

    @staticmethod
    def _log_det(x: Tensor, z: Tensor) -> Tensor:
        near = F.logsigmoid(x) + F.logsigmoid(-x) + 0.5 * (z.square() + math.log(2 * math.pi))
        return torch.where(x.abs() < FAR, near, -z.abs().clamp(min=1).log()).flatten(1).sum(1)
