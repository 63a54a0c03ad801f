"""How far long work has come: the floors of mathematics hand their steps to a `Progress`, and commands choose one that shows a bar."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    def __call__(self, steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """The same `steps`, of which there are `total`; `what` names the work."""


def unseen(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Shows nothing."""
    return steps


def bar(steps: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """A bar on standard error while the steps are taken, where that is a terminal."""
    from tqdm import tqdm

    return tqdm(steps, desc=what, total=total, unit="", disable=None, leave=False)
