"""Where image files come from: a folder or a zip, and the lists that lie with them."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from flowgen.errors import FlowgenError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LARGEST = 2**28  # bytes of a file in a zip
LISTS = {".csv", ".txt"}


class Source(NamedTuple):
    """Image files by name: what changes when a file changes, how to read one, the lists in a zip, and the folders to find others in."""

    path: Path
    stamps: dict[str, list[int]]
    read: Callable[[str], bytes]
    lists: Sequence[str]
    beside: Sequence[Path]

    @property
    def names(self) -> list[str]:
        return list(self.stamps)

    def find_list(self, stem: str) -> tuple[str, list[list[str]]] | None:
        """The place of the list STEM.txt or STEM.csv and the words of its lines, where there is one. Raises FlowgenError for no UTF-8."""
        inside = [name for name in self.lists if PurePosixPath(name).stem == stem]
        outside = [path for folder in self.beside for path in sorted(folder.glob(f"{stem}.*")) if path.suffix in LISTS and path.is_file()]
        if not inside and not outside:
            return None
        place = f"{self.path}/{inside[0]}" if inside else str(outside[0])
        try:
            data = self.read(inside[0]) if inside else outside[0].read_bytes()
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise FlowgenError(f"{place} is no text in UTF-8: get it again, or move it away") from error
        except Exception as error:  # a damaged archive raises whatever its decompressor does
            raise FlowgenError(f"{place} cannot be read: get it again, or move it away") from error
        return place, [words for line in lines if (words := line.replace(",", " ").split())]


def open_source(root: Path) -> Source:
    """The image files under `root`, sorted by name; hidden files and the shadows that macOS leaves in zips are passed over."""
    if root.is_file():
        return _open_zip(root, [root.parent])
    beside = [root, *sorted(path for path in root.iterdir() if path.is_dir()), root.parent]
    files = [path for path in sorted(root.rglob("*")) if _is_image(str(path.relative_to(root))) and path.is_file()]
    if files:
        stats = {str(path.relative_to(root)): path.stat() for path in files}
        stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return Source(root, stamps, lambda name: (root / name).read_bytes(), (), beside)
    archives = sorted(path for path in root.rglob("*.zip") if path.is_file())
    if len(archives) == 1:
        return _open_zip(archives[0], beside)
    raise FlowgenError(f"{root} holds no image and {len(archives)} zips: point data.root at a folder of images or at one zip")


def _open_zip(path: Path, beside: Sequence[Path]) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # of any kind, as said above
        raise FlowgenError(f"{path} is no zip, or is cut short: get it again, or point data.root at a folder of images") from error
    infos = sorted((info for info in archive.infolist() if _is_image(info.filename)), key=lambda info: info.filename)
    if not infos:
        raise FlowgenError(f"{path} holds no image: point data.root at a folder or a zip of images")

    def read(name: str) -> bytes:
        if archive.getinfo(name).file_size > LARGEST:
            raise OSError(f"it unpacks to more than {LARGEST >> 20} MiB")
        return archive.read(name)

    lists = [name for name in archive.namelist() if PurePosixPath(name).suffix in LISTS and not _is_hidden(name)]
    return Source(path, {info.filename: [info.CRC, info.file_size] for info in infos}, read, lists, beside)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
