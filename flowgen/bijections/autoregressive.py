"""Autoregressive bijections, which transform each value or token given the previous ones."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import CausalTransformer, Progress, no_progress, zero_init
from flowgen.bijections.univariate import Transform


class MaskedLinear(nn.Linear):
    """A linear layer whose output i depends on input j only if `mask[i, j]` is true."""

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.mask = nn.Buffer(mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)

    def masked_weight(self) -> Tensor:
        """Return the weight with zeros where the mask is false."""
        return self.weight * self.mask


class MADE(nn.Module):
    """An autoregressive masked network that maps (batch, dim) to (batch, num_params * dim).

    The parameters of value t depend on the values before t and on the condition, whose
    `cond_channels` values follow the other values in the input. The last layer starts at zero.
    Germain et al. (1502.03509).

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
        # values, even if there are few units. Units of degree -1 depend only on the condition, and
        # the first value uses them.
        lowest = -1 if cond_channels else 0
        degrees = torch.linspace(lowest, max(dim - 2, lowest), width).round().long()
        self.first = MaskedLinear(F.pad(degrees[:, None] >= inputs, (0, cond_channels), value=True))
        self.middle = nn.ModuleList(
            MaskedLinear(degrees[:, None] >= degrees) for _ in range(num_layers - 1)
        )
        self.last = zero_init(MaskedLinear((inputs[:, None] > degrees).repeat(num_params, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, *self.middle):
            x = layer(x).relu()
        return self.last(x)

    def invert_sequentially(
        self,
        invert_value: Callable[[int, Tensor], tuple[Tensor, Tensor]],
        batch_size: int,
        condition: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor]:
        """Compute values in order.

        Each step adds one value to the sums of the first layer and computes the outputs of the
        last layer only for the next value.

        Args:
            invert_value: Function of the index of a value and its parameters (batch, num_params)
                that returns the value and its log-slope, both of shape (batch, 1).
            batch_size: Number of vectors.
            condition: Condition of shape (batch, cond_channels), or None.
            progress: Wrapper of the loop over the values.

        Returns:
            The values (batch, dim) and the sum of their log-slopes (batch,).
        """
        first = self.first.masked_weight()
        middle: list[tuple[Tensor, Tensor]] = [
            (layer.masked_weight(), layer.bias)  # type: ignore[operator, misc]
            for layer in self.middle
        ]
        last = self.last.masked_weight().view(self.num_params, self.dim, -1)
        last_bias = self.last.bias.view(self.num_params, self.dim)
        sums = self.first.bias.expand(batch_size, -1)
        if condition is not None:
            sums = sums + F.linear(condition.to(sums.dtype), first[:, self.dim :])
        outputs: list[tuple[Tensor, Tensor]] = []
        for index in progress(range(self.dim), "values"):
            hidden = sums.relu()
            for weight, bias in middle:
                hidden = F.linear(hidden, weight, bias).relu()
            params = F.linear(hidden, last[:, index], last_bias[:, index])
            outputs.append(invert_value(index, params))
            sums = torch.addcmul(sums, outputs[-1][0].to(sums.dtype), first[:, index])
        values, log_slopes = zip(*outputs, strict=True)
        return torch.cat(values, 1), torch.cat(log_slopes, 1).sum(1)


class Autoregressive(Bijection):
    """Masked autoregressive flow of vectors: z_t = h(x_t; network(x_<t, condition)).

    `forward` transforms all values in parallel and `inverse` transforms them in order. log|det| is
    the sum of log h'. MAF (1705.07057), section 3.1.

    Args:
        network: Network that computes the parameters of the transform.
        transform: Univariate transform h with `network.num_params` parameters per value.

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
        def invert_value(index: int, params: Tensor) -> tuple[Tensor, Tensor]:
            return self.transform.inverse(z[:, index : index + 1], params.to(z.dtype))

        return self.network.invert_sequentially(invert_value, len(z), condition, self.progress)


class TokenHead(Bijection):
    """z = h(x; linear(context)), which transforms the values of a token independently.

    x and z have shape (batch, dim). The condition is the context of the token, (batch, width).

    Args:
        dim: Values per token.
        width: Numbers of the context of a token.
        transform: The scalar function h.

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
        self.linear = zero_init(nn.Linear(width, transform.num_params * dim))
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.linear(condition).to(x.dtype))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.transform.inverse(z, self.linear(condition).to(z.dtype))
        return x, log_slope.sum(1)


def autoregressive_head(dim: int, width: int, transform: Transform) -> Autoregressive:
    """Return a head that also conditions each value on the previous values of its token.

    Args:
        dim: Numbers per token.
        width: Width of the vectors that the head gets.
        transform: Elementwise transform of the numbers.
    """
    return Autoregressive(MADE(dim, width, 1, transform.num_params, width), transform)


class TokenAutoregressive(Bijection):
    """Autoregressive flow of tokens: z_i = head(x_i; c_i) with the context c_i = network(x_<i).

    x and z have shape (batch, channels, height, width). Token i consists of the channels of pixel
    i, in raster order. TarFlow (2412.06329), section 2.3.

    `forward` transforms all tokens in parallel. `inverse` computes the tokens in order, with cached
    keys and values. With `jacobi` it instead updates all tokens in parallel by the fixed-point
    iteration x <- head^-1(z; network(x)). After k iterations the first k tokens are exact, so the
    number of iterations is at most the number of tokens. Inverses compute in float64, because the
    rounding error of a token propagates to all tokens after it. New samples can use the
    precision of z, because their rounding errors act like small changes of z.

    Args:
        network: Transformer that computes the contexts.
        head: Bijection of a token, whose condition is the context.
        reverse: Whether to reverse the order of the tokens and of the values of each token.

    Attributes:
        jacobi: Whether `inverse` uses Jacobi iterations. Default: False.
        float64_forward: Whether `forward` also computes in float64. Default: False.
        float64_inverse: Whether `inverse` computes in float64. Default: True.
        tolerance: Largest change of a value, relative to max(1, |value|), at which Jacobi
            iterations stop.
        num_iterations: Iterations of the last `inverse`, or the number of tokens without `jacobi`.
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
        self.float64_forward = False
        self.float64_inverse = True
        self.tolerance = 1e-6
        self.num_iterations = 0
        self.progress: Progress = no_progress

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = _double_copy(self.network) if self.float64_forward else self.network
        head = _double_copy(self.head) if self.float64_forward else self.head
        tokens = self.to_tokens(x.double() if self.float64_forward else x)
        z, log_det = _map_tokens(head.forward, tokens, network(tokens, condition))
        return self.to_image(z, x).to(x.dtype), log_det.sum(1).to(x.dtype)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = _double_copy(self.network) if self.float64_inverse else self.network
        head = _double_copy(self.head) if self.float64_inverse else self.head
        tokens = self.to_tokens(z.double() if self.float64_inverse else z)
        invert = self._invert_by_jacobi if self.jacobi else self._invert_sequentially
        x, log_det = invert(tokens, condition, network, head)
        return self.to_image(x, z).to(z.dtype), log_det.to(z.dtype)

    def _invert_sequentially(
        self, z: Tensor, condition: Tensor | None, network: CausalTransformer, head: Bijection
    ) -> tuple[Tensor, Tensor]:
        def invert_token(index: int, context: Tensor) -> tuple[Tensor, Tensor]:
            return head.inverse(z[:, index], context)

        self.num_iterations = z.shape[1]
        return network.invert_sequentially(invert_token, len(z), condition, self.progress)

    def _invert_by_jacobi(
        self, z: Tensor, condition: Tensor | None, network: CausalTransformer, head: Bijection
    ) -> tuple[Tensor, Tensor]:
        x = z
        log_det = z.new_zeros(z.shape[:2])
        num_final = 0  # leading tokens that no longer change
        for iteration in range(z.shape[1]):
            self.num_iterations = iteration + 1
            updated, change = _map_tokens(
                head.inverse, z[:, num_final:], network(x, condition)[:, num_final:]
            )
            difference = (updated - x[:, num_final:]).abs()
            changed = (difference > self.tolerance * updated.abs().clamp(min=1)).any(2).any(0)
            x = torch.cat((x[:, :num_final], updated), 1)
            log_det = torch.cat((log_det[:, :num_final], change), 1)
            if not changed.any():
                break
            # The context of the first token that changed depends only on final tokens.
            num_final += int(changed.int().argmax()) + 1
        return x, log_det.sum(1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Convert (batch, channels, height, width) to (batch, tokens, channels)."""
        tokens = x.flatten(2).transpose(1, 2)
        return tokens.flip(1, 2) if self.reverse else tokens

    def to_image(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Invert `to_tokens`: return the image of tokens, with the shape of `like`."""
        tokens = tokens.flip(1, 2) if self.reverse else tokens
        return tokens.transpose(1, 2).reshape(like.shape)


def _map_tokens(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tokens: Tensor, contexts: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply a head to tokens (batch, tokens, dim) and return log-dets of shape (batch, tokens)."""
    mapped, log_det = function(tokens.flatten(0, 1), contexts.flatten(0, 1))
    return mapped.view(tokens.shape), log_det.view(tokens.shape[:2])


def _double_copy(module: nn.Module) -> Any:
    """Return a copy in float64 whose parameters pass their gradients to those of `module`."""
    memo: dict[int, object] = {
        id(tensor): tensor.double()
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.is_floating_point()
    }
    # The copy shares progress bars, which cannot be copied.
    bars = [part.progress for part in module.modules() if isinstance(part, Autoregressive)]
    memo |= {id(bar): bar for bar in bars}
    return copy.deepcopy(module, memo)
