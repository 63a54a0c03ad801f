"""Prepared images on disk, so that a set is decoded once and may be larger than memory."""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from flowgen.data.preprocess import ImageSource, preprocess
from flowgen.utils.errors import UserError

VERSION = 1  # of `prepare`: what it made before is made again
CHUNK = 2048  # images decoded ahead of the writer
log = logging.getLogger("flowgen")


def cache_folder() -> Path:
    """`FLOWGEN_CACHE`, else `~/.cache/flowgen`."""
    return Path(os.environ.get("FLOWGEN_CACHE", "~/.cache/flowgen")).expanduser()


def cached_images(
    source: ImageSource, names: list[str], size: int, channels: int, crop: int | None
) -> tuple[Tensor, set[str]]:
    """The images `names`, prepared and memory-mapped, (N, channels, size, size) at 8 bits, and the names that could be used.

    What cannot be read is named and counted. Raises FlowgenError where nothing can. The file is made again when `source`, the
    settings or the choice of names change; of several processes that want it one makes it, and the others wait.
    """
    settings = _hash([VERSION, str(source.path.resolve()), size, channels, crop])
    contents = _hash([[name, source.fingerprints[name]] for name in names])
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / f"{source.path.stem}-{settings}-{contents}.json"
    with _held(folder / f"{settings}.lock", source.path):
        entry = _read(index, channels * size**2)
        if entry is None:
            for stale in folder.glob(
                f"*-{settings}-*"
            ):  # the lock says that nobody is about to read them
                stale.unlink()
            entry = _write(
                index, source, names, partial(preprocess, size=size, channels=channels, crop=crop)
            )
        kept, refused = entry["kept"], entry["refused"]
        if refused:
            log.warning(
                "%d of %d images left out: %s",
                len(refused),
                len(names),
                "; ".join(refused[:3]) + "; ..." * (len(refused) > 3),
            )
        if not kept:
            raise UserError(
                f"none of the {len(names)} images of {source.path} can be used: {refused[0]}"
            )
        shape = torch.Size((len(kept), channels, size, size))
        return _mapped(index.with_suffix(".bin")).view(shape), set(kept)


def cached_array(name: str, fingerprints: object, chunks: Callable[[], Iterable[Tensor]]) -> Tensor:
    """All that `chunks` yields, bytes of uint8 tensors one after the other, memory-mapped; written again when `stamps` change."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    path = cache_folder() / f"{name}-{_hash([VERSION, fingerprints])}.bin"
    with _held(path.with_suffix(".lock"), path):
        if not path.exists():
            aside = path.with_suffix(".part")
            try:
                with open(aside, "wb") as file:
                    for chunk in chunks():
                        file.write(chunk.contiguous().numpy().tobytes())
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
        return _mapped(path) if path.stat().st_size else torch.empty(0, dtype=torch.uint8)


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, to be read only: its pages are the system's to take back, so that a machine may have less memory than that."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8
        )


@contextlib.contextmanager
def _held(path: Path, images: Path) -> Iterator[None]:
    """The lock, after whoever has it; a process that dies lets it go."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that prepares %s", images)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read(index: Path, size: int) -> dict[str, list[str]] | None:
    """What the index says, where both files are whole: as many images of `size` bytes as it names."""
    try:
        entry = json.loads(index.read_text())
        found = {key: [str(line) for line in entry[key]] for key in ("kept", "refused")}
        return (
            found if index.with_suffix(".bin").stat().st_size == size * len(found["kept"]) else None
        )
    except (OSError, ValueError, KeyError, TypeError):  # lost, cut short, or no index
        return None


def _write(
    index: Path, source: ImageSource, names: list[str], make: Callable[[bytes], Tensor]
) -> dict[str, list[str]]:
    """The images one after the other, then the index, whose presence says that both are whole."""
    entry: dict[str, list[str]] = {"kept": [], "refused": []}
    aside = index.with_suffix(".part")
    try:
        with open(aside, "wb") as file:
            for name, image in _decode(source, names, make):
                if isinstance(image, UserError):
                    entry["refused"].append(f"{name} {image}")
                else:
                    entry["kept"].append(name)
                    file.write(image.contiguous().numpy().tobytes())
        aside.replace(index.with_suffix(".bin"))
        aside.write_text(json.dumps(entry))
        aside.replace(index)
    finally:
        aside.unlink(missing_ok=True)
    return entry


def _decode(
    source: ImageSource, names: list[str], make: Callable[[bytes], Tensor]
) -> Iterator[tuple[str, Tensor | UserError]]:
    def attempt(name: str) -> Tensor | UserError:
        try:
            return make(source.read(name))
        except UserError as error:
            return error
        except Exception as error:  # a damaged archive raises whatever its decompressor does
            return UserError(f"cannot be read ({error})")

    bar = tqdm(
        total=len(names),
        desc=f"preparing {source.path.name}",
        unit="image",
        disable=None,
        leave=False,
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            yield from zip(chunk, pool.map(attempt, chunk), strict=True)
            bar.update(len(chunk))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
