"""Measure the training speed of a Glow on a GPU with different settings of the trainer.

Usage: python scripts/benchmarks/gpu_bench.py. It takes ten minutes on a GPU. On a CPU it trains a
tiny model for a minute or two.

Every row of the table is a training run on random images by `flowgen train`. It has the images per
second of the second half of the steps, the peak memory, and the startup time, which is the time of
loading, compiling and the first half. The rows differ in precision, batch size, compilation,
`trainer.activation_memory` and the number of GPUs.
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

sys.path.append(str(Path(__file__).parents[1]))
from run_flowgen import run_flowgen

NUM_GPUS = torch.cuda.device_count()
SIZE = 64 if NUM_GPUS else 8  # height and width of the images
STEPS = 200 if NUM_GPUS else 6
BATCH_SIZES = (16, 128) if NUM_GPUS else (4, 8)
TIMEOUT_SECONDS = 120 if NUM_GPUS else 60  # per row
NUM_IMAGES = 64
NEVER = 10**6  # steps
MODEL_OVERRIDES = [] if NUM_GPUS else ["model.levels=1", "model.steps_per_level=1", "model.width=8"]
TRAINER_OVERRIDES = [
    f"trainer={'gpu' if NUM_GPUS else 'cpu'}",
    f"trainer.steps={STEPS}",
    f"trainer.log_every={STEPS // 2}",
    f"trainer.eval_every={NEVER}",
    f"trainer.sample_every={NEVER}",
    f"trainer.save_every={NEVER}",
    "trainer.eval_images=16",
    "trainer.init_images=64",
]


def rows() -> list[dict[str, object]]:
    """Return the settings of the trainer for each row."""
    largest_batch = BATCH_SIZES[-1]
    result: list[dict[str, object]] = [
        {"batch_size": batch_size, "precision": "float32"} for batch_size in BATCH_SIZES
    ]
    for batch_size, compiled in product(BATCH_SIZES, (False, True)):
        result.append({"batch_size": batch_size, "precision": "bfloat16", "compile": compiled})
    for mode in ("checkpoint", "reversible"):
        result.append({"batch_size": largest_batch, "activation_memory": mode})
    if NUM_GPUS > 1:
        result.append({"batch_size": largest_batch * NUM_GPUS, "num_processes": NUM_GPUS})
    return result


def measure(folder: Path, index: int, settings: dict[str, object]) -> str:
    """Return the cells of a row: images/s, GiB and startup seconds, or an error."""
    run = folder / str(index)
    data = ["data=folder", f"data.root={folder / 'images'}", f"data.size={SIZE}"]
    overrides = [f"trainer.{name}={value}" for name, value in settings.items()]
    args = ["model=glow", *MODEL_OVERRIDES, *data, *TRAINER_OVERRIDES, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    start = time.monotonic()
    try:
        result = run_flowgen("train", *args, f"output_dir={run}", timeout=TIMEOUT_SECONDS, **pipes)
    except subprocess.TimeoutExpired:
        return f"more than {TIMEOUT_SECONDS} s | |"
    seconds = time.monotonic() - start
    if result.returncode:
        return f"{result.stderr.strip().splitlines()[-1]} | |"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in metrics if row["split"] == "train"][-1]
    speed = last["images_per_second"]
    measured_seconds = STEPS / 2 * int(str(settings["batch_size"])) / speed
    return f"{speed:.0f} | {last['memory_gib']:.2f} | {seconds - measured_seconds:.0f}"


def main() -> None:
    device = torch.cuda.get_device_name() if NUM_GPUS else "CPU"
    model = " ".join(MODEL_OVERRIDES) or "default settings"
    print(f"{device}, torch {torch.__version__}, Glow on {SIZE}x{SIZE}x3, {model}, {STEPS} steps\n")
    print(
        "| trainer | images/s | GiB | startup seconds |\n| --- | ---: | ---: | ---: |", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for index in range(NUM_IMAGES):
            pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "images" / f"{index}.png")
        for index, settings in enumerate(rows()):
            text = " ".join(f"{key}={value}" for key, value in settings.items())
            print(f"| {text} | {measure(folder, index, settings)} |", flush=True)


if __name__ == "__main__":
    main()
