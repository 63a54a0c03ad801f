"""Continuous normalizing flows, which are defined by an ordinary differential equation."""

import math
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowgen.bijections.base import Bijection, concat_condition
from flowgen.bijections.networks import Transformer
from flowgen.bijections.reshape import Squeeze

NUM_FREQUENCIES = 2  # of the time embedding
MAX_DIRECTIONS = 64  # directional derivatives that are computed in parallel


class VelocityField(nn.Module):
    """Velocity v(x, t) of flattened images, computed by a transformer over patches.

    The input of every patch includes cos(k pi t) and sin(k pi t) for k = 1..`NUM_FREQUENCIES`, and
    the condition. The velocity starts at zero.

    Args:
        channels: Channels of the images.
        resolution: Height and width of the images.
        patch_size: Height and width of a patch.
        width: Values per hidden token.
        num_heads: Attention heads, a divisor of `width`.
        num_layers: Transformer blocks.
        dropout: Probability of dropping a value of a hidden layer.
        cond_channels: Values of the condition.

    Example:
        >>> velocity = VelocityField(1, (4, 4), patch_size=2, width=8, num_heads=2, num_layers=1)
        >>> velocity(torch.randn(5, 16), torch.tensor(0.5)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        channels: int,
        resolution: tuple[int, int],
        patch_size: int,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float = 0.0,
        cond_channels: int = 0,
    ):
        super().__init__()
        self.shape = (channels, *resolution)
        self.squeeze = Squeeze(patch_size)
        patch_channels = channels * patch_size**2
        self.network = Transformer(
            math.prod(resolution) // patch_size**2,
            patch_channels + 2 * NUM_FREQUENCIES + cond_channels,
            width,
            patch_channels,
            num_heads,
            num_layers,
            dropout,
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the velocity of x (batch, dim) at time t, which is a scalar or (batch,)."""
        frequencies = torch.arange(1, NUM_FREQUENCIES + 1, device=x.device, dtype=x.dtype)
        angles = math.pi * t.expand(len(x))[:, None] * frequencies
        time_embedding = torch.cat((angles.cos(), angles.sin()), 1)
        patches, _ = self.squeeze(x.unflatten(1, self.shape))
        v = self.network(concat_condition(patches, concat_condition(time_embedding, condition)))
        return self.squeeze.inverse(v)[0].flatten(1).to(x.dtype)


class CNF(Bijection):
    """Continuous normalizing flow: z = x(0) and x = x(1) for dx/dt = velocity(x, t).

    log|det dz/dx| is the integral of tr(dv/dx) from t = 1 to 0. Chen et al. (1806.07366),
    theorem 1. The trace is exact for up to `exact_trace_dims` dimensions. For more dimensions it is
    Hutchinson's estimate e^T (dv/dx) e with random signs e for each image. The estimate and the
    log-det are unbiased. FFJORD (1810.01367), section 3.1. The image seeds its signs, so
    it has the same log-det in every batch, up to `tolerance`. If the solver does not
    finish, all results are NaN. This bijection needs the package torchdiffeq.

    Args:
        velocity: Module that maps x (batch, dim), t and the condition to the velocity (batch, dim).
        tolerance: Relative and absolute error per step of the solver.
        exact_trace_dims: Largest dimension with an exact trace.

    Example:
        >>> class Shrink(nn.Module):
        ...     def forward(self, x, t, condition=None):
        ...         return -x
        >>> flow = CNF(Shrink(), tolerance=1e-6, exact_trace_dims=4)
        >>> z, log_det = flow(torch.ones(1, 2))
        >>> z.detach(), log_det.detach()  # z = e x
        (tensor([[2.7183, 2.7183]]), tensor([2.0000]))
    """

    supports_checkpointing = False

    def __init__(self, velocity: nn.Module, tolerance: float, exact_trace_dims: int):
        super().__init__()
        self.velocity = velocity
        self.tolerance = tolerance
        self.exact_trace_dims = exact_trace_dims

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._integrate(x, condition, 1.0, 0.0)

    def inverse(self, z: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._integrate(z, condition, 0.0, 1.0)

    def _integrate(
        self, x: Tensor, condition: Tensor | None, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        # Importing torchdiffeq creates constant tensors. They would have no data if the import ran
        # in the meta device context in which models can be built.
        from torchdiffeq import odeint

        times = torch.tensor([start, end], device=x.device, dtype=x.dtype)
        tolerance = max(self.tolerance, 10 * torch.finfo(x.dtype).eps)
        try:
            with torch.autocast(x.device.type, enabled=False):
                positions, log_dets = odeint(
                    partial(self._velocity_and_trace, condition, self._directions(x)),
                    (x, x.new_zeros(len(x))),
                    times,
                    method="dopri8",
                    rtol=tolerance,
                    atol=(tolerance, tolerance * x.shape[1]),  # per value, also of the log-det
                    options={
                        "norm": _largest_error,
                        "first_step": 0.1,  # the solver reduces it if the error is too large
                        "step_t": times[1:],
                        "max_num_steps": 2000,
                    },
                )
        except AssertionError:  # raised by torchdiffeq for too many or too short steps
            return torch.full_like(x, math.nan), x.new_full((len(x),), math.nan)
        return positions[-1], log_dets[-1]

    def _directions(self, x: Tensor) -> Tensor:
        """Return all axes or random signs, of shape (directions, batch, dim)."""
        if x.shape[1] <= self.exact_trace_dims:
            axes = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
            return axes[:, None].expand(-1, len(x), -1)
        generators = [torch.Generator().manual_seed(hash(tuple(row)) % 2**63) for row in x.tolist()]
        signs = [torch.randint(2, x.shape[1:], generator=generator) for generator in generators]
        return 2 * torch.stack(signs)[None].to(x) - 1

    def _velocity_and_trace(
        self,
        condition: Tensor | None,
        directions: Tensor,
        t: Tensor,
        state: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the time derivatives of the state, which is (positions, log-dets)."""
        x, _ = state
        needs_grad = torch.is_grad_enabled()
        traces = []
        for chunk in directions.split(MAX_DIRECTIONS):
            # Only the math backend of attention has second derivatives.
            backend = sdpa_kernel(SDPBackend.MATH) if needs_grad else nullcontext()
            with torch.enable_grad(), backend:
                repeated_x = x.repeat(len(chunk), 1).requires_grad_()
                v = self.velocity(
                    repeated_x, t, None if condition is None else condition.repeat(len(chunk), 1)
                )
                (product,) = torch.autograd.grad(
                    v, repeated_x, chunk.flatten(0, 1), create_graph=needs_grad
                )
            traces.append((product.view(chunk.shape) * chunk).sum((0, 2)))
        v = v[: len(x)]
        return v if needs_grad else v.detach(), torch.stack(traces).sum(0)


def _largest_error(state: tuple[Tensor, Tensor]) -> Tensor:
    """Return the largest error of all images, in units of the tolerance."""
    position, log_det = state
    return torch.maximum(position.square().mean(1).sqrt().max(), log_det.abs().max())
