"""The comparison of the two experiments of the thesis: metrics, figures, tests of claims."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from figure import Figure, cached_json
from flow_report import flow_report
from glow_figures import TEMPERATURES
from scipy.stats import ttest_ind, ttest_rel

import flowgen
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation import sample_quality, stats
from flowgen.models.base import sample_images
from flowgen.training.run_dir import Run, validation_rows
from flowgen.utils import plots

NUM_SAMPLE_SETS = 4  # per temperature, for the standard error of a metric
SIGNIFICANCE_LEVEL = 0.05  # of two-sided tests: 5% of true null hypotheses are rejected
SPACE = (
    "in the space of the 64 leading principal components of training images, except for the "
    "metrics of torch-fidelity"
)
BY_EYE = "The original compares by eye."
ONE_TRAINING = (
    f'"Confirmed" and "contradicted" are at a level of {100 * SIGNIFICANCE_LEVEL:g} % by a t '
    "test over sets of samples, or pairs of images, of these weights. Each experiment was trained "
    "once. The effect of another seed is unknown, so these results are no statements about the "
    "method."
)


class QualityMetric(NamedTuple):
    """A metric of sample quality that a figure shows."""

    key: str
    label: str
    caption: str


QUALITY_METRICS = {
    "C.2": QualityMetric(
        "frechet",
        "Fréchet distance",
        "Closeness: the Fréchet distance of samples and test images. It is not the FID.",
    ),
    "C.3": QualityMetric(
        "coverage",
        "coverage",
        "Diversity: the share of test images that have a sample at most as far as their fifth "
        "neighbor among the test images.",
    ),
    "C.4": QualityMetric(
        "spread",
        "mean distance of samples / of test images",
        "Diversity: the distance of two samples.",
    ),
    "C.7": QualityMetric("fid", "fid", "By torch-fidelity: fid."),
    "C.8": QualityMetric("precision", "precision", "By torch-fidelity: precision."),
    "C.9": QualityMetric("recall", "recall", "By torch-fidelity: recall."),
}


def report(run: Run, data: ImageDataset, count: int) -> dict[str, Any]:
    """Return the `flow_report` of an experiment, stored in the folder of the run.

    Args:
        run: The run of the experiment.
        data: Its data set.
        count: Maximum number of test images, and of samples in each set.
    """
    weights = sample_quality.find_fid_weights()

    def compute() -> dict[str, Any]:
        model: Any = flowgen.load(run.folder, "auto")
        size = min(count, len(data.test))
        samples = {}
        for temperature in TEMPERATURES:
            num_sets = (
                NUM_SAMPLE_SETS if temperature else 1
            )  # at temperature 0 all samples are equal
            samples[temperature] = [
                sample_images(model, size, temperature, seed)[0] for seed in range(num_sets)
            ]
        return flow_report(model, data, samples, weights=weights)

    return cached_json(run, "report_with_fid.json" if weights else "report.json", compute)


def figures(runs: dict[str, Run], reports: dict[str, Any], data: ImageDataset) -> Iterator[Figure]:
    """Yield bits/dim during training, sample quality, and smoothness of interpolations."""
    all_runs = list(runs.values())
    yield _bits_figure(runs, data)
    first = next(iter(reports.values()))
    for number, metric in QUALITY_METRICS.items():
        if metric.key in first["samples"][0][0]:
            yield _quality_figure(number, metric, reports, all_runs)
    yield from _interpolation_figures(reports, all_runs)


def _bits_figure(runs: dict[str, Run], data: ImageDataset) -> Figure:
    rows = {name: validation_rows(run.read_metrics()) for name, run in runs.items()}
    curves = {
        name: [(row["step"], row["bits_per_dim"]) for row in run_rows]
        for name, run_rows in rows.items()
    }
    count = min(len(data.validation), *(run_rows[-1]["images"] for run_rows in rows.values()))
    right_axis = None
    if data.bits < 8:
        offset = 8 - data.bits
        right_axis = (f"as defined by the thesis: {offset} more", float(offset))
    draw = partial(
        plots.lines,
        curves,
        xlabel="step",
        ylabel=f"validation bits/dim at {data.bits} bits",
        right=right_axis,
    )
    return Figure(
        "C.1",
        f"Bits/dim of {count:,} validation images during training, with averaged weights.",
        draw,
        list(runs.values()),
        difference="The thesis only shows training losses.",
    )


def _quality_figure(
    number: str, metric: QualityMetric, reports: dict[str, Any], runs: list[Run]
) -> Figure:
    lines = {}
    errors = {}
    for name, experiment in reports.items():
        means = [
            stats.mean([quality[metric.key] for quality in sample_sets])
            for sample_sets in experiment["samples"]
        ]
        lines[name] = list(zip(TEMPERATURES, (mean.value for mean in means), strict=True))
        errors[name] = [mean.error for mean in means]
    first = next(iter(reports.values()))
    training = first["training"].get(metric.key, math.nan)
    lines["training images"] = [(0.0, training), (1.0, training)]
    draw = partial(plots.lines, lines, xlabel="temperature", ylabel=metric.label, errors=errors)
    caption = (
        f"{metric.caption} {first['images']} of each, {SPACE}. Error bars are over "
        f"{NUM_SAMPLE_SETS} sets of samples."
    )
    return Figure(number, caption, draw, runs, difference=BY_EYE)


def _interpolation_figures(reports: dict[str, Any], runs: list[Run]) -> Iterator[Figure]:
    first = next(iter(reports.values()))["walk"]
    positions = torch.linspace(0, 1, len(first["bits"][0])).tolist()
    middles = [(start + end) / 2 for start, end in pairwise(positions)]
    changes = {name: experiment["walk"]["changes"][0] for name, experiment in reports.items()}
    changes["pixels"] = first["changes"][1]
    change_lines = {
        name: list(zip(middles, values, strict=True)) for name, values in changes.items()
    }
    bits_lines = {}
    for index, prefix in enumerate(("", "pixels, by ")):
        for name, experiment in reports.items():
            values = experiment["walk"]["bits"][index]
            bits_lines[prefix + name] = list(zip(positions, values, strict=True))
    count = (
        f"mean over {len(first['unevenness'])} pairs of test images, {len(positions)} images each"
    )
    for number, caption, lines, label in (
        (
            "C.5",
            "Smoothness: the change from each image to the next",
            change_lines,
            "change of the pixels, root mean square",
        ),
        ("C.6", "The likelihood of the images", bits_lines, "bits/dim of the image"),
    ):
        draw = partial(plots.lines, lines, xlabel="position between the ends", ylabel=label)
        yield Figure(number, f"{caption}; {count}.", draw, runs, difference=BY_EYE)


def sentences(reports: Mapping[str, Any], bits: int) -> list[str]:
    """Return the conclusions from the reports of experiments 1 and 2."""
    first, second = reports.values()
    first_walk = first["walk"]["unevenness"]
    second_walk = second["walk"]["unevenness"]
    result = [
        f"On the same {first['images']} test images experiment 1 has {stats.mean(first['bits'])} "
        f"bits/dim at {bits} bits, experiment 2 has {stats.mean(second['bits'])}, with one sample "
        f"of the noise. The difference over the images is "
        f"{stats.paired_difference(first['bits'], second['bits'])}. The experiments have "
        f"{first['parameters']:,} and {second['parameters']:,} parameters.",
        "The thesis finds a neutral face at temperature 0 in experiment 2. Figures 3.10 and 3.28 "
        "show it. The distance of this image from the mean test image, relative to that of a test "
        f"image, is {first['mean_sample']:.2f} in experiment 1 and {second['mean_sample']:.2f} in "
        "experiment 2.",
        "The thesis finds the samples of experiment 2 more diverse. At temperature 1, "
        f"{_test_claim(first, second, 'coverage', 'the share of test images that are covered')}; "
        f"{_test_claim(first, second, 'spread', 'the relative distance of two samples')}.",
        "The thesis finds the interpolations of experiment 2 smoother. The ratio of the largest "
        f"step of an interpolation to the mean step is {stats.mean(first_walk)} in experiment 1 "
        f"and {stats.mean(second_walk)} in experiment 2. Over the same pairs of images the "
        f"difference is {stats.paired_difference(first_walk, second_walk)}: "
        f"{verdict(ttest_rel(first_walk, second_walk))}.",
        ONE_TRAINING,
    ]
    if bits < 8:
        result.append(
            f"The loss of the thesis adds 8 bits to data of {bits} bits. Its values are too high "
            f"by {8 - bits}, see the right axis of the figures."
        )
    if "fid" not in first["samples"][0][0]:
        result.append(
            "FID is skipped. To compute it, set FID_WEIGHTS to the file of torch-fidelity's "
            "network and install the package torch-fidelity."
        )
    return result


def verdict(test: Any) -> str:
    """Return the verdict on a claim that a difference is positive.

    Args:
        test: Result of a two-sided t test by scipy. Its p-value is nan if nothing varies.
    """
    if not test.pvalue < SIGNIFICANCE_LEVEL:
        return "no significant difference"
    return "confirmed" if test.statistic > 0 else "contradicted"


def _test_claim(
    first: Mapping[str, Any], second: Mapping[str, Any], key: str, description: str
) -> str:
    """Test the claim that experiment 2 has a higher metric at temperature 1, by Welch's test."""
    first_values = [quality[key] for quality in first["samples"][-1]]
    second_values = [quality[key] for quality in second["samples"][-1]]
    result = verdict(ttest_ind(second_values, first_values, equal_var=False))
    return (
        f"{description} is {stats.mean(first_values)} in experiment 1, "
        f"{stats.mean(second_values)} in experiment 2: {result}"
    )
