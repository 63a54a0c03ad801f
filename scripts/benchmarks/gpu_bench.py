"""What a GPU trains a Glow with, fastest: python scripts/gpu_bench.py, ten minutes on a GPU; a tiny one on a CPU, a minute or two.

Every row is a training of its own by `flowgen train` on random images: images a second over its second half, as its metrics have them, the
memory that it held, and how long it took to begin: loading, compiling, the first half. Precisions, batches, compiling with CUDA graphs, the
ways of `trainer.activation_memory`, and, where there are several GPUs, one and all of them.
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from PIL import Image

GPUS = torch.cuda.device_count()
SIZE, STEPS, BATCHES = (64, 200, (16, 128)) if GPUS else (8, 6, (4, 8))
MODEL = [
    "model=glow",
    *([] if GPUS else ["model.levels=1", "model.steps_per_level=1", "model.width=8"]),
]
ENOUGH = 120 if GPUS else 60  # seconds for a row, after which it is given up
QUIET = ["evaluate_every", "sample_every", "save_every"]


def rows() -> list[dict[str, object]]:
    """Settings of the trainer, the plainest first."""
    found = [{"batch_size": batch, "precision": "float32"} for batch in BATCHES]
    found += [
        {"batch_size": batch, "precision": "bfloat16", "compile": compiled}
        for batch, compiled in product(BATCHES, (False, True))
    ]
    found += [
        {"batch_size": BATCHES[-1], "activation_memory": memory}
        for memory in ("checkpoint", "reversible")
    ]
    return found + [{"batch_size": BATCHES[-1] * GPUS, "num_processes": GPUS}] * (GPUS > 1)


def measure(folder: Path, number: int, settings: dict[str, object]) -> str:
    """Images a second, GiB and seconds to begin, as cells; or what went wrong."""
    out = folder / str(number)
    ends = [f"trainer.{name}=1000000" for name in QUIET] + [
        f"trainer.steps={STEPS}",
        f"trainer.log_every={STEPS // 2}",
    ]
    given = [f"trainer.{name}={value}" for name, value in settings.items()]
    few = ["trainer.eval_images=16", "trainer.init_images=64"]
    words = [
        *MODEL,
        "data=folder",
        f"data.root={folder / 'images'}",
        f"data.size={SIZE}",
        f"trainer={'gpu' if GPUS else 'cpu'}",
    ]
    began = time.monotonic()
    try:
        command = [
            sys.executable,
            "-m",
            "flowgen",
            "train",
            *words,
            *ends,
            *few,
            *given,
            f"output_dir={out}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ENOUGH)
    except subprocess.TimeoutExpired:
        return f"more than {ENOUGH} s | |"
    took = time.monotonic() - began
    if done.returncode:
        return f"{done.stderr.strip().splitlines()[-1]} | |"
    last = [
        row
        for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if row["split"] == "train"
    ][-1]
    computing = STEPS / 2 * int(str(settings["batch_size"])) / last["images_per_second"]
    return f"{last['images_per_second']:.0f} | {last['memory_gib']:.2f} | {took - computing:.0f}"


def main() -> None:
    where = torch.cuda.get_device_name() if GPUS else "CPU"
    print(
        f"{where}, torch {torch.__version__}, Glow on {SIZE}x{SIZE}x3, {' '.join(MODEL[1:]) or 'its defaults'}, {STEPS} steps\n"
    )
    print(
        "| trainer | images/s | GiB | seconds to begin |\n| --- | ---: | ---: | ---: |", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number in range(64):
            pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "images" / f"{number}.png")
        for number, settings in enumerate(rows()):
            said = " ".join(f"{name}={value}" for name, value in settings.items())
            print(f"| {said} | {measure(folder, number, settings)} |", flush=True)


if __name__ == "__main__":
    main()
