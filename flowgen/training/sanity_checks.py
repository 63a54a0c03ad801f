"""Images that occur more than once: within a set, whose entropy they lower, and in two sets that should have none in common."""

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flowgen.data.dataset import ImageDataset
from flowgen.utils.metrics import MetricValue, beats_entropy_bound
from flowgen.utils.rendering import is_toy2d

LOOKED_AT = 1024  # bytes of each image at most; those that agree in them are compared as a whole


def find_duplicates(train: Tensor, test: Tensor) -> list[int]:
    """The places in `test` of the images that are in `train` too, pixel for pixel; points of the plane agree by chance and are none."""
    if is_toy2d(tuple(train.shape[1:])):
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


MAX_NAMES = 3
MAX_ABS_VALUE = 2**33  # bytes of training images that are read for it
FAR_OFF = 1e-3  # of the largest activation: gradients are about as far off
log = logging.getLogger("flowgen")


def warn_implausible_likelihood(
    measured: MetricValue, data: ImageDataset, batches: Iterable[Tensor]
) -> None:
    """Warn where the likelihood of these images is better than their entropy allows."""
    bits = entropy(batches)
    if beats_entropy_bound(measured, bits, math.prod(data.image_shape)):
        least = f"the entropy of these images is {bits:.2f} bits each, {bits / math.prod(data.image_shape):.4f} bits/dim"
        log.warning(
            "%s cannot be: %s, and no model is below; the checkpoint or the model's code is wrong",
            measured,
            least,
        )


def warn_test_leakage(data: ImageDataset) -> None:
    """Warn of test images that are training images too, where looking at all of them takes seconds."""
    if data.train.images.nbytes > MAX_ABS_VALUE:
        return
    if places := find_duplicates(data.train.images, data.test.images):
        named = ", ".join(map(str, places[:MAX_NAMES])) + ", ..." * (len(places) > MAX_NAMES)
        words = "%d of %d test images are training images too, pixel for pixel (numbers %s): test figures are flattered"
        log.warning(words, len(places), len(data.test), named)


def warn_inaccurate_inverse(health: dict[str, float]) -> dict[str, float]:
    """The same figures, with a word where activations that `trainer.activation_memory=reversible` recovered are too far off to differentiate at."""
    error = health.get("inversion_error", 0.0)
    if not error <= FAR_OFF:
        log.warning(
            "trainer.activation_memory=reversible recovers activations to %.1g of the largest only: go on with trainer.activation_memory=checkpoint",
            error,
        )
    return health
