"""Training speed of Glow beside the package normflows, in images per second, both on the same threads in the same run.

64x64 colour, 4 levels, 8 steps a level, coupling networks conv3-1-3 of width 128, batches of 8: forward, backward and Adam. normflows
runs as its documentation shows it (`GlowBlock`, `MultiscaleFlow`), each in a process of its own. They take turns, and each one's best
round counts, since a shared machine slows whichever runs at the wrong moment.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
import yaml
from torch import Tensor, nn

from flowgen.config import conf_folder
from flowgen.models import Glow
from flowgen.training.device import autocast_dtype

SIZE, LEVELS, STEPS, WIDTH, BATCH = 64, 4, 8, 128, 8


def flowgen_step(compiled: bool) -> Callable[[Tensor], None]:
    arguments = yaml.safe_load((conf_folder() / "model" / "glow.yaml").read_text()) | {"channels": 3, "size": SIZE, "bits": 5}
    arguments |= {"levels": LEVELS, "steps_per_level": STEPS, "width": WIDTH}
    del arguments["_target_"]
    model = Glow(**arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.initialize(torch.randint(0, 32, (64, 3, SIZE, SIZE), dtype=torch.uint8))
    if compiled:
        model.compile()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    dtype = autocast_dtype("auto", torch.device("cpu"))

    def step(levels: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(levels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()

    return step


def normflows_step() -> Callable[[Tensor], None]:
    import normflows

    bases, merges, flows = [], [], []
    for level in range(LEVELS):
        channels = 3 * 2 ** (LEVELS + 1 - level)
        blocks = [normflows.flows.GlowBlock(channels, WIDTH, split_mode="channel", scale=True) for _ in range(STEPS)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        side = SIZE // 2 ** (LEVELS - level)
        if level > 0:
            merges.append(normflows.flows.Merge())
            channels //= 2
        bases.append(normflows.distributions.GlowBase((channels, side, side)))
    model = normflows.MultiscaleFlow(bases, flows, merges)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(levels: Tensor) -> None:
        loss = model.forward_kld((levels + torch.rand(levels.shape)) / 32)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def images_per_second(step: Callable[[Tensor], None], levels: Tensor, repeats: int = 8) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        step(levels)
    return repeats * len(levels) / (time.perf_counter() - began)


STEPS_OF: dict[str, Callable[[], Callable[[Tensor], None]]] = {
    "normflows": normflows_step,
    "flowgen": lambda: flowgen_step(compiled=False),
    "flowgen, trainer.compile=true": lambda: flowgen_step(compiled=True),
}


def measure(name: str, threads: int, rounds: int) -> list[float]:
    """Images per second in each of some rounds, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    levels = torch.randint(0, 32, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    step = STEPS_OF[name]()
    images_per_second(step, levels, 3)  # the first steps compile and allocate
    return [images_per_second(step, levels) for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=STEPS_OF, help=argparse.SUPPRESS)  # one of them, in a process of its own
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.threads, options.rounds)))
        return
    speeds: dict[str, list[float]] = {name: [] for name in STEPS_OF}
    for _ in range(options.turns):
        for name, found in speeds.items():
            words = [sys.executable, __file__, "--only", name, "--threads", str(options.threads), "--rounds", str(options.rounds)]
            found += json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}  {options.threads} threads  batch {BATCH}")
    for name, found in speeds.items():
        ratio = max(found) / max(speeds["normflows"])
        print(f"{name:32} {max(found):6.1f} images/s, slowest round {min(found):.1f}  {ratio:.2f}x")


if __name__ == "__main__":
    main()
