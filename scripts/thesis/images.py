"""The images that are trained on and shown."""

import contextlib
import io
from typing import Any

import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor

from flowgen.config import build_data, conf_folder
from flowgen.data import Images
from flowgen.data.lists import split_names
from flowgen.data.locate import locate
from flowgen.data.source import open_source
from flowgen.errors import FlowgenError
from flowgen.messages import one_sentence

SHOWN = 16  # training images in figures 3.1 and 3.2


def config_of(name: str) -> dict[str, Any]:
    """`conf/data/NAME.yaml`."""
    return yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())


def faces(config: dict[str, Any], scale: str) -> Images:
    """Raises FlowgenError with the cure where they, or what the scale needs, are missing."""
    if scale == "full" and not torch.cuda.is_available():
        raise FlowgenError("SCALE=full trains for days on one GPU, and this machine has none: SCALE=small takes an hour on two cores")
    if config.get("root", "") == "???":
        raise FlowgenError("DATA=folder needs ROOT=, a folder or a zip of images: make reproduce-thesis DATA=folder ROOT=~/faces")
    try:
        return build_data({"data": config})
    except FlowgenError as error:
        raise FlowgenError(
            f"{one_sentence(error).removesuffix('.')}. Give its place as ROOT=FOLDER, or take a substitute: "
            "DATA=celeba ROOT=FOLDER, or DATA=folder ROOT=FOLDER with images of your own"
        ) from error


def digits(scale: str) -> Images:
    return build_data({"data": config_of("mnist_sample" if scale == "smoke" else "mnist") | {"bits": 1}})


def originals(config: dict[str, Any], prepared: Images) -> Tensor:
    """The first training images as they are before they are prepared, each in a white square: (N, channels, size, size) in [0, 1]."""
    if "names" not in config:
        return prepared.train.images[:SHOWN].float() / 255
    source = open_source(locate(config["root"], config["names"], config["cure"]))
    names = split_names(source)[0]
    readable: list[Tensor] = []
    for name in names:
        with contextlib.suppress(OSError):  # such a file is left out of the training images too
            readable.append(_padded(Image.open(io.BytesIO(source.read(name))).convert("RGB")))
        if len(readable) == SHOWN:
            break
    return torch.cat(readable)


def _padded(image: Image.Image, size: int = 128) -> Tensor:
    """The image at its own proportions in the middle of a white square: (1, 3, size, size) in [0, 1]."""
    square = ImageOps.pad(image, (size, size), color="white")
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, size, size, 3).permute(0, 3, 1, 2) / 255
