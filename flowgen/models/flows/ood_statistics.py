"""Statistics of a flow for out-of-distribution detection: the terms of its log-density."""

import math

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection, standard_normal_log_prob
from flowgen.bijections.reshape import FactorOut


def ood_statistics(
    bijection: Bijection, x: Tensor, means: Tensor | None, condition_networks: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log p(x) in nats, (batch,), and a dictionary of its terms, (batch,) each.

    The terms are `log_base`, log N(z; mean, I), `log_det`, log|det dz/dx|, and `last_level`,
    log p(h). h is the input of the last level of a multi-scale flow, which is coarse and therefore
    closest to what an image shows; its density is the sum of the terms of this level: Schirrmeister
    et al. (2006.10848), section 4. In flows with a single level, h is x. In flows with classes,
    log p(x) averages over the classes, and each term is weighted by p(y | x).

    Args:
        bijection: the bijection of the flow.
        x: points in [0, 1), (batch, channels, height, width).
        means: means of the latents of each class, (classes, D), or None.
        condition_networks: the class, one-hot, is the condition of the bijection.
    """
    if means is None:
        base, log_det, last_level = _terms(bijection, x, x.new_zeros(1, x[0].numel()), None)
    elif not condition_networks:
        base, log_det, last_level = _terms(bijection, x, means, None)
    else:
        one_hot = torch.eye(len(means), device=x.device, dtype=x.dtype)
        terms = [
            _terms(bijection, x, mean[None], condition.expand(len(x), -1))
            for mean, condition in zip(means, one_hot, strict=True)
        ]
        base, log_det, last_level = (torch.cat(term, 1) for term in zip(*terms, strict=True))
    log_density = base + log_det
    posterior = log_density.softmax(1)
    statistics = {"log_base": base, "log_det": log_det, "last_level": last_level}
    return log_density.logsumexp(1) - math.log(log_density.shape[1]), {
        name: (posterior * value).sum(1) for name, value in statistics.items()
    }


def _terms(
    bijection: Bijection, x: Tensor, means: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three terms of `ood_statistics` under each of `means` (K, D): (batch, K) each."""
    outputs: list[tuple[Tensor, Tensor]] = []
    with _last_level(bijection).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    ):
        z, log_det = bijection(x, condition)
    last_z, last_log_det = outputs[0]
    base = torch.stack([standard_normal_log_prob(z - mean) for mean in means], 1)
    last_means = means[:, : last_z.shape[1]]
    last = torch.stack([standard_normal_log_prob(last_z - mean) for mean in last_means], 1)
    return base, log_det[:, None].expand_as(base), last + last_log_det[:, None]


def _last_level(bijection: Bijection) -> nn.Module:
    """Return the bijection inside the innermost FactorOut, or the whole one without FactorOut.

    The latents of the last level come first in the vector of latents.
    """
    splits = [module for module in bijection.modules() if isinstance(module, FactorOut)]
    return splits[-1].inner if splits else bijection
