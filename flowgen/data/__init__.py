"""Data sets as uint8 tensors, which know no model."""

from flowgen.data.base import Images
from flowgen.data.cifar import CIFAR10
from flowgen.data.folder import ImageFolder
from flowgen.data.imagenet import DownsampledImageNet
from flowgen.data.mnist import MNIST
from flowgen.data.mnist_sample import MNISTSample
from flowgen.data.originals import originals
from flowgen.data.prepare import check_pictures, prepare, read_exactly, read_levels, size_of
from flowgen.data.repeats import entropy, shared
from flowgen.data.splits import Split, part
from flowgen.data.stream import Stream
from flowgen.data.svhn import SVHN
from flowgen.data.table import Table, read_table
from flowgen.data.toy import Toy

__all__ = [
    "CIFAR10",
    "MNIST",
    "SVHN",
    "DownsampledImageNet",
    "ImageFolder",
    "Images",
    "MNISTSample",
    "Split",
    "Stream",
    "Table",
    "Toy",
    "check_pictures",
    "entropy",
    "originals",
    "part",
    "prepare",
    "read_exactly",
    "read_levels",
    "read_table",
    "shared",
    "size_of",
]
