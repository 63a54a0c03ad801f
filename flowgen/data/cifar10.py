"""CIFAR-10: 60,000 color images of 32x32 pixels in ten classes. Krizhevsky (2009)."""

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowgen.data.dataset import ImageDataset, Split, find_or_download, validation_mask
from flowgen.utils.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
DOWNLOAD_HINT = f"Download {URL} and set data.root to it or to its folder."
IMAGE_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32  # the class, then the red, green and blue values
TRAIN_FILES = [f"data_batch_{number}.bin" for number in range(1, 6)]
TEST_FILES = ["test_batch.bin"]


class CIFAR10(ImageDataset):
    """CIFAR-10, read from its binary archive. Downloaded if missing and without `root`.

    One in twelve training images is for validation.

    Args:
        root: `cifar-10-binary.tar.gz` or its folder, or None to look for it in the data directory.
        search_dirs: Names of the folder in the data directory.
        random_flip: See `ImageDataset`.
        options: `bits`, `random_shift` and `binarization` of `ImageDataset`.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        search_dirs: Sequence[str] = ("cifar10", "cifar-10", "cifar-10-batches-bin"),
        random_flip: bool = True,
        **options: Any,
    ):
        files = _files(find_or_download(root, search_dirs, {URL: MD5}, DOWNLOAD_HINT))
        train = _read(files, TRAIN_FILES)
        test = _read(files, TEST_FILES)
        is_validation = validation_mask(len(train))
        super().__init__(
            train[~is_validation], train[is_validation], test, random_flip=random_flip, **options
        )


def _files(root: Path) -> dict[str, bytes]:
    """Return the content of the batch files, loose or in the archive, by name."""
    if root.is_file():
        archives = [root]
        files = {}
    else:
        archives = sorted(root.rglob("cifar-10-binary.tar.gz"))
        files = {path.name: path.read_bytes() for path in root.rglob("*_batch*.bin")}
    if files or not archives:
        return files
    try:
        with tarfile.open(archives[0]) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".bin"):
                    file = archive.extractfile(member)
                    files[Path(member.name).name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{archives[0]} is not CIFAR-10's archive, or is cut short: "
            "delete it and download it again"
        ) from error
    return files


def _read(files: dict[str, bytes], names: list[str]) -> Split:
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(f"{missing[0]} is missing. {DOWNLOAD_HINT}")
    for name in names:
        if not files[name] or len(files[name]) % RECORD_BYTES:
            raise UserError(
                f"{name} is empty, cut short or not a file of CIFAR-10. {DOWNLOAD_HINT}"
            )
    data = bytearray(b"".join(files[name] for name in names))
    table = torch.frombuffer(data, dtype=torch.uint8).view(-1, RECORD_BYTES)
    if table[:, 0].max() > 9:
        raise UserError(f"{names[0]} has other classes than the ten of CIFAR-10. {DOWNLOAD_HINT}")
    return Split(table[:, 1:].reshape(-1, *IMAGE_SHAPE), table[:, 0].long())
