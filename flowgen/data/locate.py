"""Where data lies."""

import os
from pathlib import Path

from flowgen.errors import FlowgenError


def data_folder() -> Path:
    """The folder that holds the data sets: `FLOWGEN_DATA`, else `data/` here."""
    return Path(os.environ.get("FLOWGEN_DATA", "data"))


def check_names(names: list[str]) -> None:
    """Raise `FlowgenError` for names of folders that are not in the data folder: what a configuration names is read there, or put there."""
    for name in names:
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise FlowgenError(f"data.names={names!r} must be names of folders inside the data folder: point data.root elsewhere instead")


def locate(root: str | None, names: list[str], cure: str) -> Path:
    """`root` where it is given, else the first of `names` that stands in the data folder.

    Raises FlowgenError with `cure`, a sentence that says how to get the data, where there is none.
    """
    check_names(names)
    if root is not None:
        path = Path(root).expanduser()
        if not path.exists():
            raise FlowgenError(f"data.root={root} does not exist: {cure}")
        return path
    for name in names:
        if (data_folder() / name).exists():
            return data_folder() / name
    place = data_folder() / names[0] if names else "data.root"
    raise FlowgenError(f"{place} does not exist: {cure}")
