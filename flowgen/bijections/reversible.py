"""Memory of activations for the backward pass of deep flows.

The modes are "store" (keep all activations), "checkpoint" (keep the input of every bijection and
compute the bijection again: Chen et al., 1604.06174) and "reversible" (keep the output of a whole
chain and recover every input by inversion, so that memory does not grow with depth: Gomez et al.,
1707.04585, section 3.2). `Chain` in `flowgen.bijections.base` uses these functions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from flowgen.bijections.networks import batch_norm_layers, has_dropout

ACTIVATION_MEMORY = ("store", "checkpoint", "reversible")
# Bijections whose inputs are recovered from one output. Rounding errors grow with their number.
MAX_INVERTED_BIJECTIONS = 128

Step = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # as Bijection.forward


def checkpointed(bijection: nn.Module) -> Step:
    """Return `bijection.forward` as a function that the backward pass computes again."""
    kwargs: dict[str, Any] = {}
    if batch_norm_layers(bijection):  # torch.compile does not support context_fn
        kwargs["context_fn"] = lambda: (nullcontext(), _frozen_statistics(bijection))
    return partial(
        checkpoint,
        bijection,
        use_reentrant=False,
        preserve_rng_state=has_dropout(bijection),
        **kwargs,
    )


@contextmanager
def _frozen_statistics(bijection: nn.Module) -> Iterator[None]:
    """Keep recomputation from updating running statistics a second time."""
    buffers = [buffer for layer in batch_norm_layers(bijection) for buffer in layer.buffers()]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.data.copy_(value)  # .data hides the change from autograd's version counter


def reversible(bijections: Sequence[Any], errors: list[Tensor]) -> Iterator[Step]:
    """Yield steps that apply `bijections` and recover their inputs in the backward pass.

    Args:
        bijections: Bijections with `supports_reversible`, in the order of application.
        errors: List of at most one tensor, which the backward pass sets to the largest error of a
            recovered input, relative to the largest input.

    The condition gets no gradient.
    """
    for start in range(0, len(bijections), MAX_INVERTED_BIJECTIONS):
        part = bijections[start : start + MAX_INVERTED_BIJECTIONS]
        parameters = [parameter for bijection in part for parameter in bijection.parameters()]

        def step(
            x: Tensor, condition: Tensor | None, part: Any = part, parameters: Any = parameters
        ) -> tuple[Tensor, Tensor]:
            return _ReversibleFunction.apply(part, errors, x, condition, *parameters)

        yield step


class _ReversibleFunction(torch.autograd.Function):
    """Bijections applied one after the other, of which only the last output is needed backward.

    The first input is saved too, to measure the error of its recovery.
    """

    @staticmethod
    def forward(
        ctx: Any,
        bijections: Sequence[Any],
        errors: list[Tensor],
        x: Tensor,
        condition: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device_type = x.device.type
        ctx.bijections = bijections
        ctx.errors = errors
        ctx.autocast = torch.autocast(
            device_type,
            torch.get_autocast_dtype(device_type),
            enabled=torch.is_autocast_enabled(device_type),
        )
        z = x
        log_det = x.new_zeros(len(x))
        for bijection in bijections:
            z, change = bijection(z, condition)
            log_det = log_det + change
        ctx.save_for_backward(x, z, condition)
        return z, log_det

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, z, condition = ctx.saved_tensors
        z_grad, log_det_grad = gradients
        z = z.detach()  # its graph would lead back to this function
        parameter_grads: list[Tensor | None] = []
        for bijection in reversed(ctx.bijections):
            with torch.enable_grad(), ctx.autocast:
                leaves, *outputs = bijection.invert_and_recompute(z, condition)
            # The log-determinant of a volume-preserving bijection is a constant.
            num_outputs = 2 if outputs[1].requires_grad else 1
            grads = torch.autograd.grad(
                outputs[:num_outputs],
                [*leaves, *bijection.parameters()],
                (z_grad, log_det_grad)[:num_outputs],
                allow_unused=True,
            )
            z_grad = torch.cat(grads[: len(leaves)], 1)
            parameter_grads[:0] = grads[len(leaves) :]
            z = torch.cat([leaf.detach() for leaf in leaves], 1)
        error = (z - x).abs().max() / x.abs().max()
        ctx.errors[:] = [torch.stack((*ctx.errors, error)).max()]
        return None, None, z_grad, None, *parameter_grads
