"""Measure the peak memory and the time of a training step for each `trainer.activation_memory`.

Usage: python scripts/benchmarks/memory.py [DEPTH...], with numbers of steps of flow per level.

Each measurement runs in its own process. Memory is the increase of the resident memory during a
step, so it excludes weights and gradients. While memory is measured, glibc maps every large tensor
separately and returns freed memory to the system at once. Time is measured without this setting.
"""

import ctypes
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from flowgen.bijections.base import ACTIVATION_MEMORY, set_activation_memory
from flowgen.bijections.networks import ZeroConv2d
from flowgen.models.flows.glow import Glow

DEPTHS = (8, 16, 32, 64, 128)
BATCH_SIZE = 128
SIZE = 16  # height and width of the images
MALLOC_OPTIONS = {-3: 8192, -4: 1_000_000}  # M_MMAP_THRESHOLD (bytes), M_MMAP_MAX
MIB = 2**20


def resident_mib(key: str) -> float:
    """Return a value of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def build(depth: int) -> Glow:
    """Build a Glow with two levels of `depth` steps of flow."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Glow(
        image_shape=(3, SIZE, SIZE),
        bits=5,
        levels=2,
        steps_per_level=depth,
        width=32,
        base="learned",
        final_actnorm=False,
        gaussianize=False,
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, ZeroConv2d):  # imitate a trained model instead of the identity
            torch.nn.init.normal_(module.weight, std=0.01)
    return model


def weights_mib(model: Glow) -> float:
    """Return the size of the parameters in MiB."""
    return sum(parameter.nbytes for parameter in model.parameters()) / MIB


def measure(quantity: str, mode: str, depth: int) -> float:
    """Run a training step and return its memory in MiB or its CPU time in seconds."""
    if quantity == "memory":
        for option, value in MALLOC_OPTIONS.items():
            ctypes.CDLL(None).mallopt(option, value)
    model = build(depth)
    images = torch.randint(32, (BATCH_SIZE, 3, SIZE, SIZE), dtype=torch.uint8)
    model.initialize(images)
    set_activation_memory(model, mode)
    model(images[:2]).backward()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_mib("VmRSS")
    start = time.process_time()
    model(images).backward()
    seconds = time.process_time() - start
    return resident_mib("VmHWM") - before if quantity == "memory" else seconds


def measure_in_process(quantity: str, mode: str, depth: int) -> float:
    """Call `measure` in a new process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (quantity, mode, depth))


def main() -> None:
    first, *others = ACTIVATION_MEMORY
    columns = [*ACTIVATION_MEMORY, *(f"time of {mode} / {first}" for mode in others)]
    print(f"| steps per level | weights | {' | '.join(columns)} |")
    print(f"|{' ---: |' * (2 + len(columns))}")
    for depth in map(int, sys.argv[1:] or DEPTHS):
        cells = [str(depth), f"{weights_mib(build(depth)):.1f} MiB"]
        for mode in ACTIVATION_MEMORY:
            cells.append(f"{measure_in_process('memory', mode, depth):.1f} MiB")
        first_seconds = measure_in_process("seconds", first, depth)
        for mode in others:
            cells.append(f"{measure_in_process('seconds', mode, depth) / first_seconds:.2f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
