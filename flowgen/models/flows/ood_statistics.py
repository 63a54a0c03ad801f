"""What a flow says of an image beside its likelihood."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection, standard_normal_log_prob
from flowgen.bijections.reshape import FactorOut


def statistics(
    bijection: Bijection, x: Tensor, means: Tensor | None, condition_networks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """log p(x) in nats of points x, the mean over classes of the latents' `means` (K, D) where there are any, and its terms: (batch,) each.

    The terms are log N(z; mean, I), log|det dz/dx| and log p(h) of `last_level`, averaged by the classes' p(y | x). h is the input of the
    last level of a multi-scale flow, coarse and so nearest to what an image shows, and its density the sum of that level's own terms:
    Schirrmeister et al. (2006.10848), section 4. Where a flow has one level alone, h is x. With `class_networks` the class, one-hot, is
    the bijection's condition.
    """
    if means is None or not condition_networks:
        base, log_det, last = _terms(
            bijection, x, x.new_zeros(1, x[0].numel()) if means is None else means, None
        )
    else:
        one_hot = torch.eye(len(means), device=x.device, dtype=x.dtype)
        each = [
            _terms(bijection, x, mean[None], y.expand(len(x), -1))
            for mean, y in zip(means, one_hot, strict=True)
        ]
        base, log_det, last = (torch.cat(kind, 1) for kind in zip(*each, strict=True))
    density = base + log_det
    share = density.softmax(1)
    named = {"log_base": base, "log_det": log_det, "last_level": last}
    return density.logsumexp(1) - math.log(density.shape[1]), {
        name: (share * each).sum(1) for name, each in named.items()
    }


def _terms(
    bijection: Bijection, x: Tensor, means: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `statistics`, under each of `means` (K, D): (batch, K) each."""
    with _watched(_last_level(bijection)) as seen:
        z, log_det = bijection(x, condition)
    last_z, last_log_det = seen[0]
    base = torch.stack([standard_normal_log_prob(z - mean) for mean in means], 1)
    last = torch.stack(
        [standard_normal_log_prob(last_z - mean[: last_z.shape[1]]) for mean in means], 1
    )
    return base, log_det[:, None].expand_as(base), last + last_log_det[:, None]


def _last_level(bijection: Bijection) -> nn.Module:
    """What the innermost FactorOut leaves to do; the whole where there is none. Its latents come first in the vector."""
    splits = [module for module in bijection.modules() if isinstance(module, FactorOut)]
    return splits[-1].inner if splits else bijection


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Every output of `module` while the context lasts."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
