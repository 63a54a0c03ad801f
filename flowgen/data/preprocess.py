"""Where image files come from: a folder or a zip, and the lists that lie with them."""

import io
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowgen.data.dataset import binarize
from flowgen.utils.errors import UserError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MAX_ABS_VALUE = 2**28  # bytes of a file in a zip
LISTS = {".csv", ".txt"}


class ImageSource(NamedTuple):
    """Image files by name: what changes when a file changes, how to read one, the lists in a zip, and the folders to find others in."""

    path: Path
    fingerprints: dict[str, list[int]]
    read: Callable[[str], bytes]
    lists: Sequence[str]
    concat_condition: Sequence[Path]

    @property
    def names(self) -> list[str]:
        return list(self.fingerprints)

    def find_list(self, stem: str) -> tuple[str, list[list[str]]] | None:
        """The place of the list STEM.txt or STEM.csv and the words of its lines, where there is one. Raises FlowgenError for no UTF-8."""
        inside = [name for name in self.lists if PurePosixPath(name).stem == stem]
        outside = [
            path
            for folder in self.concat_condition
            for path in sorted(folder.glob(f"{stem}.*"))
            if path.suffix in LISTS and path.is_file()
        ]
        if not inside and not outside:
            return None
        place = f"{self.path}/{inside[0]}" if inside else str(outside[0])
        try:
            data = self.read(inside[0]) if inside else outside[0].read_bytes()
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place} is no text in UTF-8: get it again, or move it away"
            ) from error
        except Exception as error:  # a damaged archive raises whatever its decompressor does
            raise UserError(f"{place} cannot be read: get it again, or move it away") from error
        return place, [words for line in lines if (words := line.replace(",", " ").split())]


def open_source(root: Path) -> ImageSource:
    """The image files under `root`, sorted by name; hidden files and the shadows that macOS leaves in zips are passed over."""
    if root.is_file():
        return _open_zip(root, [root.parent])
    concat_condition = [
        root,
        *sorted(path for path in root.iterdir() if path.is_dir()),
        root.parent,
    ]
    files = [
        path
        for path in sorted(root.rglob("*"))
        if _is_image(str(path.relative_to(root))) and path.is_file()
    ]
    if files:
        stats = {str(path.relative_to(root)): path.stat() for path in files}
        fingerprints = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return ImageSource(
            root, fingerprints, lambda name: (root / name).read_bytes(), (), concat_condition
        )
    archives = sorted(path for path in root.rglob("*.zip") if path.is_file())
    if len(archives) == 1:
        return _open_zip(archives[0], concat_condition)
    raise UserError(
        f"{root} holds no image and {len(archives)} zips: point data.root at a folder of images or at one zip"
    )


def _open_zip(path: Path, concat_condition: Sequence[Path]) -> ImageSource:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # of any kind, as said above
        raise UserError(
            f"{path} is no zip, or is cut short: get it again, or point data.root at a folder of images"
        ) from error
    infos = sorted(
        (info for info in archive.infolist() if _is_image(info.filename)),
        key=lambda info: info.filename,
    )
    if not infos:
        raise UserError(f"{path} holds no image: point data.root at a folder or a zip of images")

    def read(name: str) -> bytes:
        if archive.getinfo(name).file_size > MAX_ABS_VALUE:
            raise OSError(f"it unpacks to more than {MAX_ABS_VALUE >> 20} MiB")
        return archive.read(name)

    lists = [
        name
        for name in archive.namelist()
        if PurePosixPath(name).suffix in LISTS and not _is_hidden(name)
    ]
    return ImageSource(
        path,
        {info.filename: [info.CRC, info.file_size] for info in infos},
        read,
        lists,
        concat_condition,
    )


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = {1: "L", 3: "RGB"}


def preprocess(file: bytes, size: int, channels: int, crop: int | None) -> Tensor:
    """Decode, crop, resize: uint8 of shape (channels, size, size), at 8 bits.

    `crop` cuts that many pixels out of the centre where the image is larger, as is the custom with the faces of CelebA (148 of
    178x218). Then the largest central square is resized. Colour and greyscale are converted into one another. Raises FlowgenError
    for what is no image, is cut short, or is too small to be one.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(file), formats=FORMATS))
        image = _convert(image, MODES[channels])
    except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
        raise UserError("is not an image, or is cut short") from error
    if min(image.size) < size / 4:
        raise UserError(f"is {image.width}x{image.height} pixels, too small for {size}x{size}")
    if crop is not None and min(image.size) > crop:
        image = _centre(image, crop)
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(size, size, channels)
        .permute(2, 0, 1)
    )


def check_color_channels(channels: int) -> None:
    """Raise `FlowgenError` where images of so many channels are none that a file holds, such as points of the plane."""
    if channels not in MODES:
        raise UserError(
            f"this model is of {channels} channels, and an image file has 1 or 3: name another with --run"
        )


def read_images(path: str | Path, size: int, channels: int, crop: int | None, bits: int) -> Tensor:
    """The levels of one image file, prepared like the data: (1, channels, size, size)."""
    path = Path(path)
    check_color_channels(channels)
    if path.is_dir():
        raise UserError(f"{path} is a folder: name an image file")
    if not path.is_file():
        raise UserError(f"{path} does not exist: name an image file")
    try:
        return preprocess(path.read_bytes(), size, channels, crop)[None] >> (8 - bits)
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def read_unscaled(path: str | Path, shape: tuple[int, int, int], bits: int) -> Tensor:
    """The levels of one image file that has this shape (channels, height, width) already: (1, channels, height, width).

    Raises FlowgenError for any other, since pixels that a mask speaks of must stay where they are.
    """
    images = read_images(path, shape[1], shape[0], None, bits)
    height, width = image_size(path)
    if (height, width) != shape[1:]:
        raise UserError(
            f"{path} is {width}x{height} pixels, and the images of this model are {shape[2]}x{shape[1]}: resize it first"
        )
    return images


def image_size(path: str | Path) -> tuple[int, int]:
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
    if image.mode.startswith(
        "I"
    ):  # 16 bits a pixel, which Pillow would clip to 255 rather than scale
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


Batch = tuple[list[str], Tensor]
log = logging.getLogger("flowgen")


class ImageStream:
    """The images of files, folders and zips, prepared like the data of a model: names, levels (batch, channels, size, size).

    Where `binarise` is not threshold, pixels of one bit are drawn, with `seed`, as `Images` draws them. What lies in a folder or a zip
    and cannot be read is left out and counted. Raises FlowgenError for a path that holds no image.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: int,
        channels: int,
        crop: int | None,
        bits: int,
        binarization: str | None = "threshold",
        seed: int = 0,
    ):
        self.how = (size, channels, crop)
        self.bits, self.draws = bits, bits == 1 and binarization not in (None, "threshold")
        self.generator = torch.Generator().manual_seed(seed)
        paths = [path.expanduser() for path in paths]
        self.parts = [
            path if path.suffix.lower() in SUFFIXES and not path.is_dir() else _open(path)
            for path in paths
        ]
        self.left_out: list[str] = []

    def __len__(self) -> int:
        return sum(len(part.names) if isinstance(part, ImageSource) else 1 for part in self.parts)

    def batches(self, count: int) -> Iterator[Batch]:
        names: list[str] = []
        images: list[Tensor] = []
        for name, image in self._images():
            names, images = [*names, name], [*images, image]
            if len(names) == count:
                yield names, self._levels(images)
                names, images = [], []
        if names:
            yield names, self._levels(images)
        if self.left_out:
            more = "; ..." * (len(self.left_out) > 3)
            log.warning(
                "%d of %d images left out: %s",
                len(self.left_out),
                len(self),
                "; ".join(self.left_out[:3]) + more,
            )

    def _levels(self, images: list[Tensor]) -> Tensor:
        stacked = torch.stack(images)
        return (binarize(stacked, self.generator) if self.draws else stacked) >> (8 - self.bits)

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        for part in self.parts:
            if isinstance(part, Path):
                yield str(part), read_images(part, *self.how, 8)[0]
                continue
            for name in part.names:
                try:
                    yield f"{part.path}/{name}", preprocess(part.read(name), *self.how)
                except UserError as error:
                    self.left_out.append(f"{name} {error}")
                except (
                    Exception
                ) as error:  # a damaged archive raises whatever its decompressor does
                    self.left_out.append(f"{name} cannot be read ({error})")


def _open(path: Path) -> ImageSource:
    if not path.exists():
        raise UserError(f"{path} does not exist: name images, or a folder or a zip of them")
    try:
        return open_source(path)
    except UserError as error:
        raise UserError(
            f"{path} holds no image: name images, or a folder or a zip of them"
        ) from error
