"""Transformers: networks that read an image as a sequence of tokens, the channels of each of its pixels in raster order."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.layers import Dropout, Network
from flowgen.progress import Progress, unseen

Past = tuple[Tensor, Tensor]  # keys and values of the tokens read so far, (B, heads, tokens, width / heads) each


class Layer(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)), of tokens (B, N, width). Vaswani et al. (1706.03762); Xiong et al. (2002.04745)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.merge = nn.Sequential(nn.Linear(width, width), Dropout(dropout))
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), Dropout(dropout))

    def forward(self, h: Tensor, causal: bool) -> Tensor:
        queries, keys, values = self._read(h)
        return self._go_on(h, F.scaled_dot_product_attention(queries, keys, values, is_causal=causal))

    def step(self, h: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """What `forward` makes of the next token, h (B, 1, width), after those of `past`, which grows by it."""
        queries, keys, values = self._read(h)
        if past is not None:
            keys, values = torch.cat((past[0], keys), 2), torch.cat((past[1], values), 2)
        return self._go_on(h, F.scaled_dot_product_attention(queries, keys, values)), (keys, values)

    def _read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = self.queries_keys_values(self.norm(h)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def _go_on(self, h: Tensor, seen: Tensor) -> Tensor:
        h = h + self.merge(seen.transpose(1, 2).flatten(2))
        return h + self.mlp(h)


class CausalTransformer(nn.Module):
    """Contexts of tokens, (B, N, size) -> (B, N, width), each read off the tokens before it; the first off a learned start alone.

    All of them see a condition of `seen` numbers, the same for all or one for each token. TarFlow (2412.06329), section 3.
    """

    def __init__(self, tokens: int, size: int, width: int, heads: int, layers: int, dropout: float = 0.0, seen: int = 0):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.embed = nn.Linear(size, width)
        self.condition = nn.Linear(seen, width, bias=False) if seen else None
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self._places(len(tokens), condition) + F.pad(self.embed(tokens[:, :-1]), (0, 0, 1, 0))
        for layer in self.layers:
            h = layer(h, causal=True)
        return self.norm(h)

    def one_by_one(
        self, choose: Callable[[int, Tensor], Tensor], batch: int, condition: Tensor | None = None, progress: Progress = unseen
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


class Transformer(Network):
    """A transformer of the pixels of an image, each of which sees all: (B, C, H, W) -> (B, C', H, W); the last layer starts at zero."""

    def __init__(self, tokens: int, in_channels: int, width: int, out_channels: int, heads: int, layers: int, dropout: float = 0.0):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.embed = nn.Linear(in_channels, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
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
