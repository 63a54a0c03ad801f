"""What makes figures doubtful: a likelihood that no model can have, test images that were trained on."""

import logging
import math
from collections.abc import Iterable

from torch import Tensor

from flowgen.data import Images, entropy, shared
from flowgen.measures import Measured, too_good

NAMED = 3
LARGEST = 2**33  # bytes of training images that are read for it
FAR_OFF = 1e-3  # of the largest activation: gradients are about as far off
log = logging.getLogger("flowgen")


def doubt_likelihood(measured: Measured, data: Images, batches: Iterable[Tensor]) -> None:
    """Warn where the likelihood of these images is better than their entropy allows."""
    bits = entropy(batches)
    if too_good(measured, bits, math.prod(data.shape)):
        least = f"the entropy of these images is {bits:.2f} bits each, {bits / math.prod(data.shape):.4f} bits/dim"
        log.warning("%s cannot be: %s, and no model is below; the checkpoint or the model's code is wrong", measured, least)


def doubt_split(data: Images) -> None:
    """Warn of test images that are training images too, where looking at all of them takes seconds."""
    if data.train.images.nbytes > LARGEST:
        return
    if places := shared(data.train.images, data.test.images):
        named = ", ".join(map(str, places[:NAMED])) + ", ..." * (len(places) > NAMED)
        words = "%d of %d test images are training images too, pixel for pixel (numbers %s): test figures are flattered"
        log.warning(words, len(places), len(data.test), named)


def doubt_recovery(health: dict[str, float]) -> dict[str, float]:
    """The same figures, with a word where activations that `trainer.memory=invert` recovered are too far off to differentiate at."""
    error = health.get("inversion_error", 0.0)
    if not error <= FAR_OFF:
        log.warning("trainer.memory=invert recovers activations to %.1g of the largest only: go on with trainer.memory=checkpoint", error)
    return health
