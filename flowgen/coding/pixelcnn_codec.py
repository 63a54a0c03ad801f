"""The codec of a PixelCNN: intervals of the cumulative distribution of every pixel value.

Given the values before it, value k has the integers from F(k - 1) to F(k), in units of 2^-28. The
encoder pops one of them from the stack for each value, and pushes these integers with 28 bits each,
so that the stack grows by -log2(F(k) - F(k - 1)) bits per value. The decoder pops all integers of a
batch, which are the uniform numbers of its latents, and computes all values at once by fixed-point
iterations.
"""

import copy
import math

import torch
from torch import Tensor, nn

from flowgen.coding.codec import Codec
from flowgen.coding.coder import Coder
from flowgen.models.pixel_distribution import PixelDistribution
from flowgen.models.pixelcnn.pixelcnn import PixelCNN

# The uniform part of a distribution of 8-bit values gives each value more than 2^-28.
FREQUENCY_BITS = 28


class PixelCNNCodec(Codec):
    """Encoder and decoder of batches of images with a PixelCNN.

    The network computes in float64. Its outputs and the borders of the intervals are rounded, which
    removes the differences between machines.

    Args:
        model: A trained PixelCNN.
    """

    length_description = "the model"

    def __init__(self, model: PixelCNN):
        super().__init__(model)
        self.pixelcnn = copy.deepcopy(model).cpu().double().eval()
        self.noise_bits = self.dimensions * FREQUENCY_BITS

    def checksum(self) -> int:
        return 0  # no table

    @torch.no_grad()
    def encode(self, images: Tensor, coder: Coder) -> Tensor:
        labels = None
        if self.pixelcnn.num_classes is not None:
            labels = self.pixelcnn.classify(images).argmax(1)
        network = RoundedNetwork(self.pixelcnn.network, coder)
        one_hot = self.pixelcnn.one_hot(labels)
        distribution = self.pixelcnn.conditionals(images, one_hot, network)
        low, high = self._interval(distribution, images, coder)
        numbers = low + coder.pop(high - low)
        coder.push_bits(numbers, FREQUENCY_BITS)
        if labels is not None:
            coder.push(labels, torch.full_like(labels, self.pixelcnn.check_classes()))
        return -self.pixelcnn.log_prob(images) / math.log(2)

    @torch.no_grad()
    def decode(self, count: int, coder: Coder) -> Tensor:
        labels = None
        if self.pixelcnn.num_classes is not None:
            labels = coder.pop(torch.full((count,), self.pixelcnn.num_classes))
        numbers = coder.pop_bits(FREQUENCY_BITS, torch.Size((count, *self.image_shape)))
        # floor(2^28 F + offset) <= number  if and only if  F < u
        u = (numbers + 1 - coder.offset) * 2.0**-FREQUENCY_BITS
        network = RoundedNetwork(self.pixelcnn.network, coder)
        images, distribution = self.pixelcnn.solve(network, u, self.pixelcnn.one_hot(labels))
        low, high = self._interval(distribution, images, coder)
        coder.push(numbers - low, high - low)
        return images

    def _interval(
        self, distribution: PixelDistribution, images: Tensor, coder: Coder
    ) -> tuple[Tensor, Tensor]:
        """Return F(k - 1) and F(k) of each value k, in units of 2^-FREQUENCY_BITS."""
        low, high = distribution.interval(images)
        return coder.quantize(low, FREQUENCY_BITS), coder.quantize(high, FREQUENCY_BITS)


class RoundedNetwork(nn.Module):
    """A network whose outputs are rounded, so that all machines agree on them.

    Args:
        network: The network.
        coder: Rounds its outputs.
    """

    def __init__(self, network: nn.Module, coder: Coder):
        super().__init__()
        self.network = network
        self.coder = coder

    def forward(self, images: Tensor, condition: Tensor | None) -> Tensor:
        return self.coder.quantize_parameters(self.network(images, condition))
