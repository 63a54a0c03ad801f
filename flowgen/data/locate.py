"""Where data lies."""

import os
from pathlib import Path

from flowgen.errors import FlowgenError


def data_folder() -> Path:
    """The folder that holds the data sets: `FLOWGEN_DATA`, else `data/` here."""
    return Path(os.environ.get("FLOWGEN_DATA", "data"))


def locate(root: str | None, names: list[str], cure: str) -> Path:
    """`root` where it is given, else the first of `names` that stands in the data folder.

    Raises FlowgenError with `cure`, a sentence that says how to get the data, where there is none.
    """
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
