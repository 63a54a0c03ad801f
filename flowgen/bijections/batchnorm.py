"""Normalization layers: ActNorm and batch normalization as bijections."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections.base import Bijection
from flowgen.bijections.networks import batch_norm_layers, temporary_attributes


class BatchNorm(Bijection):
    """Batch normalization as a bijection: z = (x - mean) / sqrt(variance + eps) per channel.

    log|det| = -height * width / 2 * sum(log(variance + eps)). Real NVP (1605.08803), section 3.7.

    In training, mean and variance are those of the batch, so an image changes the output of the
    others: log-likelihoods of training mode are not exact. In evaluation mode, and for the
    inverse, they are the running averages. `momentum` is the weight of a new batch in them; None
    stands for equal weights, as in torch's batch norm layers.

    Shapes: (batch, channels) or (batch, channels, height, width), the same for x and z.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = BatchNorm(3)
        >>> x = 5 + 2 * torch.randn(64, 3)
        >>> z = bijection.initialize(x)
        >>> bool(z.mean(0).abs().max() < 1e-5)
        True
        >>> torch.allclose(bijection.inverse(z)[0], x, atol=1e-5)
        True
    """

    eps = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        self.momentum: float | None = 0.1
        self.num_batches = 0  # batches since `reset_running_stats`
        self.mean = nn.Buffer(torch.zeros(channels))
        self.variance = nn.Buffer(torch.ones(channels))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self._normalize(x, self.mean, self.variance)
        mean, variance, count = self.batch_moments(x)
        if count < 2:
            # The sentence of torch's batch norm layers.
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size {tuple(x.shape)}"
            )
        weight = self.momentum
        if weight is None:
            self.num_batches += 1
            weight = 1 / self.num_batches
        self.mean.lerp_(mean.detach(), weight)
        self.variance.lerp_(variance.detach() * (count / (count - 1)), weight)
        return self._normalize(x, mean, variance)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_deviation = 0.5 * (self.variance + self.eps).log()
        x = torch.addcmul(_per_channel(self.mean, z), z, _per_channel(log_deviation.exp(), z))
        return x, (log_deviation.sum() * z[0, 0].numel()).expand(len(z))

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        variance, mean = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1, correction=0)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        return self._normalize(x, mean, variance)[0]

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
        """Reset the running statistics, as torch's batch norm layers do."""
        self.mean.zero_()
        self.variance.fill_(1.0)
        self.num_batches = 0

    def _normalize(self, x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        log_deviation = 0.5 * (variance + self.eps).log()
        z = (x - _per_channel(mean, x)) * _per_channel((-log_deviation).exp(), x)
        return z, -(log_deviation.sum() * x[0, 0].numel()).expand(len(x))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape (channels,) to broadcast over x."""
    return values.view(-1, *[1] * (x.dim() - 2))


@torch.no_grad()
def update_bn(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
    """Set the running statistics of all batch norm layers to their means over `batches`.

    Running averages lag behind weights that change, and averaged weights have no statistics.
    This is `torch.optim.swa_utils.update_bn` for batches of several arguments and for `BatchNorm`.
    Izmailov et al. (1803.05407), section 3.2.

    Args:
        model: Model whose statistics are updated. Without batch norm layers, no batch is drawn.
        batches: Positional arguments of `model`, one tuple per batch.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> bijection = BatchNorm(1)
        >>> update_bn(bijection, [(torch.tensor([[1.0], [3.0]]),), (torch.tensor([[3.0], [5.0]]),)])
        >>> bijection.mean.item()
        3.0
    """
    layers = batch_norm_layers(model)
    if not layers:
        return
    for layer in layers:
        layer.reset_running_stats()
    with (
        temporary_attributes(layers, momentum=None),
        temporary_attributes(model.modules(), training=True),
    ):
        for batch in batches:
            model(*batch)
