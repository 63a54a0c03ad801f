"""Attributes of images in the user's own CSV file."""

import csv
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowgen.data.cache import hash_json
from flowgen.utils.errors import UserError, user_error


class AttributeTable(NamedTuple):
    """Attributes of image files.

    Attributes:
        names: Names of the attributes.
        files: Image files.
        values: One number for each image and attribute, float64 (images, names).
    """

    names: tuple[str, ...]
    files: list[Path]
    values: Tensor

    def fingerprint(self) -> str:
        """Return a hash that changes with the table and with the size or time of its files."""
        values = hashlib.sha256(self.values.numpy().tobytes()).hexdigest()
        files = [
            (str(path.absolute()), status.st_size, status.st_mtime_ns)
            for path, status in ((path, path.stat()) for path in self.files)
        ]
        return hash_json([self.names, values, files])


def read_table(path: Path) -> AttributeTable:
    """Read a CSV file with a header and one line per image.

    A line has an image file, relative to the table's folder, and a number for each name in the
    header. Columns that contain only -1 and 1 are converted to 0 and 1.

    Raises:
        UserError: If the file is not such a table.
    """
    with user_error(f"{path} cannot be read as a table: set --labels to a CSV file"):
        if not path.is_file():
            raise OSError("not a regular file")  # reading a pipe would wait forever
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    names = tuple(name.strip() for name in header[1:])
    if not names or not rows or len(set(names)) < len(names) or "" in names:
        raise UserError(
            f"{path} is not a table of attributes: "
            "write a line `image,NAME,NAME...` and a line for every image"
        )
    table = []
    for number, (_, *words) in enumerate(rows, 2):
        with user_error(
            f"line {number} of {path} must have an image and {len(names)} numbers: fix it"
        ):
            table.append([float(word) for word in words])
            if len(words) != len(names) or not all(map(math.isfinite, table[-1])):
                raise ValueError("too few or too many numbers, or infinite ones")
    files = [path.parent / row[0] for row in rows]
    for image in files:
        if not image.is_file():
            raise UserError(
                f"{image}, named in {path}, does not exist: "
                "give images relative to the table's folder"
            )
    values = torch.tensor(table, dtype=torch.double)
    values = torch.where((values.abs() == 1).all(0), (values + 1) / 2, values)
    return AttributeTable(names, files, values)
