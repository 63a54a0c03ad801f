"""Lossless compression: `flowgen compress` and `flowgen decompress`."""

import io
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from torch import Tensor

from flowgen.coding import archive
from flowgen.coding.archive import CompressionResult, Header
from flowgen.coding.codec import Codec
from flowgen.coding.factory import make_codec
from flowgen.config import instantiate, runs
from flowgen.data.preprocess import (
    FORMATS,
    ImageSource,
    check_color_channels,
    list_images,
    preprocess,
    read_file,
)
from flowgen.models.base import GenerativeModel, SupportsCompression
from flowgen.training.checkpoint import zoo
from flowgen.utils import console
from flowgen.utils.errors import UserError, check_folder_of, user_error
from flowgen.utils.files import atomic_write
from flowgen.utils.memory import check_memory
from flowgen.utils.metrics import BITS_PER_DIM
from flowgen.utils.rendering import encode_png

BATCH_SIZE = 64  # images that are read from a data set at once


@dataclass(frozen=True)
class CompressReport:
    """The file that `compress` wrote, and its size in several units.

    `str(report)` is the text for the user, `row()` a dictionary that can be written as JSON.
    """

    path: Path
    codec: Codec
    result: CompressionResult
    png_bytes: int
    verified: bool
    seconds: float
    likelihood: str  # the kind of likelihood of the model
    verdict: str | None

    def row(self) -> dict[str, Any]:
        """Return all values as one flat dictionary."""
        result = self.result
        is_known = math.isfinite(result.model_bits)
        return {
            "file": str(self.path),
            "images": result.num_images,
            "dimensions": result.dimensions,
            "bytes": len(result.data),
            "bits_per_dim": result.bits_per_dim,
            "net_bits_per_dim": result.net_bits_per_dim,
            "model_bits_per_dim": result.model_bits_per_dim if is_known else None,
            "likelihood": self.likelihood,
            "png_bits_per_dim": self._png_bits_per_dim,
            "raw_images": result.raw_images,
            "verified": self.verified,
            "seconds": self.seconds,
            "annealing_steps": self.codec.annealing_steps,
            "verdict": self.verdict,
        }

    @property
    def _png_bits_per_dim(self) -> float:
        return 8 * self.png_bytes / (self.result.num_images * self.result.dimensions)

    def __str__(self) -> str:
        result = self.result
        images = console.count_noun(result.num_images, "image")
        sign = BITS_PER_DIM.bound_sign(self.likelihood)
        lines = [
            str(self.path),
            f"{images} of {result.dimensions:,} numbers: {len(result.data):,} bytes, "
            f"{result.bits_per_dim:.4f} bits/dim",
            f"without the fixed cost of the file: {self._length(result.net_bits)}; "
            f"{self.codec.length_description}: {sign}{self._length(result.model_bits)}; "
            f"PNG: {self._png_bits_per_dim:.4f}",
        ]
        if self.codec.annealing_steps:
            lines.append(f"log Z is {self.verdict or 'unknown: run `flowgen evaluate`'}")
        return "\n".join([*lines, *(["decoded again: equal"] if self.verified else [])])

    def _length(self, bits: float) -> str:
        """Return a length of all images in bits/dim, and for an RBM also in nats per image."""
        if not math.isfinite(bits):
            return "unknown"
        count = self.result.num_images
        text = f"{bits / (count * self.result.dimensions):.4f} bits/dim"
        if not self.codec.annealing_steps:
            return text
        return f"{text} ({bits * math.log(2) / count:.2f} nats per image)"


def compress(
    *,
    paths: Sequence[Path],
    run: str | None,
    split: str | None,
    count: int | None,
    prepared: bool,
    verify: bool,
    annealing_steps: int,
    overwrite: bool,
    out: Path,
) -> CompressReport:
    """Compress images into one file.

    Args:
        paths: Image files, folders and zips.
        run: Name of the run, or None for the newest one of a model that compresses images.
        split: Split of the run's own data to compress instead of files.
        count: Maximum number of images, or None for all; those of a split are chosen by hash.
        prepared: Accept images that must be resized or reduced, and compress the results.
        verify: Whether to decode each batch again and compare it.
        annealing_steps: Annealing steps of an RBM.
        overwrite: Whether to replace `out`.
        out: The file to write.
    """
    if bool(paths) == bool(split):
        raise UserError("give images, folders or zips, or choose --split test, but not both")
    check_folder_of(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder: choose a file for --out")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another --out, or add --overwrite")
    run_dir, checkpoint, model = runs.find_model(run, "cpu", SupportsCompression)
    codec = make_codec(model, annealing_steps)
    config = checkpoint["config"]
    names = None
    if split:
        images = _split_images(config, model, split, count)
    else:
        names, images = read_exact_images(paths, count, model, config, prepared)
    start = time.perf_counter()
    result = archive.compress(
        codec, images, _run_name(run, run_dir.folder), names, verify, console.progress_bar
    )
    seconds = time.perf_counter() - start
    # Values that are not scaled to 8 bits make smaller files.
    png_bytes = sum(len(encode_png(image, bits=8)) for image in images)
    with atomic_write(out) as temporary:
        temporary.write_bytes(result.data)
    verdict = checkpoint["metrics"].get("verdict")
    return CompressReport(out, codec, result, png_bytes, verify, seconds, model.likelihood, verdict)


def _split_images(
    config: dict[str, Any], model: GenerativeModel, split: str, count: int | None
) -> Tensor:
    data = instantiate.build_data(config)
    instantiate.check_fits_data(model, data)
    return torch.cat(list(data.batches(split, BATCH_SIZE, count)))


def _run_name(name: str | None, folder: Path) -> str:
    """Return the name under which `decompress` looks for the model."""
    has_place = name is not None and name.startswith(("zoo/", runs.HUB_PREFIX))
    return str(name) if has_place else str(folder)


def read_exact_images(
    paths: Sequence[Path],
    count: int | None,
    model: GenerativeModel,
    config: dict[str, Any],
    prepared: bool,
) -> tuple[list[str], Tensor]:
    """Read images that the model represents exactly.

    Args:
        paths: Image files, folders and zips.
        count: Maximum number of images, or None for all.
        model: The model that compresses them.
        config: Configuration of its run.
        prepared: Accept images that must be resized or reduced.

    Returns:
        The names of the images, and their pixel values, uint8 (N, channels, height, width).

    Raises:
        UserError: If an image must be changed and `prepared` is false, or cannot be read.
    """
    channels, height, width = model.image_shape
    check_color_channels(channels)
    files = [file for path in paths for file in list_images(path.expanduser())][:count]
    check_memory("the number of images", len(files), 2 * channels * height * width)
    names = []
    images = []
    for source, path in console.progress_bar(files, "reading", len(files)):
        image, is_exact = _read_image(source, path, model, config["data"].get("crop"))
        if not is_exact and not prepared:
            raise UserError(
                f"{path} would be changed to {width}x{height} pixels, "
                f"{console.count_noun(channels, 'channel')} and "
                f"{console.count_noun(model.bits, 'bit')}, which loses details: prepare the images "
                "in this format, or add --prepared to compress the changed images"
            )
        names.append(path if source else Path(path).name)
        images.append(image)
    check_names(names)
    return names, torch.stack(images)


def _read_image(
    source: ImageSource | None, name: str, model: GenerativeModel, crop: int | None
) -> tuple[Tensor, bool]:
    """Return an image at the model's bit depth, and whether its PNG will be equal to the file."""
    channels, *size = model.image_shape
    with user_error(f"{name} cannot be read as an image: repair or remove it"):
        data = read_file(source.root / name if source else Path(name))
        try:
            image = preprocess(data, size, channels, crop)
        except UserError as error:
            raise UserError(f"{name} {error}: repair or remove it") from error
        values = image >> (8 - model.bits)
        restored = _pixels(encode_png(values, model.bits))
        original = _pixels(data)
    return values, original is not None and original == restored


def _pixels(file: bytes) -> tuple[tuple[int, int], bytes] | None:
    """Return size and pixels of an image file, or None for more than 8 bits or one image."""
    stored = Image.open(io.BytesIO(file), formats=FORMATS)
    if _exceeds_8_bits(stored) or getattr(stored, "n_frames", 1) > 1:
        return None
    image = ImageOps.exif_transpose(stored)
    return image.size, image.convert("RGBA").tobytes()


def _exceeds_8_bits(image: ImageFile) -> bool:
    """Return whether the values of an image that is not loaded yet have more than 8 bits.

    Pillow rounds those of color images to 8 bits as it loads them.
    """
    if image.mode.startswith(("I", "F")):
        return True
    for tile in image.tile:
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        raw_mode = str(arguments[0]) if arguments else ""
        if re.search(";16[BLN]", raw_mode):  # of PNG and TIFF
            return True
        if image.format == "PPM" and arguments[1:] and int(arguments[1]) > 255:  # maximum value
            return True
    return False


def decompress(*, file: Path, run: str | None, overwrite: bool, out: Path) -> str:
    """Restore the images of a file as PNG files in a folder.

    Args:
        file: A file of `compress`.
        run: Name of the run that compressed the images; by default the one that the file names.
        overwrite: Whether to replace files in `out`.
        out: The folder.

    Returns:
        The text for the user.
    """
    folder = out.resolve()  # `out` may be a link
    check_folder_of(folder)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise UserError(f"{out} exists already: choose another --out, or add --overwrite")
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{file} {problem}: choose a file of `flowgen compress`")
    header, payload = archive.read_header(file.read_bytes())
    names = file_names(header)
    _, _, model = runs.find_model(run or _known_run(header), "cpu", SupportsCompression)
    archive.check_model(header, model)  # a codec of another model may refuse the annealing steps
    codec = make_codec(model, header.annealing_steps)
    check_color_channels(model.image_shape[0])
    images = archive.decompress(codec, header, payload, console.progress_bar)
    _save_images(images, names, model.bits, folder)
    count = console.count_noun(len(images), "image")
    bits = console.count_noun(model.bits, "bit") + (", scaled to 8" if model.bits < 8 else "")
    return f"{out}\n{count} of {bits}"


def _known_run(header: Header) -> str:
    """Return the name of the run that a file names, if it is here already.

    A file from a stranger must not make this machine read other places or download a model.
    """
    if header.run in zoo() or header.run in {str(run.folder) for run in runs.list_runs()}:
        return header.run
    raise UserError(
        f"the file was written with the model {header.run!r}, which is not a run here: "
        "give the same model with --run"
    )


def check_names(names: Sequence[str]) -> None:
    """Raise UserError unless all names stay inside of the folder that they are written to."""
    for name in names:
        if not _is_safe(name):
            raise UserError(
                f"{name!r} is not a safe name of an image: rename it, and compress the images again"
            )


def _is_safe(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    path = PurePosixPath(name)
    is_relative = not path.is_absolute() and not PureWindowsPath(name).drive
    has_only_names = not {"", ".", ".."} & set(name.split("/"))
    return is_relative and has_only_names and "\\" not in name and "\0" not in name


def file_names(header: Header) -> list[str]:
    """Return a different name that ends in .png for each image of a file."""
    if header.names is None:
        return [f"{index:07d}.png" for index in range(header.num_images)]
    check_names(header.names)
    folders = {
        str(folder).casefold() for name in header.names for folder in PurePosixPath(name).parents
    }
    used: set[str] = set()
    names = []
    for original in header.names:
        name = str(PurePosixPath(original).with_suffix(".png"))
        number = 1
        while name.casefold() in used | folders:
            number += 1
            name = f"{PurePosixPath(original).with_suffix('')}_{number}.png"
        used.add(name.casefold())
        names.append(name)
    return names


def _save_images(images: Tensor, names: Sequence[str], bits: int, out: Path) -> None:
    """Write PNG files to a folder; an interruption before the end changes nothing."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        folder = work / "images"
        folder.mkdir()
        for image, name in zip(images, names, strict=True):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image, bits))
        if out.is_dir() and (any(out.iterdir()) or out == Path.cwd()):
            _move_into(folder, names, out)
        else:
            if out.is_dir():
                out.rmdir()
            folder.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_into(folder: Path, names: Sequence[str], out: Path) -> None:
    """Move files into an existing folder, and never through a link out of it."""
    for name in names:
        target = out / name
        if not target.parent.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{target.parent} is a link to another folder: choose another --out")
    for name in names:
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).replace(target)
