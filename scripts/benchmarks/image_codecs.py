"""Measure the bits/dim of common lossless codecs on the test images of a data set.

"Each" writes one file per image; "mosaic" writes all images side by side into one image; "stream"
compresses the pixel values of all images as one stream. Images of fewer than 8 bits keep their
values 0..2^bits-1 in files of 8 bits. Every file of an image is decoded and compared.

Usage: python scripts/benchmarks/image_codecs.py [--count N] [--each N] OVERRIDE...

such as `data=mnist` or `data=celeba data.root=FOLDER`. JPEG XL needs the extra `bench`.
"""

import argparse
import bz2
import io
import lzma
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pillow_jxl  # noqa: F401  (adds JPEG XL to Pillow)
import torch
from numpy.typing import NDArray
from PIL import Image

from flowgen.config.compose import compose_config
from flowgen.config.instantiate import build_data

MAX_WEBP_SIZE = 16383  # height and width
IMAGE_CODECS = {
    "PNG": {"format": "PNG", "optimize": True},
    "WebP": {"format": "WebP", "lossless": True, "quality": 100, "method": 6},
    "JPEG XL, effort 7": {"format": "JXL", "lossless": True, "effort": 7},
    "JPEG XL, effort 9": {"format": "JXL", "lossless": True, "effort": 9},
}
STREAM_CODECS: dict[str, Callable[[bytes], bytes]] = {
    "bzip2 -9": partial(bz2.compress, compresslevel=9),
    "xz -9e": partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME),
}

Pixels = NDArray[np.uint8]


def file_size(pixels: Pixels, options: dict[str, object]) -> int:
    """Return the bytes of one image (height, width, channels) in a lossless format."""
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    picture.save(file, **options)
    decoded = Image.open(file, formats=[str(options["format"])]).convert(picture.mode)
    if decoded.tobytes() != picture.tobytes():
        raise SystemExit(f"{options} does not restore an image")
    return file.tell()


def make_mosaics(images: Pixels) -> Iterator[Pixels]:
    """Yield almost square mosaics of images (N, height, width, channels), without gaps."""
    count, height, width, channels = images.shape
    columns = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
    rows = count // columns
    limit = MAX_WEBP_SIZE // height
    grid = images.reshape(rows, columns, height, width, channels)
    for start in range(0, rows, limit):
        part = grid[start : start + limit]
        yield part.swapaxes(1, 2).reshape(-1, columns * width, channels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="+", metavar="OVERRIDE")
    parser.add_argument("--count", type=int, help="number of test images")
    parser.add_argument("--each", type=int, help="number of images with one file each")
    args = parser.parse_args()
    data = build_data(compose_config(args.overrides).config)
    tensor = torch.cat(list(data.batches("test", 64, args.count)))
    images = tensor.permute(0, 2, 3, 1).contiguous().numpy()
    print(
        f"{args.overrides}: {len(images)} images of {images[0].size} numbers, {data.bits} bits",
        flush=True,
    )
    single = images[: args.each]
    for name, options in IMAGE_CODECS.items():
        each = sum(file_size(image, options) for image in single)
        print(f"{name}, each of {len(single)}: {8 * each / single.size:.3f} bits/dim", flush=True)
        mosaic = sum(file_size(image, options) for image in make_mosaics(images))
        print(f"{name}, mosaic: {8 * mosaic / images.size:.3f} bits/dim", flush=True)
    values = tensor.numpy().tobytes()
    for name, compress in STREAM_CODECS.items():
        print(f"{name}, stream: {8 * len(compress(values)) / images.size:.3f} bits/dim", flush=True)


if __name__ == "__main__":
    main()
