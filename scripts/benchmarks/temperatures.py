"""Compare the sample quality of models at several temperatures.

    python scripts/benchmarks/temperatures.py RUN... [--temperatures 0.5 0.7 1] [--samples 1000]

The samples are compared with the validation images of the data of each run. The last row of a run
compares training images in the same way: a perfect model has these values.
"""

import argparse

import torch

from flowgen.config.instantiate import build_data
from flowgen.config.runs import find_checkpoint, load_from_checkpoint
from flowgen.evaluation.sample_quality import SampleQuality
from flowgen.models.base import GenerativeModel, sample_images
from flowgen.utils.metrics import Metrics

COLUMNS = {  # keys of the metrics with formats
    "frechet": ".2f",
    "coverage": ".3f",
    "readable": ".1%",
    "class_accuracy": ".1%",
}


def format_row(title: str, metrics: Metrics, prefix: str) -> str:
    """Return a row of a Markdown table."""
    cells = [
        format(metrics.measured[key].value, style) if key in metrics.measured else ""
        for key, style in ((f"{prefix}_{name}", style) for name, style in COLUMNS.items())
    ]
    return "| " + " | ".join([title, *cells]) + " |"


def compare(run: str, temperatures: list[float], count: int, root: str | None) -> None:
    """Print the sample quality of a run at several temperatures."""
    _, checkpoint = find_checkpoint(run, GenerativeModel)
    config = checkpoint["config"]
    data = build_data(config | {"data": config["data"] | ({"root": root} if root else {})})
    data.test = data.validation  # a choice must not use the test images
    model = load_from_checkpoint(checkpoint)
    quality = SampleQuality(data, count)
    classes = torch.arange(count) % model.num_classes if model.num_classes else None
    for temperature in temperatures:
        samples, _ = sample_images(model, count, temperature, config["seed"])
        metrics = quality.evaluate(samples, classes)
        print(format_row(f"`{run}`, temperature {temperature:g}", metrics, "sample"), flush=True)
    print(format_row("training images", metrics, "training"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 1]
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples per temperature")
    parser.add_argument("--root", help="folder of the data, if it is not that of the run")
    args = parser.parse_args()
    print("| samples | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (1 + len(COLUMNS)) + "|")
    for run in args.runs:
        compare(run, args.temperatures, args.samples, args.root)


if __name__ == "__main__":
    main()
