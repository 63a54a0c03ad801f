"""Conditioner networks: functions without an inverse that compute the parameters of a bijection."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise, product
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

MIN_DEVIATION = 1e-6  # lower bound of a standard deviation, for channels that are constant
T = TypeVar("T")


class Progress(Protocol):
    """A wrapper of a loop that reports its progress, as `tqdm` does."""

    def __call__(
        self, steps: Iterable[T], description: str, total: int | None = None, /
    ) -> Iterable[T]:
        """Return an iterable over the same steps; `total` is their number."""


def no_progress(steps: Iterable[T], description: str, total: int | None = None, /) -> Iterable[T]:
    """Return `steps` unchanged: the default, which reports nothing."""
    return steps


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


@contextmanager
def temporary_attributes(objects: Iterable[object], **values: object) -> Iterator[None]:
    """Set attributes of all objects inside the context, and restore them afterwards.

    Example:
        >>> dropout = nn.Dropout(0.5)
        >>> with temporary_attributes([dropout], p=0.1):
        ...     print(dropout)
        Dropout(p=0.1, inplace=False)
        >>> dropout
        Dropout(p=0.5, inplace=False)
    """
    with ExitStack() as stack:
        for item, (name, value) in product(objects, values.items()):
            stack.callback(setattr, item, name, getattr(item, name))
            setattr(item, name, value)
        yield


class Conditioner(nn.Module, ABC):
    """Base class of networks that can be initialized from data."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height, width)."""

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Initialize from one batch before training and return the output for it."""
        return self(x)


class Sequential(Conditioner):
    """Networks applied one after the other."""

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


class ReLU(Conditioner):
    """max(x, 0), computed in place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x)


class NormalizedConv2d(Conditioner):
    """A convolution with "same" padding followed by ActNorm, fused into one layer.

    `initialize` scales each output channel to zero mean and unit variance. Scale and shift of
    ActNorm are absorbed by the weight and the bias, so they cost nothing afterwards.
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
        # The CPU's bfloat16 weight gradient of a dilated channels-last convolution is NaN for
        # images of 32x32 and larger (torch 2.13).
        weight = self.weight.contiguous()
        return F.conv2d(x.contiguous(), weight, self.bias, padding="same", dilation=self.dilation)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self(x).transpose(0, 1).flatten(1), dim=1)
        deviation = deviation.clamp(min=MIN_DEVIATION)
        self.weight.div_(deviation[:, None, None, None])
        self.bias.copy_((self.bias - mean) / deviation)
        return self(x)


class ZeroConv2d(Conditioner):
    """A convolution that starts at zero: (w * x + b) exp(3 log_scale).

    As the last layer of a conditioner it makes a coupling start as the identity. Glow
    (1807.03039), section 3.3 and its code.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the weights gives the same result as scaling the pixels, at no cost.
        scale = (3 * self.log_scale).exp()
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, self.bias * scale, padding="same")


class ActNormLayer(Conditioner):
    """ActNorm inside a network: y = exp(log_scale) x + shift per channel.

    It is used where no convolution precedes that could absorb it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(x.dtype), x, self.log_scale.exp().to(x.dtype))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        self.log_scale.copy_(-deviation[0].clamp(min=MIN_DEVIATION).log())
        self.shift.copy_(-mean[0] * self.log_scale.exp())
        return self(x)


def batch_norm_layers(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that keep running statistics of batches.

    These are torch's batch norm layers and `flowgen.bijections.batchnorm.BatchNorm`.
    """
    return [module for module in model.modules() if hasattr(module, "reset_running_stats")]


def has_dropout(network: nn.Module) -> bool:
    """Return whether dropout makes the network a random function in training."""
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
    """x + conv3x3(relu(conv3x3(x))), both convolutions normalized."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = Sequential(
            NormalizedConv2d(channels, channels, 3), ReLU(), NormalizedConv2d(channels, channels, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        return x + self.branch.initialize(x)


class ConvNetwork(Sequential):
    """The conditioner of Glow.

    conv3x3 -> ActNorm -> ReLU -> conv1x1 -> ActNorm -> ReLU -> zero conv3x3. Glow (1807.03039),
    section 5.

    Args:
        in_channels: Channels of the input, including those of the condition.
        width: Channels of the hidden layers.
        out_channels: Channels of the output.

    Example:
        >>> ConvNetwork(2, 16, 4)(torch.randn(5, 2, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, in_channels: int, width: int, out_channels: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            ReLU(),
            NormalizedConv2d(width, width, 1),
            ReLU(),
            ZeroConv2d(width, out_channels, 3),
        )


class ResNetwork(Sequential):
    """A residual conditioner.

    conv3x3 -> ActNorm -> ReLU -> residual blocks -> ActNorm -> ReLU -> zero conv3x3.
    V. Sydorskyi, bachelor thesis (Kyiv Polytechnic Institute, 2020), section 3.5, with one block.

    Example:
        >>> ResNetwork(2, 16, 4, num_blocks=2)(torch.randn(5, 2, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, num_blocks: int = 1):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            ReLU(),
            *(ResidualBlock(width) for _ in range(num_blocks)),
            ActNormLayer(width),
            ReLU(),
            ZeroConv2d(width, out_channels, 3),
        )


class GatedBlock(Conditioner):
    """x + conv1x1(tanh(a) sigmoid(b)), where (a, b) = conv3x3(x) with dilation.

    Both convolutions are normalized. WaveNet (1609.03499), section 2.3.
    """

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.split = NormalizedConv2d(channels, 2 * channels, 3, dilation)
        self.merge = NormalizedConv2d(channels, channels, 1)

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
    """A conditioner with gated blocks, as in WaveNet.

    conv3x3 -> ActNorm -> gated blocks -> ActNorm -> ReLU -> zero conv3x3. The dilations of the
    blocks are 1, 2, 4, 1, 2, 4, ...

    Example:
        >>> GatedNetwork(2, 16, 4, num_blocks=3)(torch.randn(5, 2, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, num_blocks: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            *(GatedBlock(width, 2 ** (index % 3)) for index in range(num_blocks)),
            ActNormLayer(width),
            ReLU(),
            ZeroConv2d(width, out_channels, 3),
        )


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer with zero weights and biases, for parameters that start at zero."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DenseNetwork(Conditioner):
    """A multilayer perceptron (batch, in_features) -> (batch, out_features) that starts at zero.

    It has `num_layers` hidden layers of `width` ReLUs. NICE (1410.8516), section 5.1.

    Example:
        >>> DenseNetwork(3, 16, 6, num_layers=2)(torch.randn(5, 3)).shape
        torch.Size([5, 6])
    """

    def __init__(self, in_features: int, width: int, out_features: int, num_layers: int):
        super().__init__()
        sizes = [in_features, *[width] * num_layers]
        hidden = [module for pair in pairwise(sizes) for module in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*hidden, zero_linear(sizes[-1], out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class RealNVPNetwork(Conditioner):
    """A convolutional ResNet with weight and batch normalization for affine couplings.

    conv3x3 -> `num_blocks` times x + conv3x3(relu(bn(conv3x3(relu(bn(x)))))) -> bn -> relu ->
    conv1x1. The first half of the output channels are log-scales, scale * tanh(.) with a learned
    `scale`; the second half are shifts. Real NVP (1605.08803), section 4.1 and figure 4.

    Example:
        >>> RealNVPNetwork(2, 16, 4, num_blocks=1)(torch.randn(5, 2, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, num_blocks: int):
        super().__init__()
        self.first = weight_norm(nn.Conv2d(in_channels, width, 3, padding=1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *self._bn_relu_conv(width, width, 3), *self._bn_relu_conv(width, width, 3)
            )
            for _ in range(num_blocks)
        )
        self.last = nn.Sequential(*self._bn_relu_conv(width, out_channels, 1))
        self.scale = nn.Parameter(torch.zeros(out_channels // 2, 1, 1))

    @staticmethod
    def _bn_relu_conv(in_channels: int, out_channels: int, kernel_size: int) -> list[nn.Module]:
        convolution = weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding="same"))
        return [nn.BatchNorm2d(in_channels), nn.ReLU(), convolution]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        raw, shift = self.last(x).chunk(2, dim=1)
        return torch.cat((self.scale.to(raw.dtype) * raw.tanh(), shift), dim=1)


KeysValues = tuple[Tensor, Tensor]  # of the tokens so far, (batch, heads, tokens, width / heads)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: h + attention(norm(h)), then h + MLP(norm(h)).

    Tokens are (batch, tokens, width). Vaswani et al. (1706.03762); Xiong et al. (2002.04745).
    """

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
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

    def forward(
        self, h: Tensor, causal: bool = False, cache: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Return the output for tokens h, and the keys and values of all tokens so far.

        Args:
            h: Tokens (batch, tokens, width).
            causal: Whether each token only attends to itself and the tokens before it.
            cache: Keys and values of tokens before h, to which h attends too.
        """
        projected = self.queries_keys_values(self.norm(h)).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            keys = torch.cat((cache[0], keys), 2)
            values = torch.cat((cache[1], values), 2)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        h = h + self.merge(attended.transpose(1, 2).flatten(2))
        return h + self.mlp(h), (keys, values)


class CausalTransformer(nn.Module):
    """Contexts of tokens, (batch, tokens, dim) -> (batch, tokens, width).

    The context of a token depends on the tokens before it; that of the first token is learned.
    All contexts depend on the condition, if there is one: (batch, cond_channels), or one for each
    token as an image (batch, cond_channels, height, width). TarFlow (2412.06329), section 3.

    Args:
        num_tokens: Length of the sequence.
        dim: Values per token.
        width: Values per context.
        num_heads: Attention heads, a divisor of `width`.
        num_layers: Transformer blocks.
        dropout: Probability of dropping a value of a hidden layer.
        cond_channels: Channels of the condition, 0 for no condition.

    Example:
        >>> network = CausalTransformer(num_tokens=8, dim=4, width=16, num_heads=2, num_layers=1)
        >>> network(torch.randn(5, 8, 4)).shape
        torch.Size([5, 8, 16])
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float = 0.0,
        cond_channels: int = 0,
    ):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(num_tokens, width))  # position embedding
        self.embed = nn.Linear(dim, width)
        self.condition = nn.Linear(cond_channels, width, bias=False) if cond_channels else None
        self.layers = nn.ModuleList(
            TransformerBlock(width, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        previous = F.pad(self.embed(tokens[:, :-1]), (0, 0, 1, 0))
        h = self._embed_positions(len(tokens), condition) + previous
        for layer in self.layers:
            h, _ = layer(h, causal=True)
        return self.norm(h)

    def sample_sequentially(
        self,
        sample_fn: Callable[[int, Tensor], Tensor],
        batch_size: int,
        condition: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> Tensor:
        """Generate tokens one after the other, with cached keys and values.

        Args:
            sample_fn: Function of the index of a token and its context (batch, width) that
                returns the token, (batch, dim).
            batch_size: Number of sequences.
            condition: Condition of the contexts, as for `forward`.
            progress: Wrapper of the loop over the tokens.

        Returns:
            The tokens, (batch, tokens, dim).
        """
        positions = self._embed_positions(batch_size, condition)
        cache: list[KeysValues | None] = [None] * len(self.layers)
        tokens: list[Tensor] = []
        for index in progress(range(len(self.place)), "tokens"):
            h = positions[:, index : index + 1]
            if tokens:
                h = h + self.embed(tokens[-1])[:, None]
            for depth, layer in enumerate(self.layers):
                h, cache[depth] = layer(h, cache=cache[depth])
            tokens.append(sample_fn(index, self.norm(h)[:, 0]))
        return torch.stack(tokens, 1)

    def _embed_positions(self, batch_size: int, condition: Tensor | None) -> Tensor:
        """Return the embeddings of position and condition, (batch, tokens, width)."""
        if condition is None or self.condition is None:
            return self.place.expand(batch_size, -1, -1)
        tokens = condition.reshape(*condition.shape[:2], -1).transpose(1, 2)
        return self.place + self.condition(tokens.to(self.place.dtype))


class Transformer(Conditioner):
    """A transformer over the pixels of an image, with full attention, that starts at zero.

    (batch, in_channels, height, width) -> (batch, out_channels, height, width). Each pixel is a
    token: `num_tokens` is height * width. Jet (2412.15129), section 2.

    Example:
        >>> network = Transformer(16, 3, 8, 6, num_heads=2, num_layers=1)
        >>> network(torch.randn(5, 3, 4, 4)).shape
        torch.Size([5, 6, 4, 4])
    """

    def __init__(
        self,
        num_tokens: int,
        in_channels: int,
        width: int,
        out_channels: int,
        num_heads: int,
        num_layers: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(num_tokens, width))  # position embedding
        self.embed = nn.Linear(in_channels, width)
        self.layers = nn.ModuleList(
            TransformerBlock(width, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.last = zero_linear(width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.place + self.embed(x.flatten(2).transpose(1, 2))
        for layer in self.layers:
            h, _ = layer(h)
        return self.last(self.norm(h)).transpose(1, 2).unflatten(2, x.shape[2:])
