"""Images that occur more than once: within a set, whose entropy they lower, and in two sets that should have none in common."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flowgen.plane import is_plane

LOOKED_AT = 1024  # bytes of each image at most; those that agree in them are compared as a whole


def shared(train: Tensor, test: Tensor) -> list[int]:
    """The places in `test` of the images that are in `train` too, pixel for pixel; points of the plane agree by chance and are none."""
    if is_plane(tuple(train.shape[1:])):
        return []
    places = defaultdict(list)
    for place, digest in enumerate(_digests(test, LOOKED_AT)):
        places[digest].append(place)
    found = set()
    for number, digest in enumerate(_digests(train, LOOKED_AT)):
        if digest in places:
            found |= {place for place in places[digest] if torch.equal(test[place], train[number])}
    return sorted(found)


def entropy(batches: Iterable[Tensor]) -> float:
    """Of the images' frequencies, in bits an image: -sum f log2 f, which no mean of -log2 p can fall below (Gibbs' inequality)."""
    counts = Counter(digest for batch in batches for digest in _digests(batch))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def _digests(images: Tensor, most: int | None = None) -> Iterator[bytes]:
    flat = images.flatten(1).cpu()
    if most is not None:
        flat = flat[:, :: -(-flat.shape[1] // most)]
    for part in flat.split(4096):
        for row in part.contiguous().numpy():
            yield hashlib.blake2b(row, digest_size=16).digest()
