"""Peak memory and time of a training step by depth, for the ways of `trainer.activation_memory`: python scripts/memory.py [DEPTH...]

Every figure is of a process of its own. Memory is what its resident memory grew by during a step, beside weights and gradients, which are
there before; every large tensor is a mapping of its own (mallopt of glibc), so that what is freed is given back at once. Time is
measured without that.
"""

import ctypes
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from flowgen.bijections.chain import set_activation_memory
from flowgen.bijections.networks import ZeroConv2d
from flowgen.bijections.reversible import ACTIVATION_MEMORY
from flowgen.config.instantiate import build_model
from flowgen.models.base import GenerativeModel

DEPTHS = (8, 16, 32, 64, 128)
BATCH, SIZE = 128, 16
APART = {-3: 8192, -4: 1_000_000}  # M_MMAP_THRESHOLD, M_MMAP_MAX
GLOW = {
    "_target_": "flowgen.models.flows.glow.Glow", "image_shape": (3, SIZE, SIZE), "bits": 5, "levels": 2, "width": 32, "network": "conv",
    "num_blocks": 1, "transform": "affine", "log_scale": "bounded", "convolution": "plu", "split_prior": "predicted", "base": "learned",
    "final_actnorm": False, "gaussianize": False, "dequantisation": "uniform", "num_classes": None,
}  # fmt: skip


def resident(key: str) -> float:
    """MiB, by the name that Linux gives the figure."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def built(depth: int) -> GenerativeModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model({"model": GLOW | {"steps_per_level": depth}}).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, ZeroConv2d):
            torch.nn.init.normal_(
                module.weight, std=0.01
            )  # as of a trained model, not of the identity
    return model


def weights(model: GenerativeModel) -> float:
    """MiB."""
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def measure(what: str, memory: str, depth: int) -> float:
    """MiB or seconds of processor time, as `what` says, of one step."""
    for parameter, value in APART.items() if what == "memory" else ():
        ctypes.CDLL(None).mallopt(parameter, value)
    model = built(depth)
    images = torch.randint(32, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    model.initialize(images)
    set_activation_memory(model, memory)
    model(images[:2]).backward()
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before, began = resident("VmRSS"), time.process_time()
    model(images).backward()
    seconds = time.process_time() - began
    return resident("VmHWM") - before if what == "memory" else seconds


def apart(what: str, memory: str, depth: int) -> float:
    """The same in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (what, memory, depth))


if __name__ == "__main__":
    print(
        f"| steps a level | weights | {' | '.join(ACTIVATION_MEMORY)} | time beside keep: {' | '.join(ACTIVATION_MEMORY[1:])} |"
    )
    print(f"|{' ---: |' * (2 * len(ACTIVATION_MEMORY) + 1)}")
    for depth in map(int, sys.argv[1:] or DEPTHS):
        sizes = " | ".join(f"{apart('memory', memory, depth):.1f} MiB" for memory in ACTIVATION_MEMORY)
        kept, *others = [apart("seconds", memory, depth) for memory in ACTIVATION_MEMORY]
        times = " | ".join(f"{seconds / kept:.2f}" for seconds in others)
        print(f"| {depth} | {weights(built(depth)):.1f} MiB | {sizes} | {times} |", flush=True)
