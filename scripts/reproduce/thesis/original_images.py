"""Images before preprocessing, for the figures of the thesis."""

import contextlib
import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowgen.data.dataset import find_dataset
from flowgen.data.image_folder import split_names
from flowgen.data.preprocess import open_source, read_file


def original_images(config: dict[str, Any], count: int, side: int = 128) -> Tensor:
    """Return the first training images of a data section, padded to white squares, not cropped.

    Files that cannot be read are skipped.

    Args:
        config: The data section of a configuration, of an `ImageFolder`.
        count: Number of images.
        side: Height and width of the result, in pixels.

    Returns:
        Images, uint8 (count, 3, side, side).
    """
    root = find_dataset(config["root"], config["search_dirs"], config["download_hint"])
    source = open_source(root)

    def squares() -> Iterator[Tensor]:
        for name in split_names(source)[0]:
            with contextlib.suppress(OSError):
                image = Image.open(io.BytesIO(read_file(source.root / name))).convert("RGB")
                image = ImageOps.pad(image, (side, side), color="white")
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                yield pixels.view(side, side, 3).permute(2, 0, 1)

    return torch.stack(list(islice(squares(), count)))
