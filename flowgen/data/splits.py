"""Splits of images into training, validation and test images, chosen by hash."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import torch
from torch import Tensor

VALIDATION_DIVISOR = 12  # one of 12 training images is a validation image


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one split, with labels and attributes if they have any.

    Args:
        images: 8-bit pixel values, uint8 (N, channels, height, width).
        labels: Class of each image, (N,).
        attributes: Attributes of each image, bool (N, number of attributes).
        gray: 8-bit images before random binarization, used to find duplicates; else None.
    """

    images: Tensor
    labels: Tensor | None = None
    attributes: Tensor | None = None
    gray: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(
            **{name: value[index] for name, value in vars(self).items() if value is not None}
        )


@cache
def hashed_order(count: int) -> Tensor:
    """Return 0..count-1 sorted by the SHA-256 of each number, (count,).

    This permutation is independent of any RNG version.
    """
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(count)]
    return torch.tensor(sorted(range(count), key=digests.__getitem__), dtype=torch.long)


def hashed_validation_split(split: Split) -> tuple[Split, Split]:
    """Split off one in twelve training images for validation, chosen by the hash of its index.

    Returns:
        Training and validation images: 55,000 and 5,000 of the 60,000 of MNIST.
    """
    count = len(split)
    chosen = hashed_order(count)[: max(1, count // VALIDATION_DIVISOR)]
    is_validation = torch.isin(torch.arange(count), chosen)
    return split[~is_validation], split[is_validation]


def hashed_subset(count: int, limit: int | None) -> Tensor:
    """Return the sorted indices of `limit` of `count` images, chosen by hash, (n,).

    The subsets are nested: a larger limit adds images and removes none.

    Args:
        count: Number of images.
        limit: Size of the subset. None, or `count` and more: all images.
    """
    return hashed_order(count)[:limit].sort().values


def hashed_split(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split file names 8:1:1 into training, validation and test, by the hash of each name.

    The hash ignores directories, and an image stays in its split when others are added. Each split
    of three or more names has at least one name.
    """
    part = {name: hash_name(name) % 10 for name in names}
    test = {name for name in names if part[name] == 0} or set(sorted(names, key=hash_name)[:1])
    rest = [name for name in names if name not in test]
    validation = {name for name in rest if part[name] == 1} or set(sorted(rest, key=hash_name)[:1])
    splits = (
        [name for name in rest if name not in validation],
        [name for name in names if name in validation],
        [name for name in names if name in test],
    )
    for split in splits:  # the hashes of a few names can leave a split empty
        largest = max(splits, key=len)
        if not split and len(largest) > 1:
            split.append(largest.pop())
    return splits


def hash_name(name: str) -> int:
    """Return the first 8 bytes of the SHA-256 of a file's name, without its directories."""
    data = PurePosixPath(name).name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
