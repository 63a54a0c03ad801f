"""Conditioner networks, which compute the parameters of bijections and need no inverse."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

MIN_STD = 1e-6  # lower bound of a standard deviation, for channels that are constant
# A function such as `tqdm` that returns an iterable over the same steps and reports its progress.
# Its arguments are the steps, a description, and optionally the number of steps. This is not
# `flowgen.utils.console.Progress`, because bijections need torch alone.
Progress = Callable[..., Iterable[Any]]


def no_progress(steps: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """Return `steps` without reporting progress."""
    return steps


class RandomSource(nn.Module):
    """Source of the random numbers that a model draws for a batch in training.

    A module that needs noise owns a `RandomSource` and calls it instead of `torch.rand` or
    `torch.randn`. Training in several processes replaces it with a source that draws the numbers
    of the whole batch and returns the rows of this process.

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
            generator: Random number generator, or None for the global generator of torch.
            kwargs: Further arguments of `draw`, such as `device` and `dtype`.
        """
        return draw(shape, generator=generator, **kwargs)


@contextmanager
def temporary_attributes(objects: Iterable[object], **values: object) -> Iterator[None]:
    """Set attributes of all objects inside the context and restore them afterwards.

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


class Conditioner(nn.Module):
    """Base class of networks whose normalization layers can be initialized from data.

    The input has shape (batch, in_channels, height, width) and the output (batch, out_channels,
    height, width). `DenseNetwork` maps vectors instead.
    """

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Initialize from one batch before training and return the output for it."""
        with ExitStack() as stack:
            for layer in self.modules():
                if isinstance(layer, NormalizedConv2d | ActNormLayer):
                    stack.enter_context(
                        layer.register_forward_pre_hook(
                            lambda module, args: module.init_from_data(*args)
                        )
                    )
            return self(x)


class Sequential(Conditioner):
    """A conditioner that applies layers in order."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NormalizedConv2d(nn.Module):
    """A convolution with "same" padding followed by ActNorm, fused into one layer.

    `init_from_data` scales each output channel to zero mean and unit variance. The weight and the
    bias absorb the scale and the shift of ActNorm, so ActNorm costs nothing after initialization.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1):
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(
            0.05 * torch.randn(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[2] == 1 and x.dtype == torch.float32 and x.device.type == "cpu":
            # Dilation does not change a 1x1 kernel, but makes torch use oneDNN. Without it, torch
            # uses MKL for fewer than 16 images on one thread, which takes twice as long on an AMD.
            return F.conv2d(x, self.weight, self.bias, dilation=2)
        if self.dilation == 1:
            return F.conv2d(x, self.weight, self.bias, padding="same")
        # The CPU's bfloat16 weight gradient of a dilated channels-last convolution is NaN for
        # images of 32x32 and larger (torch 2.13).
        return F.conv2d(
            x.contiguous(),
            self.weight.contiguous(),
            self.bias,
            padding="same",
            dilation=self.dilation,
        )

    def init_from_data(self, x: Tensor) -> None:
        """Normalize the output for a batch of inputs."""
        output = self.forward(x).transpose(0, 1).flatten(1)
        std, mean = torch.std_mean(output, dim=1, correction=0)
        std = std.clamp(min=MIN_STD)
        self.weight.div_(std[:, None, None, None])
        self.bias.copy_((self.bias - mean) / std)


class ZeroConv2d(Conditioner):
    """A convolution whose output starts at zero: (w * x + b) exp(3 log_scale).

    As the last layer of a conditioner, it makes a coupling start as the identity. Glow
    (1807.03039), section 3.3, and the code of Glow.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, an odd number.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        # Scaling the weights gives the same result as scaling the pixels, at no cost.
        scale = (3 * self.log_scale).exp()
        return F.conv2d(
            x, self.weight * scale[:, None, None, None], self.bias * scale, padding="same"
        )


class ActNormLayer(nn.Module):
    """ActNorm inside a network: y = exp(log_scale) x + shift per channel.

    Networks use it after layers that cannot absorb it, unlike a convolution.

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(x.dtype), x, self.log_scale.exp().to(x.dtype))

    def init_from_data(self, x: Tensor) -> None:
        """Normalize the output for a batch of inputs."""
        std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        self.log_scale.copy_(-std[0].clamp(min=MIN_STD).log())
        self.shift.copy_(-mean[0] * self.log_scale.exp())


def batch_norm_layers(model: nn.Module) -> list[Any]:
    """Return the modules of `model` that keep running statistics of batches.

    They are the batch norm layers of torch and `flowgen.bijections.linear.BatchNorm`.
    """
    return [module for module in model.modules() if hasattr(module, "reset_running_stats")]


def has_dropout(network: nn.Module) -> bool:
    """Return whether the network drops values at random in training."""
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


class ResidualBlock(nn.Module):
    """x + conv3x3(relu(conv3x3(x))) with normalized convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch = Sequential(
            NormalizedConv2d(channels, channels, 3),
            nn.ReLU(inplace=True),
            NormalizedConv2d(channels, channels, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class ConvNetwork(Sequential):
    """The conditioner of Glow (1807.03039), section 5.

    conv3x3 -> ActNorm -> ReLU -> conv1x1 -> ActNorm -> ReLU -> zero conv3x3.

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
            nn.ReLU(inplace=True),
            NormalizedConv2d(width, width, 1),
            nn.ReLU(inplace=True),
            ZeroConv2d(width, out_channels, 3),
        )


class ResNetwork(Sequential):
    """A conditioner with residual blocks.

    conv3x3 -> ActNorm -> ReLU -> `num_blocks` residual blocks -> ActNorm -> ReLU -> zero conv3x3.
    V. Sydorskyi, bachelor thesis (Kyiv Polytechnic Institute, 2020), section 3.5, uses one block.

    Args:
        in_channels: Channels of the input, including those of the condition.
        width: Channels of the hidden layers.
        out_channels: Channels of the output.
        num_blocks: Residual blocks.

    Example:
        >>> ResNetwork(2, 16, 4, num_blocks=2)(torch.randn(5, 2, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, num_blocks: int = 1):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            nn.ReLU(inplace=True),
            *(ResidualBlock(width) for _ in range(num_blocks)),
            ActNormLayer(width),
            nn.ReLU(inplace=True),
            ZeroConv2d(width, out_channels, 3),
        )


class GatedBlock(nn.Module):
    """x + conv1x1(tanh(a) sigmoid(b)), where a and b are the halves of a dilated conv3x3(x).

    Both convolutions are normalized. WaveNet (1609.03499), section 2.3.
    """

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.split = NormalizedConv2d(channels, 2 * channels, 3, dilation)
        self.merge = NormalizedConv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.split(x).chunk(2, dim=1)
        return x + self.merge(signal.tanh() * gate.sigmoid())


class GatedNetwork(Sequential):
    """A conditioner with gated blocks, as in WaveNet.

    conv3x3 -> ActNorm -> `num_blocks` gated blocks -> ActNorm -> ReLU -> zero conv3x3. The
    dilations of the blocks are 1, 2, 4, 1, 2, 4, ...

    Args:
        in_channels: Channels of the input, including those of the condition.
        width: Channels of the hidden layers.
        out_channels: Channels of the output.
        num_blocks: Gated blocks.

    Example:
        >>> GatedNetwork(2, 16, 4, num_blocks=3)(torch.randn(5, 2, 8, 8)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, num_blocks: int):
        super().__init__(
            NormalizedConv2d(in_channels, width, 3),
            *(GatedBlock(width, 2 ** (index % 3)) for index in range(num_blocks)),
            ActNormLayer(width),
            nn.ReLU(inplace=True),
            ZeroConv2d(width, out_channels, 3),
        )


def zero_init(layer: nn.Linear | nn.Conv2d) -> Any:
    """Set the weight and bias of a layer to zero and return the layer."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class DenseNetwork(Sequential):
    """A multilayer perceptron whose output starts at zero.

    It maps (batch, in_features) to (batch, out_features) and has `num_layers` hidden layers of
    `width` ReLUs. NICE (1410.8516), section 5.1.

    Args:
        in_features: Numbers per input.
        width: Units of each hidden layer.
        out_features: Numbers per output.
        num_layers: Hidden layers.

    Example:
        >>> DenseNetwork(3, 16, 6, num_layers=2)(torch.randn(5, 3)).shape
        torch.Size([5, 6])
    """

    def __init__(self, in_features: int, width: int, out_features: int, num_layers: int):
        sizes = [in_features, *[width] * num_layers]
        hidden = [module for pair in pairwise(sizes) for module in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*hidden, zero_init(nn.Linear(sizes[-1], out_features)))


class RealNVPNetwork(Conditioner):
    """A residual network with weight and batch normalization for affine couplings.

    conv3x3 -> `num_blocks` times x + conv3x3(relu(bn(conv3x3(relu(bn(x)))))) -> bn -> relu ->
    conv1x1. The first half of the output channels are log-scales, tanh(.) times the learned
    `scale`. The second half are shifts. Real NVP (1605.08803), sections 3.7 and 4.1.

    Args:
        in_channels: Channels of the input.
        width: Channels of the hidden layers.
        out_channels: Channels of the output, an even number.
        num_blocks: Residual blocks.

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
        return [
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            weight_norm(nn.Conv2d(in_channels, out_channels, kernel_size, padding="same")),
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        raw, shift = self.last(x).chunk(2, dim=1)
        return torch.cat((self.scale.to(raw.dtype) * raw.tanh(), shift), dim=1)


class KeyValueCache:
    """Keys and values of the tokens so far, in memory that is allocated once.

    Args:
        num_tokens: Length of the sequence.

    Example:
        >>> cache = KeyValueCache(num_tokens=8)
        >>> cache.append(torch.randn(5, 4, 2, 1, 16)).shape
        torch.Size([5, 4, 2, 1, 16])
        >>> cache.append(torch.randn(5, 4, 2, 1, 16)).shape
        torch.Size([5, 4, 2, 2, 16])
    """

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.length = 0
        self.memory: Tensor | None = None

    def append(self, new: Tensor) -> Tensor:
        """Append the keys and values of new tokens and return those of all tokens so far.

        Args:
            new: Keys and values, (batch, num_heads, 2, tokens, width / num_heads).
        """
        if torch.is_grad_enabled():  # Autograd needs every earlier result unchanged.
            self.memory = new if self.memory is None else torch.cat((self.memory, new), 3)
            return self.memory
        if self.memory is None:
            self.memory = new.new_empty(*new.shape[:3], self.num_tokens, new.shape[4])
        start = self.length
        self.length += new.shape[3]
        self.memory[:, :, :, start : self.length] = new
        return self.memory[:, :, :, : self.length]


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: h + attention(norm(h)), then h + MLP(norm(h)).

    Tokens have shape (batch, tokens, width). Vaswani et al. (1706.03762); Xiong et al.
    (2002.04745).
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
        self, h: Tensor, causal: bool = False, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Return the output for tokens h.

        Args:
            h: Tokens of shape (batch, tokens, width).
            causal: Whether each token attends only to itself and the tokens before it.
            cache: Keys and values of earlier tokens, to which h also attends, or None.
        """
        batch_size, num_tokens, width = h.shape
        h = h.reshape(-1, width)  # Linear layers are faster on matrices.
        projected = self.queries_keys_values(self.norm(h))
        context: AbstractContextManager[object] = nullcontext()
        if h.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # On a CPU, the backward pass of attention is up to eight times as slow in bfloat16.
            projected = projected.to(h.dtype)
            context = torch.autocast("cpu", enabled=False)
        projected = projected.view(batch_size, num_tokens, 3, self.num_heads, -1).transpose(1, 3)
        queries, keys, values = projected.unbind(2)  # (batch, num_heads, tokens, -1)
        if cache is not None:
            keys, values = cache.append(projected[:, :, 1:]).unbind(2)
        with context:
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
        h = h + self.merge(attended.transpose(1, 2).reshape(h.shape))
        return (h + self.mlp(h)).view(batch_size, num_tokens, width)


class TransformerBase(nn.Module):
    """Base class of transformers: embeddings, transformer blocks and a final norm.

    Args:
        num_tokens: Length of the sequence.
        dim: Values per token.
        width: Values per hidden token.
        num_heads: Attention heads, a divisor of `width`.
        num_layers: Transformer blocks.
        dropout: Probability of dropping a value of a hidden layer.
        cond_channels: Channels of the condition, 0 for no condition.
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

    def transform(self, h: Tensor, causal: bool) -> Tensor:
        """Apply the transformer blocks and the norm to embedded tokens (batch, tokens, width)."""
        for layer in self.layers:
            h = layer(h, causal)
        return self.norm(h)


class CausalTransformer(TransformerBase):
    """A transformer that computes a context for each token from the tokens before it.

    It maps tokens (batch, tokens, dim) to contexts (batch, tokens, width). The context of the
    first token is learned. All contexts depend on the optional condition (batch, cond_channels).
    TarFlow (2412.06329), section 2.3.

    Example:
        >>> network = CausalTransformer(num_tokens=8, dim=4, width=16, num_heads=2, num_layers=1)
        >>> network(torch.randn(5, 8, 4)).shape
        torch.Size([5, 8, 16])
    """

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        previous = F.pad(self.embed(tokens[:, :-1]), (0, 0, 1, 0))
        return self.transform(self._embed_positions(len(tokens), condition) + previous, causal=True)

    def invert_sequentially(
        self,
        invert_token: Callable[[int, Tensor], tuple[Tensor, Tensor]],
        batch_size: int,
        condition: Tensor | None = None,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor]:
        """Compute tokens in order, with cached keys and values.

        Args:
            invert_token: Function of the index of a token and its context (batch, width) that
                returns the token (batch, dim) and its log-det (batch,).
            batch_size: Number of sequences.
            condition: Condition of the contexts, as for `forward`.
            progress: Wrapper of the loop over the tokens.

        Returns:
            The tokens (batch, tokens, dim) and the sum of their log-dets (batch,).
        """
        positions = self._embed_positions(batch_size, condition)
        caches = [KeyValueCache(len(self.place)) for _ in self.layers]
        outputs: list[tuple[Tensor, Tensor]] = []
        for index in progress(range(len(self.place)), "tokens"):
            h = positions[:, index : index + 1]
            if outputs:
                h = h + self.embed(outputs[-1][0])[:, None]
            for layer, cache in zip(self.layers, caches, strict=True):
                h = layer(h, cache=cache)
            outputs.append(invert_token(index, self.norm(h)[:, 0]))
        tokens, log_dets = zip(*outputs, strict=True)
        return torch.stack(tokens, 1), torch.stack(log_dets).sum(0)

    def _embed_positions(self, batch_size: int, condition: Tensor | None) -> Tensor:
        """Return the embeddings of position and condition, of shape (batch, tokens, width)."""
        if condition is None or self.condition is None:
            return self.place.expand(batch_size, -1, -1)
        tokens = condition.reshape(*condition.shape[:2], -1).transpose(1, 2)
        return self.place + self.condition(tokens.to(self.place.dtype))


class Transformer(TransformerBase, Conditioner):
    """A transformer over the pixels of an image with full attention, whose output starts at zero.

    It maps (batch, in_channels, height, width) to (batch, out_channels, height, width). Each pixel
    is a token, so `num_tokens` is height * width. Jet (2412.15129), section 2.

    Args:
        num_tokens: Number of pixels.
        in_channels: Channels of the input.
        width: Values per hidden token.
        out_channels: Channels of the output.
        num_heads: Attention heads, a divisor of `width`.
        num_layers: Transformer blocks.
        dropout: Probability of dropping a value of a hidden layer.

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
        super().__init__(num_tokens, in_channels, width, num_heads, num_layers, dropout)
        self.last = zero_init(nn.Linear(width, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.transform(self.place + self.embed(x.flatten(2).transpose(1, 2)), causal=False)
        return self.last(h).transpose(1, 2).unflatten(2, x.shape[2:])
