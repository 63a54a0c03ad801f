"""Device, precision, seeds and memory of a training run."""

import os
import platform
import random
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from flowgen.bijections.base import supports_checkpointing
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import GenerativeModel
from flowgen.training.threads import use_threads
from flowgen.utils.console import count_noun
from flowgen.utils.errors import UserError, check_choice
from flowgen.utils.memory import check_memory, free_memory

PRECISIONS = ("auto", "float32", "bfloat16")


class Runtime:
    """Device, number of CPU threads and precision.

    Args:
        device: Device: auto, cpu or cuda.
        num_threads: CPU threads, or "auto" for one per free core.
        precision: Number format of the networks: float32, bfloat16 or auto.

    Raises:
        UserError: If this machine does not have the device.
    """

    def __init__(
        self, device: str = "cpu", num_threads: int | str = "auto", precision: str = "auto"
    ):
        self.device = choose_device(device)
        self.num_threads = use_threads(num_threads)
        self.dtype = autocast_dtype(precision, self.device)

    def autocast(self) -> torch.autocast:
        """Return the context in which the forward pass runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def seed(self, seed: int, step: int) -> None:
        """Make all random numbers of an optimizer step a function of `seed` and `step`."""
        number = random.Random(f"{seed} {step}").getrandbits(63)
        torch.default_generator.manual_seed(number)  # torch.manual_seed visits all back ends
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(number)


def choose_device(name: str) -> torch.device:
    """Return the named device; `auto` is the first GPU, or the CPU without one.

    This also turns off TF32 for float32 convolutions: its rounding breaks inverses.

    Raises:
        UserError: If this machine does not have the device.
    """
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on `meta`, whose tensors hold no data
    except (RuntimeError, AssertionError) as error:
        choices = "auto, cuda or cpu" if torch.cuda.is_available() else "auto or cpu"
        raise UserError(f"device {name!r} is not on this machine: choose {choices}") from error
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the number format of the networks.

    Args:
        precision: "float32", "bfloat16" or "auto": the environment variable FLOWGEN_PRECISION, or
            bfloat16 if the hardware multiplies it.
        device: The device that computes.
    """
    forced = os.environ.get("FLOWGEN_PRECISION", "auto")
    check_choice(PRECISIONS, precision=precision, FLOWGEN_PRECISION=forced)
    precision = forced if precision == "auto" else precision
    if precision != "auto":
        supported = precision == "bfloat16"
    elif device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.cpu._is_avx512_bf16_supported()  # no public name in torch 2.11
    return torch.bfloat16 if supported else torch.float32


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`; for main memory on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_memory(device: torch.device) -> float:
    """Return the largest memory of this process since `reset_peak_memory`, in GiB.

    This is the GPU's memory, or main memory without a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError, IndexError):  # IndexError: a sandbox that does not report it
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    if platform.system() == "Windows":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    unit = 1 if platform.system() == "Darwin" else 1024  # bytes of ru_maxrss, see getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(device: torch.device, num_processes: int = 1) -> str:
    """Describe versions and hardware for the log of a run."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        threads = count_noun(torch.get_num_threads(), "thread")
        cores = count_noun(os.cpu_count() or 1, "core")
        hardware = f"{platform.machine()} CPU, {threads} on {cores}"
    if num_processes > 1:
        hardware = f"{num_processes} processes, each on {hardware}"
    return (
        f"flowgen {version('flowgen')}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()}, {hardware}"
    )


def check_batch_fits(
    model: GenerativeModel,
    data: ImageDataset,
    runtime: Runtime,
    batch_size: int,
    parts: int,
    activation_memory: str,
) -> None:
    """Check that the activations of one micro-batch fit into memory.

    Args:
        model: Model on its device.
        data: Data set, of which a few images are tried.
        runtime: Device and precision.
        batch_size: Images per optimizer step.
        parts: Number of equal parts of a batch, of which this memory has one at a time.
        activation_memory: Setting of the same name.

    Raises:
        UserError: If they do not fit. The message has the largest batch size that fits.
    """
    small, large = (
        saved_tensor_bytes(model, runtime, *data.train_batch(0, count, 0)) for count in (2, 4)
    )
    bytes_per_image = max(0, large - small) // 2
    on_gpu = runtime.device.type == "cuda"
    free = torch.cuda.mem_get_info(runtime.device)[0] if on_gpu else free_memory()
    hint = ", more with trainer.grad_accum_steps=2"
    if activation_memory == "store" and supports_checkpointing(model):
        hint += ", or with trainer.activation_memory=checkpoint"
    check_memory("trainer.batch_size", batch_size, -(-bytes_per_image // parts), hint, free)


def saved_tensor_bytes(
    model: GenerativeModel, runtime: Runtime, images: torch.Tensor, labels: torch.Tensor | None
) -> int:
    """Return the bytes of the tensors that a forward pass saves for the backward pass.

    Args:
        model: The model, whose buffers do not change.
        runtime: Device and precision.
        images: (batch, channels, height, width).
        labels: Classes (batch,), or None.
    """
    sizes: dict[int, int] = {}  # of each storage, by its address
    # A forward pass changes running statistics and Markov chains: here those of a copy.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
    with hooks, runtime.autocast():
        torch.func.functional_call(model, buffers, (images, labels))
    return sum(sizes.values())
