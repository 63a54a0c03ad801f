"""Output of a training run: metrics.jsonl, TensorBoard, train.log, plots, samples, terminal."""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack, nullcontext

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flowgen.models.base import GenerativeModel
from flowgen.training.run_dir import Run
from flowgen.utils import console, plots, rendering
from flowgen.utils.errors import log
from flowgen.utils.metrics import Metrics, MetricValue

BAR = "{desc}{remaining} left |{bar}| {n:.0f}/{total} {unit}{postfix}"


class Logger(ExitStack):
    """Context manager that writes the metrics and samples of a run, and shows its progress.

    A terminal shows a progress bar; elsewhere every log line is printed.

    Args:
        run: Folder to write to.
        model: Model whose metric the curves show.
        step: Optimizer step at which this process starts.
        start: Position of the progress bar at the start, in `unit`s.
        total: Position at the end.
        unit: "steps" or "seconds".
    """

    def __init__(
        self, run: Run, model: GenerativeModel, step: int, start: float, total: float, unit: str
    ):
        super().__init__()
        self.run = run
        self.model = model
        self.board = self.enter_context(
            SummaryWriter(str(run.tensorboard), purge_step=step + 1 if step else None)
        )
        self.bar = self.enter_context(
            tqdm(
                total=math.ceil(total),
                initial=math.floor(start),
                unit=unit,
                bar_format=BAR,
                disable=None,  # unless standard error is a terminal
                dynamic_ncols=True,
            )
        )
        self.eta = console.EtaLogger(unit, start, total)

    def advance(self, position: float) -> None:
        """Move the progress bar."""
        self.bar.update(min(position, self.bar.total) - self.bar.n)
        if self.bar.disable:
            self.eta.update(position)

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Write the metrics of one split; facts such as the number of images only to files.

        Args:
            step: Step of the training.
            split: "train", "validation" or "test".
            metrics: The metrics.
        """
        row = metrics.row()
        self.run.write_metrics(step, split, row)
        for name, value in row.items():
            if isinstance(value, str):
                continue
            self.board.add_scalar(f"{split}/{name}", value, step)
        text = "  ".join(_format(value) for value in metrics.measured.values())
        on_bar = split == "train" and not self.bar.disable
        if on_bar:
            self._describe(metrics)
        log.log(logging.DEBUG if on_bar else logging.INFO, "step %d  %s  %s", step, split, text)

    def _describe(self, metrics: Metrics) -> None:
        """Show the loss of a training step before the remaining time, and the speed at the end."""
        loss = next(iter(metrics.measured.values()))
        unit = loss.metric.unit
        text = f"{loss.sign}{loss.value:#.4g} {unit}" if unit else _format(loss)
        self.bar.set_description_str(f"{text}, ", refresh=False)
        if speed := metrics.measured.get("images_per_second"):
            self.bar.set_postfix_str(f"{speed.value:.0f} images/s")

    def write_samples(self, step: int, images: Tensor, bits: int) -> None:
        """Write a grid of samples as a file and to TensorBoard."""
        image = rendering.image_grid(images, bits, columns=8)
        rendering.save_picture(image, self.run.sample_grid(step))
        self.board.add_image("samples", np.array(image), step, dataformats="HWC")

    def write_filters(self, filters: Tensor | None) -> None:
        """Write the filters of the model, if it has any that can be drawn."""
        if filters is not None:
            rendering.save_picture(rendering.weight_grid(filters), self.run.filters)

    def plot_curves(self) -> None:
        """Plot the metrics of the run so far."""
        plots.curves(self.run.read_metrics(), self.model.metric, self.run.curves)


class WorkerLogger(nullcontext[None]):
    """Logger of a process that writes nothing: all methods of `Logger`, without an effect."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


def _format(value: MetricValue) -> str:
    number = str(value.value) if isinstance(value.value, int) else f"{value.value:.4g}"
    error = f" ± {value.error:.2g}" if value.error else ""
    return f"{value.metric.name} {value.sign}{number}{error}"
