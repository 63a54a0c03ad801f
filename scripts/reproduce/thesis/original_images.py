"""Images before and after preprocessing, for the figures of the thesis."""

import io
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowgen.data.download import find_dataset
from flowgen.data.image_folder import split_names
from flowgen.data.preprocess import open_source, read_file
from flowgen.utils.errors import UserError


def original_images(config: dict[str, Any], count: int, side: int = 128) -> tuple[Tensor, Tensor]:
    """Draw training images of a data section. Files that cannot be read are skipped.

    Args:
        config: The data section of a configuration, of an `ImageFolder`.
        count: Number of images.
        side: Height and width of the images before preprocessing, in pixels.

    Returns:
        The images padded to white squares, not cropped, uint8 (count, 3, side, side); and the same
        images after preprocessing, uint8 (count, channels, height, width).
    """
    root = find_dataset(config["root"], config["search_dirs"], config["download_hint"])
    source = open_source(root)
    names = list(split_names(source)[0])
    random.Random(0).shuffle(names)  # neighbors can show the same person or class

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for name in names:
            after = source.load(name, config["size"], config["channels"], config.get("crop"))
            if isinstance(after, UserError):
                continue
            image = Image.open(io.BytesIO(read_file(source.root / name))).convert("RGB")
            image = ImageOps.pad(image, (side, side), color="white")
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            yield pixels.view(side, side, 3).permute(2, 0, 1), after

    before, after = zip(*islice(pairs(), count), strict=True)
    return torch.stack(before), torch.stack(after)
