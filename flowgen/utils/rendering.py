"""Images as pictures: grids, PNG, GIF and zip files."""

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowgen.utils.files import atomic_write
from flowgen.utils.toy2d import is_toy2d

MIN_SIDE = 56  # pixels; smaller images are enlarged by an integer factor
GAP = 2  # pixels between the images of a grid
TITLED_SIDE = 112  # pixels of the height of an image under its own title
FRAME_MILLISECONDS = 80  # of an animation
ORANGE = torch.tensor([217.0, 95.0, 2.0])
BLUE = torch.tensor([8.0, 81.0, 156.0])


def image_grid(images: Tensor, bits: int, columns: int, side: int = MIN_SIDE) -> Image.Image:
    """Draw images in a grid, or points of the plane as a scatter plot.

    Args:
        images: Pixel values, uint8 (N, channels, height, width), or points (N, 2, 1, 1).
        bits: Bits of a pixel value.
        columns: Number of images in a row.
        side: Smaller images are enlarged to at least this many pixels.
    """
    if is_toy2d(images.shape[1:]):
        from flowgen.utils import plots  # Matplotlib takes long to import

        return plots.scatter_plot(images.flatten(1).cpu(), 2**bits)
    factor = -(-side // min(images.shape[-2:]))
    pixels = scale_to_8_bits(images, bits).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    tiles = [to_pil(image) for image in pixels]
    return tiles[0].convert("RGB") if len(tiles) == 1 else _tile(tiles, columns, GAP)


def to_uint8(brightness: Tensor) -> Tensor:
    """Convert brightness or probabilities in [0, 1] to 8-bit pixel values on the CPU."""
    return (255 * brightness).round().to(torch.uint8).cpu()


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert one image of 8 bits, uint8 (channels, height, width), grayscale or RGB."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _tile(tiles: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Arrange images in rows on white, with a gap around each."""
    width = max(tile.width for tile in tiles) + gap
    height = max(tile.height for tile in tiles) + gap
    columns = min(columns, len(tiles))
    size = (width * columns + gap, height * math.ceil(len(tiles) / columns) + gap)
    page = Image.new("RGB", size, "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        page.paste(tile, (column * width + gap, row * height + gap))
    return page


def save_zip(batches: Iterable[Tensor], bits: int, path: Path) -> None:
    """Write images in their own size to a zip of 0000000.png, 0000001.png, ...

    Each batch is written before the next one is drawn.

    Args:
        batches: Batches of images.
        bits: Bits per pixel value.
        path: The zip file.
    """
    images = (image for batch in batches for image in batch)
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for index, image in enumerate(images):
            archive.writestr(f"{index:07d}.png", encode_png(image, bits))


def encode_png(image: Tensor, bits: int) -> bytes:
    """Return one image, uint8 (channels, height, width), as a PNG of the same size."""
    return to_png(to_pil(scale_to_8_bits(image, bits)))


def to_png(picture: Image.Image) -> bytes:
    """Return the PNG of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def save_picture(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture whose format is the suffix of its path. A failure keeps the previous file.

    Args:
        picture: The picture.
        path: The file.
        **options: Further arguments of `PIL.Image.Image.save`.
    """
    with atomic_write(path) as temporary:
        picture.save(temporary, Image.registered_extensions()[path.suffix.lower()], **options)


def scale_to_8_bits(images: Tensor, bits: int) -> Tensor:
    """Scale pixel values of `bits` bits to 0..255."""
    return (images.cpu().int() * 255 // (2**bits - 1)).to(torch.uint8)


def weight_grid(weights: Tensor, columns: int = 20, max_tiles: int = 400) -> Image.Image:
    """Draw weights as tiles: blue for negative values, white for zero, orange for positive ones.

    Args:
        weights: (count, channels, height, width). The channels are averaged, and each tile is
            scaled by its largest absolute value.
        columns: Number of tiles in a row.
        max_tiles: Only the first tiles are drawn.
    """
    scaled = weights[:max_tiles].mean(1).cpu().float()
    scaled = scaled / scaled.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    color = torch.where(scaled[..., None] > 0, ORANGE, BLUE)
    pixels = (255 + (color - 255) * scaled.abs()[..., None]).round().to(torch.uint8)
    return image_grid(pixels.permute(0, 3, 1, 2), 8, columns=min(columns, len(pixels)))


def titled_grids(grids: Sequence[tuple[str, Tensor]], bits: int, columns: int) -> Image.Image:
    """Draw a grid for each title and its images, one below the other.

    Args:
        grids: Titles with images (N, channels, height, width).
        bits: Bits per pixel value.
        columns: Columns of each grid.
    """
    return stack_titled([(title, image_grid(images, bits, columns)) for title, images in grids])


def stack_titled(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange pictures one below the other, each under its title of one or more lines."""
    font = ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((4, 4), title, font) for title, _ in pictures]
    sizes = [
        (max(picture.width, math.ceil(box[2]) + 4), picture.height + math.ceil(box[3]) + 4)
        for (_, picture), box in zip(pictures, boxes, strict=True)
    ]
    widths, heights = zip(*sizes, strict=True)
    page = Image.new("RGB", (max(widths), sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    bottom = 0
    for (title, picture), height in zip(pictures, heights, strict=True):
        draw.multiline_text((4, bottom + 4), title, fill="black", font=font)
        bottom += height
        page.paste(picture, (0, bottom - picture.height))
    return page


def titled_tiles(images: Tensor, bits: int, titles: Sequence[str], columns: int) -> Image.Image:
    """Draw images (N, channels, height, width) in a grid, each under its own title.

    Args:
        images: Pixel values.
        bits: Bits per pixel value.
        titles: One title per image.
        columns: Columns of the grid.
    """
    tiles = [
        stack_titled([(title, image_grid(image[None], bits, 1, TITLED_SIDE))])
        for image, title in zip(images, titles, strict=True)
    ]
    return _tile(tiles, columns, 0)


def save_gif(frames: Sequence[Tensor], bits: int, columns: int, path: Path) -> None:
    """Write an endless GIF with one image grid per frame.

    Args:
        frames: Images of each frame.
        bits: Bits per pixel value.
        columns: Columns of the grid.
        path: The file.
    """
    first, *rest = (image_grid(frame, bits, columns) for frame in frames)
    options = {"save_all": True, "append_images": rest, "duration": FRAME_MILLISECONDS, "loop": 0}
    save_picture(first, path, **options)
