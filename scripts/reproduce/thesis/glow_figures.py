"""Figures of the data, of the two experiments with Glow, and of the outlook."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
import yaml
from figure import Figure, command_figure
from jobs import data_section
from original_images import original_images
from torch import Tensor

import flowgen
from flowgen.config.compose import read_config
from flowgen.config.instantiate import build_data
from flowgen.config.settings import conf_folder, flatten
from flowgen.data.dataset import ImageDataset
from flowgen.models.base import sample_images
from flowgen.training.optim import learning_rate_factor, warmup_steps
from flowgen.training.run_dir import Run, validation_rows
from flowgen.utils import plots, rendering
from flowgen.utils.console import user_message
from flowgen.utils.errors import UserError

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXPERIMENTS = {  # numbers of the figures of training, of samples and of interpolations
    "glow_conv": ("3.4-3.6", ("3.7", "3.8", "3.9", "3.10-3.14"), ("3.15-3.18", "3.19-3.20")),
    "glow_resnet": (
        "3.21-3.23",
        ("3.24", "3.25", "3.26-3.27", "3.28-3.32"),
        ("3.33-3.34", "3.35-3.36"),
    ),
}
SETTINGS = "Settings: see the beginning of this section."
ALWAYS_DIFFERENT = (
    "All runs differ from the thesis in these points: averaged weights in samples and test "
    "metrics; bounded log-scales, and exp(3 parameter) at the end of coupling networks; 1x1 "
    "convolutions as P L U, initialized by the principal axes; ActNorm initialized by several "
    "batches, and inside of networks, including residual blocks, merged into the convolutions "
    "afterwards."
)


def load_faces(data: str, root: str | None, preset: str) -> ImageDataset:
    """Load the images of faces.

    Raises:
        UserError: If the images, or the GPU that the preset needs, are missing.
    """
    if preset == "full" and not torch.cuda.is_available():
        raise UserError(
            "SCALE=full trains for days on one GPU, and this machine has no GPU: SCALE=small "
            "takes an hour on two cores, SCALE=night a night"
        )
    if data == "folder" and root is None:
        raise UserError(
            "DATA=folder needs ROOT=, a folder or a zip of images: "
            "make reproduce-thesis DATA=folder ROOT=~/faces"
        )
    try:
        return build_data({"data": data_section(data, root)})
    except UserError as error:
        message = user_message(error).removesuffix(".")
        raise UserError(
            f"{message}; set its place by ROOT=FOLDER, or use other images by DATA=celeba "
            "ROOT=FOLDER or DATA=folder ROOT=FOLDER"
        ) from error


def _original_settings(experiment: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / "experiment" / f"{experiment}.yaml").read_text())


def differences(run: Run, experiment: str, data: str) -> str:
    """Describe the differences between the settings of a run and those of the thesis.

    The settings of the thesis are those in the file of the experiment.
    """
    original = _original_settings(experiment)
    sections = {name: original.get(name) or {} for name in ("data", "model", "trainer")}
    config = flatten(read_config(run.config))
    items = [] if data == "celeba_hq" else ["other data than celeba_hq"]
    for key, value in flatten(sections).items():
        if config.get(key) != value and not key.startswith("trainer.checkpoint_"):
            items.append(f"{key}={config.get(key)} for {value}")
    text = "; ".join(items) or "none"
    return f"Differences from the file of the experiment: {text}. {ALWAYS_DIFFERENT}"


def random_images(images: Tensor, count: int) -> Tensor:
    """Draw images (count, channels, height, width). Data sets can be sorted by class."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:count]]


def data_figures(data: ImageDataset, name: str, root: str | None) -> Iterator[Figure]:
    """Yield figures 3.1 and 3.2: random training images before and after preprocessing."""
    section = data_section(name, root)
    if "search_dirs" in section:
        before, preprocessed = original_images(section, 16)
    else:
        before = preprocessed = random_images(data.train.images, 16)
    pixels = (preprocessed >> (8 - data.bits)).float()
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    after = (255 * (pixels + noise) / 2**data.bits).to(torch.uint8)
    crop = section.get("crop")
    cropped = f"cropped to {crop}x{crop} if they are larger" if crop else "cropped to a square"
    size = f"{data.image_shape[1]}x{data.image_shape[2]}"

    def grid(images: Tensor) -> Callable[[Path], None]:
        return lambda path: rendering.image_grid(images, 8, 8, 128).save(path)

    yield Figure(
        "3.1",
        f"Random training images of {name}.",
        grid(before),
        difference="The thesis: other images, cropped to 148x148.",
    )
    yield Figure(
        "3.2",
        f"The same images {cropped}, resized to {size}, with {data.bits} bits and noise "
        "u ~ U[0, 1) added to the pixel values.",
        grid(after),
        difference="The thesis describes Gaussian noise and uses uniform noise in its code.",
    )


def experiment_figures(run: Run, name: str, data: ImageDataset, folder: Path) -> Iterator[Figure]:
    """Yield the figures of an experiment: training, samples, interpolations."""
    training, samples, interpolations = EXPERIMENTS[name]
    if name == "glow_conv":
        yield _warmup_figure(run, data)
    yield _training_figure(run, training, data)
    yield from _sample_figures(run, samples, f"thesis/{name}")
    yield from _interpolation_figures(run, interpolations, data, folder)


def _warmup_figure(run: Run, data: ImageDataset) -> Figure:
    trainer = read_config(run.config)["trainer"]
    steps = warmup_steps(trainer["warmup"], len(data.train), trainer["batch_size"])
    factors = [
        (step, learning_rate_factor(step, 0.0, steps, 0.0))
        for step in range(0, 2 * steps + 1, max(1, steps // 100))
    ]
    draw = partial(
        plots.lines, {"warm-up": factors}, xlabel="step", ylabel="share of the learning rate"
    )
    caption = f"The warm-up: {steps:,} steps, then constant."
    difference = f"The thesis: 1,500 steps. {SETTINGS}"
    return Figure("3.3", caption, draw, [run], difference=difference)


def _training_figure(run: Run, number: str, data: ImageDataset) -> Figure:
    caption = (
        "Above: the loss of batches, raw and smoothed by a moving average, and the loss of "
        f"validation images with averaged weights, in bits/dim at {data.bits} bits. The first "
        "steps are above the frame. Below: the learning rate and the norm of the gradient."
    )
    difference = SETTINGS
    if data.bits < 8:
        difference = f"The loss as defined by the thesis is {8 - data.bits} more. {SETTINGS}"
    draw = partial(copyfile, run.curves)
    return Figure(number, caption, draw, [run], "flowgen train", difference)


def _sample_figures(run: Run, numbers: tuple[str, ...], experiment: str) -> Iterator[Figure]:
    """Yield samples at the checkpoints of the thesis, then one latent at five temperatures."""
    original_steps = _original_settings(experiment)["trainer"]["checkpoint_steps"]
    steps = read_config(run.config)["trainer"]["checkpoint_steps"]
    for number, original, step in zip(numbers, original_steps, steps, strict=False):
        yield command_figure(
            number,
            f"Samples after {step:,} steps, two at each temperature, from high to low "
            "log-probability.",
            run,
            f"sample --run {run.step_path(step)} --count 2 --temperature 0 --temperature 0.25 "
            "--temperature 0.7 --temperature 1",
            f"The original: after {original:,} steps. {SETTINGS}",
        )
    temperatures = " ".join(f"--temperature {temperature}" for temperature in TEMPERATURES)
    yield command_figure(
        numbers[-1],
        "One latent vector at five temperatures. The thesis shows them one by one.",
        run,
        f"sample --run {run.folder} --count 1 --seed 1 {temperatures}",
        SETTINGS,
    )


def _interpolation_figures(
    run: Run, numbers: tuple[str, ...], data: ImageDataset, folder: Path
) -> Iterator[Figure]:
    """Yield interpolations to a training image from a training image and from a test image."""
    train = random_images(data.train.images, 2)
    images = {
        "train_0": train[0],
        "train_1": train[1],
        "test_0": random_images(data.test.images, 1)[0],
    }
    for name, image in images.items():
        rendering.to_pil(image).save(folder / f"{name}.png")
    pairs = {
        "train_0": "from one training image to another",
        "test_0": "from an image that is not in the training set to one that is",
    }
    for number, (start, description) in zip(numbers, pairs.items(), strict=True):
        yield command_figure(
            number,
            f"Linear interpolation {description}, through the latents above and through the pixels "
            "below, in steps of 0.05. Those at 0.45, 0.5 and 0.75 are the 10th, 11th and 16th.",
            run,
            f"interpolate {folder / start}.png {folder / 'train_1'}.png --steps 21 "
            f"--run {run.folder}",
            f"Other images. {SETTINGS}",
        )


def outlook_figures(flows: list[Run], bits: int) -> Iterator[Figure]:
    """Yield the validation curves of all flows by the images seen, and samples of each flow."""
    rows = {run.folder.name: run.read_metrics() for run in flows}
    curves = {}
    for run in flows:
        batch_size = read_config(run.config)["trainer"]["batch_size"]
        curves[run.folder.name] = [
            (batch_size * row["step"] / 1000, row["bits_per_dim"])
            for row in validation_rows(rows[run.folder.name])
        ]
    difference = "The thesis only mentions these networks, except for those of its two experiments."

    def draw_samples(path: Path) -> None:
        grids = []
        for run in flows:
            name = run.folder.name
            images, _ = sample_images(flowgen.load(run.folder, "auto"), 12, 0.7, 0)
            grids.append((f"{name}, {rows[name][-1]['step']:,} steps", images))
        rendering.titled_grids(grids, bits, 12).save(path)

    draw_curves = partial(
        plots.lines,
        curves,
        xlabel="thousands of training images seen",
        ylabel=f"validation bits/dim at {bits} bits",
        outliers=(0.0, 0.03),
    )
    yield Figure(
        "O.1",
        "Validation bits/dim of every network by the images seen. The first steps are above the "
        "frame.",
        draw_curves,
        flows,
        difference=difference,
    )
    yield Figure(
        "O.2",
        "Samples of each network at temperature 0.7 at the end of training. The runs have "
        "different lengths.",
        draw_samples,
        flows,
        "flowgen sample --temperature 0.7 --count 12 --run RUN",
        difference,
    )
