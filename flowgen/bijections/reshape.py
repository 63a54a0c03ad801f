"""Reshapes, permutations, and the split of a multi-scale flow."""

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import Conditioner


class Squeeze(Bijection):
    """Trade resolution for channels: (B, C, H, W) -> (B, f^2 C, H / f, W / f) with f = `factor`.

    Each block of f x f pixels becomes one pixel; for f = 2:

        1 2 | 5 6
        3 4 | 7 8    ->    [1 2 3 4] [5 6 7 8]

    The output has channels-last memory format, which is the fastest for convolutions. Real NVP
    (1605.08803), section 3.6.

    Example:
        >>> z, log_det = Squeeze()(torch.tensor([[[[1, 2, 5, 6], [3, 4, 7, 8]]]]))
        >>> z[0, :, 0, 0], z[0, :, 0, 1]
        (tensor([1, 2, 3, 4]), tensor([5, 6, 7, 8]))
    """

    supports_reversible = True

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # (B, C, H/f, f, W/f, f)
        blocks = x.unflatten(3, (-1, self.factor)).unflatten(2, (-1, self.factor))
        return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # (B, H/f, W/f, C, f, f)
        blocks = z.permute(0, 2, 3, 1).unflatten(3, (-1, self.factor, self.factor))
        return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), z.new_zeros(len(z))


class Flatten(Bijection):
    """Flatten images of the given shape to vectors: (B, C, H, W) -> (B, C * H * W).

    Example:
        >>> flatten = Flatten(3, 4, 4)
        >>> flatten(torch.zeros(5, 3, 4, 4))[0].shape
        torch.Size([5, 48])
        >>> flatten.inverse(torch.zeros(5, 48))[0].shape
        torch.Size([5, 3, 4, 4])
    """

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.unflatten(1, self.shape), z.new_zeros(len(z))


class Roll(Bijection):
    """Shift images down and to the right by a number of pixels, with wrap-around.

    Example:
        >>> Roll(1)(torch.tensor([[[[1, 2], [3, 4]]]]))[0]
        tensor([[[[4, 3],
                  [2, 1]]]])
    """

    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.roll((self.pixels, self.pixels), (2, 3)), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.roll((-self.pixels, -self.pixels), (2, 3)), z.new_zeros(len(z))


class Permute(Bijection):
    """Permute the channels by a fixed random permutation.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = Permute(3)
        >>> x = torch.randn(5, 3, 4, 4)
        >>> z, log_det = bijection(x)
        >>> torch.equal(z, x[:, bijection.order]), torch.equal(bijection.inverse(z)[0], x)
        (True, True)
    """

    def __init__(self, channels: int):
        super().__init__()
        self.order = nn.Buffer(torch.randperm(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.order.argsort()], z.new_zeros(len(z))


class FactorOut(Bijection):
    """Split of a multi-scale flow, after which `inner` transforms half of the channels.

    It maps (batch, channels, height, width) to (batch, channels * height * width). The output is
    the output of `inner` for the first half x_in of the channels, followed by the latents z_out of
    the second half x_out. Without a network, z_out = x_out. With a network,
    z_out = (x_out - mean) exp(-log_std), where the network predicts the mean and the
    logarithm of the standard deviation from x_in and the condition. Real NVP (1605.08803), section
    3.6; Glow (1807.03039), section 3.

    Args:
        inner: Bijection from the first half of the channels to vectors (batch, values).
        network: Conditioner with `channels` output channels, or None.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = FactorOut(Flatten(2, 4, 4))
        >>> x = torch.randn(5, 4, 4, 4)
        >>> z, log_det = bijection(x)
        >>> z.shape, torch.equal(bijection.inverse(z)[0], x)
        (torch.Size([5, 64]), True)
    """

    def __init__(self, inner: Bijection, network: Conditioner | None = None):
        super().__init__()
        self.inner = inner
        self.network = network

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_in, x_out = x.chunk(2, dim=1)
        z_out, change = self._standardize(x_out, x_in, condition)
        z_in, log_det = self.inner(x_in, condition)
        return torch.cat([z_in, z_out.flatten(1)], dim=1), log_det + change

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z_in, z_out = z.chunk(2, dim=1)
        x_in, log_det = self.inner.inverse(z_in, condition)
        x_out = z_out.view(x_in.shape)
        if self.network is not None:
            mean, log_std = self._predict(self.network, x_in, condition)
            x_out = torch.addcmul(mean, x_out, log_std.exp())
            log_det = log_det + log_std.flatten(1).sum(1)
        return torch.cat([x_in, x_out], dim=1), log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x_in, x_out = x.chunk(2, dim=1)
        if self.network is not None:
            self.network.initialize(concat_condition(x_in, condition))
        z_out, _ = self._standardize(x_out, x_in, condition)
        return torch.cat([self.inner.initialize(x_in, condition), z_out.flatten(1)], dim=1)

    def _standardize(
        self, x_out: Tensor, x_in: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.network is None:
            return x_out, x_out.new_zeros(len(x_out))
        mean, log_std = self._predict(self.network, x_in, condition)
        return (x_out - mean) * (-log_std).exp(), -log_std.flatten(1).sum(1)

    @staticmethod
    def _predict(
        network: Conditioner, x_in: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the mean and the logarithm of the standard deviation of x_out."""
        # Without autocast, because bfloat16 is too coarse for a term of the likelihood.
        with torch.autocast(x_in.device.type, enabled=False):
            return network(concat_condition(x_in, condition)).chunk(2, dim=1)
