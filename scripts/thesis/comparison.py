"""The comparison that the thesis draws between its two experiments, in figures and in words that follow from them."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import judge
import kinds
import torch
from faces import TEMPERATURES
from figure import Figure, drawn, figures_of, unit

import flowgen
from flowgen.commands.sample import draw
from flowgen.data import Images
from flowgen.models import Flow
from flowgen.training.run import Run

PAIRS, WAY = 16, 17
NOT_FID = "The original compares by eye. Measured in the 64 leading principal components of the training images, which is no FID."


class Comparison(NamedTuple):
    """Figures, a table (its head and rows), and sentences."""

    figures: list[Figure]
    table: list[list[str]]
    sentences: list[str]


def judged(run: Run, data: Images, count: int) -> dict[str, Any]:
    """Likeness by temperature and the walk between test images, kept beside the run."""
    path = run.folder / "judged.json"
    drawn(path, run, lambda aside: aside.write_text(json.dumps(_judge(run, data, count))))
    return json.loads(path.read_text())


def _judge(run: Run, data: Images, count: int) -> dict[str, Any]:
    model = flowgen.load(run.folder, "auto")
    assert isinstance(model, Flow)
    train, test = (torch.cat(list(data.batches(split, 500, count))).cpu() for split in ("train", "test"))
    space = judge.Space(unit(train, data.bits))
    real = space(unit(test, data.bits))
    likeness, fids = [], []
    for temperature in TEMPERATURES:
        levels = draw(model, len(test), temperature, 0)[0].cpu()
        likeness.append(judge.likeness(space(unit(levels, data.bits)), real)._asdict())
        fids.append(judge.fid(levels << (8 - data.bits), test << (8 - data.bits)))
    floor = judge.likeness(space(unit(train[: len(test)], data.bits)), real)._asdict()
    half = min(PAIRS, len(test) // 2)
    walk = judge.walk(model, test[:half], test[half : 2 * half], WAY)._asdict()
    return {"likeness": likeness, "floor": floor, "fid": fids, "walk": walk, "images": len(test)}


def compare(runs: dict[str, Run], data: Images, folder: Path, count: int) -> Comparison:
    """Of the two experiments, by name."""
    newest = max(runs.values(), key=lambda run: run.last.stat().st_mtime)
    found = {name: judged(run, data, count) for name, run in runs.items()}
    figures = [*_curves(runs, data, folder, newest), *_likeness(found, folder, newest), *_walks(found, folder, newest)]
    figures = [figure._replace(runs=[run.folder for run in runs.values()]) for figure in figures]
    return Comparison(figures, _table(runs, data), _sentences(found))


def _curves(runs: dict[str, Run], data: Images, folder: Path, newest: Run) -> list[Figure]:
    tests = {name: [row for row in run.read_metrics() if row["split"] == "test"] for name, run in runs.items()}
    named = {name: [(row["step"], row["bits_per_dim"]) for row in rows] for name, rows in tests.items()}
    path = folder / "figure_C.1.png"
    label = f"test bits/dim at {data.bits} bits"
    drawn(path, newest, lambda at: kinds.lines(named, "step", label, at, offset=8.0 - data.bits))
    caption = "Test bits/dim of both experiments by the averaged weights: left as they are, right in the thesis' convention."
    return [Figure("C.1", caption, path, [], "flowgen report RUNS", "The thesis shows training losses alone.")]


def _likeness(found: dict[str, Any], folder: Path, newest: Run) -> list[Figure]:
    figures = []
    kinds_of = {
        "C.2": ("frechet", "Fréchet distance", "Closeness: the Fréchet distance of samples and test images, by temperature."),
        "C.3": ("precision", "precision", "Closeness: the share of samples near a test image."),
        "C.4": ("recall", "recall", "Diversity: the share of test images near a sample."),
        "C.5": ("spread", "mean distance of samples / of test images", "Diversity: how far apart two samples lie."),
    }
    for number, (key, label, caption) in kinds_of.items():
        named = {
            name: [(temperature, each[key]) for temperature, each in zip(TEMPERATURES, judged_["likeness"], strict=True)]
            for name, judged_ in found.items()
        }
        floor = next(iter(found.values()))["floor"][key]
        named["training images"] = [(TEMPERATURES[0], floor), (TEMPERATURES[-1], floor)]
        path = folder / f"figure_{number}.png"
        drawn(path, newest, lambda at, named=named, label=label: kinds.lines(named, "temperature", label, at))
        images = next(iter(found.values()))["images"]
        figures.append(Figure(number, f"{caption} {images} of each.", path, [], "make reproduce-thesis", NOT_FID))
    return figures


def _walks(found: dict[str, Any], folder: Path, newest: Run) -> list[Figure]:
    shares = [step / (WAY - 1) for step in range(WAY)]
    middles = [(one + other) / 2 for one, other in pairwise(shares)]
    walks = {name: judged_["walk"] for name, judged_ in found.items()}
    pixels = next(iter(walks.values()))["pixel_steps"]
    steps = {name: list(zip(middles, walk["steps"], strict=True)) for name, walk in walks.items()}
    steps["pixels"] = list(zip(middles, pixels, strict=True))
    bits = {name: list(zip(shares, walk["bits"], strict=True)) for name, walk in walks.items()}
    bits |= {f"pixels, by {name}": list(zip(shares, walk["pixel_bits"], strict=True)) for name, walk in walks.items()}
    paths = folder / "figure_C.6.png", folder / "figure_C.7.png"
    drawn(paths[0], newest, lambda at: kinds.lines(steps, "place on the way", "change of the pixels, root mean square", at))
    drawn(paths[1], newest, lambda at: kinds.lines(bits, "place on the way", "bits/dim of the picture there", at))
    how = f"mean over {PAIRS} pairs of test images, {WAY} pictures each"
    by_eye = "The original compares by eye."
    return [
        Figure("C.6", f"Smoothness: how much changes from each picture to the next; {how}.", paths[0], [], MAKE, by_eye),
        Figure("C.7", f"How likely the pictures on the way are; {how}.", paths[1], [], MAKE, by_eye),
    ]


MAKE = "make reproduce-thesis"


def _table(runs: dict[str, Run], data: Images) -> list[list[str]]:
    head = [
        "",
        "test bits/dim",
        "thesis' convention",
        "draws",
        "test images",
        "parameters, millions",
        "steps",
        "images/s",
        "hours",
        "memory, GiB",
    ]
    rows = [head]
    for name, run in runs.items():
        figures, train = figures_of(run), [row for row in run.read_metrics() if row["split"] == "train"]
        speeds = sorted(row["images_per_second"] for row in train)
        millions = sum(parameter.numel() for parameter in flowgen.load(run.folder).parameters()) / 1e6
        rows.append(
            [
                name,
                f"{figures['bits_per_dim']:.3f} ± {figures['bits_per_dim_error']:.3f} at {data.bits} bits",
                f"{figures['bits_per_dim'] + 8 - data.bits:.3f}",
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


def _sentences(found: dict[str, Any]) -> list[str]:
    """What the thesis claims, and what these runs say to it."""
    one, two = found.values()
    warmest = {name: [each["likeness"][-1][name] for each in (one, two)] for name in ("recall", "spread")}
    uneven, errors = ([each["walk"][key] for each in (one, two)] for key in ("unevenness", "unevenness_error"))
    diverse = warmest["spread"][1] > warmest["spread"][0] and warmest["recall"][1] > warmest["recall"][0]
    smoother = uneven[0] - uneven[1] > 2 * math.hypot(*errors)
    distances = " and ".join(f"{each['likeness'][0]['frechet']:.2f}" for each in (one, two))
    fids = [each["fid"] for each in (one, two)]
    said = [
        "The thesis finds one neutral face at temperature 0, in both experiments: to be seen in figures 3.10 and 3.28. No figure here "
        f"measures neutrality; the Fréchet distance of that one face to the test images is {distances}, of experiment 1 and 2.",
        f"The thesis finds the samples of experiment 2 more diverse. At temperature 1 recall is {warmest['recall'][0]:.2f} and "
        f"{warmest['recall'][1]:.2f}, the samples' mean distance {warmest['spread'][0]:.2f} and {warmest['spread'][1]:.2f} of the test "
        f"images': {'found' if diverse else 'not found in both'} here.",
        f"The thesis finds the interpolations of experiment 2 smoother. The largest step of a way is {uneven[0]:.2f} ± {errors[0]:.2f} "
        f"and {uneven[1]:.2f} ± {errors[1]:.2f} times the mean one: {'found' if smoother else 'not found'} here, by two standard errors.",
        "The thesis' loss adds 8 bits to data of fewer: its figures are too high by the difference, which the right-hand axes show.",
    ]
    if fids[0][0] is None:
        return [
            *said,
            "FID is left out: set FID_WEIGHTS to the file of torch-fidelity's network, and install flowgen[fidelity], to have it.",
        ]
    told = "; ".join(f"T = {t:g}: {a:.1f} and {b:.1f}" for t, a, b in zip(TEMPERATURES, *fids, strict=True))
    return [*said, f"FID by torch-fidelity, of experiment 1 and 2: {told}."]
