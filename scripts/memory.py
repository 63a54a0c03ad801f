"""Peak memory and time of a training step by depth, for the ways of `trainer.memory`: python scripts/memory.py [DEPTH...]

Every figure is of a process of its own: what its resident memory grew by during the second step, weights and their gradients there before.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

from flowgen.bijections import MEMORY, ZeroConv2d, save_memory
from flowgen.config import build_model

DEPTHS = (8, 16, 32, 64, 128)
BATCH, SIZE = 64, 16
GLOW = {
    "_target_": "flowgen.models.flows.glow.Glow", "channels": 3, "size": SIZE, "bits": 5, "levels": 2, "width": 32, "network": "conv",
    "blocks": 1, "coupling": "affine", "scale": "bounded", "convolution": "plu", "prior": "predicted", "base": "learned",
    "final_actnorm": False, "gaussianize": False, "dequantisation": "uniform", "classes": None,
}  # fmt: skip


def resident(key: str) -> float:
    """MiB, by the name that Linux gives the figure."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def measure(memory: str, depth: int) -> tuple[float, float]:
    """MiB and seconds of processor time of one step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model({"model": GLOW | {"steps_per_level": depth}})
    for module in model.modules():
        if isinstance(module, ZeroConv2d):
            torch.nn.init.normal_(module.weight, std=0.01)  # as of a trained model, not of the identity
    levels = torch.randint(32, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    model.initialize(levels)
    save_memory(model, memory)
    model(levels[:2]).backward()
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before, began = resident("VmRSS"), time.process_time()
    model(levels).backward()
    return resident("VmHWM") - before, time.process_time() - began


if __name__ == "__main__":
    if sys.argv[1:2] == ["of"]:
        print(*measure(sys.argv[2], int(sys.argv[3])))
        sys.exit()
    print(f"| steps a level | {' | '.join(MEMORY)} | time beside keep: {' | '.join(MEMORY[1:])} |\n|{' ---: |' * (2 * len(MEMORY))}")
    for depth in map(int, sys.argv[1:] or DEPTHS):
        words = [[sys.executable, __file__, "of", memory, str(depth)] for memory in MEMORY]
        found = [[float(word) for word in subprocess.check_output(each, text=True).split()] for each in words]
        times = [f"{seconds / found[0][1]:.2f}" for _, seconds in found[1:]]
        print(f"| {depth} | {' | '.join(f'{size:.0f} MiB' for size, _ in found)} | {' | '.join(times)} |", flush=True)
