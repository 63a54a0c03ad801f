"""What the backward pass needs of a deep flow: kept, computed again, or recovered by inverting what came out.

With `checkpoint` every bijection keeps its input alone, and is computed again (Chen et al., 1604.06174). With `invert` a whole chain keeps
its output, and every input is recovered on the way back, whatever the depth (Gomez et al., 1707.04585, section 3.2).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flowgen.bijections.base import Bijection
from flowgen.bijections.batchnorm import batch_norm_layers
from flowgen.bijections.networks import has_dropout

Forward = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
ACTIVATION_MEMORY = ("store", "checkpoint", "reversible")
LONGEST = (
    128  # bijections that are recovered from one output, since rounding errors grow on the way
)


def checkpointed(bijection: Bijection) -> Forward:
    """`bijection`, computed again in the backward pass."""

    def step(x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout(bijection)}
        if batch_norm_layers(bijection):  # torch.compile does not support context_fn
            how["context_fn"] = lambda: (nullcontext(), _again(bijection))
        return checkpoint(bijection, x, condition, **how)

    return step


@contextmanager
def _again(bijection: Bijection) -> Iterator[None]:
    """Keep recomputation from updating running statistics a second time."""
    kept = [
        (buffer, buffer.clone())
        for layer in batch_norm_layers(bijection)
        for buffer in layer.buffers()
    ]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)  # which the backward pass does not notice


def reversible(bijections: Sequence[Bijection], errors: list[Tensor]) -> Iterator[Forward]:
    """`bijections` one after the other, whose inputs are recovered in the backward pass; `errors` holds how far off the first ever was.

    That is the largest difference over the largest number. The condition is not differentiated.
    """
    for start in range(0, len(bijections), LONGEST):
        piece = bijections[start : start + LONGEST]
        parameters = [parameter for bijection in piece for parameter in bijection.parameters()]

        def step(
            x: Tensor, condition: Tensor | None, piece: Any = piece, parameters: Any = parameters
        ) -> tuple[Tensor, Tensor]:
            return _Recovered.apply(piece, errors, x, condition, *parameters)

        yield step


class _Recovered(torch.autograd.Function):
    """z and log|det dz/dx| of bijections one after the other; kept are z, and x to compare with."""

    @staticmethod
    def forward(
        ctx: Any,
        bijections: Sequence[Bijection],
        errors: list[Tensor],
        x: Tensor,
        condition: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.bijections, ctx.errors = bijections, errors
        ctx.autocast = (
            torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type),
        )
        z, log_det = x, x.new_zeros(len(x))
        for bijection in bijections:
            z, change = bijection(z, condition)
            log_det = log_det + change
        ctx.save_for_backward(x, z, condition)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, z, condition = ctx.saved_tensors
        of_z, of_log_det = gradients
        z = z.detach()  # or its graph would lead back here
        of_parameters: list[Tensor | None] = []
        enabled, dtype = ctx.autocast
        for bijection in reversed(ctx.bijections):
            with torch.enable_grad(), torch.autocast(z.device.type, dtype, enabled=enabled):
                leaves, *outputs = bijection.invert_and_recompute(z, condition)
            moved = 2 if outputs[1].requires_grad else 1  # a log-det may be of nothing
            wanted, given = [*leaves, *bijection.parameters()], (of_z, of_log_det)
            found = torch.autograd.grad(outputs[:moved], wanted, given[:moved], allow_unused=True)
            of_z = torch.cat(found[: len(leaves)], 1)
            of_parameters[:0] = found[len(leaves) :]
            z = torch.cat([leaf.detach() for leaf in leaves], 1)
        error = (z - x).abs().max() / x.abs().max()
        ctx.errors[:] = [torch.stack((*ctx.errors, error)).max()]
        return None, None, of_z, None, *of_parameters
