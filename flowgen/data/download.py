"""Published files, fetched where they are missing."""

from pathlib import Path

from flowgen.errors import FlowgenError


def download(url: str, md5: str, folder: Path) -> Path:
    """The file behind `url` in `folder`, whole by its checksum. Raises FlowgenError where it cannot be had."""
    from flowgen.vision import datasets

    name = url.rpartition("/")[2]
    try:
        datasets.utils.download_url(url, str(folder), name, md5)
    except (OSError, RuntimeError) as error:
        raise FlowgenError(f"{name} is not in {folder} and could not be downloaded ({error}): put it there, or set data.root") from error
    return folder / name
