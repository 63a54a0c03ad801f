"""Metrics of an RBM on a set of images: log-likelihood, and cheaper substitutes for it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.base import EvalConfig
from flowgen.models.rbm.energy import EnergyModel
from flowgen.models.rbm.log_z import estimate_log_z, log_likelihood_metrics
from flowgen.models.rbm.sampling import bernoulli_from_logits
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.metrics import Metric, Metrics, MetricValue

PSEUDO_LOG_LIKELIHOOD = Metric("pseudo_log_likelihood", "nats", higher_is_better=True)
RECONSTRUCTION_ERROR = Metric(
    "reconstruction_error", "squared error per pixel", higher_is_better=False
)
EXPECTED_RECONSTRUCTION_ERROR = Metric(
    "reconstruction_error_expected", "squared error per pixel", higher_is_better=False
)
FREE_ENERGY_GAP = Metric("free_energy_gap", "nats")


@torch.no_grad()
def evaluate_rbm(
    rbm: EnergyModel,
    data: Tensor,
    train_data: Tensor | None = None,
    eval_config: EvalConfig | None = None,
    progress: Progress = no_progress,
) -> Metrics:
    """Return the metrics of `data`, with the same random numbers at every call.

    - log_likelihood and log_z: see `log_z.log_likelihood_metrics`.
    - pseudo_log_likelihood: sum_i log P(v_i | other v), in nats, estimated from one random pixel i
      of each image: visible * log sigmoid(F(v with pixel i flipped) - F(v)).
    - reconstruction_error: squared error per pixel after one Gibbs step;
      reconstruction_error_expected: the same with probabilities P(v = 1 | h) for the last draw.
    - free_energy_gap: mean F of `data` minus mean F of `train_data`, in nats. A gap that grows
      shows overfitting (Hinton, A practical guide to training RBMs, 2010, section 6).

    Args:
        rbm: the model.
        data: visible units of the images, (images, visible).
        train_data: visible units of training images for the gap, or None.
        eval_config: settings of the estimate of log Z.
        progress: progress bar.

    Example:
        >>> rbm = EnergyModel(visible=4, hidden=3)
        >>> _ = torch.nn.init.zeros_(rbm.weight)
        >>> print(evaluate_rbm(rbm, torch.ones(10, 4))["log_likelihood"])  # 4 log 1/2
        log_likelihood -2.773
    """
    generator = torch.Generator(data.device).manual_seed(0)
    pixel = torch.randint(rbm.visible, (len(data), 1), generator=generator, device=data.device)
    free_energy = rbm.free_energy(data)
    flipped = data.scatter(1, pixel, 1 - data.gather(1, pixel))
    flipped_free_energy = rbm.free_energy(flipped)
    hidden = bernoulli_from_logits(rbm.hidden_input(data), generator)
    log_odds = rbm.visible_input(hidden)
    log_z = estimate_log_z(rbm, eval_config or EvalConfig(), generator, progress)
    pseudo_log_likelihood = F.logsigmoid(flipped_free_energy - free_energy).mean().item()
    reconstruction = bernoulli_from_logits(log_odds, generator)
    error = (data - reconstruction).square().mean().item()
    expected_error = (data - log_odds.sigmoid()).square().mean().item()
    values = [
        MetricValue(PSEUDO_LOG_LIKELIHOOD, rbm.visible * pseudo_log_likelihood),
        MetricValue(RECONSTRUCTION_ERROR, error),
        MetricValue(EXPECTED_RECONSTRUCTION_ERROR, expected_error),
    ]
    if train_data is not None:
        values.append(_free_energy_gap(free_energy, rbm.free_energy(train_data)))
    return log_likelihood_metrics(free_energy, log_z) | Metrics.of(*values, images=len(data))


def _free_energy_gap(free_energy: Tensor, train_free_energy: Tensor) -> MetricValue:
    variance = free_energy.var() / len(free_energy)
    train_variance = train_free_energy.var() / len(train_free_energy)
    gap = free_energy.mean() - train_free_energy.mean()
    return MetricValue(FREE_ENERGY_GAP, gap.item(), (variance + train_variance).sqrt().item())
