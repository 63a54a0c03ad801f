"""Search for data sets on this machine, and download of their files."""

import hashlib
import http.client
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from flowgen.utils.console import log
from flowgen.utils.errors import UserError
from flowgen.utils.files import data_folder


def find_dataset(
    root: str | None,
    search_dirs: Sequence[str],
    download_hint: str,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Return the path of a data set, and download it first if necessary and possible.

    Args:
        root: The path itself, or None to search for it.
        search_dirs: Names to look for in `data_folder()`, in this order. A configuration from a
            stranger must not read or write outside of it.
        download_hint: How to get the data, as one or two full sentences. The error message is
            "PATH does not exist." and the hint.
        files: The MD5 checksum of every file that can be downloaded, by its URL. They are
            downloaded to the first of `search_dirs`.

    Raises:
        UserError: If the path does not exist, or no name was found.
    """
    if not all(
        isinstance(name, str)
        and name
        and not Path(name).is_absolute()
        and ".." not in Path(name).parts
        for name in search_dirs
    ):
        raise UserError(
            f"data.search_dirs={list(search_dirs)!r} must be names of directories inside the "
            "data folder: set data.root to use another place"
        )
    paths = (
        [data_folder() / name for name in search_dirs]
        if root is None
        else [Path(root).expanduser()]
    )
    path = next(filter(Path.exists, paths), None)
    if path is None:
        if root is not None or not paths or not files:
            problem = f"{paths[0]} does not exist" if paths else "data.root is not set"
            raise UserError(f"{problem}. {download_hint}")
        path = paths[0]
        download(files, path)
    return path


def download(files: Mapping[str, str], folder: Path) -> None:
    """Download files to a new folder, which is created atomically when all are complete.

    An interrupted download continues with the missing files.

    Args:
        files: MD5 checksum of every file, by its URL.
        folder: The new folder.

    Raises:
        UserError: If a file cannot be downloaded or has another checksum.
    """
    partial = folder.with_name(f".{folder.name}.part")
    url = ""
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process downloads
            if folder.exists():
                return
            partial.mkdir(parents=True, exist_ok=True)
            for url, md5 in files.items():
                path = partial / url.rpartition("/")[2]
                if not path.is_file() or _md5(path) != md5:
                    log.info("downloading %s", url)
                    torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
                    if _md5(path) != md5:
                        path.unlink()
                        raise OSError("its checksum is wrong")
            partial.rename(folder)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url or folder} could not be downloaded ({error}). "
            f"Download it to {folder} yourself, or set data.root to its folder."
        ) from error


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
