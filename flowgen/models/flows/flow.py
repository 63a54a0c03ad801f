"""A normalizing flow over images: a bijection to N(0, I) and the levels around it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowgen.bijections import Bijection
from flowgen.errors import FlowgenError, check_whole
from flowgen.models.base import GenerativeModel
from flowgen.models.flows.dequantise import dequantiser

CLASS_DISTANCE = 0.3  # deviation of the means of the classes at the start, in every latent


def largest_levels(size: int, levels: int | None) -> int:
    """`levels`, or, where that is None, as many halvings as images of this size allow, at most 4 and none for an odd size.

    Raises FlowgenError where they are too many.
    """
    if levels is None:
        return next(levels for levels in (4, 3, 2, 1, 0) if size % 2**levels == 0)
    check_whole(levels=levels)
    if size % 2**levels:
        raise FlowgenError(f"levels={levels} needs images whose size is a multiple of {2**levels}, not {size}: choose fewer levels")
    return levels


class Flow(GenerativeModel):
    """A bijection from images in [0, 1) to vectors under N(0, I), of dequantised levels: x = (levels + u) / 2^bits.

    Shapes: `shape` is (channels, height, width), D their product, latents are (batch, D). The noise u is `uniform` or `variational`;
    when the flow is evaluated, p(x) / q(u) is averaged over `draws` of it, which tightens the bound (Burda et al., 1509.00519).
    With `classes` the latents of class y are under N(means[y], I), the images' p(x) is the mean of their p(x | y), and a class can be
    told from an image by Bayes' rule. Izmailov et al. (1912.13025), section 3.
    """

    figure = "bits_per_dim"

    def __init__(
        self, bijection: Bijection, shape: tuple[int, int, int], bits: int, draws: int, dequantisation: str, classes: int | None = None
    ):
        super().__init__()
        check_whole(bits=bits, draws=draws, **({} if classes is None else {"classes": classes}))
        self.bijection = bijection
        self.dequantiser = dequantiser(dequantisation, shape, bits)
        self.shape, self.dimensions = shape, math.prod(shape)
        self.bits, self.bins, self.draws, self.classes = bits, 2**bits, draws, classes
        self.loss_figure = "bits_per_dim" if classes is None else None  # with classes the loss is that of p(x | y)
        self.means = None if classes is None else nn.Parameter(CLASS_DISTANCE * torch.randn(classes, self.dimensions))

    def forward(self, levels: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean bits per dimension of a batch under one draw of the noise, given their classes where the flow has any."""
        return self._bits_per_dim(self.log_prob(levels, labels=labels)).mean()

    @torch.no_grad()
    def initialize(self, levels: Tensor) -> None:
        self.dequantiser.initialize(levels, self.dtype)
        self.bijection.initialize(self._dequantise(levels)[0])

    def log_prob(self, levels: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None) -> Tensor:
        """log p(x) - log q(u) - D log 2^bits in nats, (batch,), or with p(x | labels) in place of p(x).

        On average over u it is a lower bound on the images' log-probability. Theis, van den Oord and Bethge (1511.01844),
        section 3.1; Flow++ (1902.00275), section 3.1.
        """
        x, log_q = self._dequantise(levels, generator)
        return self.log_density(x, labels) - log_q - self.dimensions * math.log(self.bins)

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | labels), in nats of points x in [0, 1)^D, in the shape of images: (batch,)."""
        z, log_det = self.bijection(x)
        return self._log_base(z, labels) + log_det

    @torch.no_grad()
    def classify(self, levels: Tensor) -> Tensor:
        """log p(y | x), (batch, classes), the classes being equally likely beforehand. Raises FlowgenError for a flow without classes."""
        return self._log_base_of_classes(self.encode(levels), self._class_means()).log_softmax(1)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor], reference: Iterable[Tensor] = (), thorough: bool = False) -> dict[str, Any]:
        """Bits per dimension over `batches`, with the standard error over images; the noise is the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        figures = []
        for levels in batches:
            draws = torch.stack([self.log_prob(levels, generator) for _ in range(self.draws)])
            figures.append(self._bits_per_dim(draws.logsumexp(0) - math.log(self.draws)).double())
        per_image = torch.cat(figures)
        error = per_image.std().item() / math.sqrt(len(per_image)) if len(per_image) > 1 else math.inf
        return {
            "bits_per_dim": per_image.mean().item(),
            "bits_per_dim_error": error,
            "bits": self.bits,
            "draws": self.draws,
            "images": len(per_image),
        }

    @torch.no_grad()
    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None, label: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images whose every latent has standard deviation `temperature`, and their log p(x) in nats, carried by the inverse.

        All are of class `label`, else of classes in turn. Raises FlowgenError for a class that the flow has not.
        """
        z = temperature * torch.randn(count, self.dimensions, generator=generator, device=self.device, dtype=self.dtype)
        if label is not None:
            means = self._class_means()
            if not 0 <= label < len(means):
                raise FlowgenError(f"label {label} is none of the model's {len(means)} classes: give a number from 0 to {len(means) - 1}")
            z = z + means[label]
        elif self.means is not None:
            z = z + self.means[torch.arange(count, device=self.device) % len(self.means)]
        x, log_det = self.bijection.inverse(z)
        return self._quantise(x), self._log_base(z) - log_det - self.dimensions * math.log(self.bins)

    @torch.no_grad()
    def encode(self, levels: Tensor) -> Tensor:
        """The latents of the bins' centres, so that decoding has half a bin to spare on either side."""
        return self.bijection((levels + 0.5) / self.bins)[0]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        return self._quantise(self.bijection.inverse(latent)[0])

    def _dequantise(self, levels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The images in [0, 1), and log q(u) in nats, (batch,)."""
        noise, log_q = self.dequantiser(levels, self.dtype, generator)
        return (levels + noise) / self.bins, log_q

    def _quantise(self, x: Tensor) -> Tensor:
        return (x * self.bins).floor().nan_to_num(0.0).clamp(0, self.bins - 1).to(torch.uint8)

    def _log_base(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.means is None:
            return _log_normal(z)
        if labels is None:
            return self._log_base_of_classes(z, self.means).logsumexp(1) - math.log(len(self.means))
        return _log_normal(z - self.means[labels])

    @staticmethod
    def _log_base_of_classes(z: Tensor, means: Tensor) -> Tensor:
        return torch.stack([_log_normal(z - mean) for mean in means], 1)

    def _class_means(self) -> Tensor:
        if self.means is None:
            raise FlowgenError("this model knows no classes: train one with model.classes=10 on data that has labels")
        return self.means

    def _bits_per_dim(self, log_prob: Tensor) -> Tensor:
        return -log_prob / (self.dimensions * math.log(2))


def _log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats of z (batch, D): (batch,)."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)
