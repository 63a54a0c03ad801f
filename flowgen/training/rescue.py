"""Finding where numbers stopped being numbers."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_bad_module(model: nn.Module, levels: Tensor) -> str:
    """The name of the first module whose output is not finite for this batch; else the parameter whose gradient is not.

    Gradients are read off the parameters as the failed step left them.
    """
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(torch.isfinite(tensor).all() for tensor in tensors if isinstance(tensor, Tensor)):
                bad.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model.forward(levels)  # not what was compiled: that calls no hooks
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            bad.append(f"the gradient of {name}")
            break
    return bad[0] if bad else "the loss"


def are_finite(buffers: Iterable[Tensor]) -> bool:
    """Whether a bad step spared what a forward pass itself changes, as running statistics."""
    return all(bool(buffer.isfinite().all()) for buffer in buffers)
