"""What is measured of an RBM: its log-likelihood, and beside it what is none."""

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.base import EvalConfig
from flowgen.models.rbm.energy import EnergyModel
from flowgen.models.rbm.log_z import estimate_log_z, log_likelihood
from flowgen.models.rbm.sampling import bernoulli_from_logits
from flowgen.utils.console import Progress
from flowgen.utils.metrics import Metric, Metrics, MetricValue

PSEUDO_LIKELIHOOD = Metric("pseudo_log_likelihood", "nats", higher_is_better=True)
RECONSTRUCTION = Metric("reconstruction_error", "squared error per pixel", higher_is_better=False)
RECONSTRUCTION_EXPECTED = Metric(
    "reconstruction_error_expected", "squared error per pixel", higher_is_better=False
)
GAP = Metric("free_energy_gap", "nats")


@torch.no_grad()
def evaluate_rbm(
    machine: EnergyModel, data: Tensor, trained: Tensor | None, how: EvalConfig, progress: Progress
) -> Metrics:
    """Of images `data` (count, visible), with the same random numbers at every call.

    `free_energy_gap` is the mean F of `data` less that of `trained`, training images: above 0 it tells of over-fitting.
    """
    generator = torch.Generator(data.device).manual_seed(0)
    flipped = torch.randint(
        machine.visible, (len(data), 1), generator=generator, device=data.device
    )
    free = machine.free_energy(data)
    other = machine.free_energy(data.scatter(1, flipped, 1 - data.gather(1, flipped)))
    log_odds = machine.visible_input(bernoulli_from_logits(machine.hidden_input(data), generator))
    found = log_likelihood(free, estimate_log_z(machine, how, generator, progress))
    concat_condition = [
        MetricValue(PSEUDO_LIKELIHOOD, machine.visible * F.logsigmoid(other - free).mean().item()),
        MetricValue(
            RECONSTRUCTION,
            (data - bernoulli_from_logits(log_odds, generator)).square().mean().item(),
        ),
        MetricValue(RECONSTRUCTION_EXPECTED, (data - log_odds.sigmoid()).square().mean().item()),
        *([] if trained is None else [_gap(free, machine.free_energy(trained))]),
    ]
    return found | Metrics.of(*concat_condition, images=len(data))


def _gap(free: Tensor, trained: Tensor) -> MetricValue:
    error = (free.var() / len(free) + trained.var() / len(trained)).sqrt()
    return MetricValue(GAP, (free.mean() - trained.mean()).item(), error.item())
