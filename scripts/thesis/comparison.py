"""The comparison that the thesis draws between its two experiments: what is measured, its figures and its table."""

import os
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import claims
import judge
import kinds
import torch
from faces import TEMPERATURES
from figure import MAKE, Figure, drawn, figures_of, kept, unit
from torch import Tensor

import flowgen
from flowgen.commands.sample import draw
from flowgen.data import Images
from flowgen.models import Flow
from flowgen.training.run import Run

PAIRS, WAY = 16, 18  # an even number of pictures, since half-way between two images rounding favours the even levels
REPEATS = 4  # draws of as many samples as there are test images, for the error of a figure
NOT_FID = "The original compares by eye. Measured among the 64 leading principal components of training images, which is no FID."
BY_EYE = "The original compares by eye."


class Comparison(NamedTuple):
    """Figures, a table (its head and rows), and sentences."""

    figures: list[Figure]
    table: list[list[str]]
    sentences: list[str]


def compare(runs: dict[str, Run], data: Images, folder: Path, count: int) -> Comparison:
    """Of the two experiments, by name; `count` samples and as many test images, at most."""
    found = {name: kept(run, "judged.json", lambda run=run: _judge(run, data, count)) for name, run in runs.items()}
    newest = max(runs.values(), key=lambda run: run.last.stat().st_mtime)
    figures = [_curves(runs, newest, data, folder), *_likeness(found, newest, folder), *_walks(found, newest, folder)]
    figures = [figure._replace(runs=[run.folder for run in runs.values()]) for figure in figures]
    return Comparison(figures, _table(runs, found, data), [*claims.sentences(found, data.bits), _fidelity(runs, data, count)])


def _judge(run: Run, data: Images, count: int) -> dict[str, Any]:
    """All that the comparison needs of one experiment, as JSON keeps it."""
    model = flowgen.load(run.folder, "auto")
    assert isinstance(model, Flow)
    train, test = (torch.cat(list(data.batches(split, 500, most))) for split, most in (("train", 5 * count), ("test", count)))
    held, others = train[: len(test)], train[len(test) :]  # what is judged is not what the components are found from
    space = judge.Space(unit(others, data.bits))
    real = space(unit(test, data.bits))
    half = min(PAIRS, len(test) // 2)

    def samples(temperature: float) -> list[Tensor]:
        seeds = range(REPEATS if temperature else 1)  # at temperature 0 all samples are one
        return [space(unit(draw(model, len(test), temperature, seed)[0], data.bits)) for seed in seeds]

    points = {temperature: samples(temperature) for temperature in TEMPERATURES}
    return {
        "likeness": [[judge.likeness(each, real)._asdict() for each in drawn_] for drawn_ in points.values()],
        "training": judge.likeness(space(unit(held, data.bits)), real)._asdict(),
        "neutral": judge.offset(points[0.0][0][0], real),
        "bits": judge.bits_per_image(model, test.split(64)).tolist(),
        "walk": judge.walk(model, test[:half], test[half : 2 * half], WAY)._asdict(),
        "images": len(test),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _curves(runs: dict[str, Run], newest: Run, data: Images, folder: Path) -> Figure:
    tests = {name: [row for row in run.read_metrics() if row["split"] == "validation"] for name, run in runs.items()}
    named = {name: [(row["step"], row["bits_per_dim"]) for row in rows] for name, rows in tests.items()}
    label, offset = f"validation bits/dim at {data.bits} bits", 8.0 - data.bits
    path = drawn(folder / "figure_C.1.png", newest, lambda at: kinds.lines(named, "step", label, at, offset=offset))
    convention = ": left as they are, right in the thesis' convention" if data.bits < 8 else ""
    images = min(len(data.validation), *(rows[-1]["images"] for rows in tests.values()))
    caption = f"Bits/dim of {images:,} validation images as training went, by the averaged weights{convention}."
    return Figure("C.1", caption, path, [], MAKE, "The thesis shows training losses alone.")


def _likeness(found: dict[str, Any], newest: Run, folder: Path) -> list[Figure]:
    wanted = {
        "C.2": ("frechet", "Fréchet distance", "Closeness: the Fréchet distance of samples and test images, by temperature."),
        "C.3": ("coverage", "coverage", "Diversity: the share of test images with a sample as near as their fifth neighbour among them."),
        "C.4": ("spread", "mean distance of samples / of test images", "Diversity: how far apart two samples lie."),
    }
    images, training = (next(iter(found.values()))[key] for key in ("images", "training"))
    how = f"{images} of each; error bars over {REPEATS} draws of the samples."
    figures = []
    for number, (key, label, caption) in wanted.items():
        named, errors = {}, {}
        for name, judged in found.items():
            values = [claims.mean_and_error([one[key] for one in repeats]) for repeats in judged["likeness"]]
            named[name] = [(temperature, mean) for temperature, (mean, _) in zip(TEMPERATURES, values, strict=True)]
            errors[name] = [error for _, error in values]
        named["training images"] = [(TEMPERATURES[0], training[key]), (TEMPERATURES[-1], training[key])]
        path = drawn(
            folder / f"figure_{number}.png",
            newest,
            lambda at, named=named, errors=errors, label=label: kinds.lines(named, "temperature", label, at, errors=errors),
        )
        figures.append(Figure(number, f"{caption} {how}", path, [], MAKE, NOT_FID))
    return figures


def _walks(found: dict[str, Any], newest: Run, folder: Path) -> list[Figure]:
    shares = [step / (WAY - 1) for step in range(WAY)]
    middles = [(one + other) / 2 for one, other in pairwise(shares)]
    walks = {name: judged["walk"] for name, judged in found.items()}
    some = next(iter(walks.values()))
    steps = {name: list(zip(middles, walk["steps"], strict=True)) for name, walk in walks.items()}
    steps["pixels"] = list(zip(middles, some["pixel_steps"], strict=True))
    bits = {name: list(zip(shares, walk["bits"], strict=True)) for name, walk in walks.items()}
    bits |= {f"pixels, by {name}": list(zip(shares, walk["pixel_bits"], strict=True)) for name, walk in walks.items()}
    change = "change of the pixels, root mean square"
    paths = (
        drawn(folder / "figure_C.5.png", newest, lambda at: kinds.lines(steps, "place on the way", change, at)),
        drawn(folder / "figure_C.6.png", newest, lambda at: kinds.lines(bits, "place on the way", "bits/dim of the picture there", at)),
    )
    how = f"mean over {len(some['unevenness'])} pairs of test images, {WAY} pictures each"
    return [
        Figure("C.5", f"Smoothness: how much changes from each picture to the next; {how}.", paths[0], [], MAKE, BY_EYE),
        Figure("C.6", f"How likely the pictures on the way are; {how}.", paths[1], [], MAKE, BY_EYE),
    ]


def _table(runs: dict[str, Run], found: dict[str, Any], data: Images) -> list[list[str]]:
    """A row for each measure: its name, both experiments, and what the thesis gives."""
    rows = [
        ("", "the thesis"),
        (f"test bits/dim at {data.bits} bits", "-"),
        ("the same in the thesis' convention", "-"),
        ("test images, draws of the noise", "-"),
        ("parameters, millions", "-"),
        ("steps", "168,800 and 185,800"),
        ("images/s while training", "-"),
        ("hours, with test figures and samples", "72, from 12 to 144"),
        ("memory of the GPU, or of the process on a CPU, GiB", "12"),
    ]
    columns = [[name, *_costs(run, found[name], data)] for name, run in runs.items()]
    return [[name, *values, told] for (name, told), *values in zip(rows, *columns, strict=True)]


def _costs(run: Run, judged: dict[str, Any], data: Images) -> list[str]:
    figures, train = figures_of(run), [row for row in run.read_metrics() if row["split"] == "train"]
    bits = figures["bits_per_dim"]
    return [
        "not finite" if bits is None else f"{bits:.3f} ± {figures['bits_per_dim_error']:.3f}",
        "not finite" if bits is None else f"{bits + 8 - data.bits:.3f}",
        f"{figures['images']:,}, {figures['draws']}",
        f"{judged['parameters'] / 1e6:.2f}",
        f"{figures['step']:,}",
        f"{median(row['images_per_second'] for row in train):.1f}",
        f"{train[-1]['seconds'] / 3600:.2f}",
        f"{max(row['memory_gib'] for row in train):.2f}",
    ]


def _fidelity(runs: dict[str, Run], data: Images, count: int) -> str:
    """FID, precision and recall of both experiments at every temperature, as a sentence; kept once they have been found."""
    if not os.environ.get("FID_WEIGHTS"):
        return "FID is left out: set FID_WEIGHTS to the file of torch-fidelity's network, and install flowgen[fidelity], to have it."
    test = torch.cat(list(data.batches("test", 500, count))).cpu() << (8 - data.bits)

    def find(run: Run) -> list[dict[str, float]]:
        model = flowgen.load(run.folder, "auto")
        return [judge.fidelity(draw(model, len(test), each, 0)[0].cpu() << (8 - data.bits), test) for each in TEMPERATURES]

    one, two = (kept(run, "fidelity.json", lambda run=run: find(run)) for run in runs.values())
    told = "; ".join(
        f"T = {temperature:g}: " + ", ".join(f"{key} {a[key]:.3g} and {b[key]:.3g}" for key in a)
        for temperature, a, b in zip(TEMPERATURES, one, two, strict=True)
    )
    return f"By torch-fidelity, of experiment 1 and 2, {len(test)} samples and as many test images: {told}."
