"""Train and evaluate the included models, and export them to flowgen/zoo: `make zoo`.

A training run that was stopped is resumed. The weights at the end of training are exported, so the
test images play no part in their choice.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from flowgen.config.runs import find_checkpoint
from flowgen.config.settings import group_options
from flowgen.training.checkpoint import EXPORT_SUFFIX, ZOO, export_safetensors

sys.path.append(str(Path(__file__).parents[1]))
from run_flowgen import run_flowgen

ZOO_PREFIX = "zoo/"  # of the experiments


def export(name: str, train: bool) -> None:
    """Train a model if `train` is set, then evaluate and export it."""
    run = f"outputs/zoo_{name}"
    command = ["train", f"experiment={ZOO_PREFIX}{name}"]
    if train:
        run_flowgen(*command, f"output_dir={run}", "resume=true").check_returncode()
    path = ZOO / f"{name}{EXPORT_SUFFIX}"
    checkpoint = find_checkpoint(run)[1]
    command_line = " ".join(["flowgen", *command])
    # Evaluate the exported file, since the export rounds convolutions. Then add the metrics.
    export_safetensors(checkpoint, {}, command_line, path, half=True)
    result = run_flowgen(
        "evaluate", "--run", f"{ZOO_PREFIX}{name}", "--json", stdout=subprocess.PIPE
    )
    result.check_returncode()
    metrics = json.loads(result.stdout)
    export_safetensors(checkpoint, metrics, command_line, path, half=True)
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB, {metrics}")


def main() -> None:
    experiments = [name for name in group_options("experiment") if name.startswith(ZOO_PREFIX)]
    names = [name.removeprefix(ZOO_PREFIX) for name in experiments]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        default=names,
        help=f"models, by default all: {', '.join(names)}",
    )
    parser.add_argument(
        "--skip-training", action="store_true", help="export the runs that exist already"
    )
    args = parser.parse_args()
    for name in args.names:
        export(name, train=not args.skip_training)


if __name__ == "__main__":
    main()
