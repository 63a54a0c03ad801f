"""CIFAR-10: 60,000 colour images of 32x32 in ten classes, with their own test split. Krizhevsky (2009)."""

import tarfile
import zlib
from pathlib import Path

import torch

from flowgen.data.dataset import (
    ImageDataset,
    Split,
    check_names,
    data_folder,
    download,
    find_dataset,
    validation_mask,
)
from flowgen.utils.errors import UserError

URL, MD5 = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
)
CURE = f"point data.root at cifar-10-binary.tar.gz or its folder, from {URL}"
SHAPE, RECORD = (3, 32, 32), 1 + 3 * 32 * 32  # bytes: the class, then red, green and blue
TRAIN, TEST = [f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"]


class CIFAR10(ImageDataset):
    """From the binary archive, which holds no code as the pickled one does; downloaded where it is missing and `root` is not given."""

    def __init__(
        self,
        *,
        root: str | None,
        search_dirs: list[str],
        bits: int,
        random_flip: bool,
        binarization: str = "threshold",
        random_shift: int = 0,
    ):
        check_names(search_dirs)
        if (
            root is None
            and search_dirs
            and not any((data_folder() / name).exists() for name in search_dirs)
        ):
            download(URL, MD5, data_folder() / search_dirs[0])
        files = _files(find_dataset(root, search_dirs, CURE))
        train, test = (_read(files, wanted) for wanted in (TRAIN, TEST))
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


def _files(root: Path) -> dict[str, bytes]:
    """What the archive holds, or the folder that it unpacks to, by the files' own names."""
    archives = [root] if root.is_file() else sorted(root.rglob("cifar-10-binary.tar.gz"))
    found = {
        path.name: path.read_bytes()
        for path in ([] if root.is_file() else root.rglob("*_batch*.bin"))
    }
    if found or not archives:
        return found
    try:
        with tarfile.open(archives[0]) as archive:
            members = [
                member for member in archive if member.isfile() and member.name.endswith(".bin")
            ]
            return {
                Path(member.name).name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in members
            }
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{archives[0]} is no archive of CIFAR-10, or is cut short: delete it and get it again"
        ) from error


def _read(files: dict[str, bytes], names: list[str]) -> Split:
    missing = [name for name in names if name not in files]
    if missing:
        raise UserError(f"{missing[0]} is missing: {CURE}")
    for name in names:
        if not files[name] or len(files[name]) % RECORD:
            raise UserError(
                f"{name} is empty, cut short or no file of CIFAR-10: get it again, {CURE}"
            )
    table = torch.frombuffer(
        bytearray(b"".join(files[name] for name in names)), dtype=torch.uint8
    ).view(-1, RECORD)
    if table[:, 0].max() > 9:
        raise UserError(f"{names[0]} holds classes beyond the ten of CIFAR-10: {CURE}")
    return Split(table[:, 1:].reshape(-1, *SHAPE), table[:, 0].long())
