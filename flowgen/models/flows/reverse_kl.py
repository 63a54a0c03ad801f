"""Reverse KL: flows fitted to an unnormalized density, without data."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowgen.bijections import elementwise, networks, residual
from flowgen.bijections.base import Bijection, Chain, Invert
from flowgen.bijections.reshape import Flatten
from flowgen.models.base import QUICK_EVAL, EvalConfig
from flowgen.models.flows.builders import dense_couplings, make_transform
from flowgen.models.flows.flow import Flow
from flowgen.models.likelihood import estimate_log_mean, standard_error
from flowgen.models.shapes import MAX_DEPTH
from flowgen.utils.distributed import rank_and_size
from flowgen.utils.energies import ENERGIES, quadrature_log_z
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.metrics import LOG_Z, Metric, Metrics, MetricValue
from flowgen.utils.toy2d import TOY2D_SPAN as SPAN
from flowgen.utils.toy2d import is_toy2d

FLOWS = ("planar", "sylvester", "coupling")
MIN_BETA = 0.01  # inverse temperature at the start of annealing
NUM_EVAL_SAMPLES = 20_000  # importance samples of an evaluation
SQUARE_MARGIN = 1e-6  # keeps the logit finite at the edge of the square
LOG_AREA = 2 * math.log(2 * SPAN)  # of the square; that of the unit square is 0
REVERSE_KL = Metric("reverse_kl", "nats", higher_is_better=False)
RELATIVE_EFFECTIVE_SAMPLE_SIZE = Metric(
    "relative_effective_sample_size", "of the importance samples", higher_is_better=True
)


class ReverseKL(Flow):
    """A flow that is fitted to an unnormalized density p~(x) = Z p(x) by its reverse KL divergence.

    The loss E_q[log q(x) - log p~(x)] = KL(q || p) - log Z needs only samples x of the flow and
    their density, so that only the direction from noise to points has to be in closed form, as in
    planar flows. It needs no data: Rezende and Mohamed, Variational Inference with Normalizing
    Flows (1505.05770), sections 3 and 6.1. Only evaluations use points of the data.

    The flow T of noise z is followed by the distribution function of the normal distribution:
    x = Phi(T(z)), so that q starts as the uniform distribution on the square, and the importance
    weights p~(x) / q(x) are bounded at its edges.

    Args:
        image_shape: (2, 1, 1), the shape of points in the plane.
        bits: Bits per pixel value.
        density: Name of the density, a key of `flowgen.utils.energies.ENERGIES`.
        flow: "planar", "sylvester" or "coupling".
        num_transforms: Number of transforms.
        width: Units of each hidden layer of the coupling networks.
        num_layers: Hidden layers of the coupling networks.
        transform: Univariate transform of the couplings: "additive", "multiplicative", "affine",
            "spline" or "mixture" (of logistics).
        anneal_samples: Number of samples x over which an inverse temperature rises from 0.01 to 1
            at the start of training: the target is p~(x)^beta, so that the flow finds modes before
            they are far apart (section 6, equation 20). 0: always 1.

    Attributes:
        samples_seen: Number of samples x in training so far, a buffer; None without annealing.

    Example:
        >>> model = ReverseKL(density="ring", num_transforms=2)
        >>> images = torch.randint(256, (16, 2, 1, 1), dtype=torch.uint8)
        >>> model(images).shape
        torch.Size([])
        >>> x, log_weights = model.importance_samples(5)
        >>> x.shape, log_weights.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    is_compressible: ClassVar[bool] = False

    def __init__(
        self,
        *,
        image_shape: Sequence[int] = (2, 1, 1),
        bits: int = 8,
        density: str | None = "u1",
        flow: str = "coupling",
        num_transforms: int = 6,
        width: int = 32,
        num_layers: int = 2,
        transform: str = "spline",
        anneal_samples: int = 0,
    ):
        if density not in ENERGIES or not is_toy2d(image_shape):
            raise UserError(
                "model=reverse_kl fits a flow to an unnormalized density in the plane: set "
                f"data=energy data.name=NAME, where NAME is one of {', '.join(ENERGIES)}"
            )
        check_choice(FLOWS, flow=flow)
        check_whole(width=width)
        check_whole(high=MAX_DEPTH, num_transforms=num_transforms, num_layers=num_layers)
        check_whole(low=0, anneal_samples=anneal_samples)
        transform_fn = make_transform(transform)

        def layers() -> Iterator[Bijection]:
            if flow == "planar":
                yield from (residual.Planar(2) for _ in range(num_transforms))
            elif flow == "sylvester":
                yield from (residual.Sylvester(2, width=2) for _ in range(num_transforms))
            else:
                yield from dense_couplings(2, num_transforms, width, num_layers, transform_fn)

        super().__init__(
            Chain(
                Flatten(*image_shape),
                elementwise.Logit(SQUARE_MARGIN),
                elementwise.LogisticToNormal(),
                Invert(Chain(*layers(), elementwise.Standardize(2))),
            ),
            image_shape,
            bits,
        )
        self.density = density
        self.random_source = networks.RandomSource()
        self.loss_metric = None
        self.anneal_samples = anneal_samples
        self.samples_seen = nn.Buffer(torch.zeros((), dtype=torch.long)) if anneal_samples else None

    @classmethod
    def image_kwargs(
        cls, shape: tuple[int, int, int], bits: int, data: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        density = {} if data is None else {"density": data.get("name")}
        return super().image_kwargs(shape, bits) | density

    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Do nothing: the flow starts as the uniform distribution on the square."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return E_q[log q(x) - beta log p~(x)] with as many samples x as there are images."""
        x, log_weights = self.importance_samples(len(images))
        loss = -log_weights.mean()
        if self.samples_seen is None or not self.training:
            return loss
        beta = (MIN_BETA + self.samples_seen / self.anneal_samples).clamp(max=1)
        _, num_processes = rank_and_size()
        self.samples_seen.add_(num_processes * len(images))
        return loss + (1 - beta) * self.log_target(x).mean()

    def importance_samples(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw points x of the flow, and return their importance weights.

        Args:
            count: Number of points.
            generator: Random generator, or None for the global one.

        Returns:
            x in the square [-4, 4] x [-4, 4], (count, 2), and log p~(x) - log q(x), (count,).
        """
        z = self.random_source(
            torch.randn, (count, 2), generator, device=self.device, dtype=self.dtype
        )
        unit, log_q = self._invert(z, None)
        x = SPAN * (2 * unit.flatten(1) - 1)
        return x, self.log_target(x) - (log_q - LOG_AREA)

    def log_target(self, x: Tensor) -> Tensor:
        """Return the unnormalized log-density log p~(x) of points (batch, 2): (batch,)."""
        return -ENERGIES[self.density](x)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the bits/dim of points, and three figures of 20,000 importance samples.

        - reverse_kl: KL(q || p) = E_q[log q(x) - log p~(x)] + log Z, with log Z by quadrature.
        - log_z: the logarithm of the mean weight, an estimate of log Z, and its standard error
          sqrt((1 / s - 1) / (samples - 1)) with s below.
        - relative_effective_sample_size: s = (mean of w)^2 / mean of w^2 for the weights w, a share
          of the samples that is 1 if q equals p. Owen, Monte Carlo theory, methods and examples
          (2013), section 9.3.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        log_weights = self.importance_samples(NUM_EVAL_SAMPLES, generator)[1].double()
        estimate = estimate_log_mean(log_weights)
        true_log_z = quadrature_log_z(self.density)
        kl = true_log_z - log_weights.mean().item()
        kl_error = standard_error(log_weights)
        return super().evaluate(batches, train_batches, eval_config) | Metrics.of(
            MetricValue(REVERSE_KL, kl, kl_error),
            MetricValue(LOG_Z, estimate.log_mean, estimate.error),
            MetricValue(
                RELATIVE_EFFECTIVE_SAMPLE_SIZE, estimate.effective_sample_size / NUM_EVAL_SAMPLES
            ),
            quadrature_log_z=true_log_z,
        )
