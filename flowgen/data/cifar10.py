"""CIFAR-10: 60,000 color images of 32x32 pixels in ten classes. Krizhevsky (2009)."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowgen.data.dataset import ImageDataset
from flowgen.data.download import find_dataset
from flowgen.data.splits import Split, hashed_validation_split
from flowgen.utils.errors import UserError, user_error

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
DOWNLOAD_HINT = f"Download {URL} and set data.root to it or to its folder."
ARCHIVE_PATTERN = "cifar-10-binary.tar.[gx]z"
RECORD_BYTES = 1 + 3 * 32 * 32  # the class, then the red, green and blue values


class CIFAR10(ImageDataset):
    """CIFAR-10 in its binary format. Downloaded if missing and without `root`.

    One in twelve training images is for validation.

    Args:
        root: `cifar-10-binary.tar.gz` or `.tar.xz`, a folder that contains it or its unpacked
            files, or None to look for such a folder in the data folder.
        search_dirs: Names of the folder in the data folder.
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
        files = _read_files(find_dataset(root, search_dirs, DOWNLOAD_HINT, {URL: MD5}))
        train_files = [f"data_batch_{number}.bin" for number in range(1, 6)]
        train, validation = hashed_validation_split(_decode(files, train_files))
        super().__init__(
            train,
            validation,
            _decode(files, ["test_batch.bin"]),
            random_flip=random_flip,
            **options,
        )


def _read_files(root: Path) -> dict[str, bytes]:
    """Return the content of the batch files, unpacked or in the archive, by name.

    An archive is decompressed once, to its end, where its checksum is verified.
    """
    files = {path.name: path.read_bytes() for path in root.rglob("*_batch*.bin")}
    archives = [root] if root.is_file() else sorted(root.rglob(ARCHIVE_PATTERN))
    if archives and not files:
        with (
            user_error(
                f"{archives[0]} is not CIFAR-10's archive, or is cut short: "
                "delete it and download it again"
            ),
            tarfile.open(archives[0]) as archive,
        ):
            files = {
                Path(member.name).name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.isfile() and member.name.endswith(".bin")
            }
            archive.fileobj.read(-1)
    return files


def _decode(files: dict[str, bytes], names: list[str]) -> Split:
    for name in names:
        if not files.get(name) or len(files[name]) % RECORD_BYTES:
            raise UserError(
                f"{name} is missing, empty, cut short or not a file of CIFAR-10. {DOWNLOAD_HINT}"
            )
    data = bytearray(b"".join(files[name] for name in names))
    table = torch.frombuffer(data, dtype=torch.uint8).view(-1, RECORD_BYTES)
    if table[:, 0].max() > 9:
        raise UserError(f"{names[0]} has other classes than the ten of CIFAR-10. {DOWNLOAD_HINT}")
    return Split(table[:, 1:].reshape(-1, 3, 32, 32), table[:, 0].long())
