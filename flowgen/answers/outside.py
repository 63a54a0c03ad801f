"""Images from outside, which nobody vouches for."""

import io

from PIL import Image
from torch import Tensor

from flowgen.data import prepare
from flowgen.errors import FlowgenError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MOST_PIXELS = 40_000_000  # a camera's, and no more than half a GB when decoded


def read_foreign(file: bytes, size: int, channels: int, crop: int | None) -> Tensor:
    """An image of any of `FORMATS`, see `prepare`: (1, channels, size, size) at 8 bits. Raises FlowgenError for any other file."""
    try:
        width, height = _size(file, FORMATS)
        if width * height > MOST_PIXELS:
            raise FlowgenError(f"is larger than {MOST_PIXELS // 10**6} million pixels: make it smaller first")
        return prepare(file, size, channels, crop)[None]
    except FlowgenError as error:
        raise FlowgenError(f"the image {error}") from error
    except Exception as error:  # a hostile file makes a decoder raise whatever it does
        raise FlowgenError("the image is not an image, or is cut short") from error


def read_own(file: bytes, size: int, channels: int) -> Tensor:
    """A PNG of size x size pixels, as those that are handed out: (1, channels, size, size) at 8 bits. Raises FlowgenError for others."""
    try:
        if _size(file, ("PNG",)) == (size, size):
            return prepare(file, size, channels, None)[None]
    except Exception as error:
        raise FlowgenError("a picture is not one of those from here: open it again") from error
    raise FlowgenError("a picture has another size than the model's: open it again")


def _size(file: bytes, formats: tuple[str, ...]) -> tuple[int, int]:
    """Width and height, as the file's head says."""
    with Image.open(io.BytesIO(file), formats=formats) as image:
        return image.size
