"""ImageNet at 32x32 and 64x64: 1.3 million colour images of a thousand classes. Chrabaszcz, Loshchilov and Hutter (1707.08819)."""

import ast
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from flowgen.data.cache import cached_array
from flowgen.data.dataset import HELD_OUT, ImageDataset, Split, check_names, digest, find_dataset
from flowgen.utils.errors import UserError, check_choice

CURE = "get the npz files of its size from https://image-net.org/download-images.php (downsampled) and set data.root to their folder"
CHUNK = 4096  # images read at a time
CLASSES = 1000
LONGEST = 4096  # bytes of a header
TRAIN, TEST = "train_data_batch_*.npz", "val_data.npz"
DTYPES = {"|u1": torch.uint8, "<i8": torch.int64, "<i4": torch.int32}


class DownsampledImageNet(ImageDataset):
    """From the published batches, npz files, read without running what a pickle may hold; the validation images are the test split.

    A twelfth of the training images, by their places, is for validation. All are copied into the cache once and mapped from there: they
    may be more than the memory holds.
    """

    def __init__(
        self,
        *,
        root: str | None,
        search_dirs: list[str],
        size: int,
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
        random_shift: int = 0,
    ):
        check_choice((32, 64), size=size)
        check_names(search_dirs)
        folder = find_dataset(root, search_dirs, CURE)
        batches = sorted(
            folder.rglob(TRAIN), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0)
        )
        tests = sorted(folder.rglob(TEST))
        if not batches or not tests:
            raise UserError(
                f"{folder} lacks {'val_data.npz' if batches else 'train_data_batch_1.npz'}: {CURE}"
            )
        shape = (3, size, size)
        train, validation = (_split(batches, shape, part) for part in (False, True))
        test = _split(tests[:1], shape, None)
        super().__init__(
            train,
            validation,
            test,
            bits=bits,
            random_flip=random_flip,
            binarization=binarization,
            random_shift=random_shift,
        )


def _split(paths: list[Path], shape: tuple[int, int, int], apart: bool | None) -> Split:
    """The images of these files: those that are held out, those that are not, or all where `apart` is None."""
    fingerprints = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, apart] for path in paths
    ]
    images = cached_array(
        f"imagenet{shape[1]}",
        fingerprints,
        lambda: (chunk for path in paths for chunk in _chunks(path, shape, apart)),
    )
    labels = torch.cat([_labels(path, shape, apart) for path in paths])
    return Split(images.view(-1, *shape), labels)


def _mine(path: Path, count: int, apart: bool | None) -> Tensor:
    """Which images of a file belong to a split."""
    if apart is None:
        return torch.ones(count, dtype=torch.bool)
    return torch.tensor(
        [(digest(f"{path.name} {place}") % HELD_OUT == 0) == apart for place in range(count)]
    )


def _chunks(path: Path, shape: tuple[int, int, int], apart: bool | None) -> Iterator[Tensor]:
    """The images of a file that belong to a split, flat, some thousands at a time."""
    width = math.prod(shape)
    with _opened(path, "data") as (found, dtype, file):
        if found[1:] != (width,) or dtype != torch.uint8:
            raise UserError(
                f"{path} holds images of another size than {shape[2]}x{shape[1]}: {CURE}"
            )
        for mine in _mine(path, found[0], apart).split(CHUNK):
            yield torch.frombuffer(_read(file, len(mine) * width), dtype=dtype).view(-1, width)[
                mine
            ]


def _labels(path: Path, shape: tuple[int, int, int], apart: bool | None) -> Tensor:
    """The classes of the same images, from 0."""
    with (
        _opened(path, "data") as ((count, *_), _, _),
        _opened(path, "labels") as (found, dtype, file),
    ):
        labels = (
            torch.frombuffer(_read(file, math.prod(found) * dtype.itemsize), dtype=dtype).long() - 1
        )
    if len(labels) != count or not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(f"{path} has not a class from 1 to {CLASSES} for each image: {CURE}")
    return labels[_mine(path, count, apart)]


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[tuple[int, ...], torch.dtype, IO[bytes]]]:
    """Shape, type and bytes of an array in an npz file, which is a zip of npy files: numpy.lib.format says how these begin.

    Raises FlowgenError for what is none, is cut short, or holds objects.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("no npy file")
            size = int.from_bytes(file.read(2 if file.read(2)[0] == 1 else 4), "little")
            header = ast.literal_eval(_read(file, min(size, LONGEST)).decode("latin1"))
            if header["fortran_order"]:
                raise ValueError("columns first")
            yield tuple(header["shape"]), DTYPES[header["descr"]], file
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path} is cut short or no batch of ImageNet: {CURE}") from error


def _read(file: IO[bytes], size: int) -> bytearray:
    data = bytearray(file.read(size))
    if len(data) < size:
        raise EOFError("cut short")
    return data
