"""The toy figure, and the figures of the slides on Boltzmann machines."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from figure import Figure, by_command
from PIL import Image

import flowgen
from flowgen.commands.sample import sample_images
from flowgen.data.dataset import ImageDataset
from flowgen.training.run_dir import Run
from flowgen.utils import plots, rendering
from flowgen.utils.rendering import to_pil

SETTINGS = "The slides name neither training times nor learning rates."


def of_toy(run: Run) -> Figure:
    caption = "The target, N(0, I), the one carried into the other, and the density; colours keep the direction in the latent plane."
    return by_command(
        "B.1",
        caption,
        run,
        f"sample --run {run.folder}",
        "The original's flow is not given; it shows no density.",
    )


def likelihoods(runs: list[Run]) -> dict[str, tuple[float, float]]:
    """The test log-likelihood of each run, as training left it, and its error."""
    rows = {
        run.folder.name: [row for row in run.read_metrics() if row["split"] == "test"][-1]
        for run in runs
    }
    return {
        name: (row["log_likelihood"], row["log_likelihood_error"]) for name, row in rows.items()
    }


def best_of_prior(likelihoods: Mapping[str, tuple[float, float]]) -> str:
    """The slides' claim about priors on the weights, of the likelihoods, with their errors, of machines by name, as l2_1e3_100."""
    said = []
    for prior, claim in (("l2", "300 hidden units"), ("l1", "300 hidden units at 1e-6")):
        names = [name for name in likelihoods if name.startswith(prior)]
        if not {name.rpartition("_")[2] for name in names} >= {"50", "100", "300"}:
            found = "not all of these were trained at this scale"
        else:
            found = f"the highest likelihood, whatever its error, is that of {max(names, key=lambda name: likelihoods[name])}"
        said.append(f"with an {prior.upper()} prior {claim}: {found}")
    return f"The slides find best {'; '.join(said)}."


def of_slides(runs: list[Run], folder: Path, digits: ImageDataset) -> Iterator[Figure]:
    """Filters, samples and likelihoods of the machines; half 6, digits from noise and films of the last one."""
    *machines, half_six = runs

    def each(shown: Callable[[Any], Image.Image]) -> Callable[[Path], None]:
        return lambda at: rendering.stack_titled(
            [(run.folder.name, shown(flowgen.load(run.folder))) for run in machines]
        ).save(at)

    caption = "The 40 largest filters of each machine: orange above zero, blue below. The name: the experiment and its hidden units."
    yield Figure(
        "S.1",
        caption,
        each(lambda model: rendering.weight_grid(model.filters(), 20, 40)),
        machines,
        difference=SETTINGS,
    )
    caption, command = (
        "Samples of each machine: tempering from white noise, 500 sweeps.",
        "flowgen sample --count 20 --run RUN",
    )
    yield Figure(
        "S.2",
        caption,
        each(lambda model: rendering.image_grid(sample_images(model, 20, 1.0, 0)[0], 1, 20)),
        machines,
        command,
        SETTINGS,
    )
    caption = (
        "Test log-likelihood as training left it, by a short forward run of annealed importance sampling, which tends to flatter: `flowgen "
        "evaluate` has both directions. Errors are over images and chains; the clock ended the trainings, after different numbers of steps."
    )
    draw_it = partial(
        plots.dots, likelihoods(runs), "test log-likelihood, nats (the higher the better)"
    )
    yield Figure(
        "S.3",
        caption,
        draw_it,
        runs,
        difference="The slides judge by the reconstruction error, which is no likelihood.",
    )
    if digits.test.labels is not None:
        to_pil(digits.test.images[digits.test.labels == 6][0]).save(folder / "six.png")
    command = f"complete {folder / 'six.png'} --keep left --run {half_six.folder} --sweeps 500"
    caption = "A digit 6 of the test set, its left half, and what each sampler restores from it."
    yield by_command("S.4", caption, half_six, command, "The slides show clamped Gibbs alone.")
    yield by_command(
        "S.5",
        "New digits grown from white noise.",
        half_six,
        f"sample --run {half_six.folder} --method tempering",
        SETTINGS,
    )
    for number, method in (("S.6", "tempering"), ("S.7", "gibbs"), ("S.8", "mean-field")):
        command = (
            f"chain --method {method} --run {half_six.folder} --count 36 --frames 60 --sweeps 2"
        )
        yield by_command(
            number,
            f"A film of 36 chains from white noise: {method}.",
            half_six,
            command,
            SETTINGS,
            ".gif",
        )
