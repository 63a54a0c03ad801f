"""Messages for the user: the logger, the error of user mistakes, and checks that raise it."""

import logging
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM_DIRS = ("/dev", "/proc", "/sys")
log = logging.getLogger("flowgen")


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
    limit = "" if high == math.inf else f" and at most {high}"
    for name, value in values.items():
        check(
            isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
            f"{name} must be a whole number of at least {low}{limit}, not {value!r}",
        )


def check_number(low: float = 0.0, **values: object) -> None:
    """Raise `UserError` unless every value is a finite number of at least `low`."""
    for name, value in values.items():
        check(
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value < math.inf,
            f"{name} must be a number of at least {low:g}, not {value!r}",
        )


def check_choice(choices: Iterable[object], **values: object) -> None:
    """Raise `UserError` unless every value is one of `choices`."""
    choices = list(choices)
    options = ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    for name, value in values.items():
        check(value in choices, f"{name} must be {options}, not {value!r}")


def check_not_input(out: Path | None, *inputs: Path) -> None:
    """Raise `UserError` if the output file is one of the inputs, which it would replace."""
    if out is not None and out.exists():
        for path in inputs:
            check(
                not (path.exists() and out.samefile(path)),
                f"{out} is an input of this command: choose another output file",
            )


def check_folder_of(path: Path) -> None:
    """Raise `UserError` if `path` cannot be a new file, before any work is done."""
    folder = path.absolute().parent
    check(
        folder.is_dir(),
        f"the folder of {path} does not exist: create it or choose another path",
    )
    check(
        str(folder.resolve()) not in SYSTEM_DIRS,
        f"{path} is in a system folder: choose another path",
    )
    check(
        os.access(folder, os.W_OK),
        f"the folder of {path} cannot be written to: choose another path",
    )
