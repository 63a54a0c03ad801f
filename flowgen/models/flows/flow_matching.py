"""Flow matching: Lipman, Chen, Ben-Hamu, Nickel and Le (2210.02747)."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgen.bijections import continuous, elementwise, networks
from flowgen.bijections.base import Bijection
from flowgen.models.base import QUICK_EVAL, EvalConfig, SupportsInpainting
from flowgen.models.flows.builders import flat_chain, num_cond_channels
from flowgen.models.flows.flow import Flow
from flowgen.models.shapes import check_transformer, choose_patch, split_shape
from flowgen.utils.errors import UserError, check_number, check_whole
from flowgen.utils.metrics import Metric, Metrics, MetricValue

SOLVER_DIFFERENCE = Metric("solver_difference", "bits/dim", higher_is_better=False)
TOLERANCE_RATIO = 0.1  # the solver difference compares with this multiple of the tolerance


class FlowMatching(Flow):
    """Continuous flow trained by flow matching; likelihood and samples take an ODE solver.

    The training loss is E|v(x_t, t) - (x - z)|^2 per dimension, where x_t = (1 - t) z + t x,
    t ~ U[0, 1) and z is drawn from the base: Lipman et al. (2210.02747), section 4.1, example II,
    with sigma_min = 0. It is not a likelihood. Needs the package torchdiffeq.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        patch: Side length of the patches, the tokens of the transformer; None selects the largest
            of 4, 2 and 1 that divides height and width.
        num_layers: Layers of the transformer, which predicts the velocity.
        width: Width of the transformer, a multiple of `num_heads`.
        num_heads: Attention heads of the transformer.
        dropout: Dropout of the transformer, from 0 to 1.
        gaussianize: Start from the marginal distribution of the pixels if few values are frequent.
        tolerance: Relative and absolute tolerance of a solver step.
        exact_trace_dims: Log-dets are exact for images up to this dimension, at a cost that
            grows with it, and estimated above. The likelihood is then an estimate of a bound, which
            classes bias upwards.
        num_classes: Number of classes of a class-conditional model, or None.
        condition_networks: With classes, make the class an input of the velocity; p(x) then takes
            one solution of the ODE per class. Otherwise only the base depends on the class.

    Example:
        >>> import torch
        >>> model = FlowMatching(image_shape=(1, 2, 2), bits=5, num_layers=1, width=8)
        >>> images = torch.randint(32, (16, 1, 2, 2), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> model(images).shape
        torch.Size([])
        >>> model.sample(2)[0].shape
        torch.Size([2, 1, 2, 2])
    """

    is_compressible: ClassVar[bool] = False

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (1, 28, 28),
        bits: int = 8,
        patch: int | None = None,
        num_layers: int = 4,
        width: int = 64,
        num_heads: int = 2,
        dropout: float = 0.0,
        gaussianize: bool = True,
        tolerance: float = 1e-4,
        exact_trace_dims: int = 16,
        num_classes: int | None = None,
        condition_networks: bool = True,
    ):
        if find_spec("torchdiffeq") is None:
            raise UserError("flow matching needs the package torchdiffeq: pip install torchdiffeq")
        channels, resolution = split_shape(image_shape)
        check_transformer([num_layers], width, num_heads, dropout)
        check_number(tolerance=tolerance)
        check_whole(low=0, exact_trace_dims=exact_trace_dims)

        def layers(dim: int) -> list[Bijection]:
            return [
                elementwise.Standardize(dim, learned=False),
                continuous.CNF(
                    continuous.VelocityField(
                        channels,
                        resolution,
                        choose_patch(resolution, patch),
                        width,
                        num_heads,
                        num_layers,
                        dropout,
                        num_cond_channels(num_classes, condition_networks),
                    ),
                    tolerance,
                    exact_trace_dims,
                ),
            ]

        super().__init__(
            flat_chain(image_shape, bits, gaussianize, layers),
            image_shape,
            bits,
            "uniform",
            num_classes,
            condition_networks,
        )
        self.random_source = networks.RandomSource()
        self.loss_metric = None
        if self.dimensions > exact_trace_dims:
            self.likelihood = "estimate"  # of the bound
            # The mean of p(x) would be biased upwards by the errors of estimated log-dets:
            # E[exp(error)] > 1.
            self.averages_log_probs = True

    @classmethod
    def supports(cls, capability: type, arguments: Mapping[str, Any]) -> bool:
        # The Metropolis test of inpainting needs many exact densities.
        return capability is not SupportsInpainting and super().supports(capability, arguments)

    @property
    def cnf(self) -> continuous.CNF:
        """The continuous part of the flow, which comes last in the chain."""
        return self.bijection.bijections[-1]  # type: ignore[index, return-value]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the flow matching loss, a scalar."""
        x, _ = self._dequantize(images)
        for bijection in self.bijection.bijections[:-1]:  # type: ignore[index]
            x, _ = bijection(x)
        one_hot = self.one_hot(labels)
        z = self.random_source(torch.randn, x.shape, device=x.device, dtype=x.dtype)
        if one_hot is not None:
            z = z + one_hot @ self.means
        t = self.random_source(torch.rand, x.shape[:1], device=x.device, dtype=x.dtype)
        x_t = torch.lerp(z, x, t[:, None])
        velocity = self.cnf.velocity(x_t, t, self.network_condition(one_hot))
        return (velocity - (x - z)).square().mean()

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the bits/dim, and the solver difference.

        The latter is the mean absolute difference between the bits/dim of the first batch at the
        tolerance and at a tenth of it.
        """
        iterator = iter(batches)
        first_batch = next(iterator)
        metrics = super().evaluate(chain((first_batch,), iterator), train_batches, eval_config)
        coarse, fine = (
            self._bits_per_dim_at(ratio * self.cnf.tolerance, first_batch)
            for ratio in (1, TOLERANCE_RATIO)
        )
        return metrics | Metrics.of(
            MetricValue(SOLVER_DIFFERENCE, (coarse - fine).abs().mean().item())
        )

    def _bits_per_dim_at(self, tolerance: float, images: Tensor) -> Tensor:
        """Return the bits/dim of each image with another tolerance of the solver: (batch,)."""
        generator = torch.Generator(self.device).manual_seed(0)
        with networks.temporary_attributes([self.cnf], tolerance=tolerance):
            return self.bits_per_dim(self.log_prob(images, generator))
