"""Plots of measured values, told apart by colour, dash and mark: lines, dots with errors, a run's curves, a flow of the plane."""

import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from flowgen.utils.metrics import Metric, MetricValue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]
Errors = Mapping[str, Sequence[float]]
NO_ERRORS: Errors = MappingProxyType({})

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
)  # Okabe and Ito's, safe for colour-blind eyes
DASHES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v")
MARKED = 40  # points of a line, beyond which marks would hide it
FIRST_STEPS = 0.03  # share of a training's worst values that may leave the frame, since they would flatten all the rest


def lines(
    named: Mapping[str, Points],
    file: Path | BinaryIO,
    *,
    xlabel: str,
    ylabel: str,
    errors: Errors = NO_ERRORS,
    thin: Collection[str] = (),
    beyond: tuple[float, float] = (0.0, 0.0),
    right: tuple[str, float] | None = None,
) -> None:
    """Lines through the finite (x, y), as PNG, those in `thin` thinner; `errors` are standard errors, one a point.

    The shares `beyond` of the lowest and of the highest values may leave the frame. `right` is a second axis: its label, and how much
    larger than y its values are.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(8, 4.5), layout="constrained")
    axes = page.subplots()
    _draw(axes, named, errors=errors, thin=thin, beyond=beyond)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if right:
        label, more = right
        shift: Any = (lambda y: y + more, lambda y: y - more)
        axes.secondary_yaxis("right", functions=shift).set_ylabel(label)
    if len(named) > 1:
        page.legend(loc="outside lower center", ncols=2, fontsize="small")
    page.savefig(file, dpi=120, format="png")


def dots(named: Mapping[str, tuple[float, float]], label: str, path: Path) -> None:
    """A dot for each name, at its value with its standard error, which are written above it."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(8, 1.2 + 0.3 * len(named)), layout="constrained")
    axes = page.subplots()
    names = list(named)[::-1]
    values, errors = zip(*(named[name] for name in names), strict=True)
    axes.errorbar(values, range(len(names)), xerr=errors, fmt="o", color=COLORS[0], capsize=3)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        axes.annotate(
            f"{value:.2f} ± {error:.2f}",
            (value, place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    page.savefig(path, dpi=120)


def curves(rows: Sequence[dict[str, Any]], metric: Metric, path: Path) -> None:
    """The training loss, its moving average, and `metric` of every other split by the step; the learning rate and gradient norm below."""
    from matplotlib.figure import Figure

    train = [row for row in rows if row["split"] == "train" and row.get("loss") is not None]
    losses = [(row["step"], row["loss"]) for row in train]
    loss = {"training loss": losses, "training loss, moving average": moving_average(losses)}
    held_out: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["split"] != "train" and (measured := MetricValue.from_row(row, metric)):
            held_out.setdefault(f"{row['split']} {metric.name}", []).append(
                (row["step"], measured.value)
            )
    if not losses and not held_out:
        return
    in_one = (
        not train or metric.name in train[0]
    )  # the loss of an RBM is no likelihood, and gets a panel of its own
    above, below = (0.0, FIRST_STEPS), (FIRST_STEPS, 0.0)
    judged = (
        [(metric.name, held_out, below if metric.higher_is_better else above)] if held_out else []
    )
    panels = [(metric.name, loss | held_out, above)] if in_one else [*judged, ("loss", loss, above)]
    page = Figure(figsize=(8, 3 + 3 * len(panels)), layout="constrained")
    *upper, lower = page.subplots(
        len(panels) + 1, 1, sharex=True, height_ratios=(*(2 for _ in panels), 1)
    )
    for axes, (label, named, beyond) in zip(upper, panels, strict=True):
        _draw(axes, named, thin=("training loss",), beyond=beyond)
        axes.set_ylabel(label.replace("_", " "))
        axes.legend()
    norms = lower.twinx()
    for axes, key, colour in ((lower, "lr", COLORS[0]), (norms, "grad_norm", COLORS[1])):
        axes.plot(
            [row["step"] for row in train],
            [row.get(key) or math.nan for row in train],
            color=colour,
            linewidth=0.8,
        )
        axes.set_ylabel({"lr": "learning rate", "grad_norm": "gradient norm"}[key], color=colour)
    norms.set_yscale("log")
    lower.set_xlabel("step")
    page.savefig(path, dpi=120)


def scatter(points: Tensor, end: float) -> Image.Image:
    """Points (N, 2) of the square from 0 to `end`."""
    from matplotlib.figure import Figure

    page, file = Figure(figsize=(4, 4), layout="constrained"), io.BytesIO()
    axes = page.subplots()
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=6, color=COLORS[0])
    axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    page.savefig(file, dpi=100)
    return Image.open(file).convert("RGB")


def plane(
    target: Tensor, latent: Tensor, carried: Tensor, density: Tensor, temperature: float, path: Path
) -> None:
    """Four pictures of a flow of the plane: the target's points, N(0, temperature^2 I), what the flow makes of it, and its density.

    Points are (N, 2); those of the target and the carried ones lie in the unit square, as does the density (height, width). The latent
    points' colour is the direction that they lie in, and they keep it where they are carried to.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(13, 3.6), layout="constrained")
    axes = page.subplots(1, 4)
    angle = torch.atan2(latent[:, 1], latent[:, 0])
    colour = {"c": angle.numpy(), "cmap": "twilight_shifted", "s": 2, "linewidths": 0}
    axes[0].scatter(*target.T.numpy(), s=2, linewidths=0, color=COLORS[0])
    axes[1].scatter(*latent.T.numpy(), **colour)
    axes[2].scatter(*carried.T.numpy(), **colour)
    picture = axes[3].imshow(
        density.numpy(),
        origin="lower",
        extent=(0, 1, 0, 1),
        cmap="magma",
        vmax=density.quantile(0.998).item(),
    )
    page.colorbar(picture, ax=axes[3], label="density")
    axes[1].set(xlim=(-4, 4), ylim=(-4, 4))
    base = "N(0, I)" if temperature == 1 else f"N(0, {temperature:g}² I)"
    for each, title in zip(
        axes, ("the target", base, "carried into the data", "the density"), strict=True
    ):
        each.set(title=title, aspect="equal")
        each.tick_params(labelsize=8)
    for each in (axes[0], axes[2]):
        each.set(xlim=(0, 1), ylim=(0, 1))
    page.savefig(path, dpi=130)


def moving_average(points: Points, memory: float = 0.95) -> list[tuple[float, float]]:
    """The exponential moving average of y, corrected for its start at 0. Kingma and Ba, Adam (1412.6980), section 3.

    m_t = memory m_(t-1) + (1 - memory) y_t, over 1 - memory^t: the first value counts no more than its weight among all.
    """
    averages, total = [], 0.0
    for count, (x, y) in enumerate(points, 1):
        total = memory * total + (1 - memory) * y
        averages.append((x, total / (1 - memory**count)))
    return averages


def limits(
    values: Iterable[float], beyond: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float] | None:
    """The lowest and the highest of the finite values, with a margin, but for the shares `beyond` of them; None where there are none."""
    found = sorted(value for value in values if math.isfinite(value))
    if not found:
        return None
    below, above = (int(share * len(found)) for share in beyond)
    low, high = found[below], found[-1 - above]
    margin = 0.06 * (high - low) + 1e-3 * max(abs(low), abs(high)) + 1e-6
    return low - margin, high + margin


def _draw(
    axes: "Axes",
    named: Mapping[str, Points],
    *,
    errors: Errors = NO_ERRORS,
    thin: Collection[str] = (),
    beyond: tuple[float, float] = (0.0, 0.0),
) -> None:
    finite = {
        name: [(x, y if y is not None else math.nan) for x, y in points]
        for name, points in named.items()
        if points
    }
    for number, (name, points) in enumerate(finite.items()):
        style: dict[str, Any] = {
            "color": COLORS[number % len(COLORS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
        if len(points) <= MARKED and name not in thin:
            style |= {"marker": MARKS[number % len(MARKS)], "markersize": 4}
        x, y = zip(*points, strict=True)
        axes.errorbar(
            x,
            y,
            errors.get(name),
            label=name,
            linewidth=0.6 if name in thin else 1.6,
            capsize=3,
            **style,
        )
    if frame := limits((y for points in finite.values() for _, y in points), beyond):
        axes.set_ylim(*frame)
    axes.grid(alpha=0.3)
