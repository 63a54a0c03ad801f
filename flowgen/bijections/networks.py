"""The networks inside couplings: free functions of their input, the only part that may run in bfloat16."""

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from flowgen.errors import FlowgenError


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


class ResidualBlock(Network):
    """x + conv3x3(relu(conv3x3(x))), the two convolutions normalised."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = Layers(NormalizedConv2d(width, width, 3), Relu(), NormalizedConv2d(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        return x + self.branch.initialize(x)


class ConvNetwork(Layers):
    """conv3x3 -> ActNorm -> ReLU -> conv1x1 -> ActNorm -> ReLU -> zero conv3x3. Glow (1807.03039), section 5."""

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            Relu(),
            NormalizedConv2d(width, width, 1),
            Relu(),
            ZeroConv2d(width, out_channels, 3),
        )


class ResNetwork(Layers):
    """conv3x3 -> ActNorm -> ReLU -> residual blocks -> ActNorm -> ReLU -> zero conv3x3.

    V. Sydorskyi, bachelor thesis (Kyiv Polytechnic Institute, 2020), section 3.5, there with one block.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, blocks: int = 1):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            Relu(),
            *(ResidualBlock(width) for _ in range(blocks)),
            Normalize(width),
            Relu(),
            ZeroConv2d(width, out_channels, 3),
        )


class GatedBlock(Network):
    """x + conv1x1(tanh(a) sigmoid(b)), where a and b are the halves of a normalised, dilated conv3x3. WaveNet (1609.03499), section 2.3."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.split = NormalizedConv2d(width, 2 * width, 3, dilation)
        self.merge = NormalizedConv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.merge(self._gate(self.split(x)))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        return x + self.merge.initialize(self._gate(self.split.initialize(x)))

    @staticmethod
    def _gate(x: Tensor) -> Tensor:
        signal, gate = x.chunk(2, dim=1)
        return signal.tanh() * gate.sigmoid()


class GatedNetwork(Layers):
    """conv3x3 -> ActNorm -> gated blocks of dilation 1, 2, 4, 1, ... -> ActNorm -> ReLU -> zero conv3x3."""

    def __init__(self, in_channels: int, width: int, out_channels: int, blocks: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            *(GatedBlock(width, 2 ** (block % 3)) for block in range(blocks)),
            Normalize(width),
            Relu(),
            ZeroConv2d(width, out_channels, 3),
        )


class DenseNetwork(Network):
    """Linear -> ReLU, `layers` times, then a linear layer that starts at zero: (B, C) -> (B, C'). NICE (1410.8516), section 5.1."""

    def __init__(self, in_features: int, width: int, out_features: int, layers: int):
        super().__init__()
        sizes = [in_features, *[width] * layers]
        hidden = [module for pair in pairwise(sizes) for module in (nn.Linear(*pair), nn.ReLU())]
        last = nn.Linear(sizes[-1], out_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def check_can_be_normalised(x: Tensor) -> None:
    """Raises FlowgenError for a batch of one number a channel, which has no variance."""
    if x[:, 0].numel() < 2:
        raise FlowgenError("batch normalisation needs more than one image at a time: give trainer.batch_size at least 2 a part")


class RealNVPNetwork(Network):
    """A convolutional ResNet with weight and batch normalisation, whose log-scales are scale * tanh(.) with a learnt scale.

    conv3x3 -> `blocks` times x + conv3x3(relu(bn(conv3x3(relu(bn(x)))))) -> bn -> relu -> conv1x1; the first half of the outputs
    are log-scales. Real NVP (1605.08803), section 4.1 and figure 4.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, blocks: int):
        super().__init__()
        self.first = weight_norm(nn.Conv2d(in_channels, width, 3, padding=1))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(layer for _ in range(2) for layer in self._normalised(width, width, 3))) for _ in range(blocks)
        )
        self.last = nn.Sequential(*self._normalised(width, out_channels, 1))
        self.scale = nn.Parameter(torch.zeros(out_channels // 2, 1, 1))

    @staticmethod
    def _normalised(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
        convolution = weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding="same"))
        return [nn.BatchNorm2d(in_channels), nn.ReLU(), convolution]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            check_can_be_normalised(x)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        raw, shift = self.last(x).chunk(2, dim=1)
        return torch.cat((self.scale.to(raw.dtype) * raw.tanh(), shift), dim=1)
