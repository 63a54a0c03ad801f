"""The comparison that the thesis draws between its two experiments: what is measured, its figures, and what is to be said of its claims."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from faces import TEMPERATURES
from figure import Figure, kept
from scipy.stats import ttest_ind, ttest_rel

import flowgen
from flowgen.commands.sample import sample_images
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation import sample_quality, stats
from flowgen.training.run_dir import Run, validation_rows
from flowgen.utils import plots

REPEATS = 4  # draws of as many samples as there are test images, for the error of a figure
SPACE = "among the 64 leading principal components of training images, but for what torch-fidelity measures"
BY_EYE = "The original compares by eye."
LIKENESS = {
    "C.2": (
        "frechet",
        "Fréchet distance",
        "Closeness: the Fréchet distance of samples and test images, which is no FID.",
    ),
    "C.3": (
        "coverage",
        "coverage",
        "Diversity: the share of test images with a sample as near as their fifth neighbour among them.",
    ),
    "C.4": (
        "spread",
        "mean distance of samples / of test images",
        "Diversity: how far apart two samples lie.",
    ),
    **{
        f"C.{number}": (key, key, f"By torch-fidelity: {key}.")
        for number, key in ((7, "fid"), (8, "precision"), (9, "recall"))
    },
}

LEVEL = 0.05  # share of claims that count as found, or their opposite, where there is no difference
ONE_TRAINING = (
    f"Found, or its opposite: at a level of {100 * LEVEL:g} % by a t test over draws of samples, or pairs of images, of these weights. "
    "Each experiment was trained once, and what another seed would have given is unknown: none of this is a statement about the method."
)


def judged(run: Run, data: ImageDataset, count: int) -> dict[str, Any]:
    """All that the comparison needs of one experiment, of `count` test images and as many samples at most; kept beside the run."""

    weights = sample_quality.network()

    def find() -> dict[str, Any]:
        model: Any = flowgen.load(run.folder, "auto")
        most, seeds = (
            min(count, len(data.test)),
            {each: range(REPEATS if each else 1) for each in TEMPERATURES},
        )  # at 0 all samples are one
        samples = {
            each: [sample_images(model, most, each, seed)[0] for seed in seeds[each]]
            for each in TEMPERATURES
        }
        return sample_quality.flow_report(model, data, samples, weights=weights)

    return kept(run, "judged_with_fid.json" if weights else "judged.json", find)


def figures(runs: dict[str, Run], found: dict[str, Any], data: ImageDataset) -> Iterator[Figure]:
    """Bits/dim as training went; closeness and diversity by temperature; smoothness of the interpolations."""
    some, all_runs = next(iter(found.values())), list(runs.values())
    rows = {name: validation_rows(run.read_metrics()) for name, run in runs.items()}
    curves = {
        name: [(row["step"], row["bits_per_dim"]) for row in each] for name, each in rows.items()
    }
    images = min(len(data.validation), *(each[-1]["images"] for each in rows.values()))
    right = (
        (f"the thesis' convention: {8 - data.bits} more", 8.0 - data.bits)
        if data.bits < 8
        else None
    )
    caption = f"Bits/dim of {images:,} validation images as training went, by the averaged weights."
    draw_it = partial(
        plots.lines,
        curves,
        xlabel="step",
        ylabel=f"validation bits/dim at {data.bits} bits",
        right=right,
    )
    yield Figure(
        "C.1", caption, draw_it, all_runs, difference="The thesis shows training losses alone."
    )
    for number, (key, label, caption) in (
        (number, each) for number, each in LIKENESS.items() if each[0] in some["samples"][0][0]
    ):
        means = {
            name: [stats.mean([one[key] for one in draws]) for draws in found[name]["samples"]]
            for name in found
        }
        named = {
            name: list(zip(TEMPERATURES, (each.value for each in means[name]), strict=True))
            for name in found
        }
        named["training images"] = [
            (temperature, some["training"].get(key, math.nan)) for temperature in (0.0, 1.0)
        ]
        errors = {name: [each.error for each in means[name]] for name in found}
        draw_it = partial(plots.lines, named, xlabel="temperature", ylabel=label, errors=errors)
        told = f"{caption} {some['images']} of each, {SPACE}; error bars over {REPEATS} draws of the samples."
        yield Figure(number, told, draw_it, all_runs, difference=BY_EYE)
    shares = torch.linspace(0, 1, len(some["walk"]["bits"][0])).tolist()
    middles = [(one + other) / 2 for one, other in pairwise(shares)]
    changes = {name: found[name]["walk"]["changes"][0] for name in found} | {
        "pixels": some["walk"]["changes"][1]
    }
    steps = {name: list(zip(middles, each, strict=True)) for name, each in changes.items()}
    spaces = [(place, name) for place in (0, 1) for name in found]
    bits = {
        ("", "pixels, by ")[place] + name: list(
            zip(shares, found[name]["walk"]["bits"][place], strict=True)
        )
        for place, name in spaces
    }
    pairs = f"mean over {len(some['walk']['unevenness'])} pairs of test images, {len(shares)} pictures each"
    for number, caption, named, label in (
        (
            "C.5",
            "Smoothness: how much changes from each picture to the next",
            steps,
            "change of the pixels, root mean square",
        ),
        ("C.6", "How likely the pictures on the way are", bits, "bits/dim of the picture there"),
    ):
        draw_it = partial(plots.lines, named, xlabel="place on the way", ylabel=label)
        yield Figure(number, f"{caption}; {pairs}.", draw_it, all_runs, difference=BY_EYE)


def sentences(found: Mapping[str, Any], bits: int) -> list[str]:
    """Of what was measured of experiment 1 and 2, see `comparison`."""
    one, two = found.values()
    uneven = one["walk"]["unevenness"], two["walk"]["unevenness"]
    said = [
        f"Over the same {one['images']} test images experiment 1 has {stats.mean(one['bits'])} bits/dim at {bits} bits, experiment 2 "
        f"{stats.mean(two['bits'])}, under one draw of the noise: a difference of {stats.paired_difference(one['bits'], two['bits'])} "
        f"over the same images. Their parameters: {one['parameters']:,} and {two['parameters']:,}.",
        "The thesis finds a neutral face at temperature 0 in experiment 2. Whether it is one is for the eye: figures 3.10 and 3.28. The "
        f"distance of that picture from the mean test image is {one['mean_sample']:.2f} of a test image's in experiment 1, "
        f"{two['mean_sample']:.2f} in experiment 2.",
        "The thesis finds the samples of experiment 2 more diverse. At temperature 1, "
        f"{_more(one, two, 'coverage', 'the share of test images that are covered')}; "
        f"{_more(one, two, 'spread', 'the mean distance of two samples over that of two test images')}.",
        "The thesis finds the interpolations of experiment 2 smoother. The largest step of a way is "
        f"{stats.mean(uneven[0])} times the mean one in experiment 1, {stats.mean(uneven[1])} in experiment 2; over "
        f"the same pairs of images the difference is {stats.paired_difference(*uneven)}: {verdict(ttest_rel(*uneven))}.",
        ONE_TRAINING,
    ]
    shift = f"The thesis' loss adds 8 bits to data of {bits}: its figures are too high by {8 - bits}, which the right-hand axes show."
    left_out = "FID is left out: set FID_WEIGHTS to the file of torch-fidelity's network, and install flowgen[fidelity], to have it."
    return [
        *said,
        *([shift] if bits < 8 else []),
        *([left_out] if "fid" not in one["samples"][0][0] else []),
    ]


def verdict(test: Any) -> str:
    """Of a claim that a difference is above 0, by scipy's result of a two-sided t test."""
    found = test.pvalue < LEVEL  # not where it is none, since nothing varies
    return (
        "no difference found"
        if not found
        else "found"
        if test.statistic > 0
        else "the opposite is found"
    )


def _more(one: Mapping[str, Any], two: Mapping[str, Any], key: str, what: str) -> str:
    """Whether experiment 2 has more of `key` at temperature 1, by Welch's test of independent draws."""
    first, second = ([repeat[key] for repeat in each["samples"][-1]] for each in (one, two))
    found = verdict(ttest_ind(second, first, equal_var=False))
    return f"{what} is {stats.mean(first)} in experiment 1, {stats.mean(second)} in experiment 2: {found}"
