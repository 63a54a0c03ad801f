"""Points of the plane, kept as images of two channels and one pixel, so that every flow of images is one of the plane."""

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowgen.utils import plots

TOY2D_SHAPE = (2, 1, 1)


def is_toy2d(shape: Sequence[int]) -> bool:
    """Whether images of this shape (channels, height, width) are points."""
    return tuple(shape) == TOY2D_SHAPE


SMALLEST_SIDE = 56  # pixels on the page; smaller images are enlarged by a whole factor
GAP = 2  # pixels between the images of a grid


def to_image(images: Tensor, bits: int, columns: int, side: int = SMALLEST_SIDE) -> Image.Image:
    """A grid of images, (N, channels, height, width) levels, `columns` in a row, or a plot of points of the plane.

    Images smaller than `side` pixels are enlarged.
    """
    if is_toy2d(images.shape[1:]):
        return plots.scatter(images.flatten(1).cpu(), 2**bits)
    factor = -(-side // min(images.shape[-2:]))
    pixels = _bytes(images, bits).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return _grid([picture_of(image) for image in pixels], columns)


def picture_of(pixels: Tensor) -> Image.Image:
    """One image of bytes (channels, height, width), grey or in colour. torchvision's takes two seconds to import."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, `columns` in a row on white; one alone has no border."""
    if len(pictures) == 1:
        return pictures[0].convert("RGB")
    width, height = pictures[0].width + GAP, pictures[0].height + GAP
    page = Image.new(
        "RGB",
        (width * min(columns, len(pictures)) + GAP, height * -(-len(pictures) // columns) + GAP),
        "white",
    )
    for place, picture in enumerate(pictures):
        page.paste(picture, (place % columns * width + GAP, place // columns * height + GAP))
    return page


def archive(batches: Iterable[Tensor], bits: int, path: Path) -> None:
    """A zip of images, 0000000.png and so on, each as large as it is, written as they come."""
    part, place = path.with_name(f"{path.name}.part"), 0
    try:
        with zipfile.ZipFile(part, "w") as target:
            for images in batches:
                for image in images:
                    target.writestr(f"{place:07d}.png", png(image, bits))
                    place += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def png(images: Tensor, bits: int) -> bytes:
    """One image (channels, height, width), as large as it is."""
    return file_of(picture_of(_bytes(images, bits)))


def file_of(picture: Image.Image) -> bytes:
    """As a PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _bytes(images: Tensor, bits: int) -> Tensor:
    """Levels as brightness from 0 to 255."""
    return (images.cpu().int() * 255 // (2**bits - 1)).to(torch.uint8)


def signed(weights: Tensor, columns: int = 20, most: int = 400) -> Image.Image:
    """Weights (count, channels, height, width) as tiles: blue below zero, white at zero, orange above, each on its own scale."""
    scaled = weights[:most].mean(1).cpu().float()
    scaled = scaled / scaled.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    above, below = torch.tensor([217, 95, 2.0]), torch.tensor([8, 81, 156.0])
    end = torch.where(scaled[..., None] > 0, above, below)
    color_weights = 255 + (end - 255) * scaled.abs()[..., None]
    return to_image(
        color_weights.round().to(torch.uint8).permute(0, 3, 1, 2),
        8,
        columns=min(columns, len(scaled)),
    )


def blocks(titled: Sequence[tuple[str, Tensor]], bits: int, columns: int) -> Image.Image:
    """Grids one above the other, each under its title."""
    return stack([(title, to_image(images, bits, columns)) for title, images in titled])


def stack(titled: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures one above the other, each under its title of one line or more."""
    font = ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((4, 4), title, font) for title, _ in titled]
    bars = [math.ceil(box[3]) + 4 for box in boxes]
    width = max(
        *(picture.width for _, picture in titled), *(math.ceil(box[2]) + 4 for box in boxes)
    )
    page = Image.new(
        "RGB", (width, sum(bars) + sum(picture.height for _, picture in titled)), "white"
    )
    draw, top = ImageDraw.Draw(page), 0
    for (title, picture), bar in zip(titled, bars, strict=True):
        draw.multiline_text((4, top + 4), title, fill="black", font=font)
        page.paste(picture, (0, top + bar))
        top += picture.height + bar
    return page


def tiles(
    images: Tensor, bits: int, titles: Sequence[str], columns: int, side: int = 112
) -> Image.Image:
    """Images (N, channels, height, width), `columns` in a row, each under its own title."""
    cells = [
        stack([(title, to_image(each[None], bits, 1, side))])
        for each, title in zip(images, titles, strict=True)
    ]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    page = Image.new(
        "RGB", (width * min(columns, len(cells)), height * -(-len(cells) // columns)), "white"
    )
    for place, cell in enumerate(cells):
        page.paste(cell, (place % columns * width, place // columns * height))
    return page


def film(
    frames: Sequence[Tensor], bits: int, columns: int, path: Path, milliseconds: int = 80
) -> None:
    """An endless GIF, one grid a frame."""
    first, *rest = (to_image(frame, bits, columns) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)
