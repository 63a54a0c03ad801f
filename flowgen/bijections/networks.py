"""The networks inside couplings: free functions of their input, the only part that may run in bfloat16."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from flowgen.bijections.layers import BatchNorm2d, Layers, Network, Normalize, NormalizedConv2d, Relu, ZeroConv2d, check_can_be_normalised


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
        return [BatchNorm2d(in_channels), nn.ReLU(), convolution]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            check_can_be_normalised(x)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        raw, shift = self.last(x).chunk(2, dim=1)
        return torch.cat((self.scale.to(raw.dtype) * raw.tanh(), shift), dim=1)
