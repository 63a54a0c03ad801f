"""Helpers on top of torch.distributed: ranks, sums, and evaluation split across processes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from flowgen.utils.errors import UserError


class WorkerDiedError(UserError):
    """Another process of the training has died."""


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, (0, 1) without a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over all processes, whose gradient is the sum of their gradients.

    Raises:
        WorkerDiedError: If another process has died.
    """
    return values if rank_and_size()[1] == 1 else _AllReduceSum.apply(values)


def all_gather_rows(values: Tensor) -> Tensor:
    """Return the rows of all processes, (processes * rows, ...), in the order of their ranks.

    Args:
        values: The rows of this process, (rows, ...), as many as those of every other process.

    Raises:
        WorkerDiedError: If another process has died.
    """
    rank, size = rank_and_size()
    rows = values.new_zeros(size, *values.shape)
    rows[rank] = values
    return all_reduce_sum(rows).flatten(0, 1)  # 0 + x is x to the last bit


def evaluate_sharded(
    batches: Iterable[Tensor],
    score: Callable[[Tensor], Tensor],
    draw_noise: Callable[[Tensor], object],
    columns: int | None = None,
) -> Tensor:
    """Return the score of every image, each batch computed by one of the processes.

    Args:
        batches: Batches of images, the same in every process.
        score: Function from a batch to one score per image, of shape (batch,), or to several, of
            shape (batch, columns).
        draw_noise: Function that advances the random generator exactly as `score` does, for the
            batches of other processes. The result does not depend on the number of processes.
        columns: Number of scores per image, or None for the shape (batch,).

    Returns:
        The scores in float64, of shape (images,) or (images, columns).
    """
    rank, size = rank_and_size()
    scores = []
    for index, images in enumerate(batches):
        if index % size == rank:
            scores.append(score(images).double())
        else:
            draw_noise(images)
            # 0 + x is x to the last bit.
            shape = (len(images),) if columns is None else (len(images), columns)
            scores.append(torch.zeros(shape, device=images.device, dtype=torch.double))
    return all_reduce_sum(torch.cat(scores))


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _all_reduce(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _all_reduce(gradients[0])


def _all_reduce(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)
    collective(dist.all_reduce, values)
    return values


def collective(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a collective operation of torch.distributed.

    Raises:
        WorkerDiedError: If another process has died.
    """
    try:
        operation(*args, **kwargs)
    except RuntimeError as error:
        raise WorkerDiedError("another process of this training has died") from error
