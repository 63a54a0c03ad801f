"""Draw docs/images/compression.png: the bits on the stack while one digit is compressed.

Usage: python scripts/reproduce/compression_picture.py FILE.png
"""

import argparse

import matplotlib
import numpy as np
import torch

import flowgen
from flowgen.coding.coder import Coder
from flowgen.coding.flow_codec import FlowCodec
from flowgen.coding.layers import code
from flowgen.coding.normal import push_normal
from flowgen.coding.stack import BitStack, Integers, reserve_words
from flowgen.data.mnist import MNISTSample

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class TracedStack(BitStack):
    """A stack that records its number of bits after every push and pop."""

    def __init__(self, reserve: int) -> None:
        super().__init__(reserve)
        self.initial = self.num_bits
        self.trace = [0]

    def _push_digits(self, values: Integers, sizes: Integers) -> None:
        super()._push_digits(values, sizes)
        self.trace.append(self.num_bits - self.initial)

    def _pop_digits(self, sizes: Integers) -> Integers:
        values = super()._pop_digits(sizes)
        self.trace.append(self.num_bits - self.initial)
        return values


@torch.no_grad()
def trace_digit(index: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return a digit, the bits on the stack, and the ends of the first two stages."""
    codec = FlowCodec(flowgen.load("zoo/glow_mnist", device="cpu"))
    image = MNISTSample().test.images[index : index + 1]
    stack = TracedStack(reserve_words(codec.noise_bits))
    coder = Coder(stack, codec.grid_bits)
    x, points, _ = codec.pixels.dequantize(image, coder)
    ends = [len(stack.trace) - 1]
    flow = codec.flow
    labels = flow.class_log_density(points).argmax(1)
    one_hot = flow.one_hot(labels)
    z = code(codec.layers, x, flow.network_condition(one_hot), coder, False)
    ends.append(len(stack.trace) - 1)
    push_normal(coder, z - coder.to_grid(coder.quantize_parameters(one_hot @ flow.means)))
    coder.push(labels, torch.full_like(labels, len(flow.means)))
    return image[0, 0].numpy(), np.array(stack.trace), ends


def draw(path: str) -> None:
    """Write the picture."""
    image, bits, ends = trace_digit(index=150)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.4), dpi=120, width_ratios=[1, 3], layout="constrained"
    )
    left.imshow(image, cmap="gray")
    left.set_axis_off()
    left.set_title(f"{image.size} pixels, {8 * image.size:,} bits")
    # Each stage gets the same width.
    edges = [0, *ends, len(bits) - 1]
    position = np.interp(np.arange(len(bits)), edges, range(4))
    right.plot(position, bits)
    right.axhline(0, color="gray", linewidth=0.8)
    names = ["noise is popped", "the flow exchanges bits", "latents are pushed"]
    for start, name in enumerate(names):
        right.axvline(start + 1, color="lightgray", linewidth=0.8)
        right.text(start + 0.5, bits.max() * 1.15, name, ha="center")
    right.annotate(
        f"+{bits[-1]:,} bits: {bits[-1] / image.size:.2f} bits/dim",
        (3, bits[-1]),
        (1.1, bits.min() * 0.3),
        arrowprops={"arrowstyle": "->"},
    )
    right.set_xlim(0, 3)
    right.set_ylim(bits.min() * 1.1, bits.max() * 1.15 + 0.12 * np.ptp(bits))
    right.set_xticks([])
    right.set_ylabel("bits on the stack")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="output file")
    draw(parser.parse_args().file)
