"""Train the models that the package brings, judge them, and put them into flowgen/zoo: `make zoo`, or `python scripts/zoo.py NAME...`.

A training that was stopped goes on. What is kept is the end of it: nothing is chosen on the test images.
"""

import argparse
import json
import subprocess
import sys

from flowgen.config.compose import group_options
from flowgen.config.runs import find_checkpoint
from flowgen.training.checkpoint import SUFFIX, ZOO, export_safetensors

EXPERIMENTS = "zoo/"


def flowgen(*words: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "flowgen", *words], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    names = [
        name.removeprefix(EXPERIMENTS)
        for name in group_options("experiment")
        if name.startswith(EXPERIMENTS)
    ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        default=names,
        help=f"by default all: {', '.join(names)}",
    )
    parser.add_argument(
        "--trained",
        action="store_true",
        help="train nothing, but judge and keep the runs that there are",
    )
    options_ = parser.parse_args()
    for name in options_.names:
        run, command = f"outputs/zoo_{name}", ["train", f"experiment=zoo/{name}"]
        if not options_.trained:
            flowgen(*command, f"output_dir={run}", "resume=true")
        path, checkpoint = ZOO / f"{name}{SUFFIX}", find_checkpoint(run)[1]
        figures: dict[str, object] = {}
        for _ in range(2):  # what is judged is the file, with its rounded convolutions
            export_safetensors(
                checkpoint, figures, " ".join(["flowgen", *command]), path, half=True
            )
            figures = figures or json.loads(flowgen("evaluate", "--run", f"zoo/{name}", "--json"))
        print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB, {figures}")


if __name__ == "__main__":
    main()
