"""MNIST and the sets in its format: greyscale images of 28x28 in idx files, with their own test split."""

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.data.base import Images
from flowgen.data.locate import data_folder, locate
from flowgen.errors import FlowgenError, check_choice, check_whole


class MNIST(Images):
    """MNIST, FashionMNIST or KMNIST, as torchvision calls them; downloaded where it is missing and `root` is not given."""

    def __init__(self, *, name: str, root: str | None, names: list[str], channels: int, size: int, bits: int, flip: bool):
        check_choice(("MNIST", "FashionMNIST", "KMNIST"), name=name)
        check_choice((1,), channels=channels)
        check_whole(size=size)
        if root is None and not any((data_folder() / folder).exists() for folder in names):
            _download(name, data_folder() / names[0])
        folder = locate(root, names, f"point data.root at a folder with the idx files of {name}, or leave it out to download them")
        train, test = (_resize(read_idx(folder, f"{split}-images-idx3-ubyte"), size) for split in ("train", "t10k"))
        super().__init__(train, test, bits=bits, flip=flip)


def read_idx(folder: Path, name: str) -> Tensor:
    """The idx file `name`, gzipped or not, anywhere below `folder`, as uint8 of shape (N, 1, height, width).

    Raises FlowgenError where there is none or it is cut short. Format: yann.lecun.com/exdb/mnist.
    """
    files = sorted(path for path in folder.rglob(f"{name}*") if path.suffix in ("", ".gz"))
    if not files:
        raise FlowgenError(f"{folder} holds no {name}.gz: point data.root at the folder with the idx files")
    try:
        data = gzip.decompress(files[0].read_bytes()) if files[0].suffix == ".gz" else files[0].read_bytes()
        magic, count, height, width = (int.from_bytes(data[place : place + 4], "big") for place in (0, 4, 8, 12))
        if magic != 0x803 or len(data) != 16 + count * height * width:
            raise ValueError
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise FlowgenError(f"{files[0]} is cut short or no idx file of images: delete it and get it again") from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=16).view(count, 1, height, width)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _download(name: str, folder: Path) -> None:
    from flowgen.vision import datasets

    try:
        getattr(datasets, name)(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise FlowgenError(
            f"{name} is not in {folder} and could not be downloaded ({error}): put its idx files there, or set data.root"
        ) from error
