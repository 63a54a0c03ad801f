"""Warnings about implausible results: likelihoods below the entropy, leaked test images."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor

from flowgen.data.dataset import ImageDataset
from flowgen.utils.errors import log
from flowgen.utils.metrics import MetricValue, beats_entropy_bound
from flowgen.utils.toy2d import is_toy2d

MAX_LISTED_INDICES = 3
MAX_TRAIN_BYTES = 2**33  # of training images that are searched for test images
MAX_INVERSION_ERROR = 1e-3  # relative; gradients have about the same error


def find_duplicates(train: Tensor, test: Tensor, bits: int = 8) -> list[int]:
    """Return the indices of test images that are training images too, pixel for pixel.

    Points of toy data sets coincide by chance and do not count.

    Args:
        train: 8-bit images, uint8 (batch, channels, height, width).
        test: The same.
        bits: Only the highest bits of a pixel value are compared.
    """
    if is_toy2d(train.shape[1:]):
        return []
    known = set(_digests(train, 8 - bits))
    return [index for index, digest in enumerate(_digests(test, 8 - bits)) if digest in known]


def entropy(batches: Iterable[Tensor]) -> float:
    """Return the entropy of the empirical distribution of the images, in bits per image.

    It is -sum f log2 f over the frequencies f of all distinct images. By Gibbs' inequality no
    model has a smaller mean of -log2 p(x) on them.
    """
    counts = Counter(digest for batch in batches for digest in _digests(batch))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def _digests(images: Tensor, shift: int = 0) -> Iterator[bytes]:
    """Yield a digest of each image without its lowest `shift` bits."""
    for part in images.flatten(1).split(4096):
        for row in (part.cpu().contiguous() >> shift).numpy():
            yield hashlib.blake2b(row, digest_size=16).digest()


def warn_implausible_likelihood(
    value: MetricValue, data: ImageDataset, batches: Iterable[Tensor]
) -> None:
    """Warn if a likelihood is better than the entropy of the evaluated images allows.

    Args:
        value: The likelihood.
        data: Data set of the images.
        batches: The evaluated images, in batches.
    """
    bits = entropy(batches)
    dimensions = math.prod(data.image_shape)
    if beats_entropy_bound(value, bits, dimensions):
        log.warning(
            "%s is below the entropy bound, which is impossible: the entropy of these images is "
            "%.2f bits per image, %.4f bits/dim; the checkpoint or the model's code is wrong",
            value,
            bits,
            bits / dimensions,
        )


def warn_test_leakage(data: ImageDataset) -> None:
    """Warn if test images are training images too. Large data sets are not searched.

    They are compared at the bits of the model. Images with a random binarization are compared
    before it, at 8 bits, since every gray value gives another distribution.
    """
    if data.train.images.nbytes > MAX_TRAIN_BYTES:
        return
    train, test = (
        split.images if split.gray is None else split.gray for split in (data.train, data.test)
    )
    duplicates = find_duplicates(train, test, data.bits if data.test.gray is None else 8)
    if duplicates:
        more = ", ..." if len(duplicates) > MAX_LISTED_INDICES else ""
        log.warning(
            "%d of %d test images are training images too, pixel for pixel (indices %s): "
            "test metrics are too good",
            len(duplicates),
            len(data.test),
            ", ".join(map(str, duplicates[:MAX_LISTED_INDICES])) + more,
        )


def warn_inaccurate_inverse(diagnostics: dict[str, float]) -> None:
    """Warn if activations recovered by trainer.activation_memory=reversible are inaccurate."""
    error = diagnostics.get("inversion_error", 0.0)
    if not error <= MAX_INVERSION_ERROR:  # also true of NaN
        log.warning(
            "trainer.activation_memory=reversible recovers activations with a relative error of "
            "%.1g: continue with trainer.activation_memory=checkpoint",
            error,
        )
