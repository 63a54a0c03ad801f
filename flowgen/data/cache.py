"""Preprocessed images on disk: decoded once, and memory-mapped when they exceed the memory."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor

from flowgen.data.dataset import Size, height_and_width, shortest_size
from flowgen.data.preprocess import ImageSource, log_skipped
from flowgen.utils.console import log, progress_bar
from flowgen.utils.errors import UserError
from flowgen.utils.files import atomic_write

VERSION = 1  # of `preprocess`: a new number invalidates all cache files
CHUNK_IMAGES = 2048  # decoded before they are written


def cached_images(
    source: ImageSource, names: list[str], size: Size, channels: int, crop: int | None
) -> tuple[Tensor, set[str]]:
    """Return preprocessed images from the cache, after writing them to it if necessary.

    The file is written again when `source`, the settings or the names change. One of several
    processes writes it, and the others wait. Images that cannot be read are skipped and counted.

    Args:
        source: Image files.
        names: Names of the images in `source`.
        size: Height and width, or one number for squares, as in `preprocess`.
        channels: 1 (grayscale) or 3 (RGB).
        crop: Side of a central square that is cut out first, or None.

    Returns:
        The images, memory-mapped, uint8 (N, channels, height, width), and the names of those that
        could be read.

    Raises:
        UserError: If none can be read.
    """
    height, width = height_and_width(size)
    settings = hash_json([VERSION, str(source.path.resolve()), shortest_size(size), channels, crop])
    contents = hash_json([[name, source.fingerprints[name]] for name in names])
    folder = cache_folder()
    index_path = folder / f"{source.path.stem}-{settings}-{contents}.json"
    with lock(folder / f"{settings}.lock", source.path):
        index = _read_index(index_path, channels * height * width)
        if index is None:
            for stale in folder.glob(f"*-{settings}-*"):  # nobody opens them without the lock
                stale.unlink()
            index = _write(
                index_path,
                source.path.name,
                names,
                partial(source.load, size=size, channels=channels, crop=crop),
            )
        log_skipped(index["refused"], len(names))
        if not index["kept"]:
            raise UserError(
                f"none of the {len(names)} images of {source.path} can be used: "
                f"{index['refused'][0]}"
            )
        pixels = _map_file(index_path.with_suffix(".bin"))
        return pixels.view(-1, channels, height, width), set(index["kept"])


def cached_array(name: str, fingerprints: object, chunks: Callable[[], Iterable[Tensor]]) -> Tensor:
    """Return the bytes of all tensors of `chunks`, memory-mapped, from the cache.

    Args:
        name: First part of the file's name.
        fingerprints: JSON values. The file is written again when they change.
        chunks: Yields uint8 tensors, which are written one after the other.

    Returns:
        All bytes, uint8 (N,).
    """
    path = cache_folder() / f"{name}-{hash_json([VERSION, fingerprints])}.bin"
    with lock(path.with_suffix(".lock"), path):
        if not path.exists():
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                for chunk in chunks():
                    file.write(chunk.numpy().tobytes())
        return _map_file(path) if path.stat().st_size else torch.empty(0, dtype=torch.uint8)


def cache_folder() -> Path:
    """Return the folder of the cache, `FLOWGEN_CACHE` or `~/.cache/flowgen`, and create it."""
    folder = Path(os.environ.get("FLOWGEN_CACHE", "~/.cache/flowgen")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _map_file(path: Path) -> Tensor:
    """Return the bytes of a file, memory-mapped for reading.

    The operating system can drop its pages, so it may be larger than the memory.
    """
    with warnings.catch_warnings(action="ignore"):  # "The given NumPy array is not writable"
        return torch.from_numpy(np.memmap(path, mode="r"))


def lock(path: Path, images: object) -> AcquireReturnProxy:
    """Acquire a lock, which is released at the end of a `with` block or if the process dies.

    Args:
        path: Lock file.
        images: Name of the images that it protects, for the log.
    """
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that prepares %s", images)
        return FileLock(path).acquire()


def _read_index(path: Path, image_bytes: int) -> dict[str, list[str]] | None:
    """Return the index if it can be read and its images are complete."""
    try:
        index: dict[str, list[str]] = json.loads(path.read_text())
        size = image_bytes * len(index["kept"])
        return index if path.with_suffix(".bin").stat().st_size == size else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _write(
    index_path: Path, title: str, names: list[str], load: Callable[[str], Tensor | UserError]
) -> dict[str, list[str]]:
    """Write the images, then the index: if it exists, the images are complete."""
    index: dict[str, list[str]] = {"kept": [], "refused": []}
    with (
        atomic_write(index_path.with_suffix(".bin")) as temporary,
        open(temporary, "wb") as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        chunks = [
            names[start : start + CHUNK_IMAGES] for start in range(0, len(names), CHUNK_IMAGES)
        ]
        images = chain.from_iterable(pool.map(load, chunk) for chunk in chunks)
        progress = progress_bar(images, f"preparing {title}", len(names))
        for name, image in zip(names, progress, strict=True):
            if isinstance(image, UserError):
                index["refused"].append(str(image))
            else:
                index["kept"].append(name)
                file.write(image.numpy().tobytes())
    with atomic_write(index_path) as temporary:
        temporary.write_text(json.dumps(index))
    return index


def hash_json(value: object) -> str:
    """Return the first 12 digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
