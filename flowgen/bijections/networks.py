"""What the networks inside couplings are made of: layers that may start from data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from flowgen.utils.console import Progress, no_progress


class RandomSource(nn.Module):
    """Source of the random numbers that a model draws for a batch in training.

    A module that needs noise owns a `RandomSource` and calls it in place of `torch.rand` or
    `torch.randn`. Training in several processes replaces it by a source that draws the numbers of
    the whole batch and returns the rows of this process.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> RandomSource()(torch.rand, (2, 3)).shape
        torch.Size([2, 3])
    """

    def forward(
        self,
        draw: Callable[..., Tensor],
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return `draw(shape, generator=generator, **kwargs)`.

        Args:
            draw: `torch.rand`, `torch.randn` or a function with the same arguments.
            shape: Shape of the result. The first dimension is the batch.
            generator: Random number generator, or None for torch's global one.
            kwargs: Further arguments of `draw`, such as `device` and `dtype`.
        """
        return draw(shape, generator=generator, **kwargs)


class Conditioner(nn.Module, ABC):
    """A function of its input that may start from data."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Look at one batch before training and hand on the output for it."""
        return self(x)


class Sequential(Conditioner):
    """Networks one after the other."""

    def __init__(self, *layers: Conditioner):
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


class Relu(Conditioner):
    """max(x, 0), written over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x)


class NormalizedConv2d(Conditioner):
    """A same-size convolution with ActNorm behind it, the two folded into one.

    `initialize` scales each output channel to zero mean and unit variance. That start is all that ActNorm adds here: its scale and
    shift are absorbed by weight and bias, and cost nothing afterwards.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1):
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(
            0.05 * torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.dilation == 1:
            return F.conv2d(x, self.weight, self.bias, padding="same")
        # Channels-last, the CPU's bfloat16 gradient for the weights of a dilated convolution is NaN from 32x32 on (torch 2.13).
        return F.conv2d(
            x.contiguous(),
            self.weight.contiguous(),
            self.bias,
            padding="same",
            dilation=self.dilation,
        )

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self(x).transpose(0, 1).flatten(1), dim=1)
        deviation = deviation.clamp(min=1e-6)  # a channel that never varies must not blow up
        self.weight.div_(deviation[:, None, None, None])
        self.bias.copy_((self.bias - mean) / deviation)
        return self(x)


class ZeroConv2d(Conditioner):
    """The last convolution, (w * x + b) exp(3 log_scale), zero when training starts: the coupling starts as the identity.

    Glow (1807.03039), section 3.3 and its code.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        factor = (
            3 * self.log_scale
        ).exp()  # on the weights rather than the pixels: the same, and free
        return F.conv2d(
            x, self.weight * factor[:, None, None, None], self.bias * factor, padding="same"
        )


class ActNormLayer(Conditioner):
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


def has_dropout(network: nn.Module) -> bool:
    """Whether dropout makes it another function at every call in training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws its mask from a `RandomSource`.

    The mask therefore does not depend on how a batch is split across processes.
    """

    def __init__(self, p: float = 0.5):
        super().__init__(p)
        self.random_source = RandomSource()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        mask = self.random_source(torch.rand, x.shape, device=x.device) >= self.p
        return x * mask / (1 - self.p)


class ResidualBlock(Conditioner):
    """x + conv3x3(relu(conv3x3(x))), the two convolutions normalised."""

    def __init__(self, width: int):
        super().__init__()
        self.branch = Sequential(
            NormalizedConv2d(width, width, 3), Relu(), NormalizedConv2d(width, width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        return x + self.branch.initialize(x)


class ConvNetwork(Sequential):
    """conv3x3 -> ActNorm -> ReLU -> conv1x1 -> ActNorm -> ReLU -> zero conv3x3. Glow (1807.03039), section 5."""

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            Relu(),
            NormalizedConv2d(width, width, 1),
            Relu(),
            ZeroConv2d(width, out_channels, 3),
        )


class ResNetwork(Sequential):
    """conv3x3 -> ActNorm -> ReLU -> residual blocks -> ActNorm -> ReLU -> zero conv3x3.

    V. Sydorskyi, bachelor thesis (Kyiv Polytechnic Institute, 2020), section 3.5, there with one block.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, blocks: int = 1):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            Relu(),
            *(ResidualBlock(width) for _ in range(blocks)),
            ActNormLayer(width),
            Relu(),
            ZeroConv2d(width, out_channels, 3),
        )


class GatedBlock(Conditioner):
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


class GatedNetwork(Sequential):
    """conv3x3 -> ActNorm -> gated blocks of dilation 1, 2, 4, 1, ... -> ActNorm -> ReLU -> zero conv3x3."""

    def __init__(self, in_channels: int, width: int, out_channels: int, blocks: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            *(GatedBlock(width, 2 ** (block % 3)) for block in range(blocks)),
            ActNormLayer(width),
            Relu(),
            ZeroConv2d(width, out_channels, 3),
        )


class DenseNetwork(Conditioner):
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


class RealNVPNetwork(Conditioner):
    """A convolutional ResNet with weight and batch normalisation, whose log-scales are scale * tanh(.) with a learnt scale.

    conv3x3 -> `blocks` times x + conv3x3(relu(bn(conv3x3(relu(bn(x)))))) -> bn -> relu -> conv1x1; the first half of the outputs
    are log-scales. Real NVP (1605.08803), section 4.1 and figure 4.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, blocks: int):
        super().__init__()
        self.first = weight_norm(nn.Conv2d(in_channels, width, 3, padding=1))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(layer for _ in range(2) for layer in self._normalized(width, width, 3)))
            for _ in range(blocks)
        )
        self.last = nn.Sequential(*self._normalized(width, out_channels, 1))
        self.scale = nn.Parameter(torch.zeros(out_channels // 2, 1, 1))

    @staticmethod
    def _normalized(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
        convolution = weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding="same"))
        return [nn.BatchNorm2d(in_channels), nn.ReLU(), convolution]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        raw, shift = self.last(x).chunk(2, dim=1)
        return torch.cat((self.scale.to(raw.dtype) * raw.tanh(), shift), dim=1)


Past = tuple[
    Tensor, Tensor
]  # keys and values of the tokens read so far, (B, heads, tokens, width / heads) each


class TransformerBlock(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)), of tokens (B, N, width). Vaswani et al. (1706.03762); Xiong et al. (2002.04745)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.merge = nn.Sequential(nn.Linear(width, width), Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Dropout(dropout),
        )

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        queries, keys, values = self._read(h)
        return self._go_on(
            h, F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        )

    def step(self, h: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """What `forward` makes of the next token, h (B, 1, width), after those of `past`, which grows by it."""
        queries, keys, values = self._read(h)
        if past is not None:
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        return self._go_on(h, F.scaled_dot_product_attention(queries, keys, values)), (keys, values)

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = (
            self.queries_keys_values(self.norm(h))
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        return queries, keys, values

    def _go_on(self, h: Tensor, seen: Tensor) -> Tensor:
        h = h + self.merge(seen.transpose(1, 2).flatten(2))
        return h + self.mlp(h)


class CausalTransformer(nn.Module):
    """Contexts of tokens, (B, N, size) -> (B, N, width), each read off the tokens before it; the first off a learned start alone.

    All of them see a condition of `seen` numbers, the same for all or one for each token. TarFlow (2412.06329), section 3.
    """

    def __init__(
        self,
        tokens: int,
        size: int,
        width: int,
        heads: int,
        layers: int,
        dropout: float = 0.0,
        seen: int = 0,
    ):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.embed = nn.Linear(size, width)
        self.condition = nn.Linear(seen, width, bias=False) if seen else None
        self.layers = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self._places(len(tokens), condition) + F.pad(self.embed(tokens[:, :-1]), (0, 0, 1, 0))
        for layer in self.layers:
            h = layer(h, causal=True)
        return self.norm(h)

    def sample_sequentially(
        self,
        choose: Callable[[int, Tensor], Tensor],
        batch: int,
        condition: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> Tensor:
        """The tokens (batch, N, size) of which each is `choose(i, context)`, (batch, size), by its own context (batch, width).

        Keys and values of the tokens before are kept, so that every token is read once.
        """
        places = self._places(batch, condition)
        past: list[Past | None] = [None] * len(self.layers)
        tokens: list[Tensor] = []
        for i in progress(range(len(self.place)), "one token after the other"):
            h = places[:, i : i + 1]
            if tokens:
                h = h + self.embed(tokens[-1])[:, None]
            for number, layer in enumerate(self.layers):
                h, past[number] = layer.step(h, past[number])  # type: ignore[operator]
            tokens.append(choose(i, self.norm(h)[:, 0]))
        return torch.stack(tokens, 1)

    def _places(self, batch: int, condition: Tensor | None) -> Tensor:
        """What is known of every token beforehand: (batch, N, width)."""
        if condition is None or self.condition is None:
            return self.place.expand(batch, -1, -1)
        each = condition[:, None] if condition.dim() == 2 else condition.flatten(2).transpose(1, 2)
        return self.place + self.condition(each.to(self.place.dtype))


class Transformer(Conditioner):
    """A transformer of the pixels of an image, each of which sees all: (B, C, H, W) -> (B, C', H, W); the last layer starts at zero."""

    def __init__(
        self,
        tokens: int,
        in_channels: int,
        width: int,
        out_channels: int,
        heads: int,
        layers: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.embed = nn.Linear(in_channels, width)
        self.layers = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.last = zero_linear(width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.place + self.embed(x.flatten(2).transpose(1, 2))
        for layer in self.layers:
            h = layer(h, causal=False)
        return self.last(self.norm(h)).transpose(1, 2).unflatten(2, x.shape[2:])


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero, so that what it parametrises starts where its parameters are zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
