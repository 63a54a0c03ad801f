"""Worker of test_distributed.py. It trains the runs of a file, then evaluates the first one.

    torchrun --nproc-per-node N tests/distributed_worker.py CONFIGS.json

The file has a list of pairs: a folder, and a configuration or null. Null resumes the run in the
folder.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from flowgen.config.instantiate import build_model_and_data
from flowgen.config.runs import load_weights
from flowgen.config.start import lock_run, train_in_group
from flowgen.models.base import EvalConfig
from flowgen.training.distributed import WorkerGroup, join
from flowgen.training.run_dir import Run


def train(group: WorkerGroup, folder: Path, config: dict[str, Any] | None) -> None:
    run = Run(folder)
    checkpoint = None
    if config is None:
        checkpoint = group.broadcast_from_main(run.latest_valid_checkpoint)
        config = checkpoint["config"]
    if not group.is_main:
        train_in_group(group, run, config, checkpoint, "")
        return
    with lock_run(run):
        train_in_group(group, run, config, checkpoint, "")


def evaluate(group: WorkerGroup, folder: Path) -> str:
    """Return the metrics of ten and a half batches as hexadecimal numbers, which are exact."""
    checkpoint = group.broadcast_from_main(Run(folder).latest_valid_checkpoint)
    model, data, _ = build_model_and_data(checkpoint["config"])
    load_weights(model, checkpoint["model"])
    eval_config = EvalConfig(num_importance_samples=2)
    row = model.eval().evaluate(data.batches("train", 3), (), eval_config).row()
    numbers = (value for value in row.values() if not isinstance(value, str))
    return " ".join(float(number).hex() for number in numbers)


def run_jobs(jobs: list[tuple[str, dict[str, Any] | None]], metrics_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    with join() as group:
        for folder, config in jobs:
            train(group, Path(folder), config)
        metrics = evaluate(group, Path(jobs[0][0]))
        if group.is_main:
            metrics_path.write_text(metrics)
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), "threads that may abort the exit"


def report_writes(event: str, arguments: tuple) -> None:
    """Audit hook that reports every file opened for writing."""
    if event != "open" or not isinstance(arguments[0], str):
        return
    if arguments[2] & (os.O_WRONLY | os.O_RDWR):
        sys.stderr.write(f"rank {os.environ['RANK']} writes {arguments[0]}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("RANK", "0") != "0":
        sys.addaudithook(report_writes)
    path = Path(sys.argv[1])
    run_jobs(json.loads(path.read_text()), path.with_suffix(".metrics"))
