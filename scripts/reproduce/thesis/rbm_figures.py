"""The toy figure of the thesis, and the figures of the slides on Boltzmann machines."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from figure import Figure, command_figure
from PIL import Image

import flowgen
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import sample_images
from flowgen.training.run_dir import Run
from flowgen.utils import plots, rendering

SETTINGS = "The slides do not give training times and learning rates."
CLAIMS = {"l2": "300 hidden units", "l1": "300 hidden units at 1e-6"}  # prior: the slides' best RBM


def toy_figure(run: Run) -> Figure:
    """Return figure B.1."""
    return command_figure(
        "B.1",
        "The target, N(0, I), the samples of the flow, and its density. Colors show the direction "
        "in the latent plane.",
        run,
        f"sample --run {run.folder}",
        "The flow of the original is not known. The original shows no density.",
    )


def likelihoods(runs: list[Run]) -> dict[str, tuple[float, float]]:
    """Return the final test log-likelihood and its error, by the name of the run."""
    result = {}
    for run in runs:
        row = [row for row in run.read_metrics() if row["split"] == "test"][-1]
        result[run.folder.name] = (row["log_likelihood"], row["log_likelihood_error"])
    return result


def plot_dots(named: Mapping[str, tuple[float, float]], label: str, path: Path) -> None:
    """Plot one dot with an error bar per name, and write a PNG.

    Args:
        named: Value and standard error, by name.
        label: Label of the x axis.
        path: Path of the PNG.
    """
    names = list(named)[::-1]
    values, errors = zip(*(named[name] for name in names), strict=True)
    with plots.figure(8, 1.2 + 0.3 * len(named), path) as page:
        axes = page.subplots()
        axes.errorbar(
            values, range(len(names)), xerr=errors, fmt="o", color=plots.COLORS[0], capsize=3
        )
        for index, (value, error) in enumerate(zip(values, errors, strict=True)):
            axes.annotate(
                f"{value:.2f} ± {error:.2f}",
                (value, index),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(xlabel=label, xmargin=0.15, ylim=(-0.5, len(names) - 0.3))
        axes.grid(alpha=0.3)


def compare_claims(likelihoods: Mapping[str, tuple[float, float]]) -> str:
    """Compare the slides' claims about priors on the weights with the likelihoods.

    Args:
        likelihoods: Log-likelihood and error by the name of the run, such as l2_1e3_100.
    """
    sentences = []
    for prior, claim in CLAIMS.items():
        names = [name for name in likelihoods if name.startswith(prior)]
        sizes = {name.rpartition("_")[2] for name in names}
        if sizes >= {"50", "100", "300"}:
            best = max(names, key=lambda name: likelihoods[name])
            finding = f"the highest likelihood, regardless of its error, is that of {best}"
        else:
            finding = "this preset does not train all of them"
        sentences.append(f"with an {prior.upper()} prior {claim}: {finding}")
    return f"The slides find best {'; '.join(sentences)}."


def slides_figures(runs: list[Run], folder: Path, digits: ImageDataset) -> Iterator[Figure]:
    """Yield figures S.1 to S.8. The last of `runs` is the RBM of the half 6."""
    *rbms, half_six = runs
    yield from _comparison_figures(rbms, runs)
    if digits.test.labels is not None:
        six = digits.test.images[digits.test.labels == 6][0]
        rendering.to_pil(six).save(folder / "six.png")
    yield command_figure(
        "S.4",
        "A digit 6 of the test set, its left half, and the completions by each sampler.",
        half_six,
        f"complete {folder / 'six.png'} --known left --run {half_six.folder} --steps 500",
        "The slides only show clamped Gibbs sampling.",
    )
    yield command_figure(
        "S.5",
        "New digits, sampled from white noise.",
        half_six,
        f"sample --run {half_six.folder} --sampler tempering",
        SETTINGS,
    )
    for number, sampler in (("S.6", "tempering"), ("S.7", "gibbs"), ("S.8", "mean-field")):
        options = f"--run {half_six.folder} --count 36 --frames 60 --steps 2"
        yield command_figure(
            number,
            f"An animation of 36 chains from white noise: {sampler}.",
            half_six,
            f"chain --sampler {sampler} {options}",
            SETTINGS,
            ".gif",
        )


def _comparison_figures(rbms: list[Run], runs: list[Run]) -> Iterator[Figure]:
    def stacked(draw: Callable[[Any], Image.Image]) -> Callable[[Path], None]:
        def save(path: Path) -> None:
            pictures = [(run.folder.name, draw(flowgen.load(run.folder))) for run in rbms]
            rendering.stack_titled(pictures).save(path)

        return save

    yield Figure(
        "S.1",
        "The 40 largest filters of each RBM. Orange is positive, blue is negative. The name "
        "consists of the experiment and the number of hidden units.",
        stacked(lambda model: rendering.weight_grid(model.filters(), 20, 40)),
        rbms,
        difference=SETTINGS,
    )
    yield Figure(
        "S.2",
        "Samples of each RBM: tempering from white noise, 500 steps.",
        stacked(lambda model: rendering.image_grid(sample_images(model, 20, 1.0, 0)[0], 1, 20)),
        rbms,
        "flowgen sample --count 20 --run RUN",
        SETTINGS,
    )
    yield Figure(
        "S.3",
        "Test log-likelihood at the end of training, by a short forward run of annealed importance "
        "sampling, which tends to overestimate it. `flowgen evaluate` runs both directions. Errors "
        "are over images and chains. All runs had the same time, so their numbers of steps differ.",
        partial(plot_dots, likelihoods(runs), "test log-likelihood, nats (higher is better)"),
        runs,
        difference="The slides compare reconstruction errors, which are not likelihoods.",
    )
