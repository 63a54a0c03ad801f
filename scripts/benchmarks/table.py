"""Train models at equal cost and print a table of their results.

    python scripts/benchmarks/table.py --data mnist --models glow tarflow --minutes 15 [OVERRIDE...]

Every model is trained on every data set for about the same CPU time. Every `flowgen train` gets the
overrides, such as data.root=FOLDER. Results are stored in outputs/table/DATA_MODEL_MINUTES/row.json
as soon as they are known; other overrides, such as data.bits=1, and other values of --temperature
or --samples need another --folder. If the script was stopped, the same command continues. At the
end it prints all rows, draws samples of all models of a data set in one picture, and plots their
validation bits/dim against the compute of their training. Short training runs determine the number
of steps for the given CPU time. Wall-clock time is not used, since it depends on other work of the
machine.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flops import count_flops
from PIL import Image

import flowgen
from flowgen.config.compose import read_config
from flowgen.models.likelihood import LikelihoodModel
from flowgen.training.run_dir import Run
from flowgen.utils import plots, rendering
from flowgen.utils.files import atomic_write
from flowgen.utils.metrics import BITS_PER_DIM, COMPARED, FRECHET, MetricValue

sys.path.append(str(Path(__file__).parents[1]))
from run_flowgen import run_flowgen

FOLDER = Path("outputs/table")
SHORT_STEPS = 60  # of the first of the short runs that measure the cost of a step
GROWTH = 4  # of the number of steps, from one short run to the next
MIN_SECONDS = 20  # CPU time by which the last short run is longer than the first
IMPORTANCE_SAMPLES = (1, 16)
NUM_SAMPLES = 16
TIMED_SAMPLES = 64  # samples whose CPU time is measured
MODELS = ["glow", "realnvp", "nice", "maf", "tarflow", "jet"]
COLUMNS = [
    "data",
    "model",
    "likelihood",
    *(
        f"test bits/dim (nats at 1 bit), importance samples: {count}"
        for count in IMPORTANCE_SAMPLES
    ),
    "parameters, millions",
    "training images seen",
    "CPU minutes",
    "GFLOPs per image",
    "CPU seconds per sample",
    "Fréchet distance (training images)",
    "readable samples",
]
NUMBERS = {  # keys of the last columns, with divisor and format
    "parameters": (1e6, ".2f"),
    "images_seen": (1, ",.0f"),
    "cpu_seconds": (60, ".1f"),
    "flops": (1e9, ".3f"),
    "sample_seconds": (TIMED_SAMPLES, ".3f"),
}


class Row:
    """A row of the table, stored in a file.

    Args:
        data: Name of the data set.
        model: Name of the model.
        minutes: CPU minutes of the training run.
        overrides: Overrides for `flowgen train`.
        folder: Folder of the rows.
        temperature: Temperature of the samples.
        samples: Number of samples whose quality is measured, or None.
    """

    def __init__(
        self,
        data: str,
        model: str,
        minutes: float,
        overrides: list[str],
        folder: Path = FOLDER,
        temperature: float = 0.7,
        samples: int | None = None,
    ):
        self.folder = folder / f"{data}_{model}_{minutes:g}"
        self.temperature = temperature
        self.quality = [f"samples={samples}", f"temperature={temperature:g}"] if samples else []
        self.run = Run(self.folder / "run")
        self.file = self.folder / "row.json"
        self.minutes = minutes
        self.overrides = [
            f"model={model}",
            f"data={data}",
            "trainer=cpu",
            "trainer.minutes=null",
            "trainer.num_threads=1",
            *overrides,
        ]
        self.values: dict[str, Any] = {
            "data": data,
            "model": model,
            "minutes": minutes,
            "overrides": overrides,
            "temperature": temperature,
            "num_samples": samples,
        }
        if self.file.exists():
            stored = json.loads(self.file.read_text())
            for key in ("overrides", "temperature", "num_samples"):
                if stored[key] != self.values[key]:
                    sys.exit(
                        f"{self.file} has other {key}, {stored[key]}: use the same, or another "
                        "--folder"
                    )
            self.values = stored

    def cached(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return a stored value, or compute and store it."""
        if key not in self.values:
            self.store(key, compute())
        return self.values[key]

    def store(self, key: str, value: Any) -> None:
        """Store a value in the file."""
        self.values[key] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(self.values, indent=1) + "\n")

    def fill(self) -> None:
        """Train and measure the model. Results that are stored already are not measured again."""
        steps = self.cached("steps", self.measure_steps)
        if not self.run.has_ended():
            self.train(steps)
        batch_size = read_config(self.run.config)["trainer"]["batch_size"]
        self.cached("images_seen", lambda: steps * batch_size)
        run = str(self.run.folder)
        self.cached("parameters", lambda: count_parameters(run))
        self.cached("flops", lambda: flops_per_image(run))
        self.cached("curve", self.read_curve)
        first, *others = IMPORTANCE_SAMPLES
        metrics = self.cached(f"metrics_{first}", lambda: self.evaluate(first))
        for count in others:
            self.cached(
                f"metrics_{count}",
                lambda count=count: self.evaluate(count) if has_tighter_bound(run) else metrics,
            )
        self.cached("samples", self.sample)
        self.cached("sample_seconds", lambda: time_samples(run, self.temperature))

    def measure_steps(self) -> int:
        """Return the number of steps that take the given CPU time."""
        self.time_short_run(1)  # prepares the images in the cache
        steps = SHORT_STEPS
        fixed = self.time_short_run(steps)
        seconds = 0.0
        while seconds < MIN_SECONDS:
            steps *= GROWTH
            seconds = self.time_short_run(steps) - fixed
        return max(1, round(60 * self.minutes * (steps - SHORT_STEPS) / seconds))

    def time_short_run(self, steps: int) -> float:
        """Return the CPU seconds of a training run that is not kept."""
        run = self.folder / "short"
        shutil.rmtree(run, ignore_errors=True)
        _, seconds = timed_flowgen(
            "train",
            *self.overrides,
            f"trainer.steps={steps}",
            "trainer.eval_images=1",
            # PixelCNN samples by fixed-point iterations, which converge fastest at temperature 0.
            "trainer.sample_temperature=0",
            f"output_dir={run}",
        )
        shutil.rmtree(run)
        return seconds

    def train(self, steps: int) -> None:
        """Train or resume the model."""
        overrides = [
            f"trainer.steps={steps}",
            f"trainer.eval_every={max(1, steps // 5)}",
            f"trainer.sample_every={steps}",
            f"output_dir={self.run.folder}",
            "resume=true",
        ]
        _, seconds = timed_flowgen(
            "train", *self.overrides, *overrides, on_failure=self.add_cpu_seconds
        )
        self.add_cpu_seconds(seconds)

    def add_cpu_seconds(self, seconds: float) -> None:
        """Add to the CPU time of the training run."""
        self.store("cpu_seconds", self.values.get("cpu_seconds", 0.0) + seconds)

    def evaluate(self, num_importance_samples: int) -> dict[str, float]:
        """Return the test metrics; for the first number of importance samples, of samples too."""
        is_first = num_importance_samples == IMPORTANCE_SAMPLES[0]
        output, _ = timed_flowgen(
            "evaluate",
            "--run",
            str(self.run.folder),
            "--json",
            f"num_importance_samples={num_importance_samples}",
            *(self.quality if is_first else []),
        )
        metrics = json.loads(output)
        return {key: value for key, value in metrics.items() if key not in ("run", "split")}

    def read_curve(self) -> list[list[float]]:
        """Return training images seen and validation bits/dim of each evaluation."""
        batch_size = read_config(self.run.config)["trainer"]["batch_size"]
        name = BITS_PER_DIM.name
        rows = [row for row in self.run.read_metrics() if row["split"] == "validation"]
        return [[row["step"] * batch_size, row[name]] for row in rows if name in row]

    def sample(self) -> str:
        """Draw samples and return the path of their picture."""
        path = self.folder / "samples.png"
        options = f"--count {NUM_SAMPLES} --temperature {self.temperature:g} --out {path}"
        timed_flowgen("sample", "--run", str(self.run.folder), *options.split())
        return str(path)

    def titled_samples(self) -> tuple[str, Image.Image]:
        """Return the name of the model and the picture of its samples."""
        return self.values["model"], Image.open(self.values["samples"])

    def line(self) -> str:
        """Return the row as Markdown."""
        metrics = [self.values.get(f"metrics_{count}", {}) for count in IMPORTANCE_SAMPLES]
        likelihood = metrics[0].get("likelihood", "")
        cells = [self.values["data"], f"`{self.values['model']}`", likelihood]
        cells += [format_result(results) for results in metrics]
        for key, (divisor, number_format) in NUMBERS.items():
            value = self.values.get(key)
            cells.append("" if value is None else format(value / divisor, number_format))
        cells += format_quality(metrics[0])
        return f"| {' | '.join(cells)} |"


def plot_compute(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the validation bits/dim of models against their training compute, and extrapolate it.

    Args:
        rows: Contents of `row.json` of each model.
        path: The PNG.
    """
    with plots.figure(8, 5, path) as page:
        axes = page.subplots()
        for index, row in enumerate(row for row in rows if len(row["curve"]) > 1):
            images, values = np.array(row["curve"]).T
            compute = images * row["flops"] / 1e15
            style = {"color": plots.COLORS[index % len(plots.COLORS)]}
            marker = plots.MARKERS[index % len(plots.MARKERS)]
            axes.plot(compute, values, marker=marker, label=row["model"], **style)
            axes.plot(*extrapolate(compute, values), linestyle=":", **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="training compute, $10^{15}$ FLOPs", ylabel="validation bits/dim")
        axes.legend()


def extrapolate(compute: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the extrapolation, from the last point to ten times its compute.

    Its slope is that between the first two points, where the learning rate is constant. A run of
    ten times the length also ends with a falling learning rate. With a constant learning rate,
    slopes become smaller as training continues, so the extrapolation is optimistic; the later
    points also gain from the falling learning rate.

    Args:
        compute: Compute of each point.
        values: Bits/dim.
    """
    slope = (values[1] - values[0]) / np.log10(compute[1] / compute[0])  # per factor of ten
    return compute[-1] * np.array([1, 10]), values[-1] + slope * np.array([0, 1])


def format_result(results: dict[str, Any]) -> str:
    """Return the likelihood by which runs are compared with its error, or "" without one."""
    likelihoods = [metric for metric in COMPARED if metric != FRECHET]
    values = (MetricValue.from_row(results, metric) for metric in likelihoods)
    value = next(filter(None, values), None)
    if value is None:
        return ""
    unit = f" {value.metric.unit}" if value.metric != BITS_PER_DIM else ""
    return f"{value.sign}{value.value:.3f} ± {value.error:.3f}{unit}"


def format_quality(results: dict[str, Any]) -> list[str]:
    """Return the Fréchet distance and the share of readable samples, "" where not measured."""
    distance = ""
    if "sample_frechet" in results:
        distance = f"{results['sample_frechet']:.2f} ({results['training_frechet']:.2f})"
    readable = results.get("sample_readable")
    return [distance, "" if readable is None else f"{readable:.1%}"]


def timed_flowgen(
    *args: str, on_failure: Callable[[float], None] = lambda seconds: None
) -> tuple[str, float]:
    """Run a command and return its output and its CPU time in seconds.

    Args:
        *args: Arguments of `flowgen`.
        on_failure: Called with the CPU time if the command fails.

    Raises:
        SystemExit: If the command fails.
    """
    print("$ flowgen", *args, file=sys.stderr, flush=True)
    start = children_cpu_seconds()
    succeeded = False
    try:
        result = run_flowgen(*args, stdout=subprocess.PIPE)
        succeeded = result.returncode == 0
    finally:
        seconds = children_cpu_seconds() - start
        if not succeeded:
            on_failure(seconds)
    if not succeeded:
        sys.exit(
            f"the command ended with status {result.returncode}, see above: run the same command "
            "again to continue"
        )
    return result.stdout, seconds


def children_cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def time_samples(run: str, temperature: float) -> float:
    """Return the CPU seconds that `TIMED_SAMPLES` samples take on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = flowgen.load(run, device="cpu")
    start = time.process_time()
    model.sample(TIMED_SAMPLES, temperature)
    return time.process_time() - start


def has_tighter_bound(run: str) -> bool:
    """Return whether more importance samples make the bound of a model tighter."""
    model = flowgen.load(run, device="cpu")
    if not isinstance(model, LikelihoodModel):
        return False
    return model.likelihood == "bound" and model.has_noise and not model.averages_log_probs


def count_parameters(run: str) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in flowgen.load(run, device="cpu").parameters())


def flops_per_image(run: str) -> float:
    """Return the FLOPs per image of convolutions and matrix products in a training step."""
    model = flowgen.load(run, device="cpu")
    images = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
    labels = None if model.num_classes is None else torch.zeros(2, dtype=torch.long)
    return count_flops(lambda: model(images, labels).backward()) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="*", default=["mnist"])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--minutes", type=float, default=15.0, help="CPU time of each training run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the rows")
    parser.add_argument("--temperature", type=float, default=0.7, help="temperature of samples")
    parser.add_argument("--samples", type=int, help="samples whose quality is measured")
    parser.add_argument("--plot", nargs="*", type=Path, help="plot these stored rows, and end")
    args, overrides = parser.parse_known_args()
    if args.plot:
        plot_compute([json.loads(file.read_text()) for file in args.plot], Path("compute.png"))
        return
    options = (args.folder, args.temperature, args.samples)
    rows = [
        Row(data, model, args.minutes, overrides, *options)
        for data in args.data
        for model in args.models
    ]
    for row in rows:
        row.fill()
    for data in args.data:
        pictures = [row.titled_samples() for row in rows if row.values["data"] == data]
        rendering.stack_titled(pictures).save(args.folder / f"{data}_{args.minutes:g}.png")
        measured = [row.values for row in rows if row.values["data"] == data]
        plot_compute(measured, args.folder / f"{data}_{args.minutes:g}_compute.png")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + " --- |" * len(COLUMNS))
    for row in rows:
        print(row.line())


if __name__ == "__main__":
    main()
