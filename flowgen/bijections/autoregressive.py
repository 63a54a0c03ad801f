"""Autoregressive bijections of vectors: each number is transformed by what a masked network reads off those before it."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import CausalTransformer, zero_linear
from flowgen.bijections.univariate import Transform
from flowgen.utils.console import Progress, no_progress


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
        first = (
            -1 if seen_by_all else 0
        )  # units of -1 see the condition alone, for the first number
        hidden = (
            torch.linspace(first, max(size - 2, first), width).round().long()
        )  # spread over all numbers, however few the units
        self.first = MaskedLinear(F.pad(hidden[:, None] >= numbers, (0, seen_by_all), value=True))
        self.middle = nn.ModuleList(
            MaskedLinear(hidden[:, None] >= hidden) for _ in range(layers - 1)
        )
        self.last = MaskedLinear((numbers[:, None] > hidden).repeat(count, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.middle:
            x = layer(x.relu())
        return self.last(x.relu())

    def sample_sequentially(
        self,
        choose: Callable[[int, Tensor], Tensor],
        batch: int,
        condition: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> Tensor:
        """The numbers (batch, size) of which each is `choose(t, parameters)`, of shape (batch, 1), by its own (batch, count).

        The first layer's sums grow by one number at a time, and the last layer gives the parameters of that number alone.
        """
        first, last = self.first.seen(), self.last.seen().view(self.count, self.size, -1)
        middle: list[tuple[Tensor, Tensor]] = [(layer.seen(), layer.bias) for layer in self.middle]  # type: ignore[operator, misc]
        sums, bias, numbers = (
            self.first.bias.expand(batch, -1),
            self.last.bias.view(self.count, self.size),
            [],
        )
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

    progress: Progress = staticmethod(no_progress)

    def __init__(self, network: MADE, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(
            x, self.network(concat_condition(x, condition)).to(x.dtype)
        )
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_slopes = []

        def choose(t: int, parameters: Tensor) -> Tensor:
            x, log_slope = self.transform.inverse(z[:, t : t + 1], parameters.to(z.dtype))
            log_slopes.append(log_slope)
            return x

        x = self.network.sample_sequentially(choose, len(z), condition, self.progress)
        return x, torch.cat(log_slopes, 1).sum(1)


class Flip(Bijection):
    """Numbers, or channels, in reverse order."""

    supports_reversible = True

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(z)


class Invert(Bijection):
    """Another bijection, the other way round; IAF is the inverse of MAF. Kingma et al. (1606.04934)."""

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, condition)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, condition)


Part = TypeVar("Part", bound=nn.Module)


class TokenHead(Bijection):
    """z = h(x; linear(context)): the numbers of a token (B, size) independent of each other given its context (B, width)."""

    def __init__(self, size: int, width: int, transform: Transform):
        super().__init__()
        self.linear = zero_linear(width, transform.count * size)
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.linear(condition).to(x.dtype))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.transform.inverse(z, self.linear(condition).to(z.dtype))
        return x, log_slope.sum(1)


def autoregressive_head(size: int, width: int, transform: Transform) -> Autoregressive:
    """As `Head`, but each number depends on those before it in its token too."""
    return Autoregressive(MADE(size, width, 1, transform.count, seen_by_all=width), transform)


class TokenAutoregressive(Bijection):
    """z_i = head(x_i; c_i), where the context c_i is what `network` reads off x_<i and the condition. TarFlow (2412.06329), section 3.

    Tokens x_i are the channels of the pixels of x (B, C, H, W), in raster order, or with `backwards` from the last to the first, their
    numbers too. The inverse goes token by token, with the keys and values of those before kept; or, with `jacobi`, all tokens at once,
    x <- head^-1(z; contexts of x), until none moves by more than `close` of itself. After k such sweeps the first k tokens are exact, so
    that there are never more than tokens. `sweeps` is how many the last inverse took, token by token as many as tokens. Inverses reckon
    in float64, and so does the way forward where it is to be `exact`: what rounding does to a token it passes on to all after it.
    """

    progress: Progress = staticmethod(no_progress)
    jacobi = exact = False
    close = 1e-6

    def __init__(self, network: CausalTransformer, head: Bijection, backwards: bool = False):
        super().__init__()
        self.network, self.head = network, head
        self.backwards = backwards
        self.sweeps = 0

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network, head, tokens = self.network, self.head, self._tokens(x)
        if self.exact:
            network, head, tokens = _in_float64(network), _in_float64(head), tokens.double()
        z, log_det = self._each(head.forward, tokens, network(tokens, condition))
        return self._image(z, x).to(x.dtype), log_det.sum(1).to(x.dtype)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        back = self._by_sweeps if self.jacobi else self._one_by_one
        x, log_det = back(
            self._tokens(z).double(), condition, _in_float64(self.network), _in_float64(self.head)
        )
        return self._image(x, z).to(z.dtype), log_det.to(z.dtype)

    def _one_by_one(
        self, z: Tensor, condition: Tensor | None, network: CausalTransformer, head: Bijection
    ) -> tuple[Tensor, Tensor]:
        log_dets = []

        def choose(i: int, context: Tensor) -> Tensor:
            x, log_det = head.inverse(z[:, i], context)
            log_dets.append(log_det)
            return x

        self.sweeps = z.shape[1]
        return network.sample_sequentially(choose, len(z), condition, self.progress), torch.stack(
            log_dets
        ).sum(0)

    def _by_sweeps(
        self, z: Tensor, condition: Tensor | None, network: CausalTransformer, head: Bijection
    ) -> tuple[Tensor, Tensor]:
        x, log_det, done = z, z.new_zeros(z.shape[:2]), 0
        for self.sweeps in range(1, z.shape[1] + 1):
            before = x[:, done:]
            after, change = self._each(head.inverse, z[:, done:], network(x, condition)[:, done:])
            x, log_det = (
                torch.cat((x[:, :done], after), 1),
                torch.cat((log_det[:, :done], change), 1),
            )
            moved = ((after - before).abs() > self.close * after.abs().clamp(min=1)).any(2).any(0)
            if not moved.any():
                break
            done += (
                int(moved.int().argmax()) + 1
            )  # the first that moved has read what none moves any more
        return x, log_det.sum(1)

    @staticmethod
    def _each(
        head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tokens: Tensor, contexts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The head's map of every token (B, N, C) in its context, and their log-dets, (B, N)."""
        mapped, log_det = head(tokens.flatten(0, 1), contexts.flatten(0, 1))
        return mapped.view(tokens.shape), log_det.view(tokens.shape[:2])

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H*W, C), in the order in which they are read."""
        tokens = x.flatten(2).transpose(1, 2)
        return tokens.flip(1, 2) if self.backwards else tokens

    def _image(self, tokens: Tensor, like: Tensor) -> Tensor:
        tokens = tokens.flip(1, 2) if self.backwards else tokens
        return tokens.transpose(1, 2).reshape(like.shape)


def _in_float64(part: Part) -> Part:
    """A copy that reckons in float64; gradients of its parameters reach those of `part`."""
    tensors = [
        tensor for tensor in (*part.parameters(), *part.buffers()) if tensor.is_floating_point()
    ]
    watching = [
        vars(module)["progress"] for module in part.modules() if "progress" in vars(module)
    ]  # which is no part of it
    return copy.deepcopy(
        part,
        {id(tensor): tensor.double() for tensor in tensors} | {id(each): each for each in watching},
    )
