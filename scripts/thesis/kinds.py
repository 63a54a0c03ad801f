"""The kinds of figures, one function each; all write a PNG with a white ground and colours for colour-blind eyes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from flowgen.plots import COLOURS, DASHES, MARKS

Points = Sequence[tuple[float, float]]
SMOOTHED = 11


def tiles(images: Tensor, titles: Sequence[str], columns: int, path: Path) -> None:
    """Images (N, channels, height, width) in [0, 1], `columns` in a row, each under its title, enlarged without smoothing."""
    rows = -(-len(images) // columns)
    high = 1.12 + 0.12 * max((title.count("\n") + 1 for title in titles if title), default=0)
    page = Figure(figsize=(1.1 * columns, 1.1 * high * rows), layout="constrained")
    axes = page.subplots(rows, columns, squeeze=False).flatten()
    for each in axes:
        each.axis("off")
    pixels = images.clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    for each, picture, title in zip(axes, pixels, titles, strict=False):
        each.imshow(picture, interpolation="nearest")
        each.set_title(title, fontsize=8 if columns < 9 else 11)
    page.savefig(path, dpi=150)


def lines(
    named: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    path: Path,
    thin: bool = False,
    offset: float = 0.0,
    skip: float = 0.0,
    errors: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> None:
    """Lines through the finite (x, y), told apart by colour, dash and mark. `offset` adds a second axis, y + offset.

    The highest `skip` of the values may leave the frame above, as the first steps of a training, which would flatten all the rest.
    """
    finite = {name: [(x, y) for x, y in points if y is not None and math.isfinite(y)] for name, points in named.items()}
    named = {name: points for name, points in finite.items() if points}
    page = Figure(figsize=(8, 4.2), layout="constrained")
    axes = page.subplots()
    for number, (name, points) in enumerate(named.items()):
        x, y = zip(*points, strict=True)
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "label": name}
        few = {"marker": MARKS[number % len(MARKS)], "markersize": 4} if len(x) <= 40 else {}
        axes.errorbar(x, y, errors.get(name), linewidth=0.6 if thin else 1.6, capsize=3, **style, **few)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    values = sorted(y for points in named.values() for _, y in points)
    if values:
        low, high = values[0], values[int((1 - skip) * (len(values) - 1))]
        margin = 0.06 * (high - low) + 1e-6 + 1e-3 * abs(high)
        axes.set_ylim(low - margin, high + margin)
    if offset:
        second = axes.secondary_yaxis("right", functions=(lambda y: y + offset, lambda y: y - offset))
        second.set_ylabel(f"the thesis' convention: {offset:g} more")
    if len(named) > 1:
        page.legend(loc="outside lower center", ncols=2, fontsize="small")
    page.savefig(path, dpi=120)


def dots(named: Mapping[str, tuple[float, float]], label: str, path: Path) -> None:
    """A dot with its error for each name, and its figure above it."""
    page = Figure(figsize=(8, 1.2 + 0.3 * len(named)), layout="constrained")
    axes = page.subplots()
    names = list(reversed(named))
    values, errors = zip(*(named[name] for name in names), strict=True)
    axes.errorbar(values, range(len(names)), xerr=errors, fmt="o", color=COLOURS[0], capsize=3)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        axes.annotate(f"{value:.2f} ± {error:.2f}", (value, place), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    page.savefig(path, dpi=120)


def page_of(pictures: dict[str, Image.Image], path: Path) -> None:
    """Pictures one above the other, each beside its name."""
    width = max(picture.width for picture in pictures.values()) / 110
    heights = [picture.height / 110 for picture in pictures.values()]
    page = Figure(figsize=(width + 1.4, sum(heights) + 0.1 * len(heights)), layout="constrained")
    axes = page.subplots(len(pictures), 1, squeeze=False, height_ratios=heights).flatten()
    for each, (name, picture) in zip(axes, pictures.items(), strict=True):
        each.imshow(picture, interpolation="nearest")
        each.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        each.set(xticks=[], yticks=[])
        each.spines[:].set_visible(False)
    page.savefig(path, dpi=110, bbox_inches="tight")


def moving_average(points: Points, share: float = 0.02) -> list[tuple[float, float]]:
    """The mean over a window of `share` of all points around each, of `SMOOTHED` points at least."""
    if not points:
        return []
    half = max(SMOOTHED // 2, int(share * len(points) / 2))
    values = torch.tensor([y for _, y in points], dtype=torch.double)
    means = [values[max(0, place - half) : place + half + 1].mean().item() for place in range(len(values))]
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
