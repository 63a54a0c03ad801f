"""What a user can get wrong, and the checks that constructors share."""

import math
from collections.abc import Iterable
from pathlib import Path

DEVICES = ("/dev", "/proc", "/sys")  # folders in which a new file is none


class UserError(ValueError):
    """A mistake that its message, one plain sentence, tells the user how to mend."""


def check_whole(low: int = 1, high: float = math.inf, **values: object) -> None:
    """Raise `FlowgenError` unless every value is a whole number from `low` to `high`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            most = "" if high == math.inf else f" and at most {high}"
            raise UserError(f"{name} must be a whole number of at least {low}{most}, not {value!r}")


def check_number(low: float = 0.0, **values: object) -> None:
    """Raise `FlowgenError` unless every value is a finite number of at least `low`."""
    for name, value in values.items():
        number = (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )
        if not number or value < low:  # type: ignore[operator]
            raise UserError(f"{name} must be a number of at least {low:g}, not {value!r}")


def check_choice(choices: Iterable[object], **values: object) -> None:
    """Raise `FlowgenError` unless every value is one of `choices`."""
    choices = list(choices)
    for name, value in values.items():
        if value not in choices:
            raise UserError(
                f"{name} must be {'one of ' * (len(choices) > 1)}{', '.join(map(str, choices))}, not {value!r}"
            )


def check_folder_of(path: Path) -> None:
    """Raise `FlowgenError` where no file can be written to `path`, before the work is done."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"the folder of {path} does not exist: make it, or name another")
    if str(folder.resolve()) in DEVICES:
        raise UserError(f"{path} would lie among the machine's devices: name another folder")
