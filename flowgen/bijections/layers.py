"""What the networks inside couplings are made of: layers that may start from data."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.errors import FlowgenError
from flowgen.shares import draw, of_batch, total


class Network(nn.Module, ABC):
    """A function of its input that may start from data."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Look at one batch before training and hand on the output for it."""
        return self(x)


class Layers(Network):
    """Networks one after the other."""

    def __init__(self, *layers: Network):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.initialize(x)  # type: ignore[operator]
        return x


class Relu(Network):
    """max(x, 0), written over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x)


class NormalizedConv2d(Network):
    """A same-size convolution with ActNorm behind it, the two folded into one.

    `initialize` scales each output channel to zero mean and unit variance. That start is all that ActNorm adds here: its scale and
    shift are absorbed by weight and bias, and cost nothing afterwards.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1):
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(0.05 * torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.dilation == 1:
            return F.conv2d(x, self.weight, self.bias, padding="same")
        # Channels-last, the CPU's bfloat16 gradient for the weights of a dilated convolution is NaN from 32x32 on (torch 2.13).
        return F.conv2d(x.contiguous(), self.weight.contiguous(), self.bias, padding="same", dilation=self.dilation)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self(x).transpose(0, 1).flatten(1), dim=1)
        deviation = deviation.clamp(min=1e-6)  # a channel that never varies must not blow up
        self.weight.div_(deviation[:, None, None, None])
        self.bias.copy_((self.bias - mean) / deviation)
        return self(x)


class ZeroConv2d(Network):
    """The last convolution, (w * x + b) exp(3 log_scale), zero when training starts: the coupling starts as the identity.

    Glow (1807.03039), section 3.3 and its code.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        factor = (3 * self.log_scale).exp()  # on the weights rather than the pixels: the same, and free
        return F.conv2d(x, self.weight * factor[:, None, None, None], self.bias * factor, padding="same")


class Normalize(Network):
    """ActNorm where no convolution stands right before it: y = exp(log_scale) x + shift per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(width, 1, 1))
        self.shift = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(x.dtype), x, self.log_scale.exp().to(x.dtype))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        self.log_scale.copy_(-deviation[0].clamp(min=1e-6).log())
        self.shift.copy_(-mean[0] * self.log_scale.exp())
        return self(x)


def check_can_be_normalised(x: Tensor) -> None:
    """Raises FlowgenError for a batch of one number a channel, which has no variance."""
    if of_batch().size * x[:, 0].numel() < 2:
        raise FlowgenError("batch normalisation needs more than one image at a time: give trainer.batch_size at least 2 a part")


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of every channel, (C,) each, over the whole batch, and over how many numbers a channel."""
    numbers, size = x.transpose(0, 1).flatten(1), of_batch().size
    count = size * numbers.shape[1]
    if size == 1:
        variance, mean = torch.var_mean(numbers, dim=1, correction=0)
        return mean, variance, count
    mean = total(numbers.sum(1)) / count
    return mean, total((numbers - mean[:, None]).square().sum(1)) / count, count


class BatchNorm2d(nn.BatchNorm2d):
    """torch's own, over the whole batch where several processes share one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or of_batch().size == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        mean, variance, count = batch_moments(x.to(self.weight.dtype))
        weight = self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.detach(), weight)
        self.running_var.lerp_(variance.detach() * (count / (count - 1)), weight)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul((self.bias - mean * scale)[:, None, None], x, scale[:, None, None]).to(x.dtype)


def has_dropout(network: nn.Module) -> bool:
    """Whether dropout makes it another function at every call in training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


class Dropout(nn.Dropout):
    """torch's own, but that what is lost of a share of a batch is what the whole one would lose there."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        stays = draw(torch.rand, x.shape, device=x.device) >= self.p
        return x * stays / (1 - self.p)
