"""Save some of the included digits as PNG files, for example for `flowgen interpolate`.

They are from the test split of `data=mnist_sample`. All included digits are training images of
MNIST, so models of MNIST have seen them.
"""

import argparse
from pathlib import Path

from flowgen.data.mnist import MNISTSample
from flowgen.utils.rendering import to_pil

IMAGES_PER_DIGIT = 50  # the test split is sorted by digit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "indices",
        type=int,
        nargs="*",
        default=[110, 370],
        help=f"indices in the test split, 0 to 499; it has {IMAGES_PER_DIGIT} images per digit",
    )
    args = parser.parse_args()
    data = MNISTSample(bits=8, random_flip=False)
    args.folder.mkdir(parents=True, exist_ok=True)
    digits = [index // IMAGES_PER_DIGIT for index in args.indices]
    for index, digit in zip(args.indices, digits, strict=True):
        name = f"digit_{digit}" if digits.count(digit) == 1 else f"digit_{digit}_{index}"
        to_pil(data.test.images[index]).save(args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
