"""Autoregressive bijections of vectors: each number is transformed by what a masked network reads off those before it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from flowgen.bijections.base import Bijection
from flowgen.bijections.transforms import Transform

LONG = 100  # numbers from which on the slow direction shows its progress


class MaskedLinear(nn.Linear):
    """A linear layer from units of degrees `before` to units of degrees `after`, which sees those that `allowed` lets through."""

    mask: Tensor

    def __init__(self, allowed: Tensor):
        super().__init__(allowed.shape[1], allowed.shape[0])
        self.register_buffer("mask", allowed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """(batch, size) -> (batch, count * size), the parameters of number t from numbers before t alone. Germain et al. (1502.03509).

    The last layer starts at zero.
    """

    def __init__(self, size: int, width: int, layers: int, count: int):
        super().__init__()
        degrees = torch.arange(size)  # number t may be seen by what speaks of t + 1 and later
        inputs, stack = degrees, []
        for _ in range(layers):
            hidden = torch.arange(width) % max(size - 1, 1)
            stack += [MaskedLinear(hidden[:, None] >= inputs), nn.ReLU()]
            inputs = hidden
        last = MaskedLinear((degrees[:, None] > inputs).repeat(count, 1))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*stack, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Autoregressive(Bijection):
    """z_t = h(x_t; network(x_<t)): all at once from data to latent, one after the other back. MAF (1705.07057), section 3.1."""

    def __init__(self, network: MADE, transform: Transform):
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope = self.transform.forward(x, self.network(x).to(x.dtype))
        return z, log_slope.sum(1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        size = z.shape[1]
        numbers = [torch.zeros_like(z[:, :1])] * size
        log_det = z.new_zeros(len(z))
        hidden = size < LONG or torch.is_grad_enabled() or None
        for t in tqdm(range(size), desc="one number after the other", unit="", leave=False, disable=hidden):
            parameters = self.network(torch.cat(numbers, 1)).to(z.dtype).unflatten(1, (self.transform.count, size))[:, :, t]
            numbers[t], log_slope = self.transform.inverse(z[:, t : t + 1], parameters)
            log_det = log_det + log_slope[:, 0]
        return torch.cat(numbers, 1), log_det


class Reverse(Bijection):
    """Numbers, or channels, in reverse order."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self(z)


class Inverse(Bijection):
    """Another bijection, the other way round; IAF is the inverse of MAF. Kingma et al. (1606.04934)."""

    def __init__(self, bijection: Bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection(z)
