"""Training, validation and test images, and orders that are the same for ever."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import torch
from torch import Tensor

HELD_OUT = 12
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """uint8 images (N, channels, height, width) at 8 bits; their classes (N,) and attributes, bool (N, names), where these are known."""

    images: Tensor
    labels: Tensor | None = None
    attributes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Tensor | slice) -> "Split":
        labels, attributes = (None if known is None else known[chosen] for known in (self.labels, self.attributes))
        return Split(self.images[chosen], labels, attributes)


@cache
def hashed_order(count: int) -> Tensor:
    """0..count-1 by the SHA-256 of each number: a permutation that no version of a random generator can change."""
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(count)]
    return torch.tensor(sorted(range(count), key=digests.__getitem__), dtype=torch.long)


def held_out(count: int) -> Tensor:
    """Which of so many training images, chosen by their places, are for validation: one in twelve, 5,000 of 60,000."""
    apart = torch.zeros(count, dtype=torch.bool)
    apart[hashed_order(count)[: max(1, count // HELD_OUT)]] = True
    return apart


def part(count: int, limit: int | None) -> Tensor:
    """The places of `limit` of so many images, drawn by hash, in order; of all where there are no more. A larger part holds the smaller."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return hashed_order(count)[:limit].sort().values


def split_by_hash(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Eight, one and one of ten names, each by the hash of its last part alone; of three or more, at least one each."""
    tenth = {name: digest(name) % 10 for name in names}
    test = {name for name in names if tenth[name] == 0} or set(sorted(names, key=digest)[:1])
    rest = [name for name in names if name not in test]
    validation = {name for name in rest if tenth[name] == 1} or set(sorted(rest, key=digest)[:1])
    return (
        [name for name in rest if name not in validation],
        [name for name in names if name in validation],
        [name for name in names if name in test],
    )


def digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(PurePosixPath(name).name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
