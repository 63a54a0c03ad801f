"""What the machine can do."""

import os
import platform
import random
import resource
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from flowgen.bijections.base import supports_checkpointing
from flowgen.bijections.reversible import ACTIVATION_MEMORY
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import GenerativeModel
from flowgen.training.threads import use_threads
from flowgen.utils.errors import UserError, check_choice
from flowgen.utils.memory import check_memory, free_memory


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises FlowgenError for a device that is not there.

    From then on float32 convolutions are float32: cuDNN's TF32 would round what a bijection has to give back.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` has tensors, but no numbers in them
    except (RuntimeError, AssertionError) as error:
        others = "auto, cuda or cpu" if torch.cuda.is_available() else "auto or cpu"
        raise UserError(f"device {name!r} is not on this machine: choose {others}") from error
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format of the networks inside couplings; `auto` is FLOWGEN_PRECISION, or bfloat16 where the hardware multiplies it."""
    forced = os.environ.get("FLOWGEN_PRECISION", "auto")
    check_choice(("auto", "float32", "bfloat16"), precision=precision, FLOWGEN_PRECISION=forced)
    if precision == "auto":
        precision = forced
    if precision == "auto":
        if device.type == "cuda":
            precision = (
                "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
            )
        else:
            precision = (
                "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
            )  # no public name in torch 2.11
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def seed_step(device: torch.device, seed: int, step: int) -> None:
    """Make all that `step` draws a function of it and of `seed`, whatever was drawn before."""
    number = random.Random(f"{seed} {step}").getrandbits(63)
    torch.default_generator.manual_seed(
        number
    )  # torch.manual_seed would walk through every back end
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def reset_peak_memory(device: torch.device) -> None:
    """So that `peak_memory` is of what follows; not of main memory where the system cannot tell it, as on macOS."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # which is what proc(5) has for it


def peak_memory(device: torch.device) -> float:
    """GiB that this process has held at once since `reset_peak_memory`: of the GPU, or else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError):
        peak = next(
            (
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM:")
            ),
            None,
        )
        if peak is not None:
            return int(peak.split()[1]) / 2**20  # KiB
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, by getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(device: torch.device, processes: int = 1) -> str:
    """What a run ran on, for its log."""
    num_threads = torch.get_num_threads()
    cpu = f"{platform.machine()} CPU, {num_threads} thread{'s' * (num_threads > 1)} on {os.cpu_count()} core{'s' * (os.cpu_count() != 1)}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    where = f"{processes} processes, each on {where}" if processes > 1 else where
    return f"flowgen {version('flowgen')}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}, {where}"


class Runtime:
    """A device, how many threads feed it, the number format of the networks inside couplings, and whether the model is compiled for it.

    Raises FlowgenError for what this machine has not.
    """

    def __init__(
        self,
        *,
        device: str,
        num_threads: int | str,
        precision: str,
        compile: bool,
        activation_memory: str,
    ):
        check_choice((True, False), compile=compile)
        check_choice(ACTIVATION_MEMORY, activation_memory=activation_memory)
        if compile and activation_memory == "reversible":
            raise UserError(
                "memory=invert cannot be compiled: set trainer.compile=false, or trainer.activation_memory=checkpoint"
            )
        self.activation_memory = activation_memory
        self.device, self.num_threads, self.compile = (
            choose_device(device),
            use_threads(num_threads),
            compile,
        )
        self.dtype = autocast_dtype(precision, self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed(self, seed: int, step: int) -> None:
        """Make all that `step` draws here a function of it and of `seed`."""
        seed_step(self.device, seed, step)


def check_batch_fits(
    model: GenerativeModel, data: ImageDataset, machine: Runtime, batch_size: int, parts: int
) -> None:
    """Raises FlowgenError, with the largest batch that fits, where what one of its `parts` keeps for the backward pass does not."""
    sizes = [saved_tensor_bytes(model, machine, *data.train_batch(0, count, 0)) for count in (2, 4)]
    each = max(0, sizes[1] - sizes[0]) // 2
    free = (
        torch.cuda.mem_get_info(machine.device)[0]
        if machine.device.type == "cuda"
        else free_memory()
    )
    spare = machine.activation_memory == "store" and supports_checkpointing(model)
    cure = (
        ", more with trainer.grad_accum_steps=2"
        + ", or with trainer.activation_memory=checkpoint" * spare
    )
    check_memory("trainer.batch_size", batch_size, -(-each // parts), cure, free)


def saved_tensor_bytes(
    model: GenerativeModel, machine: Runtime, images: Tensor, labels: Tensor | None
) -> int:
    """Bytes of the tensors that the backward pass of a batch keeps."""
    kept: dict[int, int] = {}
    buffers = [
        (buffer, buffer.clone()) for buffer in model.buffers()
    ]  # statistics of batches, and chains

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), machine.autocast():
        loss = model.forward(images, labels)
        size = sum(kept.values())
    del loss
    for buffer, before in buffers:
        buffer.copy_(before)
    return size
