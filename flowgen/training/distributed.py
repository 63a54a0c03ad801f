"""Training of one model in several processes, started by torchrun or `trainer.num_processes`.

Every process holds the whole model and computes its rows of each batch. Only the main process
reads and writes files. All processes take every decision at the same step, from the same numbers.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from flowgen.bijections.linear import BatchNorm
from flowgen.bijections.networks import RandomSource
from flowgen.utils import processes
from flowgen.utils.console import count_noun
from flowgen.utils.distributed import WorkerDiedError, all_reduce_sum, collective
from flowgen.utils.errors import check

ERROR_DELAY_SECONDS = 0.5  # by which workers report an error after the main process
TIMEOUT = timedelta(days=1)  # one process may prepare images; a dead one is noticed at once


@dataclass(frozen=True)
class WorkerGroup:
    """This process and those that train with it. With one process all methods are no-ops.

    The methods raise `WorkerDiedError` if another process has died.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def num_machines(self) -> int:
        """Number of machines; without LOCAL_WORLD_SIZE, each process counts as one."""
        return max(1, self.size // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @property
    def is_main(self) -> bool:
        """True in the process that reads and writes files."""
        return self.rank == 0

    def batch_indices(self, batch_size: int, num_micro_batches: int = 1) -> Tensor:
        """Return the indices of this process's images in a batch of several micro-batches.

        Example:
            >>> WorkerGroup(1, 2).batch_indices(8, num_micro_batches=2)
            tensor([2, 3, 6, 7])
        """
        return (
            torch.arange(batch_size)
            .reshape(num_micro_batches, self.size, -1)[:, self.rank]
            .flatten()
        )

    def check_divides(self, batch_size: int, grad_accum_steps: int) -> None:
        """Raise `UserError` unless each process gets equally many rows of every micro-batch."""
        divisor = self.size * grad_accum_steps
        check(
            batch_size % divisor == 0,
            f"batch_size={batch_size} cannot be split among {self.size} processes with "
            f"grad_accum_steps={grad_accum_steps}: "
            f"set trainer.batch_size={max(divisor, batch_size // divisor * divisor)}",
        )

    def check_device(self, device: torch.device) -> None:
        """Raise `UserError` if there are fewer GPUs on this machine than processes."""
        num_gpus = torch.cuda.device_count()
        check(
            self.size == 1 or device.type != "cuda" or _local_rank() < num_gpus,
            f"process {_local_rank() + 1} of this machine finds {count_noun(num_gpus, 'GPU')}: "
            "start no more processes than GPUs, or set trainer.device=cpu",
        )

    def broadcast_from_main(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` in the main process and return its result in all processes."""
        if self.size == 1:
            return function(*args)
        objects = [function(*args) if self.is_main else None]
        collective(dist.broadcast_object_list, objects, src=0, device=torch.device("cpu"))
        return objects[0]

    def barrier(self) -> None:
        """Wait until the main process arrives here."""
        self.broadcast_from_main(lambda: None)

    def sync_clock_and_signal(self, seconds: float, signal: int | None) -> tuple[float, int | None]:
        """Return the main process's clock, and the largest signal number received by any."""
        if self.size == 1:
            return seconds, signal
        numbers = torch.tensor([seconds * self.is_main, signal or 0], dtype=torch.float64)
        collective(dist.all_reduce, numbers, op=dist.ReduceOp.MAX)
        return numbers[0].item(), int(numbers[1]) or None

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by their means over the processes.

        One message carries them all, because many small ones are slower.
        """
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            collective(dist.all_reduce, flat)
            means = flat.div_(self.size).split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(
                list(tensors),
                [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)],
            )

    def broadcast_weights(self, model: nn.Module) -> None:
        """Copy the weights of the main process to all processes."""
        if self.size > 1:
            model.load_state_dict(
                self.broadcast_from_main(
                    lambda: {name: value.cpu() for name, value in model.state_dict().items()}
                )
            )


class ShardedRandomSource(RandomSource):
    """Random source of a process that computes its rows of a batch.

    It draws for the whole batch and returns its own rows, so that results do not depend on the
    number of processes. With a generator or in evaluation mode, it draws only for its own rows.
    """

    def __init__(self, rank: int, world_size: int):
        super().__init__()
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        draw: Callable[..., Tensor],
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if generator is not None or not self.training:
            return draw(shape, generator=generator, **kwargs)
        batch_size, *rest = shape
        batch = draw((self.world_size * batch_size, *rest), **kwargs)
        return batch.chunk(self.world_size)[self.rank]


def _synchronized_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean, biased variance and count per channel over the batches of all processes."""
    values = x.transpose(0, 1).flatten(1)
    count = int(dist.get_world_size()) * values.shape[1]
    mean = all_reduce_sum(values.sum(1)) / count
    variance = all_reduce_sum((values - mean[:, None]).square().sum(1)) / count
    return mean, variance, count


class SyncBatchNorm(BatchNorm):
    """`BatchNorm` over the batches of all processes."""

    batch_moments = staticmethod(_synchronized_moments)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes.

    `nn.SyncBatchNorm` supports GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        mean, variance, count = _synchronized_moments(x.to(self.weight.dtype))
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(variance.detach() * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)


SYNCHRONIZED = {BatchNorm: SyncBatchNorm, nn.BatchNorm2d: SyncBatchNorm2d}


def shard_batches(model: nn.Module, rank: int, world_size: int) -> None:
    """Prepare a model in training mode for batches of which each process has an equal part.

    Every random source is replaced, and every batch norm gets another class, similar to
    `nn.SyncBatchNorm.convert_sync_batchnorm`; parameters and buffers stay the same objects.
    Copies that were made before, such as EMAs, still take whole batches.

    Args:
        model: Model, changed in place.
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """
    for module in list(model.modules()):
        if type(module) in SYNCHRONIZED:
            module.__class__ = SYNCHRONIZED[type(module)]  # keeps its parameters and buffers
        for name, child in list(module.named_children()):
            if type(child) is RandomSource:
                setattr(module, name, ShardedRandomSource(rank, world_size).train(child.training))


def _local_rank() -> int:
    """Return the number of this process on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def join() -> Iterator[WorkerGroup]:
    """Join the processes that a launcher has started: gloo between CPUs, nccl between GPUs.

    Without a launcher this yields a group of one. If several processes fail, only the first
    reports its error.
    """
    if not processes.is_distributed():
        yield WorkerGroup()
        return
    if _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    # An optimizer imports torch._dynamo. After init_process_group that import would keep the
    # group's threads alive until the interpreter exits, and they may abort it.
    from torch import _dynamo  # noqa: F401

    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield WorkerGroup(rank, size)
    except WorkerDiedError as error:
        if processes.LAUNCHED_ENV in os.environ:  # the parent process reports it
            raise SystemExit(processes.EXIT_WORKER_DIED) from error
        _raise_once(store, error)
    except Exception as error:
        _raise_once(store, error, ERROR_DELAY_SECONDS if rank else 0.0)
    finally:
        dist.destroy_process_group()


def _raise_once(store: dist.Store, error: Exception, delay_seconds: float = 0.0) -> NoReturn:
    """Raise the error, or exit silently if another process has already reported one."""
    time.sleep(delay_seconds)
    with suppress(RuntimeError):  # the store may have died with its process
        if store.add("errors", 1) > 1:
            raise SystemExit(1) from error
    raise error
