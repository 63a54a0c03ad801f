"""Continuous bijections: where the flow of an ordinary differential equation carries a point."""

import math
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import Transformer
from flowgen.bijections.reshape import Squeeze
from flowgen.utils.errors import UserError

FREQUENCIES = 2  # of the time that a velocity sees
FIRST, MOST = (
    0.1,
    2000,
)  # length of the solver's first step, which shrinks where that is too far, and how many it may take
CHUNK = 64  # directions that are differentiated along at once


class VelocityField(nn.Module):
    """v(x, t), (batch, D), of images laid out as vectors x (batch, D) and times t, one or (batch,), by a transformer of their patches.

    Every patch sees cos(k pi t) and sin(k pi t), k = 1..`FREQUENCIES`, and a condition of `seen` numbers. It starts at zero.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        width: int,
        heads: int,
        layers: int,
        dropout: float = 0.0,
        seen: int = 0,
    ):
        super().__init__()
        self.shape = channels, size, size
        self.squeeze = Squeeze(patch)
        maps, tokens = channels * patch**2, (size // patch) ** 2
        self.network = Transformer(
            tokens, maps + 2 * FREQUENCIES + seen, width, maps, heads, layers, dropout
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        angles = (
            math.pi
            * t.expand(len(x))[:, None]
            * torch.arange(1, FREQUENCIES + 1, device=x.device, dtype=x.dtype)
        )
        patches, _ = self.squeeze(x.unflatten(1, self.shape))
        v = self.network(
            concat_condition(
                patches, concat_condition(torch.cat((angles.cos(), angles.sin()), 1), condition)
            )
        )
        return self.squeeze.inverse(v)[0].flatten(1).to(x.dtype)


class CNF(Bijection):
    """z = x(0) of x = x(1), both (batch, D), where dx/dt = velocity(x, t), by an adaptive solver with errors of `tolerance` a step.

    log|det dz/dx| is the integral of tr(dv/dx) from 1 to 0 along the way: Chen et al. (1806.07366), theorem 1. With D up to `exact` the
    trace is exact. Beyond it is e^T (dv/dx) e, whose e of numbers -1 and 1 are drawn once for each image: unbiased, and so is the
    log-det. FFJORD (1810.01367), section 3.1. They are drawn from a seed that the image gives, so that the same has the same log-det in
    any company, but for `tolerance`. Where the solver comes to no end all is NaN.

    Raises FlowgenError where the package torchdiffeq is missing.
    """

    def __init__(self, velocity: nn.Module, tolerance: float, exact: int):
        super().__init__()
        self.velocity, self.tolerance, self.exact = velocity, tolerance, exact
        if find_spec("torchdiffeq") is None:
            raise UserError(
                "continuous flows need the package torchdiffeq: pip install 'flowgen[flow_matching]'"
            )

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._follow(x, condition, 1.0, 0.0)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._follow(z, condition, 0.0, 1.0)

    def _follow(
        self, x: Tensor, condition: Tensor | None, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        from torchdiffeq import (
            odeint,  # whose constants would be without data, were it imported while a model is built without
        )

        ends = torch.tensor([start, end], device=x.device, dtype=x.dtype)
        directions = self._directions(x)
        least = max(self.tolerance, 10 * torch.finfo(x.dtype).eps)

        def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self._velocity_and_trace(state[0], t, condition, directions)

        options = {"norm": _worst, "first_step": FIRST, "step_t": ends[1:], "max_num_steps": MOST}
        tolerances = {
            "rtol": least,
            "atol": (least, least * x.shape[1]),
        }  # of the log-det for each number
        state = (x, x.new_zeros(len(x)))
        try:
            with torch.autocast(x.device.type, enabled=False):
                places, log_dets = odeint(
                    slope, state, ends, method="dopri8", options=options, **tolerances
                )
        except AssertionError:  # its word for too many steps, and for one that is too short
            return torch.full_like(x, math.nan), x.new_full((len(x),), math.nan)
        return places[-1], log_dets[-1]

    def _directions(self, x: Tensor) -> Tensor:
        """Along which the velocity is differentiated, (directions, batch, D): every axis, or one at random for each image."""
        if x.shape[1] <= self.exact:
            return torch.eye(x.shape[1], device=x.device, dtype=x.dtype)[:, None].expand(
                -1, len(x), -1
            )
        generator = torch.Generator()
        seeds = [hash(tuple(numbers)) % 2**63 for numbers in x.tolist()]
        signs = [
            torch.randint(2, x.shape[1:], generator=generator.manual_seed(seed)) for seed in seeds
        ]
        return 2 * torch.stack(signs)[None].to(x) - 1

    def _velocity_and_trace(
        self, x: Tensor, t: Tensor, condition: Tensor | None, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted, traces = torch.is_grad_enabled(), []
        for along in directions.split(CHUNK):
            with (
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext(),
            ):  # the others have no second derivatives
                copies = x.repeat(len(along), 1).requires_grad_()
                v = self.velocity(
                    copies, t, None if condition is None else condition.repeat(len(along), 1)
                )
                (change,) = torch.autograd.grad(v, copies, along.flatten(0, 1), create_graph=wanted)
            traces.append((change.view(along.shape) * along).sum((0, 2)))
        v = v[: len(x)]
        return v if wanted else v.detach(), torch.stack(traces).sum(0)


def _worst(state: tuple[Tensor, Tensor]) -> Tensor:
    """Of the errors of all images, in tolerances: the largest."""
    place, log_det = state
    return torch.maximum(place.square().mean(1).sqrt().max(), log_det.abs().max())
