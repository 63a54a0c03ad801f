"""The comparison that the thesis draws between its two experiments, in figures and in words that follow from them."""

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import judge
import kinds
import torch
from faces import TEMPERATURES
from figure import MAKE, Figure, figures_of, kept, unit
from torch import Tensor

import flowgen
from flowgen.commands.sample import draw
from flowgen.data import Images
from flowgen.models import Flow
from flowgen.training.run import Run

PAIRS, WAY = 16, 18  # an even number of pictures, since half-way between two images rounding favours the even levels
NOT_FID = "The original compares by eye. Measured among the 64 leading principal components of training images, which is no FID."
BY_EYE = "The original compares by eye."
PARTS = 4  # that the samples are cut into, for the error of a figure


class Comparison(NamedTuple):
    """Figures, a table (its head and rows), and sentences."""

    figures: list[Figure]
    table: list[list[str]]
    sentences: list[str]


def compare(runs: dict[str, Run], data: Images, folder: Path, count: int) -> Comparison:
    """Of the two experiments, by name; `count` samples and as many test images, at most."""
    found = {name: kept(run, "judged.json", lambda run=run: _judge(run, data, count)) for name, run in runs.items()}
    figures = [_curves(runs, data, folder), *_likeness(found, folder), *_walks(found, folder)]
    figures = [figure._replace(runs=[run.folder for run in runs.values()]) for figure in figures]
    return Comparison(figures, _table(runs, data), [*_sentences(found, data.bits), _fid(runs, data, count)])


def _judge(run: Run, data: Images, count: int) -> dict[str, Any]:
    """Likeness by temperature, with that of training images and the errors at temperature 1, and the walk between test images."""
    model = flowgen.load(run.folder, "auto")
    assert isinstance(model, Flow)
    train, test = (
        unit(torch.cat(list(data.batches(split, 500, most))), data.bits) for split, most in (("train", 5 * count), ("test", count))
    )
    held, others = train[: len(test)], train[len(test) :]  # what is judged is not what the components are found from
    space = judge.Space(others)
    real = space(test)
    samples = [space(unit(draw(model, len(test), temperature, 0)[0], data.bits)) for temperature in TEMPERATURES]
    levels = (test * (2**data.bits - 1)).round().to(torch.uint8)
    half = min(PAIRS, len(test) // 2)
    return {
        "likeness": [judge.likeness(points, real)._asdict() for points in samples],
        "training": judge.likeness(space(held), real)._asdict(),
        "parts": [judge.likeness(points, part)._asdict() for points, part in zip(_parts(samples[-1]), _parts(real), strict=True)],
        "walk": judge.walk(model, levels[:half], levels[half : 2 * half], WAY)._asdict(),
        "images": len(test),
    }


def _parts(points: Tensor) -> list[Tensor]:
    size = len(points) // PARTS
    return [points[place * size : (place + 1) * size] for place in range(PARTS)]


def _curves(runs: dict[str, Run], data: Images, folder: Path) -> Figure:
    tests = {name: [row for row in run.read_metrics() if row["split"] == "test"] for name, run in runs.items()}
    named = {name: [(row["step"], row["bits_per_dim"]) for row in rows] for name, rows in tests.items()}
    path = folder / "figure_C.1.png"
    kinds.lines(named, "step", f"test bits/dim at {data.bits} bits", path, offset=8.0 - data.bits)
    convention = ": left as they are, right in the thesis' convention" if data.bits < 8 else ""
    caption = f"Test bits/dim of both experiments by the averaged weights{convention}."
    return Figure("C.1", caption, path, [], MAKE, "The thesis shows training losses alone.")


def _likeness(found: dict[str, Any], folder: Path) -> list[Figure]:
    wanted = {
        "C.2": ("frechet", "Fréchet distance", "Closeness: the Fréchet distance of samples and test images, by temperature."),
        "C.3": ("precision", "precision", "Closeness: the share of samples near a test image."),
        "C.4": ("recall", "recall", "Diversity: the share of test images near a sample."),
        "C.5": ("spread", "mean distance of samples / of test images", "Diversity: how far apart two samples lie."),
    }
    images, training = (next(iter(found.values()))[key] for key in ("images", "training"))
    figures = []
    for number, (key, label, caption) in wanted.items():
        named = {
            name: [(temperature, each[key]) for temperature, each in zip(TEMPERATURES, judged["likeness"], strict=True)]
            for name, judged in found.items()
        }
        named["training images"] = [(TEMPERATURES[0], training[key]), (TEMPERATURES[-1], training[key])]
        path = folder / f"figure_{number}.png"
        kinds.lines(named, "temperature", label, path)
        figures.append(Figure(number, f"{caption} {images} of each.", path, [], MAKE, NOT_FID))
    return figures


def _walks(found: dict[str, Any], folder: Path) -> list[Figure]:
    shares = [step / (WAY - 1) for step in range(WAY)]
    middles = [(one + other) / 2 for one, other in pairwise(shares)]
    walks = {name: judged["walk"] for name, judged in found.items()}
    some = next(iter(walks.values()))
    steps = {name: list(zip(middles, walk["steps"], strict=True)) for name, walk in walks.items()}
    steps["pixels"] = list(zip(middles, some["pixel_steps"], strict=True))
    bits = {name: list(zip(shares, walk["bits"], strict=True)) for name, walk in walks.items()}
    bits |= {f"pixels, by {name}": list(zip(shares, walk["pixel_bits"], strict=True)) for name, walk in walks.items()}
    paths = folder / "figure_C.6.png", folder / "figure_C.7.png"
    kinds.lines(steps, "place on the way", "change of the pixels, root mean square", paths[0])
    kinds.lines(bits, "place on the way", "bits/dim of the picture there", paths[1])
    how = f"mean over {len(some['unevenness'])} pairs of test images, {WAY} pictures each"
    return [
        Figure("C.6", f"Smoothness: how much changes from each picture to the next; {how}.", paths[0], [], MAKE, BY_EYE),
        Figure("C.7", f"How likely the pictures on the way are; {how}.", paths[1], [], MAKE, BY_EYE),
    ]


def _table(runs: dict[str, Run], data: Images) -> list[list[str]]:
    size = ["parameters, millions", "steps", "images/s", "hours", "memory, GiB"]
    head = ["test bits/dim", "thesis' convention", "draws", "test images", *size]
    rows = [["", *head]]
    for name, run in runs.items():
        figures, train = figures_of(run), [row for row in run.read_metrics() if row["split"] == "train"]
        speeds = sorted(row["images_per_second"] for row in train)
        millions = sum(parameter.numel() for parameter in flowgen.load(run.folder).parameters()) / 1e6
        bits = figures["bits_per_dim"]
        rows.append(
            [
                name,
                "not finite" if bits is None else f"{bits:.3f} ± {figures['bits_per_dim_error']:.3f} at {data.bits} bits",
                "not finite" if bits is None else f"{bits + 8 - data.bits:.3f}",
                str(figures["draws"]),
                f"{figures['images']:,}",
                f"{millions:.2f}",
                f"{figures['step']:,}",
                f"{speeds[len(speeds) // 2]:.1f}",
                f"{train[-1]['seconds'] / 3600:.2f}",
                f"{max(row['memory_gib'] for row in train):.2f}",
            ]
        )
    return rows


def _sentences(found: dict[str, Any], bits: int) -> list[str]:
    """What the thesis claims, and what these runs say to it: a difference counts from two standard errors on."""
    one, two = found.values()
    distances = " and ".join(f"{each['likeness'][0]['frechet']:.1f}" for each in (one, two))
    recalls, spreads = ([_mean_and_error([part[key] for part in each["parts"]]) for each in (one, two)] for key in ("recall", "spread"))
    diverse = all(_larger(larger, smaller) for smaller, larger in (recalls, spreads))
    uneven = [_mean_and_error(each["walk"]["unevenness"]) for each in (one, two)]
    paired = _mean_and_error([a - b for a, b in zip(one["walk"]["unevenness"], two["walk"]["unevenness"], strict=True)])
    said = [
        "The thesis finds a neutral face at temperature 0 in experiment 2; figures 3.10 and 3.28 show what these runs give. Neutrality is "
        f"not measured here; the Fréchet distance of that one picture to the test images is {distances}, of experiment 1 and 2.",
        "The thesis finds the samples of experiment 2 more diverse. At temperature 1 recall is "
        f"{_said(recalls)}, the samples' mean distance {_said(spreads)} of the test images', each over {PARTS} parts: "
        f"{'found' if diverse else 'not found in both figures'}.",
        f"The thesis finds the interpolations of experiment 2 smoother. The largest step of a way is {_said(uneven)} times the mean one, "
        f"over the same pairs of images: {'found' if _larger(paired, (0.0, 0.0)) else 'not found'}.",
    ]
    if bits < 8:
        said.append(
            f"The thesis' loss adds 8 bits to data of {bits}: its figures are too high by {8 - bits}, which the right-hand axes show."
        )
    return said


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.double)
    return numbers.mean().item(), numbers.std().item() / math.sqrt(len(numbers))


def _larger(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] - other[0] > 2 * math.hypot(one[1], other[1])


def _said(pair: list[tuple[float, float]]) -> str:
    return " and ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in pair)


def _fid(runs: dict[str, Run], data: Images, count: int) -> str:
    """FID of both experiments at every temperature, as a sentence; kept once it has been found."""
    if not os.environ.get("FID_WEIGHTS"):
        return "FID is left out: set FID_WEIGHTS to the file of torch-fidelity's network, and install flowgen[fidelity], to have it."
    test = torch.cat(list(data.batches("test", 500, count))).cpu() << (8 - data.bits)

    def find(run: Run) -> list[float]:
        model = flowgen.load(run.folder, "auto")
        return [judge.fid(draw(model, len(test), each, 0)[0].cpu() << (8 - data.bits), test) for each in TEMPERATURES]

    one, two = (kept(run, "fid.json", lambda run=run: find(run)) for run in runs.values())
    told = "; ".join(f"T = {t:g}: {a:.1f} and {b:.1f}" for t, a, b in zip(TEMPERATURES, one, two, strict=True))
    return f"FID by torch-fidelity, of experiment 1 and 2, {len(test)} samples and as many test images: {told}."
