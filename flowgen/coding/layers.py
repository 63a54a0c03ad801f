"""One coding rule per bijection: the bijection on integers, exact in both directions.

`code` follows the structure of a flow. Networks receive the numbers as floats, and their outputs
are rounded (`Coder.quantize_parameters`). Everything else is arithmetic of integers.
"""

from functools import singledispatch

import torch
from torch import Tensor, nn

from flowgen.bijections import (
    autoregressive,
    base,
    coupling,
    elementwise,
    linear,
    reshape,
    univariate,
)
from flowgen.bijections.base import concat_condition
from flowgen.coding.coder import Coder
from flowgen.utils.errors import UserError

MATRIX_BITS = 20  # entries of triangular matrices are rounded to 2^-20
PIVOT_TOLERANCE = 1e-6  # candidates this close to the largest pivot count as equal


@singledispatch
def code(
    bijection: nn.Module, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    """Apply a bijection to numbers of the grid, or its inverse if `backward`.

    Args:
        bijection: A bijection in float64.
        x: Numbers of the grid, with the shape that the bijection takes.
        condition: The condition of the bijection, in floats.
        coder: The coder, which holds the stack.
        backward: Whether to apply the inverse.
    """
    raise UserError(refusal(bijection))


def refusal(bijection: nn.Module) -> str:
    """Return why a bijection cannot be coded."""
    return (
        f"a flow with {type(bijection).__name__} cannot compress images, because its inverse is "
        "only approximate: choose a flow of couplings or an autoregressive flow, such as "
        "model=glow or model=tarflow"
    )


def has_rule(bijection: nn.Module) -> bool:
    """Return whether `code` knows the class of a bijection."""
    return code.dispatch(type(bijection)) is not code.dispatch(object)


# Structure


@code.register
def _(
    bijection: base.Chain, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    parts = list(bijection.bijections)
    for part in reversed(parts) if backward else parts:
        x = code(part, x, condition, coder, backward)
    return x


@code.register
def _(
    bijection: base.Invert, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    return code(bijection.bijection, x, condition, coder, not backward)


@code.register(base.Flip)
@code.register(reshape.Squeeze)
@code.register(reshape.Flatten)
@code.register(reshape.Roll)
@code.register(reshape.Permute)
def _(
    bijection: base.Bijection, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    """Move numbers, which needs no arithmetic."""
    y, _ = bijection.inverse(x) if backward else bijection(x)
    return y.contiguous()


@code.register
def _(
    bijection: reshape.FactorOut, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    x_in, x_out = x.chunk(2, dim=1)
    if backward:
        x_in = code(bijection.inner, x_in, condition, coder, True)
        x_out = x_out.reshape(x_in.shape)
    if bijection.network is not None:
        params = bijection.network(concat_condition(coder.to_float(x_in), condition))
        mean, log_std = coder.quantize_parameters(params).chunk(2, dim=1)
        x_out = _standardize(coder, x_out, mean, log_std, backward)
    if backward:
        return torch.cat([x_in, x_out], dim=1)
    z_in = code(bijection.inner, x_in, condition, coder, False)
    return torch.cat([z_in, x_out.flatten(1)], dim=1)


# Affine maps with fixed parameters


@code.register
def _(
    bijection: elementwise.Standardize,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    return _standardize(coder, x, bijection.mean, bijection.log_deviation, backward)


@code.register
def _(
    bijection: linear.BatchNorm, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    log_std = 0.5 * (bijection.variance + bijection.eps).log()
    return _standardize(coder, x, bijection.mean.view(shape), log_std.view(shape), backward)


def _standardize(coder: Coder, x: Tensor, mean: Tensor, log_std: Tensor, backward: bool) -> Tensor:
    """Map x to (x - mean) exp(-log_std), or back."""
    center = coder.to_grid(mean)
    scale = (-log_std).exp()
    if backward:
        return coder.affine(x, scale, torch.zeros_like(x), True) + center
    return coder.affine(x - center, scale, torch.zeros_like(x), False)


@code.register
def _(
    bijection: linear.ChannelAffine,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    """Map each pixel x to M x + c with the factorization M = P L D (I + N).

    N is strictly upper triangular and L is unit lower triangular: both add multiples of some
    channels to another, which is a bijection of integers after rounding. D scales each channel.
    """
    matrix, shift, _ = bijection.affine()
    order, lower, diagonal, upper = lu(matrix.double())
    lower = coder.quantize(lower.tril(-1), MATRIX_BITS)
    upper = coder.quantize(upper.triu(1), MATRIX_BITS)
    scale = diagonal.abs()
    sign = diagonal.sign().long()
    center = coder.to_grid(shift)
    v = x.movedim(1, -1).contiguous()
    zero = torch.zeros_like(v)
    if not backward:
        v = v + _shear(upper, v)
        v = coder.affine(v, scale, zero, False) * sign
        v = v + _shear(lower, v)
        v = v[..., order.argsort()] + center
    else:
        v = (v - center)[..., order].contiguous()
        for channel in range(v.shape[-1]):
            v[..., channel] -= _shear(lower[channel], v)
        v = coder.affine(v * sign, scale, zero, True)
        for channel in reversed(range(v.shape[-1])):
            v[..., channel] -= _shear(upper[channel], v)
    return v.movedim(-1, 1).contiguous()


def _shear(matrix: Tensor, v: Tensor) -> Tensor:
    """Return the matrix or a row of it, times the channels (the last dimension), rounded."""
    half = 1 << (MATRIX_BITS - 1)
    products = (v[..., None, :] * matrix).sum(-1) if matrix.dim() == 2 else (v * matrix).sum(-1)
    return (products + half) >> MATRIX_BITS


def lu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factorize M[order] = L D (I + N) with partial pivoting.

    Every operation is elementwise, and a pivot is the first of several that are almost equal, so
    that all machines choose the same order.

    Returns:
        The order of the rows (n,), L with its unit diagonal, the diagonal of D (n,), and I + N.

    Example:
        >>> order, lower, diagonal, upper = lu(torch.tensor([[0.0, 2.0], [4.0, 8.0]]))
        >>> order.tolist(), diagonal.tolist()
        ([1, 0], [4.0, 2.0])
    """
    rest = matrix.clone()
    size = len(rest)
    order = torch.arange(size)
    for step in range(size):
        column = rest[step:, step].abs()
        largest = column.max()
        pivot = step + int((column >= largest * (1 - PIVOT_TOLERANCE)).int().argmax())
        swap = torch.arange(size)
        swap[[step, pivot]] = swap[[pivot, step]]
        rest = rest[swap]
        order = order[swap]
        factors = rest[step + 1 :, step] / rest[step, step]
        rest[step + 1 :, step + 1 :] -= factors[:, None] * rest[step, step + 1 :]
        rest[step + 1 :, step] = factors
    diagonal = rest.diagonal().clone()
    identity = torch.eye(size, dtype=matrix.dtype)
    lower = rest.tril(-1) + identity
    upper = rest.triu(1) / diagonal[:, None] + identity
    return order, lower, diagonal, upper


@code.register
def _(
    bijection: elementwise.LogisticToNormal,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    return coder.monotone(x, lambda x: bijection(x)[0], lambda z: bijection.inverse(z)[0], backward)


# Couplings and autoregressive maps, whose parameters come from a network


@code.register
def _(
    bijection: coupling.Coupling, x: Tensor, condition: Tensor | None, coder: Coder, backward: bool
) -> Tensor:
    changed, unchanged = x.chunk(2, dim=1)
    params = bijection.network(concat_condition(coder.to_float(unchanged), condition))
    return torch.cat(
        [transform(bijection.transform, changed, params, coder, backward), unchanged], dim=1
    )


@code.register
def _(
    bijection: coupling.MaskedCoupling,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    visible = torch.where(bijection.mask, coder.to_float(x), 0.0)
    params = bijection.network(concat_condition(visible, condition))
    # Only the numbers that move exchange bits.
    moves = ~bijection.mask
    params = params.unflatten(1, (-1, x.shape[1]))[:, :, moves].flatten(1)
    y = x.clone()
    y[:, moves] = transform(bijection.transform, x[:, moves], params, coder, backward)
    return y


@code.register
def _(
    bijection: autoregressive.Autoregressive,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    """Transform the values from the last to the first, so that `backward` meets them in order."""
    y = torch.empty_like(x)

    def transform_value(index: int, params: Tensor) -> tuple[Tensor, Tensor]:
        part = slice(index, index + 1)
        y[:, part] = transform(bijection.transform, x[:, part], params, coder, backward)
        value = coder.to_float(y[:, part])
        return value, torch.zeros_like(value)

    if backward:
        bijection.network.invert_sequentially(transform_value, len(x), condition)
        return y
    params = bijection.network(concat_condition(coder.to_float(x), condition))
    params = params.unflatten(1, (-1, x.shape[1]))
    for index in reversed(range(x.shape[1])):
        transform_value(index, params[:, :, index])
    return y


@code.register
def _(
    bijection: autoregressive.TokenHead,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    return transform(bijection.transform, x, bijection.linear(condition), coder, backward)


@code.register
def _(
    bijection: autoregressive.TokenAutoregressive,
    x: Tensor,
    condition: Tensor | None,
    coder: Coder,
    backward: bool,
) -> Tensor:
    """Transform the tokens from the last to the first, so that `backward` meets them in order."""
    tokens = bijection.to_tokens(x)
    transformed = torch.empty_like(tokens)

    def transform_token(index: int, context: Tensor) -> tuple[Tensor, Tensor]:
        token = tokens[:, index].contiguous()
        transformed[:, index] = code(bijection.head, token, context, coder, backward)
        value = coder.to_float(transformed[:, index])
        return value, value.new_zeros(len(value))

    if backward:
        bijection.network.invert_sequentially(transform_token, len(x), condition)
    else:
        contexts = bijection.network(coder.to_float(tokens), condition)
        for index in reversed(range(tokens.shape[1])):
            transform_token(index, contexts[:, index])
    return bijection.to_image(transformed, x).contiguous()


def transform(
    univariate_transform: univariate.Transform,
    x: Tensor,
    params: Tensor,
    coder: Coder,
    backward: bool,
) -> Tensor:
    """Apply a univariate transform to numbers of the grid, or its inverse if `backward`.

    Args:
        univariate_transform: The transform.
        x: Numbers of the grid (batch, channels, ...).
        params: Its parameters, in floats (batch, num_params * channels, ...).
        coder: The coder, which holds the stack.
        backward: Whether to apply the inverse.
    """
    params = coder.quantize_parameters(params)
    if isinstance(univariate_transform, univariate.Additive):
        shift = coder.to_grid(params)
        return x - shift if backward else x + shift
    if isinstance(univariate_transform, univariate.Affine):
        log_scale, shift = univariate_transform.parse(params)
        return coder.affine(x, log_scale.exp(), coder.to_grid(shift), backward)
    if isinstance(univariate_transform, univariate.Scale):
        scale = univariate_transform.log_scale(params).exp()
        return coder.affine(x, scale, torch.zeros_like(x), backward)
    return coder.monotone(
        x,
        lambda x: univariate_transform.forward(x, params)[0],
        lambda y: univariate_transform.inverse(y, params)[0],
        backward,
    )
