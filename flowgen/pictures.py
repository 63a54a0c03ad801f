"""Pictures of levels and of measured values: grids, strips, films, curves."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowgen.vision import make_grid, to_pil_image

SMALLEST_SIDE = 56  # pixels on the page; smaller images are enlarged by a whole factor

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's, safe for colour-blind eyes
DASHES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v")


def to_image(levels: Tensor, bits: int, columns: int) -> Image.Image:
    """A grid of images, (N, channels, height, width) levels, `columns` in a row; images of two numbers are points in the plane."""
    if levels.shape[1:] == (2, 1, 1):
        return _scatter(levels.flatten(1).cpu(), 2**bits)
    pixels = levels.cpu().int() * 255 // (2**bits - 1)
    factor = -(-SMALLEST_SIDE // min(levels.shape[-2:]))
    pixels = pixels.to(torch.uint8).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(pixels, nrow=columns, padding=2, pad_value=255)
    return to_pil_image(grid)


def _scatter(points: Tensor, end: float) -> Image.Image:
    from matplotlib.figure import Figure

    page, file = Figure(figsize=(4, 4), layout="constrained"), io.BytesIO()
    axes = page.subplots()
    axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=6, color=COLOURS[0])
    axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    page.savefig(file, dpi=100)
    return Image.open(file).convert("RGB")


def plane(target: Tensor, latent: Tensor, carried: Tensor, density: Tensor, temperature: float, path: Path) -> None:
    """Four pictures of a flow of the plane: the target's points, N(0, temperature^2 I), what the flow makes of it, and its density.

    Points are (N, 2); those of the target and the carried ones lie in the unit square, as does the density (height, width). The latent
    points' colour is the direction that they lie in, and they keep it where they are carried to.
    """
    from matplotlib.figure import Figure

    page = Figure(figsize=(13, 3.6), layout="constrained")
    axes = page.subplots(1, 4)
    angle = torch.atan2(latent[:, 1], latent[:, 0])
    colour = {"c": angle.numpy(), "cmap": "twilight_shifted", "s": 2, "linewidths": 0}
    axes[0].scatter(*target.T.numpy(), s=2, linewidths=0, color=COLOURS[0])
    axes[1].scatter(*latent.T.numpy(), **colour)
    axes[2].scatter(*carried.T.numpy(), **colour)
    picture = axes[3].imshow(density.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap="magma", vmax=density.quantile(0.998).item())
    page.colorbar(picture, ax=axes[3], label="density")
    axes[1].set(xlim=(-4, 4), ylim=(-4, 4))
    base = "N(0, I)" if temperature == 1 else f"N(0, {temperature:g}² I)"
    for each, title in zip(axes, ("the target", base, "carried into the data", "the density"), strict=True):
        each.set(title=title, aspect="equal")
        each.tick_params(labelsize=8)
    for each in (axes[0], axes[2]):
        each.set(xlim=(0, 1), ylim=(0, 1))
    page.savefig(path, dpi=130)


def signed(weights: Tensor, columns: int = 20, most: int = 400) -> Image.Image:
    """Weights (count, channels, height, width) as tiles: blue below zero, white at zero, orange above, each on its own scale."""
    tiles = weights[:most].mean(1).cpu().float()
    tiles = tiles / tiles.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
    above, below = torch.tensor([217, 95, 2.0]), torch.tensor([8, 81, 156.0])
    end = torch.where(tiles[..., None] > 0, above, below)
    colours = 255 + (end - 255) * tiles.abs()[..., None]
    return to_image(colours.round().to(torch.uint8).permute(0, 3, 1, 2), 8, columns=min(columns, len(tiles)))


def blocks(titled: Sequence[tuple[str, Tensor]], bits: int, columns: int) -> Image.Image:
    """Grids one above the other, each under its title."""
    font = ImageFont.load_default(14)
    grids = [to_image(levels, bits, columns) for _, levels in titled]
    bar = 24
    width = max(grid.width for grid in grids), *(math.ceil(font.getlength(title)) + 8 for title, _ in titled)
    page = Image.new("RGB", (max(width), sum(grid.height + bar for grid in grids)), "white")
    draw, top = ImageDraw.Draw(page), 0
    for (title, _), grid in zip(titled, grids, strict=True):
        draw.text((4, top + 4), title, fill="black", font=font)
        page.paste(grid, (0, top + bar))
        top += grid.height + bar
    return page


def film(frames: Sequence[Tensor], bits: int, columns: int, path: Path, milliseconds: int = 80) -> None:
    """An endless GIF, one grid a frame."""
    first, *rest = (to_image(frame, bits, columns) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)


def curves(rows: Sequence[dict[str, Any]], figure: str, path: Path) -> None:
    """The training loss, its moving average, and the test figure against the step; the learning rate and gradient norm below."""
    from matplotlib.figure import Figure

    train = [row for row in rows if row["split"] == "train" and row.get("loss") is not None]
    test = [row for row in rows if row["split"] == "test" and row.get(figure) is not None]
    if not train and not test:
        return
    is_figure = not train or figure in train[0]  # the loss of an RBM is no likelihood, and gets a panel of its own
    page = Figure(figsize=(8, 7 if is_figure else 9), layout="constrained")
    *panels, below = page.subplots(2 if is_figure else 3, 1, sharex=True, height_ratios=(2, 1) if is_figure else (2, 2, 1))
    above, of_loss = panels[0], panels[-1]
    steps = [row["step"] for row in train]
    losses = [row["loss"] for row in train]
    of_loss.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training loss")
    of_loss.plot(steps, _moving_average(losses), color="#08519c", label="training loss, moving average")
    above.plot([row["step"] for row in test], [row[figure] for row in test], "o-", color="#d95f02", label=f"test {figure}")
    for panel, label in zip(panels, (figure.replace("_", " "), "loss"), strict=False):
        values = sorted(value for line in panel.lines for value in line.get_ydata())
        if values:
            low, high = values[0], values[int(0.97 * (len(values) - 1))]  # the first steps would flatten all the rest
            panel.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        panel.set_ylabel(label)
        panel.legend()
    below.plot(steps, [row.get("lr") for row in train], color="#08519c", label="learning rate")
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    norms = below.twinx()
    norms.plot(steps, [row.get("grad_norm") or float("nan") for row in train], color="#d95f02", linewidth=0.8, label="gradient norm")
    norms.set_yscale("log")
    norms.set_ylabel("gradient norm")
    page.legend(*_handles(below, norms), loc="outside lower center", ncols=2)
    page.savefig(path, dpi=120)


def compare(lines: dict[str, list[tuple[int, float]]], label: str, file: Path | BinaryIO) -> None:
    """Each named line of (step, figure), told apart by colour, dash and mark."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(9, 5), layout="constrained")
    axes = page.subplots()
    for number, (name, points) in enumerate(lines.items()):
        steps, found = zip(*points, strict=True)
        mark, dash = MARKS[number % len(MARKS)], DASHES[number % len(DASHES)]
        axes.plot(steps, found, color=COLOURS[number % len(COLOURS)], linestyle=dash, marker=mark, markersize=4, label=name)
    values = sorted(value for points in lines.values() for _, value in points)
    low, high = values[len(values) // 20], values[-1 - len(values) // 20]  # a bad start would flatten all the rest
    axes.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    page.legend(loc="outside lower center", ncols=2 if len(lines) > 4 else 1, fontsize="small")
    page.savefig(file, dpi=120, format="png")


def _handles(*axes: Any) -> tuple[list[Any], list[str]]:
    pairs = [axis.get_legend_handles_labels() for axis in axes]
    return [handle for handles, _ in pairs for handle in handles], [label for _, labels in pairs for label in labels]


def _moving_average(values: Sequence[float], memory: float = 0.95) -> list[float]:
    averages, average = [], values[0] if values else 0.0
    for value in values:
        average = memory * average + (1 - memory) * value
        averages.append(average)
    return averages
