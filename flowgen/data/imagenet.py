"""Downsampled ImageNet, 32x32 or 64x64 pixels: 1.3 million color images of a thousand classes.

Chrabaszcz, Loshchilov and Hutter (1707.08819).
"""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from flowgen.data.cache import cached_array
from flowgen.data.dataset import ImageDataset
from flowgen.data.download import find_dataset
from flowgen.data.splits import VALIDATION_DIVISOR, Split, hash_name
from flowgen.utils.errors import UserError, check_choice, user_error

DOWNLOAD_HINT = (
    "Download the npz files of this size from https://image-net.org/download-images.php "
    "(downsampled) and set data.root to their folder."
)
CHUNK_IMAGES = 4096  # read at a time
NUM_CLASSES = 1000


class DownsampledImageNet(ImageDataset):
    """ImageNet at 32x32 or 64x64 pixels, read from the published npz files without pickle.

    One in twelve training images is for validation; the validation images are the test split. The
    images are copied to the cache once and memory-mapped, so they may exceed the memory.

    Args:
        root: A folder with `train_data_batch_1.npz` to 10 and `val_data.npz`, or None to look for
            it in the data folder.
        search_dirs: Names of the folder in the data folder. Default: the usual ones.
        size: 32 or 64 pixels.
        random_flip: See `ImageDataset`.
        options: `bits`, `random_shift` and `binarization` of `ImageDataset`.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        search_dirs: Sequence[str] | None = None,
        size: int = 32,
        random_flip: bool = True,
        **options: Any,
    ):
        check_choice((32, 64), size=size)
        if search_dirs is None:
            search_dirs = [f"{name}{size}" for name in ("imagenet", "ImageNet", "Imagenet")]
        folder = find_dataset(root, search_dirs, DOWNLOAD_HINT)
        train_files = sorted(
            folder.rglob("train_data_batch_*.npz"), key=lambda path: (len(path.name), path.name)
        )
        test_files = sorted(folder.rglob("val_data.npz"))
        if not train_files or not test_files:
            missing = "val_data.npz" if train_files else "train_data_batch_1.npz"
            raise UserError(f"{folder} does not contain {missing}. {DOWNLOAD_HINT}")
        super().__init__(
            _read_split(train_files, size, validation=False),
            _read_split(train_files, size, validation=True),
            _read_split(test_files[:1], size, validation=None),
            random_flip=random_flip,
            **options,
        )


def _read_split(paths: list[Path], size: int, validation: bool | None) -> Split:
    """Return the images of files that are (or are not) for validation; all of them for None."""
    fingerprints = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, validation]
        for path in paths
    ]
    images = cached_array(
        f"imagenet{size}",
        fingerprints,
        lambda: (chunk for path in paths for chunk in _read_images(path, size, validation)),
    )
    labels = torch.cat([_read_labels(path, validation) for path in paths])
    return Split(images.view(-1, 3, size, size), labels)


def _split_mask(path: Path, count: int, validation: bool | None) -> Tensor:
    """Return a mask of the images of a file that belong to a split, bool (count,).

    It depends on the hash of the file's name and the index of the image.
    """
    if validation is None:
        return torch.ones(count, dtype=torch.bool)
    hashes = [hash_name(f"{path.name} {index}") for index in range(count)]
    return torch.tensor([(value % VALIDATION_DIVISOR == 0) == validation for value in hashes])


def _read_images(path: Path, size: int, validation: bool | None) -> Iterator[Tensor]:
    """Yield the images of a split in a file, (n, values), some thousands at a time."""
    width = 3 * size**2
    with _open_array(path, "data") as (array_shape, dtype, file):
        if array_shape[1:] != (width,) or dtype != np.uint8:
            raise UserError(
                f"{path} contains images of another size than {size}x{size}. {DOWNLOAD_HINT}"
            )
        for mask in _split_mask(path, array_shape[0], validation).split(CHUNK_IMAGES):
            data = bytearray(file.read(len(mask) * width))
            yield torch.frombuffer(data, dtype=torch.uint8).view(len(mask), width)[mask]


def _read_labels(path: Path, validation: bool | None) -> Tensor:
    """Return the classes of the same images, 0..999."""
    with _open_array(path, "data") as (array_shape, _, _):
        count = array_shape[0]
    with _open_array(path, "labels") as (_, dtype, file):
        labels = torch.from_numpy(np.frombuffer(file.read(), dtype).astype(np.int64) - 1)
    if len(labels) != count or not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise UserError(
            f"{path} does not have a class from 1 to {NUM_CLASSES} for each image. {DOWNLOAD_HINT}"
        )
    return labels[_split_mask(path, count, validation)]


@contextmanager
def _open_array(
    path: Path, name: str
) -> Iterator[tuple[tuple[int, ...], np.dtype[Any], IO[bytes]]]:
    """Open an array in an npz file: its shape, its type, and a file of its bytes.

    `numpy.load` would read all images of a file at once, 1.6 GB at 64x64 pixels.
    """
    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    with (
        user_error(f"{path} is cut short or not a file of downsampled ImageNet. {DOWNLOAD_HINT}"),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{name}.npy") as file,
    ):
        shape, fortran_order, dtype = headers[npy.read_magic(file)](file)
        if fortran_order or dtype.kind not in "iu" or not shape:
            raise ValueError("an array of another kind")
        yield shape, dtype, file
