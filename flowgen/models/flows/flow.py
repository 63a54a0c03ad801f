"""Which classes to draw."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.base import Bijection
from flowgen.bijections.elementwise import EmpiricalCDF, Logit
from flowgen.bijections.networks import batch_norm_layers
from flowgen.models.base import (
    QUICK_EVAL,
    ClassConditional,
    EvalConfig,
    GenerativeModel,
    SupportsInpainting,
)
from flowgen.models.flows.dequantization import (
    Gaussian,
    Uniform,
    Variational,
    dequantizer,
    noise_of,
)
from flowgen.models.flows.inpainting import HMCInpaintingMixin
from flowgen.models.flows.ood_statistics import standard_normal_log_prob, statistics
from flowgen.utils.distributed import evaluate_sharded
from flowgen.utils.errors import UserError, check_whole
from flowgen.utils.metrics import BITS_PER_DIM, NOISY_BITS_PER_DIM, Metrics, MetricValue

NO_CLASSES = (
    "this model knows no classes: train one with model.num_classes=10 on data that has labels"
)


def labels_to_draw(
    count: int, label: int | None, first: int, num_classes: int | None, device: torch.device
) -> Tensor | None:
    """Those of `count` samples: `label`, or each class in turn as from sample number `first` on, or None where there are no classes.

    Raises FlowgenError for a class that there is not.
    """
    if label is None:
        return (
            None
            if num_classes is None
            else torch.arange(first, first + count, device=device) % num_classes
        )
    if num_classes is None:
        raise UserError(NO_CLASSES)
    if not 0 <= label < num_classes:
        raise UserError(
            f"label {label} is none of the model's {num_classes} classes: give a number from 0 to {num_classes - 1}"
        )
    return torch.full((count,), label, device=device)


NO_LIKELIHOOD = "this flow was trained on images with noise (model.dequantization=gaussian:...) and knows no likelihood of images themselves"


def check_boundless(bijection: Bijection) -> None:
    """Raises FlowgenError for a flow of nothing but what lies in [0, 1), which noise leaves."""
    if any(isinstance(part, EmpiricalCDF | Logit) for part in bijection.modules()):
        raise UserError(
            "model.dequantization=gaussian:... needs model.gaussianize=false, and another model than realnvp"
        )


@torch.enable_grad()
def denoised(y: Tensor, deviation: float, log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """E[x | y] = y + s^2 grad log p(y) where y = x + s e, e ~ N(0, I): Tweedie's formula, as Efron (2011), section 2, gives it."""
    y = y.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(y).sum(), y)
    return y.detach() + deviation**2 * gradient


class LikelihoodMixin(GenerativeModel):
    """The scores of a flow, from `log_prob` under one draw of its noise."""

    metric = BITS_PER_DIM
    averages_logs = False  # over draws, where the mean of importance weights bounds no likelihood
    bijection: Bijection
    dequantizer: Uniform | Variational
    means: Tensor | None
    bins: int
    dimensions: int
    condition_networks: bool

    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """log p(x) of each image in nats, (batch,): the log of the mean of `draws` importance weights p(x + u) / q(u).

        Raises FlowgenError for a flow of images with noise, as `statistics` does.
        """
        self._check_likelihood()
        return self._over_draws(images, labels, draws, generator)

    def _over_draws(
        self, images: Tensor, labels: Tensor | None, draws: int, generator: torch.Generator | None
    ) -> Tensor:
        each = torch.stack(
            [
                self.log_prob(images, generator, labels)
                for _ in self.progress(range(draws), "draws", draws)
            ]
        )
        return each.mean(0) if self.averages_logs else each.logsumexp(0) - math.log(draws)

    def _check_likelihood(self) -> None:
        if self.metric != BITS_PER_DIM:
            raise UserError(NO_LIKELIHOOD)

    @torch.no_grad()
    def statistics(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Beside log p(x) its terms log N(z) and log|det dz/dx|, and those of the last level; over classes as they are likely."""
        self._check_likelihood()
        x, log_q = self._dequantize(images, generator)
        log_density, found = statistics(self.bijection, x, self.means, self.condition_networks)
        return {"log_prob": log_density - log_q - self.dimensions * math.log(self.bins), **found}

    @torch.no_grad()
    def evaluate(
        self,
        batches: Iterable[Tensor],
        reference: Iterable[Tensor] = (),
        how: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """Bits per dimension over `batches`, with the standard error over images; the noise is the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        per_image = evaluate_sharded(
            batches,
            lambda images: self._bits_per_dim(
                self._over_draws(images, None, how.num_importance_samples, generator)
            ),
            lambda images: [
                self.dequantizer.start(images, self.dtype, generator)
                for _ in range(how.num_importance_samples)
            ],
        )
        error = (
            per_image.std().item() / math.sqrt(len(per_image)) if len(per_image) > 1 else math.inf
        )
        return Metrics.of(
            MetricValue(self.metric, per_image.mean().item(), error),
            bits=self.bits,
            num_importance_samples=how.num_importance_samples,
            images=len(per_image),
        )

    def _bits_per_dim(self, log_prob: Tensor) -> Tensor:
        return -log_prob / (self.dimensions * math.log(2))

    @abstractmethod
    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """log p(x) under one draw of the noise, in nats: (batch,)."""

    @abstractmethod
    def _dequantize(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images in [0, 1), and log q(u) in nats, (batch,)."""


CLASS_DISTANCE = 0.3  # deviation of the means of the classes at the start, in every latent


class Flow(LikelihoodMixin, ClassConditional, HMCInpaintingMixin):
    """A bijection from images in [0, 1) to vectors under N(0, I), of dequantised levels: x = (levels + u) / 2^bits.

    Shapes: `shape` is (channels, height, width), D their product, latents are (batch, D). The noise u is `uniform` or `variational`;
    where p(x) / q(u) is averaged over more draws of it, the bound is tighter (Burda et al., 1509.00519).
    With `classes` the latents of class y are under N(means[y], I), the images' p(x) is the mean of their p(x | y), and a class can be
    told from an image by Bayes' rule. Izmailov et al. (1912.13025), section 3. With `class_networks` the class, one-hot, is the
    condition of every network in the bijection too; then the class is a latent like the others, and the vector that `encode` returns
    ends with it: (batch, D + classes).
    With noise `gaussian:s` x is (levels + 1/2) / 2^bits + s e: its figures are none of images, and samples are denoised.
    """

    def __init__(
        self,
        bijection: Bijection,
        shape: Sequence[int],
        bits: int,
        dequantization: str,
        num_classes: int | None = None,
        condition_networks: bool = False,
    ):
        super().__init__()
        check_whole(bits=bits, **({} if num_classes is None else {"num_classes": num_classes}))
        self.bijection, self.dequantizer = bijection, dequantizer(dequantization, shape, bits)
        self.image_shape, self.dimensions = (shape[0], shape[1], shape[2]), math.prod(shape)
        self.bits, self.bins, self.num_classes = bits, 2**bits, num_classes
        if isinstance(self.dequantizer, Gaussian):
            check_boundless(bijection)
            self.metric, self.averages_logs = NOISY_BITS_PER_DIM, True
        # With classes the loss is that of p(x | y), and under batch normalisation it is no likelihood.
        self.loss_metric = (
            self.metric if num_classes is None and not batch_norm_layers(bijection) else None
        )
        self.condition_networks = condition_networks and num_classes is not None
        self.means = (
            None
            if num_classes is None
            else nn.Parameter(CLASS_DISTANCE * torch.randn(num_classes, self.dimensions))
        )

    @classmethod
    def supports(cls, ability: type, arguments: Mapping[str, Any]) -> bool:
        lacks: dict[type, bool] = {
            ClassConditional: arguments.get("num_classes") is None,
            SupportsInpainting: noise_of(arguments.get("dequantization")) is not None,
        }
        return super().supports(ability, arguments) and not lacks.get(ability, False)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean bits per dimension of a batch under one draw of the noise, given their classes where the flow has any."""
        return self._bits_per_dim(self.log_prob(images, labels=labels)).mean()

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.dequantizer.initialize(images, self.dtype)
        if labels is None and self.num_classes is not None:
            labels = torch.arange(len(images), device=images.device) % self.num_classes
        self.bijection.initialize(
            self._dequantize(images)[0], self._condition(self._one_hot(labels))
        )

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """log p(x) - log q(u) - D log 2^bits in nats, (batch,), or with p(x | labels) in place of p(x).

        On average over u it is a lower bound on the images' log-probability. Theis, van den Oord and Bethge (1511.01844),
        section 3.1; Flow++ (1902.00275), section 3.1.
        """
        x, log_q = self._dequantize(images, generator)
        return self.log_density(x, labels) - log_q - self.dimensions * math.log(self.bins)

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | labels), in nats of points x in [0, 1)^D, in the shape of images: (batch,)."""
        if labels is None and self.means is not None:
            return self._log_density_of_classes(x).logsumexp(1) - math.log(len(self.means))
        one_hot = self._one_hot(labels)
        z, log_det = self.bijection(x, self._condition(one_hot))
        return self._log_base(z, one_hot) + log_det

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """log p(y | x), (batch, classes), the classes being equally likely beforehand. Raises FlowgenError for a flow without classes."""
        return self._log_density_of_classes(self._bin_centers(images)).log_softmax(1)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Images whose every latent has standard deviation `temperature`, and their log p(x) in nats, carried by the inverse.

        All are of class `label`, else of each class in turn, as from number `first` on. Raises FlowgenError for a class that it has not.
        """
        z = temperature * torch.randn(
            count, self.dimensions, generator=generator, device=self.device, dtype=self.dtype
        )
        one_hot = self._one_hot(labels_to_draw(count, label, first, self.num_classes, self.device))
        z = z if one_hot is None else z + one_hot @ self._class_means()
        x, log_density = self._invert(z, one_hot)
        return self._quantize(
            self._without_noise(x, one_hot)
        ), log_density - self.dimensions * math.log(self.bins)

    @torch.no_grad()
    def points(self, z: Tensor) -> Tensor:
        """What has these latents (batch, D) of no class: x in [0, 1)^D, before it is levels again, without noise."""
        return self._without_noise(self._invert(z, None)[0], None)

    def _invert(self, z: Tensor, one_hot: Tensor | None) -> tuple[Tensor, Tensor]:
        """The points that have these latents, and their log p(x)."""
        x, log_det = self.bijection.inverse(z, self._condition(one_hot))
        return x, (
            self._log_base(z, one_hot) if self.condition_networks else self._log_base(z)
        ) - log_det

    def _without_noise(self, x: Tensor, one_hot: Tensor | None) -> Tensor:
        if not isinstance(self.dequantizer, Gaussian):
            return x
        labels = None if one_hot is None else one_hot.argmax(1)
        return denoised(x, self.dequantizer.deviation, lambda y: self.log_density(y, labels))

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latents of the bins' centres, so that decoding has half a bin to spare on either side, or of noise drawn in the bins."""
        x = (
            self._bin_centers(images)
            if generator is None
            else self._dequantize(images, generator)[0]
        )
        one_hot = (
            self._one_hot(self.classify(images).argmax(1)) if self.condition_networks else None
        )
        z, _ = self.bijection(x, one_hot)
        return z if one_hot is None else torch.cat((z, one_hot), 1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        z, one_hot = latent[:, : self.dimensions], latent[:, self.dimensions :].clamp(0, 1)
        return self._quantize(self.bijection.inverse(z, self._condition(one_hot))[0])

    def class_latents(self) -> Tensor:
        means = self._class_means()
        return (
            torch.cat((means, torch.eye(len(means)).to(means)), 1)
            if self.condition_networks
            else means
        )

    def _bin_centers(self, images: Tensor) -> Tensor:
        return (images + 0.5) / self.bins

    def _dequantize(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images in [0, 1), and log q(u) in nats, (batch,)."""
        noise, log_q = self.dequantizer(images, self.dtype, generator)
        return (images + noise) / self.bins, log_q

    def _quantize(self, x: Tensor) -> Tensor:
        return (x * self.bins).floor().nan_to_num(0.0).clamp(0, self.bins - 1).to(torch.uint8)

    def _one_hot(self, labels: Tensor | None) -> Tensor | None:
        """(batch, classes), for a flow that has any and is told them."""
        return (
            None
            if labels is None or self.num_classes is None
            else F.one_hot(labels, self.num_classes).to(self.dtype)
        )

    def _condition(self, one_hot: Tensor | None) -> Tensor | None:
        return one_hot if self.condition_networks else None

    def _log_base(self, z: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """log p(z | class), or, where no class is given, the log of its mean over the classes: (batch,)."""
        if self.means is None:
            return standard_normal_log_prob(z)
        if one_hot is None:
            return self._log_base_of_classes(z).logsumexp(1) - math.log(len(self.means))
        return standard_normal_log_prob(z - one_hot @ self.means)

    def _log_base_of_classes(self, z: Tensor) -> Tensor:
        return torch.stack([standard_normal_log_prob(z - mean) for mean in self._class_means()], 1)

    def _log_density_of_classes(self, x: Tensor) -> Tensor:
        """log p(x | y) in nats for every class y: (batch, classes)."""
        num_classes = len(self._class_means())
        if self.condition_networks:
            return torch.stack(
                [
                    self.log_density(x, x.new_full((len(x),), label, dtype=torch.long))
                    for label in range(num_classes)
                ],
                1,
            )
        z, log_det = self.bijection(x)
        return self._log_base_of_classes(z) + log_det[:, None]

    def _class_means(self) -> Tensor:
        if self.means is None:
            raise UserError(NO_CLASSES)
        return self.means
