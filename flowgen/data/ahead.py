"""The next batch, read while the one in hand is computed with."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

Batch = tuple[Tensor, Tensor | None]


class Ahead:
    """`draw` of `Images`, one batch ahead in a thread: the same batches, since each is a function of its place alone."""

    def __init__(self, draw: Callable[..., Batch]):
        self.draw, self.pool = draw, ThreadPoolExecutor(1, "read ahead")
        self.place: tuple[int, ...] = ()
        self.coming: Future[Batch] | None = None

    def __call__(self, seen: int, count: int, seed: int, rows: Tensor | None = None) -> Batch:
        expected = self.coming is not None and self.place == (seen, count, seed)
        batch: Any = self.coming.result() if expected and self.coming else self.draw(seen, count, seed, rows)
        self.place = (seen + count, count, seed)
        self.coming = self.pool.submit(self.draw, *self.place, rows)
        return batch
