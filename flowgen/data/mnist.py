"""MNIST and data sets in its format: grayscale images of 28x28 pixels with their own test split."""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.data.dataset import ImageDataset, Size, height_and_width
from flowgen.data.download import find_dataset
from flowgen.data.splits import Split, hashed_validation_split
from flowgen.utils.errors import UserError, check_choice, user_error

SEARCH_DIRS = {
    "MNIST": ("mnist", "MNIST"),
    "FashionMNIST": ("fashion_mnist", "fashion-mnist", "FashionMNIST"),
    "KMNIST": ("kmnist", "KMNIST"),
}
URLS = {
    "MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "FashionMNIST": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "KMNIST": "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
}
MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "KMNIST": {
        "train-images-idx3-ubyte.gz": "bdb82020997e1d708af4cf47b453dcf7",
        "train-labels-idx1-ubyte.gz": "e144d726b3acfaa3e44228e80efcd344",
        "t10k-images-idx3-ubyte.gz": "5c965bf0a639b31b8f53240b1b52f4d7",
        "t10k-labels-idx1-ubyte.gz": "7320c461ea6c1c855c0b718fb2a4b134",
    },
}


class MNIST(ImageDataset):
    """MNIST, FashionMNIST or KMNIST. Downloaded if missing and without `root`.

    One in twelve training images, 5,000 of 60,000, is for validation.

    Args:
        name: "MNIST", "FashionMNIST" or "KMNIST".
        root: A folder with the idx files, or None to look for them in the data folder.
        search_dirs: Names of the folder in the data folder. Default: the usual ones.
        size: Height and width that images are resized to, in pixels, or one number for squares.
        options: `bits`, `random_flip`, `random_shift` and `binarization` of `ImageDataset`.

    Example:
        >>> from flowgen.data import MNIST
        >>> data = MNIST(bits=1, binarization="dynamic")  # doctest: +SKIP
        >>> len(data.train), data.image_shape  # doctest: +SKIP
        (55000, (1, 28, 28))
    """

    def __init__(
        self,
        *,
        name: str = "MNIST",
        root: str | None = None,
        search_dirs: Sequence[str] | None = None,
        size: Size = 28,
        **options: Any,
    ):
        check_choice(URLS, name=name)
        height_and_width(size)  # raises UserError before the files are searched
        search_dirs = SEARCH_DIRS[name] if search_dirs is None else search_dirs
        folder = find_dataset(
            root,
            search_dirs,
            f"Set data.root to a folder with {name}'s idx files, or remove it to download them.",
            {URLS[name] + file: md5 for file, md5 in MD5[name].items()},
        )
        train, validation = hashed_validation_split(read_split(folder, search_dirs, "train", size))
        super().__init__(
            train, validation, read_split(folder, search_dirs, "t10k", size), **options
        )


def read_split(root: Path, search_dirs: Sequence[str], split: str, size: Size) -> Split:
    """Return the images of a split, resized, with their labels if there is a file of them.

    Args:
        root: A folder with the idx files, gzipped or not, anywhere below it.
        search_dirs: Names of subfolders. If one exists, only files below it count, since data sets
            in this format have the same file names.
        split: "train" or "t10k" (the test split).
        size: Height and width of the images in pixels, or one number for squares.
    """
    files = _find(root, search_dirs, split, "images-idx3")
    if not files:
        raise UserError(
            f"{root} does not contain {split}-images-idx3-ubyte.gz: "
            "set data.root to the folder with the idx files"
        )
    if len({path.parent for path in files}) > 1:
        raise UserError(
            f"{root} contains several data sets, {files[0].parent} and {files[-1].parent}: "
            "set data.root to one of them"
        )
    images = read_idx(files[0], dimensions=3)[:, None]
    resolution = height_and_width(size)
    if images.shape[-2:] != resolution:
        images = F.interpolate(images, resolution, mode="bilinear", antialias=True)
    files = _find(root, search_dirs, split, "labels-idx1")
    labels = read_idx(files[0], dimensions=1) if files else None
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f"{files[0]} has {len(labels)} labels for {len(images)} images: "
            "download both files again"
        )
    return Split(images, labels)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return the array in an idx file of bytes, gzipped or not, as uint8.

    Format: a big-endian magic number 0x0800 + dimensions, the shape, then the values
    (yann.lecun.com/exdb/mnist).
    """
    start = 4 * (dimensions + 1)
    with user_error(
        f"{path} is empty, cut short or not an idx file: delete it and download it again"
    ):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = np.frombuffer(data, ">u4", dimensions + 1).tolist()
        if magic != 0x800 + dimensions or not 0 < math.prod(shape) == len(data) - start:
            raise ValueError("wrong header or length")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def _find(root: Path, search_dirs: Sequence[str], split: str, kind: str) -> list[Path]:
    """Return the idx files of a split below `root`, or below the first of `search_dirs` in it."""
    folder = next((root / name for name in search_dirs if (root / name).is_dir()), root)
    return sorted(
        path
        for path in folder.rglob(f"{split}-{kind}-ubyte*")
        if path.suffix in ("", ".gz") and path.is_file()
    )


class MNISTSample(ImageDataset):
    """5,000 images of MNIST, 500 of each digit, included in flowgen.

    4,000 are for training, 500 for validation and 500 for the test.

    Args:
        options: `bits`, `random_flip`, `random_shift` and `binarization` of `ImageDataset`.

    Example:
        >>> from flowgen.data import MNISTSample
        >>> data = MNISTSample(bits=1)
        >>> len(data.train), len(data.validation), len(data.test), data.image_shape
        (4000, 500, 500, (1, 28, 28))
        >>> images, labels = data.train_batch(images_seen=0, batch_size=8, seed=0)
        >>> labels
        tensor([0, 2, 8, 8, 1, 0, 7, 4])
    """

    def __init__(self, **options: Any):
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
            images = torch.from_numpy(file["images"])[:, None]
            digits = Split(images, torch.from_numpy(file["labels"]))
        position = torch.arange(len(digits)) % 10  # the digits are sorted by class
        train = digits[(position != 0) & (position != 5)]
        super().__init__(train, digits[position == 5], digits[position == 0], **options)
