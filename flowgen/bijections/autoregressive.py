"""Autoregressive bijections: each value, or token, is transformed given those before it."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import CausalTransformer, Progress, no_progress, zero_linear
from flowgen.bijections.univariate import Transform


class MaskedLinear(nn.Linear):
    """A linear layer whose output i depends on input j only where `mask[i, j]`."""

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.mask = nn.Buffer(mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)

    def masked_weight(self) -> Tensor:
        """Return the weight with zeros where the mask is 0."""
        return self.weight * self.mask


class MADE(nn.Module):
    """Masked network (batch, dim) -> (batch, num_params * dim) that is autoregressive.

    The parameters of value t depend on the values before t and on the condition, whose
    `cond_channels` values follow the others in the input. The last layer starts at zero. Germain
    et al. (1502.03509).

    Args:
        dim: Values per vector.
        width: Units of each hidden layer.
        num_layers: Hidden layers.
        num_params: Parameters per value.
        cond_channels: Values of the condition.

    Example:
        >>> MADE(dim=6, width=32, num_layers=2, num_params=2)(torch.randn(5, 6)).shape
        torch.Size([5, 12])
    """

    def __init__(
        self, dim: int, width: int, num_layers: int, num_params: int, cond_channels: int = 0
    ):
        super().__init__()
        self.dim = dim
        self.num_params = num_params
        inputs = torch.arange(dim)
        # A hidden unit of degree d depends on the values up to d. The degrees are spread over all
        # values, even if there are few units. Degree -1 depends on the condition alone and serves
        # the first value.
        lowest = -1 if cond_channels else 0
        degrees = torch.linspace(lowest, max(dim - 2, lowest), width).round().long()
        self.first = MaskedLinear(F.pad(degrees[:, None] >= inputs, (0, cond_channels), value=True))
        self.middle = nn.ModuleList(
            MaskedLinear(degrees[:, None] >= degrees) for _ in range(num_layers - 1)
        )
        self.last = MaskedLinear((inputs[:, None] > degrees).repeat(num_params, 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.middle:
            x = layer(x.relu())
        return self.last(x.relu())

    def sample_sequentially(
        self,
        sample_fn: Callable[[int, Tensor], Tensor],
        batch_size: int,
        condition: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> Tensor:
        """Generate values one after the other.

        Each step adds one value to the sums of the first layer and computes the outputs of the
        last layer for the next value only.

        Args:
            sample_fn: Function of the index of a value and its parameters (batch, num_params)
                that returns the value, (batch, 1).
            batch_size: Number of vectors.
            condition: Condition (batch, cond_channels), if there is one.
            progress: Wrapper of the loop over the values.

        Returns:
            The values, (batch, dim).
        """
        first = self.first.masked_weight()
        last = self.last.masked_weight().view(self.num_params, self.dim, -1)
        last_bias = self.last.bias.view(self.num_params, self.dim)
        middle: list[tuple[Tensor, Tensor]] = [
            (layer.masked_weight(), layer.bias)  # type: ignore[operator, misc]
            for layer in self.middle
        ]
        sums = self.first.bias.expand(batch_size, -1)
        if condition is not None:
            sums = sums + F.linear(condition.to(sums.dtype), first[:, self.dim :])
        values: list[Tensor] = []
        for index in progress(range(self.dim), "values"):
            hidden = sums.relu()
            for weight, bias in middle:
                hidden = F.linear(hidden, weight, bias).relu()
            values.append(sample_fn(index, F.linear(hidden, last[:, index], last_bias[:, index])))
            sums = torch.addcmul(sums, values[-1].to(sums.dtype), first[:, index])
        return torch.cat(values, 1)


class Autoregressive(Bijection):
    """Masked autoregressive flow of vectors: z_t = h(x_t; network(x_<t, condition)).

    `forward` transforms all values in parallel and `inverse` one after the other. log|det| is the
    sum of log h'. MAF (1705.07057), section 3.1.

    Args:
        network: Network that computes the parameters of the transform.
        transform: The univariate transform h, with `network.num_params` parameters per value.

    Attributes:
        progress: Wrapper of the loop over the values in `inverse`.

    Example:
        >>> from flowgen.bijections.univariate import Affine
        >>> _ = torch.manual_seed(0)
        >>> bijection = Autoregressive(MADE(6, 32, num_layers=2, num_params=2), Affine())
        >>> x = torch.randn(5, 6)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    def __init__(self, network: MADE, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform
        self.progress: Progress = no_progress

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        params = self.network(concat_condition(x, condition)).to(x.dtype)
        z, log_slope = self.transform.forward(x, params)
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_slopes = []

        def sample_fn(index: int, params: Tensor) -> Tensor:
            x, log_slope = self.transform.inverse(z[:, index : index + 1], params.to(z.dtype))
            log_slopes.append(log_slope)
            return x

        x = self.network.sample_sequentially(sample_fn, len(z), condition, self.progress)
        return x, torch.cat(log_slopes, 1).sum(1)


class TokenHead(Bijection):
    """z = h(x; linear(context)): the values of a token are independent given its context.

    x and z are (batch, dim), and the condition is the context, (batch, width).

    Example:
        >>> from flowgen.bijections.univariate import Affine
        >>> _ = torch.manual_seed(0)
        >>> head = TokenHead(4, 8, Affine())
        >>> x, context = torch.randn(5, 4), torch.randn(5, 8)
        >>> z, log_det = head(x, context)
        >>> torch.allclose(head.inverse(z, context)[0], x)
        True
    """

    def __init__(self, dim: int, width: int, transform: Transform):
        super().__init__()
        self.linear = zero_linear(width, transform.num_params * dim)
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.linear(condition).to(x.dtype))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.transform.inverse(z, self.linear(condition).to(z.dtype))
        return x, log_slope.sum(1)


def autoregressive_head(dim: int, width: int, transform: Transform) -> Autoregressive:
    """Return a head like `TokenHead` whose values also depend on those before them in the token."""
    return Autoregressive(MADE(dim, width, 1, transform.num_params, width), transform)


class TokenAutoregressive(Bijection):
    """Autoregressive flow of tokens: z_i = head(x_i; c_i) with the context c_i = network(x_<i).

    x and z are (batch, channels, height, width). Token i consists of the channels of pixel i, in
    raster order. TarFlow (2412.06329), section 3.

    `forward` transforms all tokens in parallel. `inverse` generates them one after the other,
    with cached keys and values, or, with `jacobi`, updates all at once by the fixed-point iteration
    x <- head^-1(z; contexts of x). After k iterations the first k tokens are exact, so the number
    of iterations is at most the number of tokens. Inverses compute in float64, because the
    rounding error of a token is passed on to all tokens after it.

    Args:
        network: Transformer that computes the contexts.
        head: Bijection of a token, whose condition is the context.
        reverse: Whether to process the tokens from the last to the first, and the values of each
            token too.

    Attributes:
        jacobi: Whether `inverse` uses Jacobi iterations. Default: False.
        exact: Whether `forward` also computes in float64. Default: False.
        tolerance: Jacobi iterations stop when no value changes by more than this, relative to
            max(1, |value|).
        num_iterations: Iterations of the last `inverse`, or the number of tokens if they were
            generated one after the other.
        progress: Wrapper of the loop over the tokens in `inverse`.

    Example:
        >>> from flowgen.bijections.univariate import Affine
        >>> _ = torch.manual_seed(0)
        >>> network = CausalTransformer(num_tokens=4, dim=3, width=8, num_heads=2, num_layers=1)
        >>> bijection = TokenAutoregressive(network, TokenHead(3, 8, Affine()))
        >>> x = torch.randn(5, 3, 2, 2)
        >>> z, log_det = bijection(x)
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
        >>> bijection.num_iterations
        4
    """

    def __init__(self, network: CausalTransformer, head: Bijection, reverse: bool = False):
        super().__init__()
        self.network = network
        self.head = head
        self.reverse = reverse
        self.jacobi = False
        self.exact = False
        self.tolerance = 1e-6
        self.num_iterations = 0
        self.progress: Progress = no_progress

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = _double_copy(self.network) if self.exact else self.network
        head = _double_copy(self.head) if self.exact else self.head
        tokens = self._to_tokens(x.double() if self.exact else x)
        z, log_det = _map_tokens(head.forward, tokens, network(tokens, condition))
        return self._to_image(z, x).to(x.dtype), log_det.sum(1).to(x.dtype)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        invert = self._invert_by_jacobi if self.jacobi else self._invert_sequentially
        network = _double_copy(self.network)
        x, log_det = invert(
            self._to_tokens(z.double()), condition, network, _double_copy(self.head)
        )
        return self._to_image(x, z).to(z.dtype), log_det.to(z.dtype)

    def _invert_sequentially(
        self, z: Tensor, condition: Tensor | None, network: CausalTransformer, head: Bijection
    ) -> tuple[Tensor, Tensor]:
        log_dets = []

        def sample_fn(index: int, context: Tensor) -> Tensor:
            x, log_det = head.inverse(z[:, index], context)
            log_dets.append(log_det)
            return x

        x = network.sample_sequentially(sample_fn, len(z), condition, self.progress)
        self.num_iterations = z.shape[1]
        return x, torch.stack(log_dets).sum(0)

    def _invert_by_jacobi(
        self, z: Tensor, condition: Tensor | None, network: CausalTransformer, head: Bijection
    ) -> tuple[Tensor, Tensor]:
        x = z
        log_det = z.new_zeros(z.shape[:2])
        num_final = 0  # leading tokens that no longer change
        for iteration in range(z.shape[1]):
            self.num_iterations = iteration + 1
            contexts = network(x, condition)[:, num_final:]
            previous = x[:, num_final:]
            updated, change = _map_tokens(head.inverse, z[:, num_final:], contexts)
            x = torch.cat((x[:, :num_final], updated), 1)
            log_det = torch.cat((log_det[:, :num_final], change), 1)
            limit = self.tolerance * updated.abs().clamp(min=1)
            changed = ((updated - previous).abs() > limit).any(2).any(0)
            if not changed.any():
                break
            # The contexts of the first token that changed depend on final tokens only.
            num_final += int(changed.int().argmax()) + 1
        return x, log_det.sum(1)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Convert (batch, channels, height, width) to (batch, tokens, channels)."""
        tokens = x.flatten(2).transpose(1, 2)
        return tokens.flip(1, 2) if self.reverse else tokens

    def _to_image(self, tokens: Tensor, like: Tensor) -> Tensor:
        tokens = tokens.flip(1, 2) if self.reverse else tokens
        return tokens.transpose(1, 2).reshape(like.shape)


def _map_tokens(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tokens: Tensor, contexts: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a head to tokens (batch, tokens, dim); the log-dets are (batch, tokens)."""
    mapped, log_det = function(tokens.flatten(0, 1), contexts.flatten(0, 1))
    return mapped.view(tokens.shape), log_det.view(tokens.shape[:2])


M = TypeVar("M", bound=nn.Module)


def _double_copy(module: M) -> M:
    """Return a copy in float64; gradients of its parameters reach those of `module`."""
    memo: dict[int, object] = {
        id(tensor): tensor.double()
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point()
    }
    for part in module.modules():
        if isinstance(part, Autoregressive):
            memo[id(part.progress)] = part.progress  # a progress bar cannot be copied
    return copy.deepcopy(module, memo)
