"""Peak memory and time of a training step by depth, for the ways of `trainer.memory`: python scripts/memory.py [DEPTH...]

Every figure is of a process of its own. Memory is what its resident memory grew by during a step, less the gradients of the weights, which
are as large as the weights however they come about; every large tensor is a mapping of its own (MALLOC_MMAP_THRESHOLD_ of glibc), so that
what is freed is given back at once. Time is measured without that.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from flowgen.bijections import MEMORY, ZeroConv2d, save_memory
from flowgen.config import build_model
from flowgen.models import GenerativeModel

DEPTHS = (8, 16, 32, 64, 128)
BATCH, SIZE, STEPS = 64, 16, 2
APART = {"MALLOC_MMAP_THRESHOLD_": "8192", "MALLOC_MMAP_MAX_": "1000000"}
GLOW = {
    "_target_": "flowgen.models.flows.glow.Glow", "channels": 3, "size": SIZE, "bits": 5, "levels": 2, "width": 32, "network": "conv",
    "blocks": 1, "coupling": "affine", "scale": "bounded", "convolution": "plu", "prior": "predicted", "base": "learned",
    "final_actnorm": False, "gaussianize": False, "dequantisation": "uniform", "classes": None,
}  # fmt: skip


def resident(key: str) -> float:
    """MiB, by the name that Linux gives the figure."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def built(depth: int) -> GenerativeModel:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model({"model": GLOW | {"steps_per_level": depth}}).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, ZeroConv2d):
            torch.nn.init.normal_(module.weight, std=0.01)  # as of a trained model, not of the identity
    return model


def weights(model: GenerativeModel) -> float:
    """MiB."""
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**20


def measure(what: str, memory: str, depth: int) -> float:
    """MiB or seconds of processor time, as `what` says, of one step."""
    model = built(depth)
    levels = torch.randint(32, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    model.initialize(levels)
    save_memory(model, memory)
    model(levels[:2]).backward()
    model.zero_grad()
    if what == "seconds":
        began = time.process_time()
        for _ in range(STEPS):
            model(levels).backward()
            model.zero_grad()
        return (time.process_time() - began) / STEPS
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before = resident("VmRSS")
    model(levels).backward()
    return resident("VmHWM") - before - weights(model)


def asked(what: str, memory: str, depth: int) -> float:
    """The same in another process."""
    environment = os.environ | (APART if what == "memory" else {})
    return float(subprocess.check_output([sys.executable, __file__, "of", what, memory, str(depth)], env=environment, text=True))


if __name__ == "__main__":
    if sys.argv[1:2] == ["of"]:
        print(measure(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        sys.exit()
    print(f"| steps a level | weights | {' | '.join(MEMORY)} | time beside keep: {' | '.join(MEMORY[1:])} |")
    print(f"|{' ---: |' * (2 * len(MEMORY) + 1)}")
    for depth in map(int, sys.argv[1:] or DEPTHS):
        sizes = " | ".join(f"{asked('memory', memory, depth):.1f} MiB" for memory in MEMORY)
        kept, *others = [asked("seconds", memory, depth) for memory in MEMORY]
        times = " | ".join(f"{seconds / kept:.2f}" for seconds in others)
        print(f"| {depth} | {weights(built(depth)):.1f} MiB | {sizes} | {times} |", flush=True)
