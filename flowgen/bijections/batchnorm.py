"""Normalisations that start from data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection
from flowgen.bijections.linear import ChannelAffine


class ActNorm(ChannelAffine):
    """y = exp(log_scale) x + shift per channel, log|det| = H W sum(log_scale).

    `initialize` sets both so that every channel of its output has zero mean and unit variance. The logarithm is kept, not the
    scale: a scale can cross zero. Glow (1807.03039), section 3.1.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def affine(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.diag(self.log_scale.exp()), self.shift, self.log_scale.sum()

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        deviation, mean = torch.std_mean(x.transpose(0, 1).flatten(1), dim=1)
        self.log_scale.copy_(
            -deviation.clamp(min=1e-6).log()
        )  # a channel that never varies must not blow up
        self.shift.copy_(-mean * self.log_scale.exp())
        return self(x)[0]


class BatchNorm(Bijection):
    """y = (x - mean) / sqrt(variance + eps) per channel: of the batch in training, of the batches past otherwise.

    log|det| = -H W / 2 sum log(variance + eps). Real NVP (1605.08803), section 3.7. In training each image moves the batch's mean and
    variance, so that figures from there are no likelihoods. Raises FlowgenError for a batch of one number a channel. `momentum` is
    the weight of a batch among those past, None for equal weights, as for torch's own layers.
    """

    eps = 1e-5
    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.momentum: float | None = 0.1
        self.batches = 0  # since the statistics were last reset
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self._map(x, self.mean, self.variance)
        mean, variance, count = self.batch_moments(x)
        if count < 2:
            # The sentence of torch's batch norm layers.
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size {tuple(x.shape)}"
            )
        self._remember(mean.detach(), variance.detach() * (count / (count - 1)))
        return self._map(x, mean, variance)

    def batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the batch statistics that `forward` uses in training.

        Subclasses that train in several processes override this.

        Returns:
            Mean and biased variance of each channel, both (channels,), and the number of values
            per channel.
        """
        values = x.transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, dim=1, correction=0)
        return mean, variance, values.shape[1]

    def reset_running_stats(self) -> None:
        self.mean.zero_()
        self.variance.fill_(1.0)
        self.batches = 0

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        weight = self.momentum
        if weight is None:
            self.batches += 1
            weight = 1 / self.batches
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(variance, weight)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, log_deviation = self.mean, 0.5 * (self.variance + self.eps).log()
        x = torch.addcmul(self._spread(mean, z), z, self._spread(log_deviation.exp(), z))
        return x, (log_deviation.sum() * z[0, 0].numel()).expand(len(z))

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        variance, mean = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1, correction=0)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        return self._map(x, mean, variance)[0]

    def _map(self, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        log_deviation = 0.5 * (variance + self.eps).log()
        z = (x - self._spread(mean, x)) * self._spread((-log_deviation).exp(), x)
        return z, -(log_deviation.sum() * x[0, 0].numel()).expand(len(x))

    @staticmethod
    def _spread(values: Tensor, x: Tensor) -> Tensor:
        return values.view(-1, *[1] * (x.dim() - 2))


Normalisation = BatchNorm | nn.BatchNorm1d | nn.BatchNorm2d


def batch_norm_layers(model: nn.Module) -> list[Normalisation]:
    """Every layer of `model` that keeps statistics of the batches past."""
    return [module for module in model.modules() if isinstance(module, Normalisation)]


@torch.no_grad()
def update_bn(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
    """Set the statistics of all batch normalisations to the means over `batches`, arguments of `model`, at its weights as they stand.

    Running means lag behind weights that move, and averaged weights have none of their own. Izmailov et al. (1803.05407), section 3.2.
    A model without such layers sees no batch.
    """
    layers, training = batch_norm_layers(model), model.training
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.train()
    try:
        for batch in batches:
            model(*batch)
    finally:
        model.train(training)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
