"""Flows of images with Gaussian noise on them, which is taken away from their samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowgen.bijections import Bijection, Equalize, Logit
from flowgen.errors import FlowgenError

NO_LIKELIHOOD = (
    "this flow was trained on images with noise (model.dequantisation=gaussian:...) and knows no likelihood of images themselves"
)


def check_boundless(bijection: Bijection) -> None:
    """Raises FlowgenError for a flow of nothing but what lies in [0, 1), which noise leaves."""
    if any(isinstance(part, Equalize | Logit) for part in bijection.modules()):
        raise FlowgenError("model.dequantisation=gaussian:... needs model.gaussianize=false, and another model than realnvp")


@torch.enable_grad()
def denoised(y: Tensor, deviation: float, log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """E[x | y] = y + s^2 grad log p(y) where y = x + s e, e ~ N(0, I): Tweedie's formula, as Efron (2011), section 2, gives it."""
    y = y.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(y).sum(), y)
    return y.detach() + deviation**2 * gradient
