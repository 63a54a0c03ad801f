"""Save some of the embedded test digits as PNG files, to have images for `flowgen interpolate`."""

import argparse
from pathlib import Path

from flowgen.data.mnist import MNISTSample
from flowgen.utils.rendering import to_pil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "numbers",
        type=int,
        nargs="*",
        default=[110, 370],
        help="places in the test split, 0 to 499; 50 of each digit",
    )
    options = parser.parse_args()
    data = MNISTSample(bits=8, random_flip=False)
    options.folder.mkdir(parents=True, exist_ok=True)
    for number in options.numbers:
        to_pil(data.test.images[number]).save(options.folder / f"digit_{number // 50}.png")


if __name__ == "__main__":
    main()
