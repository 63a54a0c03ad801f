"""What the machine can do."""

import ctypes
import sys

import torch

from flowgen.errors import FlowgenError, check_choice


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises FlowgenError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FlowgenError(f"device {name!r} is not on this machine: choose auto, cpu or cuda") from error
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format of the networks inside couplings; `auto` is bfloat16 where the hardware multiplies it."""
    check_choice(("auto", "float32", "bfloat16"), precision=precision)
    if precision == "auto":
        if device.type == "cuda":
            precision = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        else:
            precision = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"  # no public name in torch 2.11
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def keep_memory() -> None:
    """Have glibc keep freed memory rather than hand it back to the system and fault it in anew at every step.

    Activations on the CPU are freed and taken again thousands of times a second; a tenth to a third of the time went there.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            trim_threshold, top_pad, mmap_threshold = -1, -2, -3
            mallopt(mmap_threshold, 32 << 20)
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(top_pad, 64 << 20)
