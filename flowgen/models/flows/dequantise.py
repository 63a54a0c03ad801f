"""Noise within the levels, which turns them into a density's points."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections import Affine, ConvNetwork, channelwise, checkerboard
from flowgen.errors import check_choice

STEPS, WIDTH = 4, 32
END = 1 - 2**-16  # where a level of 8 bits and its noise still stay below the next level in float32
Call = Callable[[Any, Tensor], Tensor]


class Uniform(nn.Module):
    """u ~ U[0, 1). Theis, van den Oord and Bethge (1511.01844), section 3.1."""

    def forward(self, levels: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """u in the shape of `levels`, and log q(u | levels) in nats, (batch,)."""
        noise = torch.rand(levels.shape, generator=generator, device=levels.device, dtype=dtype)
        return noise, noise.new_zeros(len(levels))

    def initialize(self, levels: Tensor, dtype: torch.dtype) -> None:
        """Uniform noise has nothing to learn."""


class Variational(Uniform):
    """u = END Phi(g(e; levels)) with e ~ N(0, I), g a chain of masked affine couplings that see the image.

    It starts as uniform noise on [0, END). log q(u) = log N(e) - log|det dg/de| - log N(g) - D log END. Flow++ (1902.00275), section 3.1.
    """

    masks: Tensor

    def __init__(self, channels: int, size: int, bins: int):
        super().__init__()
        self.bins, self.transform = bins, Affine()
        kind = checkerboard if size > 1 else channelwise
        self.register_buffer("masks", torch.stack([kind(channels, size, size, step % 2 == 1) for step in range(STEPS)]), persistent=False)
        self.networks = nn.ModuleList(ConvNetwork(2 * channels, WIDTH, 2 * channels) for _ in range(STEPS))

    def forward(self, levels: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return self._draw(levels, dtype, generator, lambda network, x: network(x))

    def initialize(self, levels: Tensor, dtype: torch.dtype) -> None:
        self._draw(levels, dtype, None, lambda network, x: network.initialize(x))

    def _draw(self, levels: Tensor, dtype: torch.dtype, generator: torch.Generator | None, call: Call) -> tuple[Tensor, Tensor]:
        image = 2 * (levels + 0.5).to(dtype) / self.bins - 1
        z = torch.randn(levels.shape, generator=generator, device=levels.device, dtype=dtype)
        log_q = -0.5 * z.square().flatten(1).sum(1)
        for step in range(STEPS):
            mask = self.masks[step]
            parameters = call(self.networks[step], torch.cat((torch.where(mask, z, 0.0), image), 1)).to(dtype)
            moved, log_slope = self.transform.forward(z, parameters)
            z = torch.where(mask, z, moved)
            log_q = log_q - torch.where(mask, 0.0, log_slope).flatten(1).sum(1)
        log_q = log_q + 0.5 * z.square().flatten(1).sum(1)
        return END * torch.special.ndtr(z), log_q - z[0].numel() * math.log(END)


def dequantiser(dequantisation: str, shape: tuple[int, int, int], bits: int) -> Uniform:
    """By the name that a configuration gives it. Raises FlowgenError for another."""
    check_choice(("uniform", "variational"), dequantisation=dequantisation)
    return Uniform() if dequantisation == "uniform" else Variational(shape[0], shape[1], 2**bits)
