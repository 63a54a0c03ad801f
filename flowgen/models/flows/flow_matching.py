"""Flow matching: Lipman, Chen, Ben-Hamu, Nickel and Le (2210.02747)."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flowgen.bijections.base import Bijection
from flowgen.bijections.chain import Chain
from flowgen.bijections.continuous import CNF, VelocityField
from flowgen.bijections.elementwise import MarginalGaussianization, Standardize
from flowgen.bijections.networks import RandomSource
from flowgen.bijections.reshape import Flatten
from flowgen.models.base import QUICK_EVAL, EvalConfig, SupportsInpainting, square_shape
from flowgen.models.flows.flow import Flow
from flowgen.models.flows.tarflow import check_transformers, patch_size
from flowgen.utils.errors import check_choice, check_number, check_whole
from flowgen.utils.metrics import Metric, Metrics, MetricValue

SOLVER = Metric("solver_difference", "bits/dim", higher_is_better=False)
FINER = 0.1  # of the tolerance, to compare with


class FlowMatching(Flow):
    """A continuous flow whose velocity learns the straight ways from noise to data; its likelihood is found by an ODE's solver.

    The training loss is E|v(x_t, t) - (x - z)|^2 for each number, x_t = (1 - t) z + t x, t ~ U[0, 1), z drawn from the base: section 4.1,
    example II, with s_min = 0. It is no likelihood. `conf/model/flow_matching.yaml` says what each argument means.
    """

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
        tolerance: float = 0.0001,
        exact_trace_dims: int = 16,
        num_classes: int | None = None,
        condition_networks: bool = True,
    ):
        channels, size = square_shape(image_shape)
        check_whole(bits=bits)
        check_transformers([num_layers], width, num_heads, dropout)
        check_choice((True, False), gaussianize=gaussianize, condition_networks=condition_networks)
        check_number(tolerance=tolerance)
        check_whole(low=0, exact_trace_dims=exact_trace_dims)
        numbers, seen = (
            channels * size**2,
            num_classes if num_classes is not None and condition_networks else 0,
        )
        velocity = VelocityField(
            channels, size, patch_size(size, patch), width, num_heads, num_layers, dropout, seen
        )
        bijections: list[Bijection] = (
            [MarginalGaussianization(channels, 2**bits)] if gaussianize else []
        )
        bijections += [
            Flatten(channels, size, size),
            Standardize(numbers, learnt=False),
            CNF(velocity, tolerance, exact_trace_dims),
        ]
        super().__init__(
            Chain(*bijections),
            image_shape,
            bits,
            "uniform",
            num_classes,
            condition_networks,
        )
        self.random_source = RandomSource()
        self.loss_metric = None
        self.averages_logs = (
            numbers > exact_trace_dims
        )  # the mean of weights would count the estimates' errors as likelihood: E[exp(error)] > 1

    @classmethod
    def supports(cls, ability: type, arguments: Mapping[str, Any]) -> bool:
        return ability is not SupportsInpainting and super().supports(
            ability, arguments
        )  # Metropolis' steps want exact densities, and many

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        *before, flow = self.bijection.bijections  # type: ignore[misc]
        x, _ = Chain(*before)(self._dequantize(images)[0])
        one_hot = self._one_hot(labels)
        z = self.random_source(torch.randn, x.shape, device=x.device, dtype=x.dtype)
        z = z if one_hot is None else z + one_hot @ self._class_means()
        t = self.random_source(torch.rand, x.shape[:1], device=x.device, dtype=x.dtype)
        v = flow.velocity(torch.lerp(z, x, t[:, None]), t, self._condition(one_hot))
        return (v - (x - z)).square().mean()

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        reference: Iterable[Tensor] = (),
        how: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """As every flow, and how far the bits/dim of the first batch's images lie, on average, from those at a tenth of the tolerance."""
        each = iter(batches)
        first = next(each)
        return super().evaluate(chain((first,), each), reference, how) | Metrics.of(
            self._solver_difference(first)
        )

    def _solver_difference(self, images: Tensor) -> MetricValue:
        flow: Any = self.bijection.bijections[-1]  # type: ignore[index]
        tolerance, found = flow.tolerance, []
        try:
            for flow.tolerance in (tolerance, FINER * tolerance):
                found.append(
                    self._bits_per_dim(
                        self.log_prob(images, torch.Generator(self.device).manual_seed(0))
                    )
                )
        finally:
            flow.tolerance = tolerance
        return MetricValue(SOLVER, (found[0] - found[1]).abs().mean().item())
