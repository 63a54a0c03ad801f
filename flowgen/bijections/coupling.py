"""Coupling layers, in which a network reads one part of the input and transforms the other."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import Conditioner, batch_norm_layers, has_dropout
from flowgen.bijections.univariate import Transform

# `Transform.forward` or `Transform.inverse`: values and parameters to values and log-slopes.
TransformFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CouplingBase(Bijection):
    """Base class of couplings.

    One part of x passes through unchanged. The network computes from it, and from the condition,
    the parameters of the transform h for the rest.

    Args:
        network: Conditioner of the part of the input that stays unchanged and of the condition.
        transform: Univariate transform h.
    """

    def __init__(self, network: Conditioner, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.transform.forward, x, condition)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.transform.inverse, z, condition)

    def init_from_data(self, x: Tensor, condition: Tensor | None = None) -> None:
        self.network.initialize(concat_condition(self._unchanged(x), condition))

    @abstractmethod
    def _unchanged(self, x: Tensor) -> Tensor:
        """Return the part of the input that the network reads."""

    @abstractmethod
    def _map(
        self, function: TransformFunction, x: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply a direction of the transform to the rest of the input."""

    def _params(self, part: Tensor, condition: Tensor | None) -> Tensor:
        return self.network(concat_condition(part, condition)).to(part.dtype)


class Coupling(CouplingBase):
    """Coupling of the two halves of the channels: z_a = h(x_a; network(x_b, condition)), z_b = x_b.

    x_a is the first half of the channels and x_b the second half. log|det| is the sum of log h'
    over x_a. Glow (1807.03039), table 1.

    Args:
        network: Conditioner that maps the channels of x_b, and of the condition, to
            `transform.num_params` times the channels of x_a.
        transform: Univariate transform h.

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
        # One network call serves both directions, because z_b = x_b.
        z_a, b = z.detach().chunk(2, dim=1)
        b.requires_grad_()
        params = self._params(b, condition)
        with torch.no_grad():
            a = self.transform.inverse(z_a, params)[0].requires_grad_()
        z_a, log_slope = self.transform.forward(a, params)
        return (a, b), torch.cat([z_a, b], dim=1), log_slope.flatten(1).sum(1)

    def _unchanged(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[1]

    def _map(
        self, function: TransformFunction, x: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=1)
        a, log_slope = function(a, self._params(b, condition))
        return torch.cat([a, b], dim=1), log_slope.flatten(1).sum(1)


class MaskedCoupling(CouplingBase):
    """Coupling by a mask: z = x where the mask is 1, else z = h(x; network(mask x, condition)).

    log|det| is the sum of log h' where the mask is 0. Real NVP (1605.08803), sections 3.4 and 3.5.

    Args:
        network: Conditioner that maps the channels of x, and of the condition, to
            `transform.num_params` times the channels of x.
        transform: Univariate transform h.
        mask: Mask of shape (channels, height, width), such as `checkerboard`.

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
        super().__init__(network, transform)
        self.mask = nn.Buffer(mask.bool().contiguous(), persistent=False)

    def _unchanged(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0)

    def _map(
        self, function: TransformFunction, x: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, log_slope = function(x, self._params(self._unchanged(x), condition))
        log_det = torch.where(self.mask, 0.0, log_slope).flatten(1).sum(1)
        return torch.where(self.mask, x, y), log_det


def checkerboard(channels: int, height: int, width: int, odd: bool) -> Tensor:
    """Return a mask that selects even values of row + column in all channels.

    Args:
        channels: Channels of the mask.
        height: Its height.
        width: Its width.
        odd: Whether to select odd values of row + column.

    Example:
        >>> checkerboard(1, 2, 3, odd=False).int()
        tensor([[[1, 0, 1],
                 [0, 1, 0]]], dtype=torch.int32)
    """
    parity = (torch.arange(height)[:, None] + torch.arange(width)) % 2
    return (parity == int(odd)).expand(channels, -1, -1)


def channelwise(channels: int, height: int, width: int, second: bool) -> Tensor:
    """Return a mask that selects the first half of the channels.

    Args:
        channels: Channels of the mask.
        height: Its height.
        width: Its width.
        second: Whether to select the second half.

    Example:
        >>> channelwise(2, 1, 3, second=True).int()
        tensor([[[0, 0, 0]],
        <BLANKLINE>
                [[1, 1, 1]]], dtype=torch.int32)
    """
    in_second_half = torch.arange(channels) >= channels // 2
    return (in_second_half == second)[:, None, None].expand(-1, height, width)


def stripes(channels: int, height: int, width: int, odd: bool) -> Tensor:
    """Return a mask that selects even columns in all channels.

    Args:
        channels: Channels of the mask.
        height: Its height.
        width: Its width.
        odd: Whether to select odd columns.

    Example:
        >>> stripes(1, 2, 3, odd=False).int()
        tensor([[[1, 0, 1],
                 [1, 0, 1]]], dtype=torch.int32)
    """
    return (torch.arange(width) % 2 == int(odd)).expand(channels, height, -1)
