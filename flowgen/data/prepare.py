"""One image file, of whatever kind, made into a square of levels."""

import io
import zlib
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowgen.errors import FlowgenError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}


def prepare(file: bytes, size: int, channels: int, crop: int | None) -> Tensor:
    """Decode, crop, resize: uint8 of shape (channels, size, size), at 8 bits.

    `crop` cuts that many pixels out of the centre where the image is larger, as is the custom with the faces of CelebA (148 of
    178x218). Then the largest central square is resized. Colour and greyscale are converted into one another. Raises FlowgenError
    for what is no image, is cut short, or is too small to be one.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(file), formats=FORMATS))
        image = _convert(image, MODES[channels])
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise FlowgenError("is not an image, or is cut short") from error
    if min(image.size) < size / 4:
        raise FlowgenError(f"is {image.width}x{image.height} pixels, too small for {size}x{size}")
    if crop is not None and min(image.size) > crop:
        image = _centre(image, crop)
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, channels).permute(2, 0, 1)


def check_pictures(channels: int) -> None:
    """Raise `FlowgenError` where images of so many channels are none that a file holds, such as points of the plane."""
    if channels not in MODES:
        raise FlowgenError(f"this model is of {channels} channels, and an image file has 1 or 3: name another with --run")


def read_levels(path: str | Path, size: int, channels: int, crop: int | None, bits: int) -> Tensor:
    """The levels of one image file, prepared like the data: (1, channels, size, size)."""
    path = Path(path)
    check_pictures(channels)
    if path.is_dir():
        raise FlowgenError(f"{path} is a folder: name an image file")
    if not path.is_file():
        raise FlowgenError(f"{path} does not exist: name an image file")
    try:
        return prepare(path.read_bytes(), size, channels, crop)[None] >> (8 - bits)
    except FlowgenError as error:
        raise FlowgenError(f"{path} {error}") from error


def read_exactly(path: str | Path, shape: tuple[int, int, int], bits: int) -> Tensor:
    """The levels of one image file that has this shape (channels, height, width) already: (1, channels, height, width).

    Raises FlowgenError for any other, since pixels that a mask speaks of must stay where they are.
    """
    levels = read_levels(path, shape[1], shape[0], None, bits)
    height, width = size_of(path)
    if (height, width) != shape[1:]:
        raise FlowgenError(f"{path} is {width}x{height} pixels, and the images of this model are {shape[2]}x{shape[1]}: resize it first")
    return levels


def size_of(path: str | Path) -> tuple[int, int]:
    """Height and width of an image file, (0, 0) of what is none."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255 rather than scale
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)
