"""Image files in folders and zips, and their preprocessing to tensors."""

import io
import os
import posixpath
import zipfile
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowgen.data.dataset import Size, binarize, height_and_width
from flowgen.utils.console import log
from flowgen.utils.errors import UserError, user_error

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LIST_SUFFIXES = (".csv", ".txt")
MAX_UNPACKED_BYTES = 2**28  # of one file in a zip
MODES = {1: "L", 3: "RGB"}  # of Pillow, by the number of channels


class ImageSource(NamedTuple):
    """Image files in a folder or a zip.

    Attributes:
        path: The folder or the zip.
        root: The same place, in which the files are found by their names.
        fingerprints: Numbers that change when a file changes, by the file's name.
        list_folders: Folders that may contain lists about the images.
    """

    path: Path
    root: Path | zipfile.Path
    fingerprints: dict[str, list[int]]
    list_folders: Sequence[Path | zipfile.Path]

    @property
    def names(self) -> list[str]:
        """Names of the images, sorted."""
        return list(self.fingerprints)

    def find_list(self, stem: str) -> tuple[str, list[list[str]]]:
        """Return the path of the list STEM.txt or STEM.csv and the words of its lines.

        Without such a list the path is empty.

        Raises:
            UserError: If the list cannot be read as text.
        """
        paths = [
            folder / f"{stem}{suffix}" for folder in self.list_folders for suffix in LIST_SUFFIXES
        ]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            return "", []
        with user_error(f"{path} cannot be read as UTF-8 text: download it again or remove it"):
            lines = read_file(path).decode("utf-8-sig").replace(",", " ").splitlines()
        return str(path), [line.split() for line in lines if line.strip()]

    def load(self, name: str, size: Size, channels: int, crop: int | None) -> Tensor | UserError:
        """Return an image as `preprocess` does, or the error if it cannot be read."""
        try:
            return preprocess(read_file(self.root / name), size, channels, crop)
        except UserError as error:
            return UserError(f"{name} {error}")
        except Exception as error:  # a damaged archive raises any error of its decompressor
            return UserError(f"{name} cannot be read ({error})")


def read_file(path: Path | zipfile.Path) -> bytes:
    """Read a file, in a zip or not. One that unpacks to gigabytes is an error."""
    with path.open("rb") as file:
        data: bytes = file.read(MAX_UNPACKED_BYTES + 1)
    if len(data) > MAX_UNPACKED_BYTES:
        raise OSError(f"it unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
    return data


def open_source(root: Path) -> ImageSource:
    """Open the image files in a folder, in a zip, or in a folder that contains one zip.

    Hidden files and the resource forks that macOS puts into zips are skipped.

    Raises:
        UserError: If there are no images.
    """
    if root.is_file():
        return _open_zip(root, [root.parent])
    list_folders = [root, *sorted(filter(Path.is_dir, root.iterdir())), root.parent]
    files = sorted(_files_below(root))
    fingerprints = {
        str(path.relative_to(root)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
        if _is_visible(str(path.relative_to(root)), IMAGE_SUFFIXES)
    }
    if fingerprints:
        return ImageSource(root, root, fingerprints, list_folders)
    archives = [path for path in files if path.match("*.zip")]
    if len(archives) == 1:
        return _open_zip(archives[0], list_folders)
    raise UserError(
        f"{root} contains no images and {len(archives)} zips: "
        "set data.root to a folder of images or to one zip"
    )


def _files_below(root: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders.

    Links to folders are followed. A folder that several links lead to is read once.
    """
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in visited:  # a link may lead to a folder above it
            subfolders.clear()
            continue
        visited.add(real_folder)
        subfolders.sort()  # so that the same one of several links is read every time
        yield from filter(Path.is_file, (Path(folder, name) for name in names))


def _open_zip(path: Path, list_folders: Sequence[Path]) -> ImageSource:
    with user_error(
        f"{path} is not a zip, or is cut short: "
        "download it again, or set data.root to a folder of images"
    ):
        archive = zipfile.ZipFile(path)
    files = {info.filename: [info.CRC, info.file_size] for info in archive.infolist()}
    fingerprints = {
        name: files[name] for name in sorted(files) if _is_visible(name, IMAGE_SUFFIXES)
    }
    if not fingerprints:
        archive.close()
        raise UserError(f"{path} contains no images: set data.root to a folder or a zip of images")
    root = zipfile.Path(archive)
    in_zip = [root / posixpath.dirname(name) for name in files if _is_visible(name, LIST_SUFFIXES)]
    return ImageSource(path, root, fingerprints, [*in_zip, *list_folders])


def _is_visible(name: str, suffixes: Collection[str]) -> bool:
    """Return whether a file has one of the suffixes and is not hidden."""
    path = PurePosixPath(name)
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in suffixes and not is_hidden


def preprocess(file: bytes, size: Size, channels: int, crop: int | None) -> Tensor:
    """Decode an image file, crop it and resize it.

    The largest central part with the proportions of `size` is resized. Color images are converted
    to grayscale or vice versa. Transparent images are drawn on white.

    Args:
        file: Content of the file.
        size: Height and width of the result in pixels, or one number for squares.
        channels: 1 (grayscale) or 3 (RGB).
        crop: Side of a central square that is cut out first if the image is larger, in pixels. For
            CelebA, 148 of 178x218 pixels are usual.

    Returns:
        8-bit pixel values, uint8 (channels, height, width).

    Raises:
        UserError: If the file is not an image, is cut short, or is too small.
    """
    height, width = height_and_width(size)
    with user_error("is not an image, or is cut short"):
        try:
            stored = Image.open(io.BytesIO(file), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise UserError("has more than 178 million pixels: make it smaller") from error
        image = ImageOps.exif_transpose(stored)
        if image.mode == "F" or (image.mode == "I" and _exceeds_16_bits(image)):
            raise UserError("has pixel values of 32 bits: convert it to 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert(MODES[channels])
    if image.height < height / 4 or image.width < width / 4:
        raise UserError(f"is {image.width}x{image.height} pixels, too small for {width}x{height}")
    if crop is not None and min(image.size) > crop:
        left = (image.width - crop) // 2
        top = (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1)


def _exceeds_16_bits(image: Image.Image) -> bool:
    low, high = cast(tuple[float, float], image.getextrema())
    return low < 0 or high >= 2**16


def check_color_channels(channels: int) -> None:
    """Raise `UserError` unless images with this many channels can be files."""
    if channels not in MODES:
        raise UserError(
            f"this model has {channels} channels, and an image file has 1 or 3: "
            "choose another model with --run"
        )


def read_image(path: Path, size: Size, channels: int, crop: int | None, bits: int) -> Tensor:
    """Read one image file and preprocess it like the training data.

    Args:
        path: The file.
        size: Height and width after resizing.
        channels: 1 for gray or 3 for color.
        crop: Side of the square that is cut out of the center first, or None.
        bits: Bits per pixel value.

    Returns:
        A batch of one image, uint8 (1, channels, height, width), at `bits` bit depth.
    """
    check_color_channels(channels)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}: choose an image file")
    try:
        return preprocess(path.read_bytes(), size, channels, crop)[None] >> (8 - bits)
    except UserError as error:
        raise UserError(f"{path} {error}") from error


def read_unscaled(path: Path, shape: tuple[int, int, int], bits: int) -> Tensor:
    """Read one image file that already has the shape (channels, height, width).

    An image of another size is refused, since resizing would move the pixels of a mask.

    Args:
        path: The file.
        shape: (channels, height, width).
        bits: Bits per pixel value.

    Returns:
        A batch of one image, uint8 (1, channels, height, width), at `bits` bit depth.
    """
    channels, height, width = shape
    images = read_image(path, (height, width), channels, None, bits)
    if image_size(path) != (height, width):
        size = "x".join(map(str, reversed(image_size(path))))
        raise UserError(
            f"{path} is {size} pixels, and the images of this model are {width}x{height}: "
            "resize it first"
        )
    return images


def image_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image file, or (0, 0) for other files."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return 0, 0


class ImageStream:
    """Images of files, folders and zips, preprocessed like the data of a model.

    Files in a folder or a zip that cannot be read are skipped and counted.

    Args:
        paths: Image files, folders and zips.
        size: Height and width of the images in pixels, or one number for squares.
        channels: 1 (grayscale) or 3 (RGB).
        crop: See `preprocess`.
        bits: Bits of a pixel value.
        binarization: See `ImageDataset`. With one bit, anything but "threshold" draws the pixels.
        seed: Seed of the binarization.

    Raises:
        UserError: If a path contains no images.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: Size,
        channels: int,
        crop: int | None,
        bits: int,
        binarization: str | None = "threshold",
        seed: int = 0,
    ):
        self.shape = (size, channels, crop)
        self.bits = bits
        self.binarize = bits == 1 and binarization not in (None, "threshold")
        self.generator = torch.Generator().manual_seed(seed)
        self.files = [file for path in paths for file in list_images(path.expanduser())]
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names and images, uint8 (batch_size, channels, height, width).

        The last batch may be smaller.
        """
        images = self._images()
        while chunk := list(islice(images, batch_size)):
            batch = torch.stack([image for _, image in chunk])
            if self.binarize:
                batch = binarize(batch, self.generator)
            yield [name for name, _ in chunk], batch >> (8 - self.bits)
        log_skipped(self.skipped, len(self))

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        for source, name in self.files:
            if source is None:
                yield name, read_image(Path(name), *self.shape, 8)[0]
                continue
            image = source.load(name, *self.shape)
            if isinstance(image, UserError):
                self.skipped.append(str(image))
            else:
                yield f"{source.path}/{name}", image


def log_skipped(skipped: Sequence[str], count: int) -> None:
    """Log which of `count` images were skipped, and why."""
    if skipped:
        first = [*skipped[:3], "..."] if len(skipped) > 3 else skipped
        log.warning("%d of %d images skipped: %s", len(skipped), count, "; ".join(first))


def list_images(path: Path) -> list[tuple[ImageSource | None, str]]:
    """Return an image file with no source, or a source and each of its names."""
    if not path.exists():
        raise UserError(f"{path} does not exist: choose images, or a folder or a zip of them")
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
        return [(None, str(path))]
    try:
        source = open_source(path)
    except UserError as error:
        if path.is_file():
            raise
        raise UserError(
            f"{path} contains no images: choose images, or a folder or a zip of them"
        ) from error
    return [(source, name) for name in source.names]
