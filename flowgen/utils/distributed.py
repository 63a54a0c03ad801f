"""Which rows of a batch this process computes, where several processes train one model together.

Everything random is drawn for the whole batch, of which each process keeps its rows: what is learnt does not depend on their number.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from flowgen.utils.errors import UserError


class WorkerDiedError(UserError):
    """Another process of the training is gone."""


class Rank(NamedTuple):
    """One of `size` processes."""

    rank: int = 0
    size: int = 1

    def rows(self, count: int, parts: int = 1) -> Tensor:
        """The places, in a batch of so many images that is cut into so many parts, of the rows of this process in each part."""
        return torch.arange(count).view(parts, self.size, -1)[:, self.rank].flatten()


ALONE = Rank()
_split = ALONE


@contextmanager
def split(share: Rank) -> Iterator[None]:
    """Meanwhile every batch that a model is given is this share of the whole one."""
    global _split
    before, _split = _split, share
    try:
        yield
    finally:
        _split = before


def batch_rank() -> Rank:
    """Which share of the whole batch the one in hand is."""
    return _split


def world_rank() -> Rank:
    """Which of the processes that train together this one is."""
    return (
        Rank(dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else ALONE
    )


def draw(
    kind: Callable[..., Tensor],
    shape: torch.Size,
    generator: torch.Generator | None = None,
    **how: Any,
) -> Tensor:
    """`kind`, as torch.rand or torch.randn, of this shape (batch, ...); without a generator of its own, its rows of the whole batch's."""
    rank, size = batch_rank()
    if size == 1 or generator is not None:
        return kind(shape, generator=generator, **how)
    return kind((size * shape[0], *shape[1:]), **how).view(size, *shape)[rank]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over all processes, whose gradient is the sum of theirs. Raises LostError where one is gone."""
    return values if world_rank().size == 1 else _Total.apply(values)


def evaluate_sharded(
    batches: Iterable[Tensor],
    score: Callable[[Tensor], Tensor],
    draw_noise: Callable[[Tensor], object],
) -> Tensor:
    """What `score` says of every image of `batches`, (N,) in float64: of every so many-th batch here, of the others in the other processes.

    `draw_noise` leaves the random numbers as `score` would: the figures have the same bits, whatever the number of processes.
    """
    rank, size = world_rank()
    found = []
    for number, images in enumerate(batches):
        if number % size == rank:
            found.append(score(images).double())
        else:
            draw_noise(images)
            found.append(
                torch.zeros(len(images), device=images.device, dtype=torch.double)
            )  # 0 + x is x
    return all_reduce_sum(torch.cat(found))


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    collective(dist.all_reduce, values)
    return values


def collective(collective: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call what all processes call at once. Raises LostError where one is gone."""
    try:
        collective(*arguments, **options)
    except RuntimeError as error:
        raise WorkerDiedError("another process of this training has died") from error
