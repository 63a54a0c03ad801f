"""Where what a run measures goes as it arises: metrics.jsonl, TensorBoard, train.log, and the screen."""

import logging
import math
import sys
from types import TracebackType

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flowgen.models.base import GenerativeModel
from flowgen.training.run_dir import Run
from flowgen.utils import plots, rendering
from flowgen.utils.console import EtaLogger
from flowgen.utils.metrics import Metrics, MetricValue

log = logging.getLogger("flowgen")


class Logger:
    """A progress bar on a terminal, plain lines where there is none, and everything on disk.

    `start` and `total` are where training stands and ends in `unit`s, steps or seconds, for the bar.
    """

    def __init__(
        self, run: Run, model: GenerativeModel, step: int, start: float, total: float, unit: str
    ):
        self.run, self.model = run, model
        self.board = SummaryWriter(str(run.tensorboard), purge_step=step + 1 if step else None)
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=math.ceil(total),
            initial=math.floor(start),
            unit=unit,
            disable=not self.terminal,
            dynamic_ncols=True,
        )
        self.outlook = EtaLogger(f"{unit}s" if unit == "step" else "seconds", start, total)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        self.board.close()

    def advance(self, place: float) -> None:
        self.bar.update(min(place, self.bar.total) - self.bar.n)
        if not self.terminal:
            self.outlook.at(place)

    def write(self, step: int, split: str, judgement: Metrics) -> None:
        """One line of what was measured on one split; the facts about how are for files alone."""
        row = judgement.row()
        self.run.write_metrics(step, split, row)
        for name, value in row.items():
            self.board.add_scalar(f"{split}/{name}", value, step)
        words = "  ".join(map(_in_words, judgement.measured.values()))
        if split != "train":
            log.info("step %d  %s  %s", step, split, words)
        elif self.terminal:
            self.bar.set_postfix_str(words)
            log.debug("step %d  train  %s", step, words)
        else:
            log.info("step %d  train  %s", step, words)

    def samples(self, step: int, images: torch.Tensor, bits: int) -> None:
        """A grid of samples, as a file and for TensorBoard."""
        image = rendering.image_grid(images, bits, columns=8)
        image.save(self.run.sample_grid(step))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
            image.height, image.width, -1
        )
        self.board.add_image("samples", pixels, step, dataformats="HWC")

    def filters(self, features: torch.Tensor | None) -> None:
        """What the model looks for, where it can be drawn."""
        if features is not None:
            rendering.weight_grid(features).save(self.run.filters)

    def curves(self) -> None:
        plots.curves(self.run.read_metrics(), self.model.metric, self.run.curves)


class NullLogger(Logger):
    """Of a process that leaves the files and the screen to another one."""

    def __init__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def advance(self, place: float) -> None:
        pass

    def write(self, step: int, split: str, judgement: Metrics) -> None:
        pass

    def samples(self, step: int, images: torch.Tensor, bits: int) -> None:
        pass

    def filters(self, features: torch.Tensor | None) -> None:
        pass

    def curves(self) -> None:
        pass


def _in_words(measured: MetricValue) -> str:
    value, error = measured.value, measured.error
    number = str(value) if isinstance(value, int) else f"{value:.4g}"
    return f"{measured.metric.name} {number}" + (f" ± {error:.2g}" if error else "")
