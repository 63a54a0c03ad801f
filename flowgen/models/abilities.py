"""What some models can do and others cannot: a model has an ability by inheriting it, and a command asks for the one that it needs."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flowgen.models.base import GenerativeModel
from flowgen.models.linear import Known


class Ability(GenerativeModel):
    """What inherits it directly is an ability: `does` says in sentences what such a model does, `example` which words of train make one."""

    does: ClassVar[str]
    example: ClassVar[str]


class Completion(NamedTuple):
    """An image restored several times: brightness from 0 to 1, (draws, channels, height, width), and its mean over all that was drawn."""

    draws: Tensor
    mean: Tensor  # (channels, height, width)
    figures: Mapping[str, float] = MappingProxyType({})  # what tells how the method fared


class Completes(Ability):
    """Draws what is missing of an image given what is known: P(unknown | known)."""

    does = "restores missing pixels"
    example = "model=glow"
    completions: ClassVar[tuple[str, ...]]  # the methods by which it can

    @abstractmethod
    def complete(
        self, levels: Tensor, known: Known, *, method: str, sweeps: int | None = None, generator: torch.Generator | None = None
    ) -> Completion:
        """Restore one image, levels (1, channels, height, width), where it is not `known`, true or false (channels, height, width).

        Where `known` are sums of pixels, a flow restores what these leave open. `sweeps` are how many steps the method takes, by default
        as many as suit it; of the levels that are not known nothing is looked at.
        Raises FlowgenError for a method that is none of `completions`, and for sums where the model wants pixels.
        """


class Classifies(Ability):
    """Knows a distribution for each class of images."""

    does = "knows classes"
    example = "model.classes=10 data=mnist"

    @abstractmethod
    def classify(self, levels: Tensor) -> Tensor:
        """log p(y | x), (batch, classes)."""

    @abstractmethod
    def class_latents(self) -> Tensor:
        """The middle of each class among the latents of `encode`: (classes, latent)."""

    @abstractmethod
    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None, label: int | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """As every model draws images, of class `label`, or of each class in turn: of many the next `count` from number `first` on.

        Raises FlowgenError for a class that there is not.
        """


class RunsChains(Ability):
    """Draws by Markov chains, which can be watched."""

    does = "draws by Markov chains"
    example = "model=rbm"

    @abstractmethod
    def film(self, count: int, method: str, generator: torch.Generator | None = None) -> Iterator[Tensor]:
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


class DrawsTokens(Ability):
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
