"""Token-autoregressive bijections: each token is transformed by what a causal transformer reads off those before it."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowgen.bijections.autoregressive import MADE, Autoregressive
from flowgen.bijections.base import Bijection
from flowgen.bijections.transformers import CausalTransformer, zero_linear
from flowgen.bijections.transforms.base import Transform
from flowgen.progress import Progress, unseen


class Head(Bijection):
    """z = h(x; linear(context)): the numbers of a token (B, size) independent of each other given its context (B, width)."""

    def __init__(self, size: int, width: int, transform: Transform):
        super().__init__()
        self.linear = zero_linear(width, transform.count * size)
        self.transform = transform

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.linear(condition).to(x.dtype))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.transform.inverse(z, self.linear(condition).to(z.dtype))
        return x, log_slope.sum(1)


def local_head(size: int, width: int, transform: Transform) -> Autoregressive:
    """As `Head`, but each number depends on those before it in its token too."""
    return Autoregressive(MADE(size, width, 1, transform.count, seen_by_all=width), transform)


class TokenAutoregressive(Bijection):
    """z_i = head(x_i; c_i), where the context c_i is what `network` reads off x_<i and the condition. TarFlow (2412.06329), section 3.

    Tokens x_i are the channels of the pixels of x (B, C, H, W), in raster order, or with `backwards` from the last to the first, their
    numbers too. The inverse goes token by token, with the keys and values of those before kept; or, with `jacobi`, all tokens at once,
    x <- head^-1(z; contexts of x), until x gives z back to one part in `close`. After k such sweeps the first k tokens are exact, so
    that there are never more than tokens. `sweeps` is how many the last inverse took.
    """

    progress: Progress = staticmethod(unseen)
    jacobi = False
    close = 1e-5

    def __init__(self, network: CausalTransformer, head: Bijection, backwards: bool = False):
        super().__init__()
        self.network, self.head = network, head
        self.backwards = backwards
        self.sweeps = 0

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(x)
        z, log_det = self._each(self.head.forward, tokens, self.network(tokens, condition))
        return self._image(z, x), log_det

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(z)
        x, log_det = (self._by_sweeps if self.jacobi else self._one_by_one)(tokens, condition)
        return self._image(x, z), log_det

    def _one_by_one(self, z: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        log_dets = []

        def choose(i: int, context: Tensor) -> Tensor:
            x, log_det = self.head.inverse(z[:, i], context)
            log_dets.append(log_det)
            return x

        return self.network.one_by_one(choose, len(z), condition, self.progress), torch.stack(log_dets).sum(0)

    def _by_sweeps(self, z: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        contexts = self.network(z, condition)
        for self.sweeps in range(1, z.shape[1] + 1):
            x, _ = self._each(self.head.inverse, z, contexts)
            contexts = self.network(x, condition)
            again, log_det = self._each(self.head.forward, x, contexts)
            if (again - z).abs().max() <= self.close * z.abs().max().clamp(min=1):
                break
        return x, -log_det

    @staticmethod
    def _each(head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], tokens: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """The head's map of every token (B, N, C) in its context, and the sum of their log-dets, (B,)."""
        mapped, log_det = head(tokens.flatten(0, 1), contexts.flatten(0, 1))
        return mapped.view(tokens.shape), log_det.view(tokens.shape[:2]).sum(1)

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H*W, C), in the order in which they are read."""
        tokens = x.flatten(2).transpose(1, 2)
        return tokens.flip(1, 2) if self.backwards else tokens

    def _image(self, tokens: Tensor, like: Tensor) -> Tensor:
        tokens = tokens.flip(1, 2) if self.backwards else tokens
        return tokens.transpose(1, 2).reshape(like.shape)
