"""What is known of an image where it is no pixel by itself: its grey, or a smaller image."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.bijections.chain import inversion_error
from flowgen.utils.console import Progress, no_progress
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.metrics import LOG_PROBABILITY, Metric, Metrics


class LinearMeasurement(NamedTuple):
    """Weighted sums over groups of pixels, blocks of `side` x `side` and, with `colours`, all channels of them; weights add up to 1.

    Images are (batch, channels, height, width), and so are sums, each at every pixel of its group. `weights` is (channels, 1, 1).
    """

    weights: Tensor
    side: int = 1
    color_weights: bool = False

    def of(self, x: Tensor) -> Tensor:
        """What is known of x."""
        return self.pool(self.weights.to(x) * x)

    def pool(self, x: Tensor) -> Tensor:
        """The sum over each group."""
        if self.color_weights:
            x = x.sum(1, keepdim=True).expand_as(x)
        if self.side > 1:
            x = F.interpolate(self.side**2 * F.avg_pool2d(x, self.side), scale_factor=self.side)
        return x

    def once(self, x: Tensor) -> Tensor:
        """The sum over the groups of what each of them has at every pixel: (batch,)."""
        return x.flatten(1).sum(1) / (self.side**2 * (x.shape[1] if self.color_weights else 1))


Observation = (
    Tensor | LinearMeasurement
)  # true where a pixel is known, (channels, height, width), or sums of pixels


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a model is judged, apart from what it is; by default a short `LOOK`, as training takes it.

    A flow averages `num_importance_samples` of its noise. An RBM estimates log Z by annealing in steps of `ais_steps`, with so many `ais_chains`; if `cross_check`,
    which may take minutes, in several ways that check one another.
    """

    num_importance_samples: int = 1
    ais_steps: int = 1000
    ais_chains: int = 100
    cross_check: bool = False

    def __post_init__(self) -> None:
        check_whole(
            high=10**5, num_importance_samples=self.num_importance_samples
        )  # a figure to one in three hundred of the noise's own error; more would take days
        check_whole(high=10**8, ais_steps=self.ais_steps)
        check_whole(high=10**6, ais_chains=self.ais_chains)
        check_choice((True, False), cross_check=self.cross_check)


QUICK_EVAL = EvalConfig()
MAX_DEPTH = 1000  # layers, blocks, couplings: more would take hours to build


def square_shape(image_shape: Sequence[int]) -> tuple[int, int]:
    """Return the channels and the side of square images of `image_shape` (channels, height, width).

    Raises:
        UserError: for images that are not square, or have no pixels.
    """
    channels, height, width = image_shape
    check_whole(channels=channels, height=height, width=width)
    if height != width:
        raise UserError(f"image_shape={list(image_shape)} is not square: choose one data.size")
    return channels, height


class GenerativeModel(nn.Module, ABC):
    """A distribution over images of levels: uint8 tensors of shape (batch, channels, height, width), values 0..2^bits-1."""

    metric: Metric  # by which two models are compared
    image_shape: tuple[int, int, int]  # channels, height, width
    bits: int
    num_classes: int | None = (
        None  # that labels tell apart, where the model learns one distribution for each
    )
    shares_batches: ClassVar[bool] = (
        True  # whether several processes may train it, each on its rows of every batch
    )
    loss_metric: Metric | None = None  # that the training loss is, where it is one
    progress: Progress = staticmethod(no_progress)

    @classmethod
    def image_kwargs(cls, shape: tuple[int, int, int], bits: int) -> dict[str, Any]:
        """What the constructor is told of the images: of their shape (channels, height, width) and bits."""
        return {"image_shape": list(shape), "bits": bits}

    @classmethod
    def supports(cls, ability: type, arguments: Mapping[str, Any]) -> bool:
        """Whether a model built from these arguments has this ability, a class of `flowgen.models.base`."""
        return issubclass(cls, ability)

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The training loss, a scalar. It comes out of `forward` so that a wrapper around the model sees it.

        `labels` (batch,) are the images' classes where the data has any; only a model of `classes` looks at them.
        """

    @abstractmethod
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Start from one batch of a few hundred images, and their classes where there are any, once, before anything wraps the model."""

    @abstractmethod
    def evaluate(
        self,
        batches: Iterable[Tensor],
        reference: Iterable[Tensor] = (),
        how: EvalConfig = QUICK_EVAL,
    ) -> Metrics:
        """What is measured on the images in `batches`: the `metric`, and what else tells of the model.

        `reference` are as many training images, for what compares the two.
        """

    @abstractmethod
    def score(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The `score_metric` of each image in nats, (batch,), given their classes where `labels` says so.

        Where the model has noise within its levels, it is averaged over `draws` of `generator`.
        """

    def statistics(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """What tells how usual images are, (batch,) each: the `score` as `log_prob`, and what else the model can say of them."""
        return {"log_prob": self.score(images, generator=generator)}

    @property
    def score_metric(self) -> Metric:
        """What `score` is: a log-probability, unless that lacks its normaliser."""
        return LOG_PROBABILITY

    def load_eval_results(self, figures: Mapping[str, Any]) -> None:
        """Take over what an evaluation has found about these very weights."""

    @abstractmethod
    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw `count` images: their levels, and what sorts them, of shape (count,)."""

    @abstractmethod
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Every latent of every image: (batch, latent).

        Where the model has noise within its levels, its middle is taken, or, by `generator`, it is drawn: then latents are as the model
        has them, N(0, I) of a flow, whereas those of many equal levels all have one and the same value, which is far from usual.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """The levels of the images with these latents."""

    def set_progress(self, progress: Progress) -> None:
        """Hand the steps of whatever takes long, in this model and its parts, to `progress`."""
        for module in self.modules():
            if hasattr(module, "progress"):
                setattr(module, "progress", progress)  # noqa: B010  # in nn.Module only parts and tensors have types

    def diagnostics(self) -> dict[str, float]:
        """What tells how training fares, beside the loss: how far off were activations that the backward pass recovered."""
        error = inversion_error(self)
        return {} if error is None else {"inversion_error": error}

    def filters(self) -> Tensor | None:
        """What the model looks for, as signed images (count, channels, height, width), where it can be drawn."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Capability(GenerativeModel):
    """What inherits it directly is an ability: `does` says in sentences what such a model does, `example` which words of train make one."""

    does: ClassVar[str]
    example: ClassVar[str]


class InpaintingResult(NamedTuple):
    """An image restored several times: brightness from 0 to 1, (draws, channels, height, width), and its mean over all that was drawn."""

    draws: Tensor
    mean: Tensor  # (channels, height, width)
    figures: Mapping[str, float] = MappingProxyType({})  # what tells how the method fared


class SupportsInpainting(Capability):
    """Draws what is missing of an image given what is known: P(unknown | known)."""

    does = "restores missing pixels"
    example = "model=glow"
    completions: ClassVar[tuple[str, ...]]  # the methods by which it can

    @abstractmethod
    def inpaint(
        self,
        images: Tensor,
        known: Observation,
        *,
        method: str,
        sweeps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> InpaintingResult:
        """Restore one image, levels (1, channels, height, width), where it is not `known`, true or false (channels, height, width).

        Where `known` are sums of pixels, a flow restores what these leave open. `sweeps` are how many steps the method takes, by default
        as many as suit it; of the levels that are not known nothing is looked at.
        Raises FlowgenError for a method that is none of `completions`, and for sums where the model wants pixels.
        """


class ClassConditional(Capability):
    """Knows a distribution for each class of images."""

    does = "knows classes"
    example = "model.num_classes=10 data=mnist"

    @abstractmethod
    def classify(self, images: Tensor) -> Tensor:
        """log p(y | x), (batch, classes)."""

    @abstractmethod
    def class_latents(self) -> Tensor:
        """The middle of each class among the latents of `encode`: (classes, latent)."""

    @abstractmethod
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """As every model draws images, of class `label`, or of each class in turn: of many the next `count` from number `first` on.

        Raises FlowgenError for a class that there is not.
        """


class SupportsMCMC(Capability):
    """Draws by Markov chains, which can be watched."""

    does = "draws by Markov chains"
    example = "model=rbm"

    @abstractmethod
    def iter_chains(
        self, count: int, method: str, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """`count` chains in white noise, then after every sweep without end: brightness from 0 to 1, (count, channels, height, width)."""

    @abstractmethod
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        method: str = "tempering",
        sweeps: int = 500,
    ) -> tuple[Tensor, Tensor]:
        """As every model draws images, by `sweeps` of the sampler `method` from white noise."""


class SupportsTokenSampling(Capability):
    """Draws an image token after token, each given those before it."""

    does = "draws an image token after token"
    example = "model=tarflow"

    @abstractmethod
    def sample(
        self,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        label: int | None = None,
        first: int = 0,
        guidance: float = 0.0,
        jacobi: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As every model draws images; with `jacobi` all tokens at once, in sweeps, with `guidance` the more typical of their class.

        Raises FlowgenError for guidance of a model that it does not fit.
        """

    @abstractmethod
    def sweeps(self) -> list[int]:
        """How many sweeps each block took when images were last drawn by them."""
