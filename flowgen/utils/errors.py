"""The error that users see, and checks that constructors share."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM_DIRS = ("/dev", "/proc", "/sys")


class UserError(ValueError):
    """A mistake of the user. Its message is plain English and names the fix."""


@contextmanager
def user_error(message: str) -> Iterator[None]:
    """Raise `UserError(message)` for any error in the block, except a `UserError`.

    It is for the files of users: damaged ones raise errors of many kinds.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(message) from error


def check(valid: bool, message: str) -> None:
    """Raise `UserError(message)` unless `valid` is true."""
    if not valid:
        raise UserError(message)


def check_whole(low: int = 1, high: float = math.inf, **values: object) -> None:
    """Raise `UserError` unless every value is an integer from `low` to `high`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            limit = "" if high == math.inf else f" and at most {high}"
            raise UserError(
                f"{name} must be a whole number of at least {low}{limit}, not {value!r}"
            )


def check_number(low: float = 0.0, **values: object) -> None:
    """Raise `UserError` unless every value is a finite number of at least `low`."""
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value < math.inf:  # type: ignore[operator]
            raise UserError(f"{name} must be a number of at least {low:g}, not {value!r}")


def check_choice(choices: Iterable[object], **values: object) -> None:
    """Raise `UserError` unless every value is one of `choices`."""
    choices = list(choices)
    options = ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    for name, value in values.items():
        if value not in choices:
            raise UserError(f"{name} must be {options}, not {value!r}")


def check_folder_of(path: Path) -> None:
    """Raise `UserError` if `path` cannot be a new file, before any work is done."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"the folder of {path} does not exist: create it or choose another path")
    if str(folder.resolve()) in SYSTEM_DIRS:
        raise UserError(f"{path} is in a system folder: choose another path")
