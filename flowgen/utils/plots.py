"""Plots: lines, the curves of a run, and models of the plane.

Lines differ in color, dash and marker, so that they can be distinguished without color.
"""

import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from flowgen.utils.files import atomic_write
from flowgen.utils.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

# The palette of Okabe and Ito, safe for color-blind readers
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")
MAX_MARKERS = 40  # longer lines have no markers, which would hide them
MAX_DECAY = 0.95  # of the moving average of the training loss
OUTLIER_SHARE = 0.03  # of a curve's worst values that are outside the frame: its first steps


def lines(
    named: Mapping[str, Points],
    file: Path | BinaryIO,
    *,
    xlabel: str,
    ylabel: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    outliers: tuple[float, float] = (0.0, 0.0),
    right: tuple[str, float] | None = None,
) -> None:
    """Plot lines through the finite points (x, y) and write a PNG.

    Args:
        named: Points of each line, by its name in the legend.
        file: Path or file of the PNG.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        errors: Standard errors of the y values of a line, by its name.
        outliers: Shares of the lowest and the highest values that may be outside the frame.
        right: Label of a second y axis, and the offset that is added to y there.
    """
    with figure(8, 4.5, file) as page:
        axes = page.subplots()
        _draw_lines(axes, named, errors or {}, (), outliers)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if right:
            label, offset = right
            functions: Any = (lambda y: y + offset, lambda y: y - offset)
            axes.secondary_yaxis("right", functions=functions).set_ylabel(label)
        if len(named) > 1:
            page.legend(loc="outside lower center", ncols=2, fontsize="small")


def curves(rows: Sequence[dict[str, Any]], metric: Metric, path: Path) -> None:
    """Plot the curves of a training run and write a PNG, if a curve has two points.

    The upper panels have the training loss, its moving average, and the metric of the other
    splits. The lowest panel has the learning rate and the gradient norm. A panel without a line of
    two points is skipped.

    Args:
        rows: Rows of metrics.jsonl.
        metric: The metric of the model.
        path: Path of the PNG.
    """
    train = [row for row in rows if row["split"] == "train" and row.get("loss") is not None]
    losses = _points(train, "train", "loss")
    loss_lines = {"training loss": losses, "training loss, moving average": moving_average(losses)}
    metric_lines = {
        f"{split} {metric.name}": _points(rows, split, metric.name)
        for split in ("validation", "test")
    }
    highest = (0.0, OUTLIER_SHARE)
    if not train or metric.name in train[0]:
        panels = [(metric.name, loss_lines | metric_lines, highest)]
    else:  # the loss of an RBM is not a likelihood and gets its own panel
        worst = (OUTLIER_SHARE, 0.0) if metric.higher_is_better else highest
        panels = [(metric.name, metric_lines, worst), ("loss", loss_lines, highest)]
    panels = [panel for panel in panels if any(len(line) > 1 for line in panel[1].values())]
    if not panels:
        return
    with figure(8, 3 + 3 * len(panels), path) as page:
        ratios = [2] * len(panels) + [1]
        *upper, lower = page.subplots(len(panels) + 1, 1, sharex=True, height_ratios=ratios)
        for axes, (label, named, outliers) in zip(upper, panels, strict=True):
            _draw_lines(axes, named, {}, ("training loss",), outliers)
            axes.set_ylabel(label.replace("_", " "))
            axes.legend()
        norms = lower.twinx()
        for axes, key, label, color in (
            (lower, "lr", "learning rate", COLORS[0]),
            (norms, "grad_norm", "gradient norm", COLORS[1]),
        ):
            values = [row.get(key) or math.nan for row in train]
            axes.plot([row["step"] for row in train], values, color=color, linewidth=0.8)
            axes.set_ylabel(label, color=color)
        norms.set_yscale("log")
        lower.set_xlabel("step")


def _points(rows: Sequence[dict[str, Any]], split: str, name: str) -> list[tuple[float, float]]:
    """Return step and value of a metric in all rows of a split that have it."""
    return [
        (row["step"], row[name])
        for row in rows
        if row["split"] == split and row.get(name) is not None
    ]


def scatter_plot(points: Tensor, end: float) -> Image.Image:
    """Plot points (N, 2) in the square from 0 to `end`."""
    file = io.BytesIO()
    with figure(4, 4, file, dpi=100) as page:
        axes = page.subplots()
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=6, color=COLORS[0])
        axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    return Image.open(file).convert("RGB")


def plane_panels(
    target: Tensor,
    latent: Tensor | None,
    samples: Tensor,
    density: Tensor | None,
    latent_title: str,
    path: Path,
    target_density: Tensor | None = None,
) -> None:
    """Plot a model of points in the plane in up to four panels and write a PNG.

    A sample has the color of its latent, which shows the latent's direction from the origin.

    Args:
        target: Points of the data in the unit square, (N, 2).
        latent: The latents of the samples, (N, 2), or None.
        samples: Samples in the unit square, (N, 2).
        density: The density of the model on a grid of the unit square, (height, width), or None.
        latent_title: Title of the panel of the latents, such as their distribution.
        path: Path of the PNG.
        target_density: The density of the data on such a grid, shown instead of its points.
    """
    style: dict[str, Any] = {"s": 2, "linewidths": 0}
    sample_style = style | {"color": COLORS[0]}
    if latent is not None:
        angle = torch.atan2(latent[:, 1], latent[:, 0])
        sample_style = style | {"c": angle.numpy(), "cmap": "twilight_shifted"}
    data = {"data": target} if target_density is None else {"target density": target_density}
    optional = data | {latent_title: latent, "samples": samples, "density": density}
    panels = {title: values for title, values in optional.items() if values is not None}
    with figure(3.25 * len(panels), 3.6, path, dpi=130) as page:
        axes = page.subplots(1, len(panels))
        for panel, (title, values) in zip(axes, panels.items(), strict=True):
            if title in ("density", "target density"):
                picture = panel.imshow(
                    values.numpy(),
                    origin="lower",
                    extent=(0, 1, 0, 1),
                    cmap="magma",
                    vmax=values.float().quantile(0.998).item(),
                )
                page.colorbar(picture, ax=panel, label="density")
            else:
                colors = style | {"color": COLORS[0]} if title == "data" else sample_style
                panel.scatter(*values.T.numpy(), **colors)
            square = (-4, 4) if title == latent_title else (0, 1)
            panel.set(title=title, aspect="equal", xlim=square, ylim=square)
            panel.tick_params(labelsize=8)


@contextmanager
def figure(
    width: float, height: float, file: Path | BinaryIO, dpi: int = 120
) -> Iterator["Figure"]:
    """Yield a figure of this size in inches, then write it as a PNG.

    Args:
        width: Width in inches.
        height: Height in inches.
        file: File to write.
        dpi: Pixels per inch.
    """
    from matplotlib.figure import Figure  # slow to import, and rarely needed

    page = Figure(figsize=(width, height), layout="constrained")
    yield page
    if isinstance(file, Path):
        with atomic_write(file) as temporary:
            page.savefig(temporary, dpi=dpi, format="png")
    else:
        page.savefig(file, dpi=dpi, format="png")


def moving_average(points: Points) -> list[tuple[float, float]]:
    """Return the exponential moving average of y, which forgets the high losses at the start.

    m_t = c_t m_(t-1) + (1 - c_t) y_t with c_t = min(t / (t + 9), MAX_DECAY) and m_0 = y_0, as in
    TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    averages: list[tuple[float, float]] = []
    for count, (x, y) in enumerate(points):
        decay = min(count / (count + 9), MAX_DECAY)
        previous = averages[-1][1] if averages else 0.0
        averages.append((x, decay * previous + (1 - decay) * y))
    return averages


def limits(
    values: Iterable[float], outliers: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float] | None:
    """Return the lowest and the highest finite value with a margin, or None without values.

    The shares `outliers` of the lowest and the highest values are ignored.
    """
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return None
    low = finite[int(outliers[0] * len(finite))]
    high = finite[-1 - int(outliers[1] * len(finite))]
    margin = 0.06 * (high - low) + 1e-3 * max(abs(low), abs(high)) + 1e-6
    return low - margin, high + margin


def _draw_lines(
    axes: "Axes",
    named: Mapping[str, Points],
    errors: Mapping[str, Sequence[float]],
    thin: Collection[str],
    outliers: tuple[float, float],
) -> None:
    finite = {
        name: [(x, math.nan if y is None else y) for x, y in points]
        for name, points in named.items()
        if points
    }
    for index, (name, points) in enumerate(finite.items()):
        has_markers = len(points) <= MAX_MARKERS and name not in thin
        x, y = zip(*points, strict=True)
        axes.errorbar(
            x,
            y,
            errors.get(name),
            label=name,
            capsize=3,
            color=COLORS[index % len(COLORS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=0.6 if name in thin else 1.6,
            marker=MARKERS[index % len(MARKERS)] if has_markers else None,
            markersize=4,
        )
    if frame := limits((y for points in finite.values() for _, y in points), outliers):
        axes.set_ylim(*frame)
    axes.grid(alpha=0.3)
