"""Autoregressive bijections of vectors: each number is transformed by what a masked network reads off those before it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, beside
from flowgen.bijections.transforms.base import Transform
from flowgen.progress import Progress, unseen


class MaskedLinear(nn.Linear):
    """A linear layer whose output unit i sees input unit j only where `allowed[i, j]`."""

    mask: Tensor

    def __init__(self, allowed: Tensor):
        super().__init__(allowed.shape[1], allowed.shape[0])
        self.register_buffer("mask", allowed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.seen(), self.bias)

    def seen(self) -> Tensor:
        return self.weight * self.mask


class MADE(nn.Module):
    """(batch, size) -> (batch, count * size), the parameters of number t from numbers before t alone. Germain et al. (1502.03509).

    All of them see the `seen_by_all` numbers of a condition, which stand behind the others. The last layer starts at zero.
    """

    def __init__(self, size: int, width: int, layers: int, count: int, seen_by_all: int = 0):
        super().__init__()
        self.size, self.count = size, count
        numbers = torch.arange(size)
        first = -1 if seen_by_all else 0  # units of -1 see the condition alone, for the first number
        hidden = torch.linspace(first, max(size - 2, first), width).round().long()  # spread over all numbers, however few the units
        self.first = MaskedLinear(F.pad(hidden[:, None] >= numbers, (0, seen_by_all), value=True))
        self.middle = nn.ModuleList(MaskedLinear(hidden[:, None] >= hidden) for _ in range(layers - 1))
        self.last = MaskedLinear((numbers[:, None] > hidden).repeat(count, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.middle:
            x = layer(x.relu())
        return self.last(x.relu())

    def one_by_one(
        self,
        choose: Callable[[int, Tensor], Tensor],
        batch: int,
        condition: Tensor | None = None,
        progress: Progress = unseen,
    ) -> Tensor:
        """The numbers (batch, size) of which each is `choose(t, parameters)`, of shape (batch, 1), by its own (batch, count).

        The first layer's sums grow by one number at a time, and the last layer gives the parameters of that number alone.
        """
        first, last = self.first.seen(), self.last.seen().view(self.count, self.size, -1)
        middle: list[tuple[Tensor, Tensor]] = [(layer.seen(), layer.bias) for layer in self.middle]  # type: ignore[operator, misc]
        sums, bias, numbers = self.first.bias.expand(batch, -1), self.last.bias.view(self.count, self.size), []
        if condition is not None:
            sums = sums + F.linear(condition.to(sums.dtype), first[:, self.size :])
        for t in progress(range(self.size), "one number after the other"):
            x = sums.relu()
            for weight, shift in middle:
                x = F.linear(x, weight, shift).relu()
            numbers.append(choose(t, F.linear(x, last[:, t], bias[:, t])))
            sums = torch.addcmul(sums, numbers[-1].to(sums.dtype), first[:, t])
        return torch.cat(numbers, 1)


class Autoregressive(Bijection):
    """z_t = h(x_t; network(x_<t, condition)): all at once from data to latent, one after the other back. MAF (1705.07057), section 3.1."""

    progress: Progress = staticmethod(unseen)

    def __init__(self, network: MADE, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.network(beside(x, condition)).to(x.dtype))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_slopes = []

        def choose(t: int, parameters: Tensor) -> Tensor:
            x, log_slope = self.transform.inverse(z[:, t : t + 1], parameters.to(z.dtype))
            log_slopes.append(log_slope)
            return x

        x = self.network.one_by_one(choose, len(z), condition, self.progress)
        return x, torch.cat(log_slopes, 1).sum(1)


class Reverse(Bijection):
    """Numbers, or channels, in reverse order."""

    recoverable = True

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(z)


class Inverse(Bijection):
    """Another bijection, the other way round; IAF is the inverse of MAF. Kingma et al. (1606.04934)."""

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, condition)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, condition)
