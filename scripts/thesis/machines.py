"""The toy figure, and the figures of the slides on Boltzmann machines."""

from pathlib import Path
from typing import Any

import kinds
from figure import MAKE, Figure, drawn
from PIL import Image
from torch import Tensor

import flowgen
import flowgen.pictures
from flowgen.commands.chain import chain
from flowgen.commands.complete import complete
from flowgen.commands.sample import draw
from flowgen.commands.sample import sample as sample_command
from flowgen.config import read_config
from flowgen.training.run import Run


def of_toy(run: Run, folder: Path) -> Figure:
    path = drawn(folder / "figure_B.1.png", run, lambda at: sample_command(str(run.folder), [], None, 0, None, None, None, "auto", at))
    caption = "The target, N(0, I), the one carried into the other, and the density; colours keep the direction in the latent plane."
    command = f"flowgen sample --run {run.folder}"
    return Figure("B.1", caption, path, [run.folder], command, "The original's flow is not given; it shows no density.")


def last_tests(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """The last test figures of each run, by its folder's name."""
    return {run.folder.name: [row for row in run.read_metrics() if row["split"] == "test"][-1] for run in runs}


def table(runs: list[Run]) -> list[list[str]]:
    """A row for each machine: what it is, how long it was trained, and how well it does."""
    rows = [["", "hidden units", "steps", "minutes", "test log-likelihood, nats", "reconstruction error per pixel"]]
    for run, (name, row) in zip(runs, last_tests(runs).items(), strict=True):
        minutes = max(each.get("seconds", 0.0) for each in run.read_metrics()) / 60
        likelihood = f"{row['log_likelihood']:.2f} ± {row['log_likelihood_error']:.2f}"
        hidden = str(read_config(run.config)["model"]["hidden"])
        rows.append([name, hidden, f"{row['step']:,}", f"{minutes:.1f}", likelihood, f"{row['reconstruction_error']:.4f}"])
    return rows


def of_slides(runs: list[Run], half_six: Run, folder: Path, six: Tensor) -> list[Figure]:
    """Filters, samples and likelihoods of the machines; half 6, digits from noise and films of the last one."""
    folders = [run.folder for run in runs]
    newest = max((*runs, half_six), key=lambda run: run.last.stat().st_mtime)
    settings = "The slides name neither training times nor learning rates."

    def filters(at: Path) -> None:
        loaded = {run.folder.name: flowgen.load(run.folder) for run in runs}
        kinds.page_of({name: flowgen.pictures.signed(model.features(), 20, 40) for name, model in loaded.items()}, at)

    def samples(at: Path) -> None:
        loaded = {run.folder.name: flowgen.load(run.folder) for run in runs}
        drawn_ = {name: draw(model, 20, 1.0, 0)[0] for name, model in loaded.items()}
        kinds.page_of({name: flowgen.pictures.to_image(levels, 1, 20) for name, levels in drawn_.items()}, at)

    tests = last_tests([*runs, half_six])
    likelihoods = {f"{name}, {row['step']:,} steps": (row["log_likelihood"], row["log_likelihood_error"]) for name, row in tests.items()}
    likelihood_path = drawn(
        folder / "figure_S.3.png", newest, lambda at: kinds.dots(likelihoods, "test log-likelihood, nats (the higher the better)", at)
    )
    image = folder / "six.png"
    Image.fromarray(255 * six[0].numpy()).save(image)
    name = str(half_six.folder)
    half = drawn(
        folder / "figure_S.4.png",
        half_six,
        lambda at: complete(image, "left", ["gibbs", "tempering", "mean-field"], name, 500, 0, "auto", at),
    )
    noise = drawn(folder / "figure_S.5.png", half_six, lambda at: sample_command(name, [1.0], 32, 0, None, "tempering", 500, "auto", at))
    found = [
        Figure(
            "S.1",
            "The 40 largest filters of each machine: orange above zero, blue below. The name: the experiment and its hidden units.",
            drawn(folder / "figure_S.1.png", newest, filters),
            folders,
            MAKE,
            settings,
        ),
        Figure(
            "S.2",
            "Samples of each machine: tempering from white noise, 500 sweeps.",
            drawn(folder / "figure_S.2.png", newest, samples),
            folders,
            "flowgen sample --count 20 --method tempering --run RUN",
            settings,
        ),
        Figure(
            "S.3",
            "Test log-likelihood as training left it: by a short forward run of annealed importance sampling, which tends to flatter; "
            "`flowgen evaluate --run RUN` has both directions. The errors are over images and chains; the clock ended the trainings, after "
            "different numbers of steps, which matters as much.",
            likelihood_path,
            [*folders, half_six.folder],
            MAKE,
            "The slides judge by the reconstruction error, which is no likelihood.",
        ),
        Figure(
            "S.4",
            "A digit 6 of the test set, its left half, and what each sampler restores from it.",
            half,
            [half_six.folder],
            f"flowgen complete {image} --keep left --run {name} --sweeps 500",
            "The slides show clamped Gibbs alone.",
        ),
        Figure(
            "S.5",
            "New digits grown from white noise.",
            noise,
            [half_six.folder],
            f"flowgen sample --run {name} --method tempering",
            settings,
        ),
    ]
    for number, method in (("S.6", "tempering"), ("S.7", "gibbs"), ("S.8", "mean-field")):
        film = drawn(folder / f"figure_{number}.gif", half_six, lambda at, method=method: chain(method, name, 36, 60, 2, 0, "auto", at))
        command = f"flowgen chain --method {method} --run {name} --count 36 --frames 60 --sweeps 2"
        found.append(Figure(number, f"A film of 36 chains from white noise: {method}.", film, [half_six.folder], command, settings))
    return found
