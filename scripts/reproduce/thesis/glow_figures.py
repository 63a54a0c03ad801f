"""The figures of the data, of the two experiments, and of the networks that the thesis only names."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
import yaml
from figure import Figure, by_command
from parts import data_section
from torch import Tensor

import flowgen
from flowgen.commands.sample import sample_images
from flowgen.config.compose import conf_folder, flatten, read_config
from flowgen.config.instantiate import build_data
from flowgen.data.dataset import ImageDataset
from flowgen.data.originals import originals
from flowgen.training.optim import learning_rate_factor, warmup_steps
from flowgen.training.run_dir import Run, validation_rows
from flowgen.utils import plots, rendering
from flowgen.utils.console import user_message
from flowgen.utils.errors import UserError
from flowgen.utils.rendering import to_pil

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
EXPERIMENTS = {  # the thesis' figures: of training, of samples, of interpolations
    "glow_conv": ("3.4-3.6", ("3.7", "3.8", "3.9", "3.10-3.14"), ("3.15-3.18", "3.19-3.20")),
    "glow_resnet": (
        "3.21-3.23",
        ("3.24", "3.25", "3.26-3.27", "3.28-3.32"),
        ("3.33-3.34", "3.35-3.36"),
    ),
}
AS_ABOVE = "Settings: see the head of this section."
ALWAYS = (
    "Always unlike the thesis: averaged weights in samples and test figures; bounded log-scales, and exp(3 parameter) where the coupling "
    "networks end; 1x1 convolutions as P L U, which start at the principal axes; ActNorm started from several batches, and, inside the "
    "networks, folded into the convolutions from then on, those of residual blocks too."
)


def prepared(data: str, root: str | None, scale: str) -> ImageDataset:
    """The faces. Raises FlowgenError with the cure where they, or what the scale needs, are missing."""
    if scale == "full" and not torch.cuda.is_available():
        raise UserError(
            "SCALE=full trains for days on one GPU, and this machine has none: SCALE=small takes an hour on two cores"
        )
    if data == "folder" and root is None:
        raise UserError(
            "DATA=folder needs ROOT=, a folder or a zip of images: make reproduce-thesis DATA=folder ROOT=~/faces"
        )
    try:
        return build_data({"data": data_section(data, root)})
    except UserError as error:
        cure = "Give its place as ROOT=FOLDER, or take a substitute: DATA=celeba ROOT=FOLDER, or DATA=folder ROOT=FOLDER"
        raise UserError(f"{user_message(error).removesuffix('.')}. {cure}") from error


def _original(experiment: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / "experiment" / f"{experiment}.yaml").read_text())


def changes(run: Run, experiment: str, data: str) -> str:
    """Where a run's configuration departs from the experiment's file, which holds the original's settings, and what is never the same."""
    original, config = _original(experiment), flatten(read_config(run.config))
    settings = flatten(
        {section: original.get(section) or {} for section in ("data", "model", "trainer")}
    )
    told = ["other data than celeba_hq"] * (data != "celeba_hq")
    told += [
        f"{key}={config.get(key)} for {value}"
        for key, value in settings.items()
        if config.get(key) != value and ".keep_" not in key
    ]
    return f"Against the experiment's file: {'; '.join(told) or 'no difference'}. {ALWAYS}"


def of_data(data: ImageDataset, name: str, root: str | None) -> Iterator[Figure]:
    """Figures 3.1 and 3.2: training images as they are, and as the model sees them."""
    config = data_section(name, root)
    as_they_are = originals(config, 16) if "names" in config else data.train.images[:16]
    images = (data.train.images[: len(as_they_are)] >> (8 - data.bits)).float()
    noisy = (
        255
        * (images + torch.rand(images.shape, generator=torch.Generator().manual_seed(0)))
        / 2**data.bits
    )
    cut = (
        f"cut to {crop}x{crop} where they are larger"
        if (crop := config.get("crop"))
        else "cut to a square"
    )
    told = f"The same {cut}, resized to {data.image_shape[1]}x{data.image_shape[2]}, in {data.bits} bits, with noise u ~ U[0, 1) within the levels."

    def grid(shown: Tensor) -> Callable[[Path], None]:
        return lambda at: rendering.image_grid(shown, 8, 8, 128).save(at)

    yield Figure(
        "3.1",
        f"Training images of {name}.",
        grid(as_they_are),
        difference="The thesis: other images, cut to 148x148.",
    )
    yield Figure(
        "3.2",
        told,
        grid(noisy.to(torch.uint8)),
        difference="The thesis adds Gaussian noise in its text, uniform noise in its code.",
    )


def of_experiment(run: Run, name: str, data: ImageDataset, folder: Path) -> Iterator[Figure]:
    """Its figures of training, of samples, and of interpolations."""
    of_training, of_samples, of_interpolations = EXPERIMENTS[name]
    yield from _of_training(run, of_training, data)
    yield from _of_samples(run, of_samples, f"thesis/{name}")
    yield from _of_interpolations(run, of_interpolations, data, folder)


def _of_training(run: Run, number: str, data: ImageDataset) -> Iterator[Figure]:
    """The learning rate, the loss, smoothed and raw; before the first experiment, figure 3.3, the warm-up."""
    if number.startswith("3.4"):
        trainer = read_config(run.config)["trainer"]
        steps = warmup_steps(trainer["warmup"], len(data.train), trainer["batch_size"])
        factors = [
            (step, learning_rate_factor(step, 0.0, steps, 0.0))
            for step in range(0, 2 * steps + 1, max(1, steps // 100))
        ]
        draw_it = partial(
            plots.lines, {"warm-up": factors}, xlabel="step", ylabel="share of the learning rate"
        )
        difference = f"The thesis: 1,500 steps. {AS_ABOVE}"
        yield Figure(
            "3.3",
            f"The warm-up: {steps:,} steps, then constant.",
            draw_it,
            [run],
            difference=difference,
        )
    caption = (
        "Above, the loss of single batches, raw and smoothed by a moving average, and that of validation images by the averaged weights, "
        f"in bits/dim at {data.bits} bits; the first steps lie above the frame. Below, the learning rate and the norm of the gradient."
    )
    difference = (
        f"By the thesis' convention the loss is {8 - data.bits} more. {AS_ABOVE}"
        if data.bits < 8
        else AS_ABOVE
    )
    yield Figure(number, caption, partial(copyfile, run.curves), [run], "flowgen train", difference)


def _of_samples(run: Run, numbers: tuple[str, ...], experiment: str) -> Iterator[Figure]:
    """Two samples at each of four temperatures at the iterations that the thesis shows; then one latent vector at five temperatures."""
    steps = zip(
        _original(experiment)["trainer"]["checkpoint_steps"],
        read_config(run.config)["trainer"]["checkpoint_steps"],
        strict=True,
    )
    for number, (wanted, step) in zip(numbers, steps, strict=False):
        caption = f"Samples after {step:,} steps, two at each temperature, from high to low log-probability."
        command = f"sample --run {run.step_path(step)} --count 2 --temperature 0 --temperature 0.25 --temperature 0.7 --temperature 1"
        yield by_command(
            number, caption, run, command, f"The original: after {wanted:,} steps. {AS_ABOVE}"
        )
    command = f"sample --run {run.folder} --count 1 --seed 1 --temperature {' --temperature '.join(map(str, TEMPERATURES))}"
    yield by_command(
        numbers[-1],
        "One latent vector at five temperatures, which the thesis shows one by one.",
        run,
        command,
        AS_ABOVE,
    )


def _of_interpolations(
    run: Run, numbers: tuple[str, ...], data: ImageDataset, folder: Path
) -> Iterator[Figure]:
    """From one training image to another, and from a test image to a training image."""
    ends = {
        "train_0": data.train.images[0],
        "train_1": data.train.images[1],
        "test_0": data.test.images[0],
    }
    for name, image in ends.items():
        to_pil(image).save(folder / f"{name}.png")
    how = "through the latents above and the pixels below, in steps of 0.05: those at 0.45, 0.5 and 0.75 are the 10th, 11th and 16th"
    outside = "from an image that is not in the training set to one that is"
    for number, start, way in zip(
        numbers, ("train_0", "test_0"), ("from one training image to another", outside), strict=True
    ):
        command = f"interpolate {folder / start}.png {folder / 'train_1'}.png --steps 21 --run {run.folder}"
        yield by_command(
            number, f"Linear interpolation {way}, {how}.", run, command, f"Other images. {AS_ABOVE}"
        )


def of_outlook(flows: list[Run], bits: int) -> Iterator[Figure]:
    """The validation figures of all flows by images seen, and samples of each."""
    rows = {run.folder.name: run.read_metrics() for run in flows}
    batches = {run.folder.name: read_config(run.config)["trainer"]["batch_size"] for run in flows}
    named = {
        name: [
            (batches[name] * row["step"] / 1000, row["bits_per_dim"])
            for row in validation_rows(each)
        ]
        for name, each in rows.items()
    }
    own = "The thesis only names these networks, but for those of its two experiments."

    def samples(at: Path) -> None:
        titles = [f"{name}, {each[-1]['step']:,} steps" for name, each in rows.items()]
        drawn = [sample_images(flowgen.load(run.folder, "auto"), 12, 0.7, 0)[0] for run in flows]
        rendering.titled_grids(list(zip(titles, drawn, strict=True)), bits, 12).save(at)

    caption = "Validation bits/dim of every network by the images seen; the first steps lie above the frame."
    how: Any = {
        "xlabel": "thousands of training images seen",
        "ylabel": f"validation bits/dim at {bits} bits",
        "beyond": (0.0, 0.03),
    }
    yield Figure("O.1", caption, partial(plots.lines, named, **how), flows, difference=own)
    ends = "Samples of each at temperature 0.7, at the end of their trainings, which differ."
    yield Figure(
        "O.2", ends, samples, flows, "flowgen sample --temperature 0.7 --count 12 --run RUN", own
    )
