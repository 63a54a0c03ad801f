"""Attributes of images in the user's own CSV file."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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
    for number, row in enumerate(rows, 2):
        if len(row) != len(header) or not all(map(_is_number, row[1:])):
            raise UserError(
                f"line {number} of {path} must have an image and {len(names)} numbers: fix it"
            )
    values = torch.tensor([[float(value) for value in row[1:]] for row in rows], dtype=torch.double)
    values = torch.where((values.abs() == 1).all(0), (values + 1) / 2, values)
    return AttributeTable(names, [path.parent / row[0] for row in rows], values)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
