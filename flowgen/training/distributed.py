"""The processes that train one model together, started by torchrun or by `trainer.num_processes`.

Each holds the whole model and computes its rows of every batch. The first alone reads and writes files. Whatever decides, all decide
at once, from the same numbers.
"""

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from flowgen.utils.distributed import Rank, WorkerDiedError, collective
from flowgen.utils.errors import UserError
from flowgen.utils.launcher import LOST, OURS, is_distributed

T = TypeVar("T")
AFTER_THE_FIRST = 0.5  # seconds
PATIENCE = timedelta(days=1)  # for one that prepares images; one that dies is noticed at once


class ProcessGroup(Rank):
    """This process and the others; alone, it does what it is told and waits for nobody. Raises LostError where another one is gone."""

    @property
    def is_main(self) -> bool:
        """Whether this process reads and writes files."""
        return self.rank == 0

    def check_divides(self, batch_size: int, grad_accum_steps: int) -> None:
        """Raises FlowgenError where the batch has not as many rows for each process."""
        if batch_size % (self.size * grad_accum_steps):
            parts = f"{self.size} processes" + f" of {grad_accum_steps} parts each" * (
                grad_accum_steps > 1
            )
            least = self.size * grad_accum_steps
            good = max(least, batch_size // least * least)
            raise UserError(
                f"batch_size={batch_size} cannot be shared among {parts}: set trainer.batch_size={good}"
            )

    def check_device(self, device: torch.device) -> None:
        """Raises FlowgenError where each process is to have a GPU of its own, and this machine has fewer."""
        place, there = _place(), torch.cuda.device_count()
        if self.size > 1 and device.type == "cuda" and place >= there:
            cure = "start no more processes than that, or set trainer.device=cpu"
            raise UserError(
                f"process {place + 1} of this machine finds {there} GPU{'s' * (there != 1)}: {cure}"
            )

    def broadcast_from_main(self, answer: Callable[..., T], *arguments: Any) -> T:
        """What `answer` gives in the first process; it is not called in the others."""
        if self.size == 1:
            return answer(*arguments)
        box = [answer(*arguments) if self.is_main else None]
        collective(dist.broadcast_object_list, box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def sync_clock_and_signal(self, seconds: float, signal: int | None) -> tuple[float, int | None]:
        """The first one's clock, and a signal that any of them has been sent."""
        if self.size == 1:
            return seconds, signal
        numbers = torch.tensor([seconds * self.is_main, signal or 0], dtype=torch.float64)
        collective(dist.all_reduce, numbers, op=dist.ReduceOp.MAX)
        return numbers[0].item(), int(numbers[1]) or None

    def all_reduce_grads(self, model: nn.Module, loss: Tensor) -> Tensor:
        """The mean loss of all; every gradient of the model becomes the mean of theirs, by one message, as many would cost more."""
        if self.size == 1:
            return loss
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        flat = torch.cat([each.flatten() for each in (*gradients, loss)])
        collective(dist.all_reduce, flat)
        *means, loss = flat.div_(self.size).split([each.numel() for each in (*gradients, loss)])
        torch._foreach_copy_(
            gradients, [mean.view_as(each) for mean, each in zip(means, gradients, strict=True)]
        )
        return loss.squeeze()

    def broadcast_weights(self, model: nn.Module) -> None:
        """Those of the first process for all."""
        if self.size > 1:
            model.load_state_dict(
                self.broadcast_from_main(
                    lambda: {name: value.cpu() for name, value in model.state_dict().items()}
                )
            )


ALONE = ProcessGroup()


def _place() -> int:
    """Which of the processes of this machine this one is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def join() -> Iterator[ProcessGroup]:
    """Meet the others, by gloo between CPUs and nccl between GPUs; alone where none were started.

    Of an error that several run into, the first to do so tells.
    """
    if not is_distributed():
        yield ALONE
        return
    if _place() < torch.cuda.device_count():
        torch.cuda.set_device(_place())
    # Imported later, as an optimiser does, it would keep the group's threads into the interpreter's end, which they may then abort
    importlib.import_module("torch._dynamo")
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield ProcessGroup(rank, size)
    except WorkerDiedError as error:
        if OURS in os.environ:  # whose parent tells
            raise SystemExit(LOST) from error
        _tell_once(store, error)
    except Exception as error:
        _tell_once(store, error, AFTER_THE_FIRST if rank else 0.0)
    finally:
        dist.destroy_process_group()


def _tell_once(store: dist.Store, error: Exception, wait: float = 0.0) -> NoReturn:
    """Raise the error where no other process has told one already: the first one's goes first."""
    time.sleep(wait)
    with contextlib.suppress(RuntimeError):  # where the store was in the process that died
        if store.add("told", 1) > 1:
            raise SystemExit(1) from error
    raise error
