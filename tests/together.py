"""What `test_team.py` has several processes do: train each configuration of a file, and judge what came of the first.

    torchrun --nproc-per-node N tests/together.py CONFIGS.json

Each entry of the file is a folder and a configuration, or nothing where the run that the folder holds is to be gone on with.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from flowgen.commands.train import lock_run, run_training_in_group
from flowgen.config.instantiate import build_model_and_data
from flowgen.config.loading import load_weights
from flowgen.models.base import EvalConfig
from flowgen.training.distributed import ProcessGroup, join
from flowgen.training.run_dir import NoRun, Run


def train(team: ProcessGroup, folder: Path, config: dict[str, Any] | None) -> None:
    checkpoint = None
    if config is None:
        checkpoint = team.broadcast_from_main(Run(folder).latest_valid_checkpoint)
        config = checkpoint["config"]
    if not team.is_main:
        return run_training_in_group(team, NoRun(folder), config, checkpoint, "")
    with lock_run(Run(folder)):
        return run_training_in_group(team, Run(folder), config, checkpoint, "")


def judge(team: ProcessGroup, folder: Path) -> str:
    """What is measured on ten batches and a half, to the last bit."""
    checkpoint = team.broadcast_from_main(Run(folder).latest_valid_checkpoint)
    model, data, _ = build_model_and_data(checkpoint["config"])
    load_weights(model, checkpoint["model"])
    row = model.eval().evaluate(data.batches("train", 3), (), EvalConfig(draws=2)).row()
    return " ".join(float(value).hex() for value in row.values())


def work(jobs: list[tuple[str, dict[str, Any] | None]], judgement: Path) -> None:
    torch.set_default_dtype(torch.float64)
    with join() as team:
        for folder, config in jobs:
            train(team, Path(folder), config)
        found = judge(team, Path(jobs[0][0]))
        if team.is_main:
            judgement.write_text(found)
    assert not any(
        "gloo" in thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")
    ), "threads that may abort the end"


def note(event: str, arguments: tuple) -> None:
    """Say what a process that follows opens to write."""
    if (
        event == "open"
        and isinstance(arguments[0], str)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    ):
        sys.stderr.write(f"rank {os.environ['RANK']} writes {arguments[0]}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("RANK", "0") != "0":
        sys.addaudithook(note)
    path = Path(sys.argv[1])
    work(json.loads(path.read_text()), path.with_suffix(".judged"))
