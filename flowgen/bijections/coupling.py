"""Coupling layers: a network reads one part of the input and transforms the other."""

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import Conditioner, batch_norm_layers, has_dropout
from flowgen.bijections.univariate import Transform


class Coupling(Bijection):
    """Coupling of the two halves of the channels: z_a = h(x_a; network(x_b, condition)), z_b = x_b.

    x_a is the first half of the channels and x_b the second. log|det| is the sum of log h' over
    x_a. Glow (1807.03039), table 1.

    Args:
        network: Maps the channels of x_b, and those of the condition, to
            `transform.num_params` times the channels of x_a.
        transform: The univariate transform h.

    Example:
        >>> from flowgen.bijections.networks import ConvNetwork
        >>> from flowgen.bijections.univariate import Affine
        >>> _ = torch.manual_seed(0)
        >>> coupling = Coupling(ConvNetwork(2, 16, 4), Affine())
        >>> x = torch.randn(5, 4, 8, 8)
        >>> z, log_det = coupling(x)
        >>> torch.allclose(coupling.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, network: Conditioner, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        z_a, log_slope = self.transform.forward(a, self._params(b, condition))
        return torch.cat([z_a, b], dim=1), log_slope.flatten(1).sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z_a, b = z.chunk(2, dim=1)
        a, log_slope = self.transform.inverse(z_a, self._params(b, condition))
        return torch.cat([a, b], dim=1), log_slope.flatten(1).sum(1)

    @property
    def supports_reversible(self) -> bool:  # type: ignore[override]
        return (
            self.transform.supports_reversible
            and not batch_norm_layers(self.network)
            and not has_dropout(self.network)
        )

    def invert_and_recompute(
        self, z: Tensor, condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        # One pass of the network serves both directions, because z_b = x_b.
        z_a, b = z.detach().chunk(2, dim=1)
        b.requires_grad_()
        params = self._params(b, condition)
        with torch.no_grad():
            a, _ = self.transform.inverse(z_a, params)
        a.requires_grad_()
        z_a, log_slope = self.transform.forward(a, params)
        return (a, b), torch.cat([z_a, b], dim=1), log_slope.flatten(1).sum(1)

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.network.initialize(concat_condition(x.chunk(2, dim=1)[1], condition))
        return self(x, condition)[0]

    def _params(self, b: Tensor, condition: Tensor | None) -> Tensor:
        return self.network(concat_condition(b, condition)).to(b.dtype)


class MaskedCoupling(Bijection):
    """Coupling by a mask: z = h(x; network(mask x, condition)) where the mask is 0, else z = x.

    log|det| is the sum of log h' where the mask is 0. Real NVP (1605.08803), sections 3.4 and 3.5.

    Args:
        network: Maps the channels of x, and those of the condition, to `transform.num_params`
            times the channels of x.
        transform: The univariate transform h.
        mask: Mask (channels, height, width), as from `checkerboard`.

    Example:
        >>> from flowgen.bijections.networks import ConvNetwork
        >>> from flowgen.bijections.univariate import Affine
        >>> _ = torch.manual_seed(0)
        >>> mask = checkerboard(1, 8, 8, odd=False)
        >>> coupling = MaskedCoupling(ConvNetwork(1, 16, 2), Affine(), mask)
        >>> x = torch.randn(5, 1, 8, 8)
        >>> z, log_det = coupling(x)
        >>> torch.allclose(coupling.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, network: Conditioner, transform: Transform, mask: Tensor):
        super().__init__()
        self.network = network
        self.transform = transform
        self.mask = nn.Buffer(mask.bool().contiguous(), persistent=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self._params(x, condition))
        return torch.where(self.mask, x, z), torch.where(self.mask, 0.0, log_slope).flatten(1).sum(
            1
        )

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.transform.inverse(z, self._params(z, condition))
        return torch.where(self.mask, z, x), torch.where(self.mask, 0.0, log_slope).flatten(1).sum(
            1
        )

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.network.initialize(self._network_input(x, condition))
        return self(x, condition)[0]

    def _params(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.network(self._network_input(x, condition)).to(x.dtype)

    def _network_input(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return concat_condition(torch.where(self.mask, x, 0.0), condition)


def checkerboard(channels: int, height: int, width: int, odd: bool) -> Tensor:
    """Return a mask that is 1 where row + column is even, or odd, in every channel.

    Example:
        >>> checkerboard(1, 2, 3, odd=False).int()
        tensor([[[1, 0, 1],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    row_plus_column = torch.arange(height)[:, None] + torch.arange(width)
    return (row_plus_column % 2 == int(odd)).expand(channels, -1, -1)


def channelwise(channels: int, height: int, width: int, second: bool) -> Tensor:
    """Return a mask that is 1 in the first half of the channels, or in the second half.

    Example:
        >>> channelwise(2, 1, 3, second=True).int()
        tensor([[[0, 0, 0]],
        <BLANKLINE>
                [[1, 1, 1]]], dtype=torch.int32)
    """
    in_second_half = torch.arange(channels) >= channels // 2
    return (in_second_half == second)[:, None, None].expand(-1, height, width)


def stripes(channels: int, height: int, width: int, odd: bool) -> Tensor:
    """Return a mask that is 1 in the even columns, or in the odd columns, in every channel.

    Example:
        >>> stripes(1, 2, 3, odd=False).int()
        tensor([[[1, 0, 1],
                 [1, 0, 1]]], dtype=torch.int32)
    """
    return (torch.arange(width) % 2 == int(odd)).expand(channels, height, -1)
