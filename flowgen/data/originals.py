"""Images as they are, before they are prepared."""

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
from flowgen.data.preprocess import open_source


def originals(config: dict[str, Any], count: int, side: int = 128) -> Tensor:
    """The first `count` training images of the files that a data section names, each in a white square: uint8 (count, 3, side, side).

    Files that cannot be read are passed over, as they are where images are prepared. Raises FlowgenError where there are none.
    """
    source = open_source(
        find_dataset(config["root"], config["search_dirs"], config["download_hint"])
    )

    def squares() -> Iterator[Tensor]:
        for name in split_names(source)[0]:
            with contextlib.suppress(OSError):
                image = ImageOps.pad(
                    Image.open(io.BytesIO(source.read(name))).convert("RGB"),
                    (side, side),
                    color="white",
                )
                yield (
                    torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
                    .view(side, side, 3)
                    .permute(2, 0, 1)
                )

    return torch.stack(list(islice(squares(), count)))
