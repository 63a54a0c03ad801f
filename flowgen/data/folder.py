"""Any folder or zip of images, the layout of CelebA among them."""

import logging
import zipfile
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath

from flowgen.data.base import Images
from flowgen.data.cache import Source, prepared
from flowgen.data.locate import locate
from flowgen.data.splits import Split, split_by_hash
from flowgen.errors import FlowgenError, check_choice, check_whole

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
PARTITION = "list_eval_partition"  # CelebA's official split: lines of a file's name and 0 (train), 1 (validation) or 2 (test)
log = logging.getLogger("flowgen")


class ImageFolder(Images):
    """The images of a folder, of a zip, or of a folder that holds one zip, prepared once and kept in a cache.

    The splits are CelebA's official ones where its list lies beside the images, else a tenth of the names each, chosen by their
    hash, is for validation and for the test. `cure` says where the data is to be had. Raises FlowgenError where `root`
    is missing or holds no image.
    """

    def __init__(
        self,
        *,
        root: str | None,
        names: list[str],
        cure: str,
        channels: int,
        size: int,
        bits: int,
        flip: bool,
        crop: int | None,
        binarise: str = "threshold",
    ):
        check_choice((1, 3), channels=channels)
        check_whole(size=size, **({} if crop is None else {"crop": crop}))
        folder = locate(root, names, cure)
        source = open_source(folder)
        splits = split_names(folder, list(source.stamps))
        images, kept = prepared(source, [name for names in splits for name in names], size, channels, crop)
        whole = Split(images)
        ends = [0, *accumulate(len(set(names).intersection(kept)) for names in splits)]
        train, validation, test = (whole[slice(*ends_of)] for ends_of in pairwise(ends))
        super().__init__(train, validation, test, bits=bits, flip=flip, binarise=binarise)


def open_source(root: Path) -> Source:
    """The image files under `root`, sorted by name; hidden files and the shadows that macOS leaves in zips are passed over."""
    if root.is_file():
        return _open_zip(root)
    files = [path for path in sorted(root.rglob("*")) if _is_image(str(path.relative_to(root))) and path.is_file()]
    if files:
        stats = {str(path.relative_to(root)): path.stat() for path in files}
        stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        return Source(root, stamps, lambda name: (root / name).read_bytes())
    archives = sorted(root.rglob("*.zip"))
    if len(archives) == 1:
        return _open_zip(archives[0])
    raise FlowgenError(f"{root} holds no image and {len(archives)} zips: point data.root at a folder of images or at one zip")


def _open_zip(path: Path) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise FlowgenError(f"{path} is no zip, or is cut short: get it again, or point data.root at a folder of images") from error
    infos = sorted((info for info in archive.infolist() if _is_image(info.filename)), key=lambda info: info.filename)
    if not infos:
        raise FlowgenError(f"{path} holds no image: point data.root at a folder or a zip of images")
    return Source(path, {info.filename: [info.CRC, info.file_size] for info in infos}, archive.read)


def _is_image(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not any(part.startswith((".", "__MACOSX")) for part in parts)


def split_names(root: Path, names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Names of training, validation and test images: CelebA's official splits where its list lies in `root` or beside it, else by hash."""
    return official_split(root, names) or split_by_hash(names)


def official_split(root: Path, names: list[str]) -> tuple[list[str], list[str], list[str]] | None:
    """What CelebA's list says of these names; None, with a warning, where it does not speak of all of them."""
    places = [root.parent] if root.is_file() else [root, *sorted(path for path in root.iterdir() if path.is_dir()), root.parent]
    lists = [path for place in places for path in sorted(place.glob(f"{PARTITION}.*"))]
    if not lists:
        return None
    rows = (line.replace(",", " ").split() for line in lists[0].read_text().splitlines())
    number = {row[0]: row[1] for row in rows if len(row) == 2}
    missing = [name for name in names if PurePosixPath(name).name not in number]
    if missing:
        log.warning("%s does not name %s and %d others: the split goes by hash", lists[0], missing[0], len(missing) - 1)
        return None
    train, validation, test = ([name for name in names if number[PurePosixPath(name).name] == each] for each in ("0", "1", "2"))
    if not (train and validation and test):
        counts = f"{len(train)}, {len(validation)} and {len(test)}"
        log.warning("%s leaves %s images for training, validation and the test: the split goes by hash", lists[0], counts)
        return None
    return train, validation, test
