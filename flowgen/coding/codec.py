"""The interface of codecs: a batch of images becomes bits on a stack, and back."""

import hashlib
import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from flowgen.coding.coder import Coder
from flowgen.models.base import GenerativeModel


class Codec(ABC):
    """Encoder and decoder of batches of images with a model.

    Args:
        model: A trained model.

    Attributes:
        model: The model.
        noise_bits: Upper bound of the bits that `encode` pops per image before it pushes any.
        grid_bits: Bits after the binary point of a number of the `Coder`.
        annealing_steps: Annealing steps of an RBM, or 0.
        length_description: Name of the length that `encode` returns, in the report.
    """

    length_description: ClassVar[str]
    noise_bits: int
    grid_bits = 12
    annealing_steps = 0

    def __init__(self, model: GenerativeModel):
        self.model = model
        self.image_shape = model.image_shape
        self.dimensions = math.prod(model.image_shape)
        self.bins = 2**model.bits

    @abstractmethod
    def checksum(self) -> int:
        """Return a checksum of the tables of floats that became integers."""

    @abstractmethod
    def encode(self, images: Tensor, coder: Coder) -> Tensor:
        """Put images on the stack.

        Args:
            images: (batch, channels, height, width).
            coder: The coder, which holds the stack.

        Returns:
            The bits of each image by the model itself, (batch,).
        """

    @abstractmethod
    def decode(self, count: int, coder: Coder) -> Tensor:
        """Take images from the stack, the reverse of `encode`.

        Args:
            count: Number of images.
            coder: The coder, which holds the stack.

        Returns:
            The images, (count, channels, height, width).
        """


def fingerprint(model: GenerativeModel) -> str:
    """Return a hash of a model: its kind, its image format and its weights."""
    kind = f"{type(model).__name__} {tuple(model.image_shape)} {model.bits}"
    digest = hashlib.sha256(kind.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
