"""Restricted Boltzmann machines as generative models of binary images."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.models.base import (
    QUICK_EVAL,
    EvalConfig,
    InpaintingResult,
    LinearMeasurement,
    Observation,
    SupportsCompression,
    SupportsInpainting,
    SupportsMCMC,
)
from flowgen.models.likelihood import standard_error
from flowgen.models.rbm.energy import ContrastiveLoss, EnergyModel
from flowgen.models.rbm.log_z import estimate_log_z, log_likelihood_metrics
from flowgen.models.rbm.negative_phase import PCD, NegativePhase
from flowgen.models.rbm.sampling import SAMPLERS, bernoulli_from_logits, white_noise
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.metrics import (
    CONDITIONAL_LOG_PROB,
    EFFECTIVE_SAMPLE_SIZE,
    LOG_LIKELIHOOD,
    LOG_PROBABILITY,
    UNNORMALIZED,
    Metric,
    Metrics,
    MetricValue,
)

# Added to the count of each value of a pixel, so that its log-odds are finite.
PIXEL_PSEUDOCOUNT = 0.5
OFFSET_DECAY = 0.99  # of the exponential moving averages that center the gradient
MIN_TEMPERATURE = 1e-6
INPAINTING_CHAINS = 64
INPAINTING_STEPS = 1000
CONDITIONAL_AIS_STEPS = 1000
SQUARED_ERROR = "squared error per pixel"  # unit of the reconstruction errors


class RBM(EnergyModel, SupportsCompression, SupportsInpainting, SupportsMCMC):
    """Restricted Boltzmann machine over binary images.

    P(v) = exp(-F(v)) / Z with the free energy of `EnergyModel`. The gradient of -log P(data) is
    estimated with the samples of `negative_phase`. The likelihood is exact if one layer is small
    enough to enumerate, and otherwise an estimate (see `flowgen.models.rbm.log_z`).

    Smolensky, Information processing in dynamical systems: foundations of harmony theory (1986);
    Hinton, A practical guide to training restricted Boltzmann machines (2010).

    Args:
        visible: Shape (channels, height, width) of the images, or a number of visible units.
        hidden: Number of hidden units.
        bits: Bits per pixel. Only 1 is possible, because an RBM has binary pixels.
        negative_phase: Estimator of the model's expectation; PCD with one Gibbs step of 100
            chains by default.
        centered: Subtract running means from both layers in the gradient (Montavon and Mueller,
            2012; Melchior, Fischer and Wiskott, arXiv:1311.1354).
        l1: Strength of a Laplace prior on the weights.
        l2: Strength of a Gaussian prior on the weights.
        sparsity_cost: Strength of a cross-entropy penalty that pulls the mean activity of each
            hidden unit to `sparsity_target` (Hinton's guide, section 11).
        sparsity_target: Target of the mean activity, between 0 and 1.

    Attributes:
        weight: Weights, (visible, hidden).
        visible_bias: Biases of the visible units, (visible,).
        hidden_bias: Biases of the hidden units, (hidden,).
        log_z: Reliable value of log Z for these weights in nats, or None.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> rbm = RBM(visible=(1, 4, 4), hidden=8)
        >>> images = torch.randint(0, 2, (32, 1, 4, 4), dtype=torch.uint8)
        >>> rbm.initialize(images)
        >>> rbm(images).backward()
        >>> samples, unnormalized_log_prob = rbm.eval().sample(5, steps=10)
        >>> samples.shape, samples.dtype, rbm.score(images).shape
        (torch.Size([5, 1, 4, 4]), torch.uint8, torch.Size([32]))
    """

    metric = LOG_LIKELIHOOD
    likelihood = "estimate"
    restores_images = False  # hidden units do not determine the pixels
    shares_batches = False  # its chains cannot be split between processes
    samplers = tuple(SAMPLERS)

    def __init__(
        self,
        visible: int | Sequence[int] = (1, 28, 28),
        hidden: int = 500,
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
                f"visible must be a number of units or (channels, height, width), not {visible!r}"
            )
        channels, height, width = shape
        check_whole(channels=channels, height=height, width=width, hidden=hidden)
        if bits != 1:
            raise UserError(f"an RBM needs binary pixels, not bits={bits}: set data.bits=1")
        check_choice((True, False), centered=centered)
        check_number(l1=l1, l2=l2, sparsity_cost=sparsity_cost, sparsity_target=sparsity_target)
        if sparsity_cost and not 0 < sparsity_target < 1:
            raise UserError(f"sparsity_target must be between 0 and 1, not {sparsity_target}")
        if not isinstance(negative_phase, NegativePhase | None):
            raise UserError(
                "model.negative_phase is a group of settings: "
                f"write model/negative_phase={negative_phase} with a slash"
            )
        super().__init__(math.prod(shape), hidden)
        self.image_shape = (channels, height, width)
        self.bits = bits
        self.centered = centered
        self.l1 = l1
        self.l2 = l2
        self.sparsity_cost = sparsity_cost
        self.sparsity_target = sparsity_target
        self.log_z: float | None = None
        self.visible_offset = nn.Buffer(torch.full((self.visible,), 0.5))
        self.hidden_offset = nn.Buffer(torch.full((hidden,), 0.5))
        self.negative_phase = negative_phase or PCD()
        self.negative_phase.allocate(hidden)

    @classmethod
    def image_kwargs(
        cls, shape: tuple[int, int, int], bits: int, data: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"visible": list(shape), "bits": bits}

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the contrastive loss and the penalties, a scalar.

        The loss is mean F(data) - mean F(negatives). Its value does not measure the fit; its
        gradient is the estimate of the gradient of -log P(data) by the negative phase.
        """
        with torch.autocast(images.device.type, enabled=False):
            data = self.to_visible(images)
            with torch.no_grad():
                hidden_input = self.hidden_input(data)
                negative, negative_input = self.negative_phase(self, data, hidden_input)
                if self.training:
                    self.visible_offset.lerp_(data.mean(0), 1 - OFFSET_DECAY)
                    self.hidden_offset.lerp_(hidden_input.sigmoid().mean(0), 1 - OFFSET_DECAY)
            loss = ContrastiveLoss.apply(
                self.weight,
                self.visible_bias,
                self.hidden_bias,
                data,
                hidden_input,
                negative,
                negative_input,
                (self.visible_offset, self.hidden_offset) if self.centered else None,
            )
            if self.l1:
                loss = loss + self.l1 * self.weight.abs().sum()
            if self.l2:
                loss = loss + 0.5 * self.l2 * self.weight.square().sum()
            if self.sparsity_cost:
                activity = self.hidden_input(data).sigmoid().mean(0)
                target = torch.full_like(activity, self.sparsity_target)
                loss = loss + self.sparsity_cost * F.binary_cross_entropy(
                    activity, target, reduction="sum"
                )
            return loss

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Set the visible biases to the log-odds of the pixels, and draw the initial chains.

        Hinton, A practical guide to training RBMs (2010), section 8.
        """
        data = self.to_visible(images)
        rates = (data.sum(0) + PIXEL_PSEUDOCOUNT) / (len(data) + 2 * PIXEL_PSEUDOCOUNT)
        self.base.copy_(rates.logit())
        self.visible_bias.copy_(self.base)
        self.visible_offset.copy_(rates)
        self.negative_phase.initialize_chains(self)

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        train_batches: Iterable[Tensor] = (),
        eval_config: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Return the log-likelihood and cheaper substitutes, with the same draws at every call.

        - log_likelihood and log_z: see `log_z.log_likelihood_metrics`.
        - pseudo_log_likelihood: sum_i log P(v_i | other v), in nats, estimated from one random
          pixel i of each image: visible * log sigmoid(F(v with pixel i flipped) - F(v)).
        - reconstruction_error: squared error per pixel after one Gibbs step;
          reconstruction_error_expected: the same with P(v = 1 | h) for the last draw.
        - free_energy_gap: mean F of the images minus mean F of those in `train_batches`, in
          nats. A gap that grows shows overfitting (Hinton's guide, section 6).

        Args:
            batches: Batches of images.
            train_batches: Batches of training images for the gap; it may be empty.
            eval_config: Settings of the estimate of log Z.

        Example:
            >>> rbm = RBM(visible=4, hidden=3)
            >>> _ = torch.nn.init.zeros_(rbm.weight)
            >>> images = torch.ones(10, 1, 1, 4, dtype=torch.uint8)
            >>> print(rbm.evaluate([images])["log_likelihood"])  # 4 log 1/2
            log_likelihood -2.773
        """
        data = torch.cat([self.to_visible(images) for images in batches])
        generator = torch.Generator(data.device).manual_seed(0)
        pixel = torch.randint(self.visible, (len(data), 1), generator=generator, device=data.device)
        flipped = data.scatter(1, pixel, 1 - data.gather(1, pixel))
        log_odds = self.visible_input(bernoulli_from_logits(self.hidden_input(data), generator))
        log_z = estimate_log_z(self, eval_config, generator, self.progress)
        free_energy = self.free_energy(data)
        reconstruction = bernoulli_from_logits(log_odds, generator)
        values = [
            MetricValue(
                Metric("pseudo_log_likelihood", "nats", higher_is_better=True),
                self.visible * F.logsigmoid(self.free_energy(flipped) - free_energy).mean().item(),
            ),
            MetricValue(
                Metric("reconstruction_error", SQUARED_ERROR, higher_is_better=False),
                (data - reconstruction).square().mean().item(),
            ),
            MetricValue(
                Metric("reconstruction_error_expected", SQUARED_ERROR, higher_is_better=False),
                (data - log_odds.sigmoid()).square().mean().item(),
            ),
        ]
        visible_train = [self.to_visible(images) for images in train_batches]
        if visible_train:
            train_energy = self.free_energy(torch.cat(visible_train))
            gap = free_energy.mean() - train_energy.mean()
            error = math.hypot(standard_error(free_energy), standard_error(train_energy))
            values.append(MetricValue(Metric("free_energy_gap", "nats"), gap.item(), error))
        return log_likelihood_metrics(free_energy, log_z) | Metrics.of(*values, images=len(data))

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        num_importance_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return log P(v) = -F(v) - log Z of each image in nats, (batch,).

        Without a reliable log Z the result is -F(v), the unnormalized log-probability. It is
        deterministic, so that the keyword arguments have no effect.
        """
        return -self.free_energy(self.to_visible(images)) - (self.log_z or 0.0)

    @property
    def score_metric(self) -> Metric:
        return UNNORMALIZED if self.log_z is None else LOG_PROBABILITY

    def load_eval_results(self, metrics: Mapping[str, Any]) -> None:
        """Use log Z of an evaluation of the same weights if it is reliable."""
        log_z = metrics.get("log_z") if metrics.get("reliable") is True else None
        self.log_z = log_z if isinstance(log_z, int | float) else None

    def train(self, mode: bool = True) -> "RBM":
        """Set the training mode. Training changes log Z, so that the stored value is dropped."""
        if mode:
            self.log_z = None
        return super().train(mode)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        sampler: str = "tempering",
        steps: int = 500,
    ) -> tuple[Tensor, Tensor]:
        """Draw images with Markov chains that start at white noise.

        Args:
            count: Number of images.
            temperature: Temperature, 1 / beta.
            generator: Random generator, or None for the global one.
            sampler: Name of the sampler, a key of `SAMPLERS`.
            steps: Number of steps of the sampler.

        Returns:
            Images (count, channels, height, width), and -F(v) in nats, (count,).
        """
        check_choice(SAMPLERS, sampler=sampler)
        visible = white_noise(self, count, generator)
        beta = 1 / max(temperature, MIN_TEMPERATURE)
        states = islice(SAMPLERS[sampler](self, visible, beta=beta, generator=generator), steps)
        for state, _ in self.progress(states, sampler, steps):
            visible = state
        visible = visible.round()  # mean field returns probabilities
        return self.to_images(visible), -self.free_energy(visible)

    @torch.no_grad()
    def iter_chains(
        self, count: int, sampler: str, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Yield white noise, then P(v = 1 | h) after each step of the sampler, without end.

        Each item has the shape (count, channels, height, width) and values from 0 to 1.
        """
        check_choice(SAMPLERS, sampler=sampler)
        noise = white_noise(self, count, generator)
        yield noise.view(-1, *self.image_shape)
        for _, probabilities in SAMPLERS[sampler](self, noise, generator=generator):
            yield probabilities.view(-1, *self.image_shape)

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        known: Observation,
        *,
        sampler: str,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> InpaintingResult:
        """Sample the unknown pixels of an image given the known ones with clamped chains.

        The unknown pixels of all `INPAINTING_CHAINS` chains start as white noise. The draws are
        P(v = 1) of every chain after the last step. The mean is over all chains and the second
        half of the steps.

        Args:
            images: One image, (1, channels, height, width).
            known: Mask of the known pixels, (channels, height, width).
            sampler: Name of the sampler, a key of `SAMPLERS`.
            steps: Number of steps of the sampler, `INPAINTING_STEPS` by default.
            generator: Random generator, or None for the global one.

        Raises:
            UserError: For an unknown sampler, or if `known` is a linear measurement.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> rbm = RBM(visible=4, hidden=3)
            >>> known = torch.tensor([True, True, False, False]).view(1, 1, 4)
            >>> image = torch.ones(1, 1, 1, 4, dtype=torch.uint8)
            >>> result = rbm.inpaint(image, known, sampler="gibbs", steps=10)
            >>> result.draws.shape, result.mean[0, 0, :2]
            (torch.Size([64, 1, 1, 4]), tensor([1., 1.]))
        """
        check_choice(SAMPLERS, sampler=sampler)
        if isinstance(known, LinearMeasurement):
            raise UserError(
                "an RBM can only inpaint missing pixels: "
                "choose other known pixels, or choose a flow with --run"
            )
        steps = steps or INPAINTING_STEPS
        mask = known.flatten()
        start = torch.where(
            mask, self.to_visible(images), white_noise(self, INPAINTING_CHAINS, generator)
        )
        chains = islice(SAMPLERS[sampler](self, start, known=mask, generator=generator), steps)
        total = torch.zeros_like(start[0])
        for index, (_, draws) in enumerate(self.progress(chains, "inpainting", steps)):
            if index >= steps // 2:
                total += draws.mean(0)
        probability = draws.mean(0)
        return InpaintingResult(
            draws.view(-1, *self.image_shape),
            mean=(total / (steps - steps // 2)).view(self.image_shape),
            std=(probability * (1 - probability)).sqrt().view(self.image_shape),
            metrics={},
        )

    @torch.no_grad()
    def conditional_log_prob(
        self,
        images: Tensor,
        known: Tensor,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Metrics:
        """Return log P(unknown | known) = -F(unknown) - log Z of the model with clamped pixels.

        Given the known pixels, the unknown ones follow a smaller RBM. Its log Z is exact if a layer
        is small enough to enumerate; otherwise it is the midpoint of forward and reverse annealed
        importance sampling, which bridge sampling checks, see `log_z.estimate_log_z`.

        Args:
            images: One image, (1, channels, height, width).
            known: Mask of the known pixels, (channels, height, width).
            steps: AIS steps, `CONDITIONAL_AIS_STEPS` by default.
            generator: Random generator, or None for the global one.

        Raises:
            UserError: If the estimate of log Z is not reliable.

        Example:
            >>> rbm = RBM(visible=4, hidden=3)
            >>> _ = torch.nn.init.zeros_(rbm.weight)
            >>> known = torch.tensor([True, True, False, False]).view(1, 1, 4)
            >>> image = torch.ones(1, 1, 1, 4, dtype=torch.uint8)
            >>> print(rbm.conditional_log_prob(image, known)["conditional_log_probability"])
            conditional_log_probability -1.386
        """
        mask = known.flatten()
        visible = self.to_visible(images)
        clamped = self.condition_on(visible[0], mask)
        steps = steps or CONDITIONAL_AIS_STEPS
        config = EvalConfig(ais_steps=steps, cross_check=True)
        log_z = estimate_log_z(clamped, config, generator, self.progress)
        if not log_z.reliable:
            reason = log_z.verdict.partition(":")[0]  # without its advice for `evaluate`
            raise UserError(
                f"log P(unknown | known) cannot be estimated reliably with {steps} steps, because "
                f"{reason}: increase --steps"
            )
        estimate = log_z.estimates[""]
        method = "enumeration of one layer"
        values = []
        if not estimate.exact:
            method = f"annealed importance sampling in {steps} steps with clamped pixels"
            values.append(MetricValue(EFFECTIVE_SAMPLE_SIZE, estimate.effective_sample_size))
        log_prob = MetricValue(
            CONDITIONAL_LOG_PROB,
            -clamped.free_energy(visible[:, ~mask]).item() - estimate.log_z,
            estimate.error,
            likelihood="exact" if estimate.exact else "estimate",
        )
        return Metrics.of(log_prob, *values, method=method)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return P(h = 1 | v) of all hidden units, (batch, hidden)."""
        return self.hidden_input(self.to_visible(images)).sigmoid()

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Return the most probable images given the hidden units, (batch, hidden)."""
        return self.to_images((self.visible_input(latent) > 0).to(self.dtype))

    def diagnostics(self) -> dict[str, float]:
        return self.negative_phase.diagnostics(self)

    def filters(self) -> Tensor:
        """Return the weights of each hidden unit as an image, those of the largest norm first.

        The shape is (hidden, channels, height, width).
        """
        order = self.weight.norm(dim=0).argsort(descending=True)
        return self.weight.detach().T[order].reshape(-1, *self.image_shape)

    def to_visible(self, images: Tensor) -> Tensor:
        """Return images (batch, channels, height, width) as visible units, (batch, visible)."""
        return images.flatten(1).to(self.dtype)

    def to_images(self, visible: Tensor) -> Tensor:
        """Return visible units (batch, visible) as uint8 images."""
        return visible.to(torch.uint8).view(-1, *self.image_shape)
