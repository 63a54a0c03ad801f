"""Restricted Boltzmann machines over binary images."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.models.base import (
    QUICK_EVAL,
    EvalConfig,
    InpaintingResult,
    LinearMeasurement,
    Observation,
    SupportsInpainting,
    SupportsMCMC,
)
from flowgen.models.rbm.energy import ContrastiveLoss, EnergyModel
from flowgen.models.rbm.evaluation import evaluate_rbm
from flowgen.models.rbm.negative_phase import CD, NegativePhase
from flowgen.models.rbm.sampling import (
    SWEEPS,
    Sampler,
    gibbs,
    mean_field,
    restore,
    tempering,
    white_noise,
)
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.metrics import LOG_LIKELIHOOD, LOG_PROBABILITY, UNNORMALIZED, Metric, Metrics

METHODS: dict[str, Sampler] = {"gibbs": gibbs, "tempering": tempering, "mean-field": mean_field}
BASE_RATE_IMAGES = 0.5  # images of either colour, added to the counts of every pixel, so that its log-odds stay finite
OFFSET_MEMORY = 0.99  # of the running means by which the gradient is centred


class RBM(EnergyModel, SupportsInpainting, SupportsMCMC):
    """A machine over binary images, whose `base` are the log-odds of the data's pixels.

    `visible` is a number of units or the shape (channels, height, width) of an image. The gradient of the loss is the one that
    `negative_phase` estimates, with both layers centred where `centred` is set (Montavon and Mueller 2012; Melchior, Fischer and
    Wiskott, 1311.1354). `l1` and `l2` are priors on the weights alone; `sparsity` pulls the mean activity of every hidden unit towards
    `activity`. `conf/model/rbm.yaml` says what each argument means.
    """

    likelihood = "estimate"
    metric = LOG_LIKELIHOOD
    shares_batches = False  # its chains go on from step to step as one
    completions = tuple(METHODS)
    visible_offset: Tensor
    hidden_offset: Tensor

    def __init__(
        self,
        visible: int | Sequence[int],
        hidden: int,
        *,
        bits: int = 1,
        negative_phase: NegativePhase | None = None,
        centered: bool = True,
        l1: float = 0.0,
        l2: float = 0.0,
        sparsity_cost: float = 0.0,
        sparsity_target: float = 0.1,
    ):
        shape = (1, 1, visible) if isinstance(visible, int) else tuple(visible)
        if len(shape) != 3:
            raise UserError(
                f"visible must be a number of units, or channels, height and width, not {visible!r}"
            )
        check_whole(**dict(zip(("channels", "height", "width"), shape, strict=True)), hidden=hidden)
        if bits != 1:
            raise UserError(f"an RBM is of binary pixels, not of bits={bits}: leave data.bits at 1")
        check_choice((True, False), centered=centered)
        check_number(l1=l1, l2=l2, sparsity_cost=sparsity_cost, sparsity_target=sparsity_target)
        if sparsity_cost and not 0 < sparsity_target < 1:
            raise UserError(f"activity must lie between 0 and 1, not at {sparsity_target}")
        units = math.prod(shape)
        super().__init__(units, hidden)
        self.image_shape, self.bits = (shape[0], shape[1], shape[2]), bits
        self.centered, self.l1, self.l2, self.sparsity_cost, self.sparsity_target = (
            centered,
            l1,
            l2,
            sparsity_cost,
            sparsity_target,
        )
        self.log_z: float | None = None  # in nats, of `score`
        self.register_buffer("visible_offset", torch.full((units,), 0.5))
        self.register_buffer("hidden_offset", torch.full((hidden,), 0.5))
        if not isinstance(negative_phase, NegativePhase | None):
            raise UserError(
                f"write model/negative_phase={negative_phase}, with a slash, when training begins"
            )
        self.negative_phase = negative_phase or CD(gibbs_steps=1)
        self.negative_phase.allocate(units, hidden)

    @classmethod
    def image_kwargs(cls, shape: tuple[int, int, int], bits: int) -> dict[str, Any]:
        return {"visible": list(shape), "bits": bits}

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(data).mean() - F(negative).mean(), and the priors: its gradient is the negative phase's estimate for -log P(data)."""
        with torch.autocast(images.device.type, enabled=False):
            data = self.units(images)
            with torch.no_grad():
                inputs = self.hidden_input(data)
                negative, negative_inputs = self.negative_phase(self, data, inputs)
                if self.training:
                    self.visible_offset.lerp_(data.mean(0), 1 - OFFSET_MEMORY)
                    self.hidden_offset.lerp_(inputs.sigmoid().mean(0), 1 - OFFSET_MEMORY)
            offsets = (self.visible_offset, self.hidden_offset) if self.centered else None
            batch = (data, inputs, negative, negative_inputs, offsets)
            loss = ContrastiveLoss.apply(self.weight, self.visible_bias, self.hidden_bias, *batch)
            if self.l1:
                loss = loss + self.l1 * self.weight.abs().sum()
            if self.l2:
                loss = loss + 0.5 * self.l2 * self.weight.square().sum()
            if self.sparsity_cost:
                active = self.hidden_input(data).sigmoid().mean(0)
                loss = loss + self.sparsity_cost * F.binary_cross_entropy(
                    active, torch.full_like(active, self.sparsity_target), reduction="sum"
                )
            return loss

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Start the visible biases at the base rates, and the chains there too. Hinton, A practical guide to training RBMs, section 8."""
        data = self.units(images)
        rate = (data.sum(0) + BASE_RATE_IMAGES) / (len(data) + 2 * BASE_RATE_IMAGES)
        self.base.copy_(rate.logit())
        self.visible_bias.copy_(self.base)
        self.visible_offset.copy_(rate)
        self.negative_phase.start(self)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        reference: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """The log-likelihood in nats and what is measured beside it, see `evaluation.judge`."""
        data = torch.cat([self.units(images) for images in batches])
        trained = [self.units(images) for images in reference]
        return evaluate_rbm(
            self, data, torch.cat(trained) if trained else None, eval_config, self.progress
        )

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """-F(v) - log Z; without log Z where no evaluation has found a reliable one. Nothing is drawn."""
        return -self.free_energy(self.units(images)) - (self.log_z or 0.0)

    @property
    def score_metric(self) -> Metric:
        return UNNORMALIZED if self.log_z is None else LOG_PROBABILITY

    def load_eval_results(self, figures: Mapping[str, Any]) -> None:
        """log Z, where it may be quoted."""
        log_z = figures.get("log_z")
        self.log_z = (
            log_z if figures.get("reliable") is True and isinstance(log_z, int | float) else None
        )

    def train(self, mode: bool = True) -> "RBM":
        """Training changes log Z, so that none is kept."""
        self.log_z = None if mode else self.log_z
        return super().train(mode)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        method: str = "tempering",
        sweeps: int = 500,
    ) -> tuple[Tensor, Tensor]:
        """Images grown from white noise in `sweeps` of a sampler, at beta = 1 / temperature, and their -F(v)."""
        check_choice(METHODS, method=method)
        noise = white_noise(self, count, generator)
        states = METHODS[method](self, noise, beta=1 / max(temperature, 1e-6), generator=generator)
        visible = deque(self.progress(islice(states, sweeps), method, sweeps), maxlen=1)[0][
            0
        ].round()  # mean field's are probabilities
        return self.images(visible), -self.free_energy(visible)

    @torch.no_grad()
    def iter_chains(
        self, count: int, method: str, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """White noise, then P(v = 1) after every sweep."""
        check_choice(METHODS, method=method)
        noise = white_noise(self, count, generator)
        yield noise.view(-1, *self.image_shape)
        for _, expected in METHODS[method](self, noise, generator=generator):
            yield expected.view(-1, *self.image_shape)

    def inpaint(
        self,
        images: Tensor,
        known: Observation,
        *,
        method: str,
        sweeps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> InpaintingResult:
        """P(v = 1) of clamped chains, see `completion.restore`."""
        check_choice(METHODS, method=method)
        if isinstance(known, LinearMeasurement):
            raise UserError(
                "an RBM restores pixels where others are known: leave whole pixels out, or name a flow with --run"
            )
        image, sampler = self.units(images), METHODS[method]
        draws, mean = restore(
            self, image, known.flatten(), sampler, sweeps or SWEEPS, generator, self.progress
        )
        return InpaintingResult(draws.view(-1, *self.image_shape), mean.view(self.image_shape))

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """P(h = 1 | v) of every hidden unit."""
        return self.hidden_input(self.units(images)).sigmoid()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """The most probable image given the hidden units."""
        return self.images((self.visible_input(latent) > 0).to(self.dtype))

    def diagnostics(self) -> dict[str, float]:
        return self.negative_phase.diagnostics(self)

    def filters(self) -> Tensor:
        """The weights of every hidden unit as an image, (hidden, channels, height, width), the largest first."""
        return (
            self.weight.detach()
            .T[self.weight.norm(dim=0).argsort(descending=True)]
            .reshape(-1, *self.image_shape)
        )

    def units(self, images: Tensor) -> Tensor:
        """Images of levels as visible units: (batch, visible)."""
        return images.flatten(1).to(self.dtype)

    def images(self, visible: Tensor) -> Tensor:
        return visible.to(torch.uint8).view(-1, *self.image_shape)
