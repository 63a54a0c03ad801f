"""The figures of the data and of the two experiments."""

import math
from collections.abc import Callable
from pathlib import Path

import kinds
import torch
import yaml
from figure import MAKE, Figure, drawn, to_pil, unit
from torch import Tensor

import flowgen
import flowgen.pictures
from flowgen.commands.sample import draw
from flowgen.config import conf_folder, read_config
from flowgen.data import Images
from flowgen.models import Flow
from flowgen.training.run import Run
from flowgen.training.schedule import learning_rate_factor, warmup_steps

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
WAY = 11  # pictures of an interpolation
PLACES = (0.45, 0.5, 0.75)
AS_ABOVE = "Settings: see the head of this section."
ALWAYS = (
    "Always unlike the thesis: averaged weights in samples and test figures; bounded log-scales, and exp(3 parameter) where the coupling "
    "networks end; 1x1 convolutions as P L U, which start at the principal axes; ActNorm started from several batches, and, inside the "
    "networks, folded into the convolutions from then on, those of residual blocks too."
)


def changes(run: Run, experiment: str) -> str:
    """Where a run's configuration departs from the experiment's file, which holds the original's settings, and what is never the same."""
    original = yaml.safe_load((conf_folder() / "experiment" / f"{experiment}.yaml").read_text())
    config = read_config(run.config)
    told = [
        f"{section}.{key}={config[section].get(key)} for {value}"
        for section in ("data", "model", "trainer")
        for key, value in (original.get(section) or {}).items()
        if config[section].get(key) != value and key not in ("keep_at", "keep_every")
    ]
    wanted = next(str(word["override /data"]) for word in original["defaults"] if "override /data" in word)
    source = yaml.safe_load((conf_folder() / "data" / f"{wanted}.yaml").read_text())
    if any(config["data"].get(key) != source[key] for key in ("_target_", "names") if key in source):
        told.insert(0, f"other data than {wanted}")
    settings = f"Against the experiment's file: {'; '.join(told)}." if told else "Settings as in the experiment's file."
    return f"{settings} {ALWAYS}"


def of_data(folder: Path, data: Images, originals: Tensor, name: str, crop: int | None) -> list[Figure]:
    """Figures 3.1 and 3.2: training images as they are, and as the model sees them."""
    count = len(originals)
    levels = (data.train.images[:count] >> (8 - data.bits)).float()
    noisy = (levels + torch.rand(levels.shape, generator=torch.Generator().manual_seed(0))) / 2**data.bits
    paths = folder / "figure_3.1.png", folder / "figure_3.2.png"
    kinds.tiles(originals, [""] * count, 8, paths[0])
    kinds.tiles(noisy, [""] * count, 8, paths[1])
    shape = "x".join(map(str, data.train.images.shape[2:]))
    return [
        Figure("3.1", f"Training images of {name}.", paths[0], [], MAKE, "The thesis: other images, cut to 148x148."),
        Figure(
            "3.2",
            f"The same {f'cut to {crop}x{crop} where they are larger' if crop else 'cut to a square'}, resized to {shape}, in {data.bits} "
            "bits, with noise u ~ U[0, 1) within the levels.",
            paths[1],
            [],
            MAKE,
            "The thesis' text adds Gaussian noise, its code uniform noise, as here.",
        ),
    ]


def of_training(run: Run, folder: Path, numbers: tuple[str, ...], images: int, first: bool) -> list[Figure]:
    """The learning rate, the smoothed loss, the raw loss; before the first experiment, figure 3.3, the warm-up."""
    rows, config = run.read_metrics(), read_config(run.config)
    train = [row for row in rows if row["split"] == "train" and row["loss"] is not None]
    found = []
    if first:
        trainer = config["trainer"]
        steps = warmup_steps(trainer["warmup"], images, trainer["batch_size"])
        factors = [(step, learning_rate_factor(step, 0.0, steps, 0.0)) for step in range(0, 2 * steps + 1, max(1, steps // 100))]
        path = drawn(folder / "figure_3.3.png", run, lambda at: kinds.lines({"warm-up": factors}, "step", "share of the learning rate", at))
        caption = f"The warm-up: {steps:,} steps, then constant."
        found.append(Figure("3.3", caption, path, [run.folder], MAKE, f"The thesis: 1,500 steps. {AS_ABOVE}"))
    rate = [(row["step"], row["lr"]) for row in train]
    raw = [(row["step"], row["loss"]) for row in train]
    held_out = [(row["step"], row["bits_per_dim"]) for row in rows if row["split"] == "validation"]
    label, offset = f"bits/dim at {config['data']['bits']} bits", 8.0 - config["data"]["bits"]
    drawings: list[tuple[str, Callable[[Path], object]]] = [
        ("The learning rate.", lambda at: kinds.lines({"learning rate": rate}, "step", "learning rate", at)),
        (
            "The loss of single batches, smoothed by a moving average; and that of validation images, by the averaged weights. The first "
            "steps lie above the frame.",
            lambda at: kinds.lines(
                {"training": kinds.moving_average(raw), "validation": held_out}, "step", label, at, offset=offset, skip=0.03
            ),
        ),
        (
            "The loss of single batches, raw; the first steps lie above the frame.",
            lambda at: kinds.lines({"training": raw}, "step", label, at, thin=True, offset=offset, skip=0.03),
        ),
    ]
    for number, (caption, draw_it) in zip(numbers, drawings, strict=True):
        path = drawn(folder / f"figure_{number}.png", run, draw_it)
        found.append(Figure(number, caption, path, [run.folder], MAKE, AS_ABOVE))
    return found


def of_samples(run: Run, folder: Path, numbers: tuple[str, ...], experiment: str) -> list[Figure]:
    """Two samples at each of four temperatures, from high to low log-probability, at the iterations that the thesis shows."""
    original = yaml.safe_load((conf_folder() / "experiment" / f"{experiment}.yaml").read_text())["trainer"]["keep_at"]
    temperatures = (0.0, 0.25, 0.7, 1.0)
    found = []
    for number, wanted, step in zip(numbers, original, read_config(run.config)["trainer"]["keep_at"], strict=True):

        def draw_it(at: Path, step: int = step) -> None:
            model = flowgen.load(run.numbered(step), "auto")
            pictures, titles = [], []
            for temperature in temperatures:
                levels, worth = draw(model, 2, temperature, 0)
                order = worth.argsort(descending=True)
                pictures.append(unit(levels[order], model.bits))
                bits = -worth[order] / (levels[0].numel() * math.log(2))
                titles += [f"T = {temperature:g}\n{value:.2f} bits/dim" for value in bits.tolist()]
            kinds.tiles(torch.cat(pictures), titles, 4, at)

        command = f"flowgen sample --run {run.numbered(step)} --count 2 " + " ".join(f"--temperature {each:g}" for each in temperatures)
        caption = (
            f"Samples after {step:,} steps, two at each temperature, from high to low log-probability. Above each is its cost, below 0 "
            "where the density is narrower than a level."
        )
        difference = f"The original: after {wanted:,} steps. {AS_ABOVE}"
        path = drawn(folder / f"figure_{number}.png", run, draw_it)
        found.append(Figure(number, caption, path, [run.folder], command, difference))
    return found


def of_temperatures(run: Run, folder: Path, number: str) -> Figure:
    """One latent vector at five temperatures."""

    def draw_it(at: Path) -> None:
        model = flowgen.load(run.folder, "auto")
        pictures = torch.cat([unit(draw(model, 1, temperature, 1)[0], model.bits) for temperature in TEMPERATURES])
        kinds.tiles(pictures, [f"T = {temperature:g}" for temperature in TEMPERATURES], 5, at)

    command = f"flowgen sample --run {run.folder} --count 1 --seed 1 " + " ".join(f"--temperature {each:g}" for each in TEMPERATURES)
    path = drawn(folder / f"figure_{number}.png", run, draw_it)
    caption = "One latent vector at temperatures 0, 0.25, 0.5, 0.75 and 1, which the thesis shows one by one."
    return Figure(number, caption, path, [run.folder], command, AS_ABOVE)


def of_interpolations(run: Run, folder: Path, numbers: tuple[str, ...], data: Images) -> list[Figure]:
    """Latent way and its middle; where six numbers are given, the pixels' way and its middle; from a test image to a training image."""
    bits = data.bits
    train, test = data.train.images[:2] >> (8 - bits), data.test.images[:1] >> (8 - bits)
    within, outside = (train[0], train[1]), (test[0], train[1])
    ends = {folder / "train_0.png": train[0], folder / "train_1.png": train[1], folder / "test_0.png": test[0]}
    for path, levels in ends.items():
        to_pil(levels, bits).save(path)

    def way(pair: tuple[Tensor, Tensor], latent: bool, shares: Tensor) -> Callable[[Path], None]:
        def draw_it(at: Path) -> None:
            weights = shares[:, None, None, None]
            if latent:
                model = flowgen.load(run.folder, "auto")
                assert isinstance(model, Flow)
                first, second = model.encode(torch.stack(pair).to(model.device))
                weights = shares[:, None].to(model.device)
                pictures = unit(model.decode((1 - weights) * first + weights * second), bits)
            else:
                pictures = (1 - weights) * unit(pair[0][None], bits) + weights * unit(pair[1][None], bits)
            kinds.tiles(pictures, [f"{share:.2g}" for share in shares.tolist()], len(shares), at)

        return draw_it

    whole, middle = torch.linspace(0, 1, WAY), torch.tensor(PLACES)
    of_two = "of two training images"
    jobs = [
        (within, True, whole, f"Linear interpolation {of_two} in the space of the latents."),
        (within, True, middle, "Its steps at 0.45, 0.5 and 0.75."),
        (within, False, whole, f"Linear interpolation {of_two} in the space of the pixels."),
        (within, False, middle, "Its steps at 0.45, 0.5 and 0.75."),
        (outside, True, whole, "Latent interpolation from an image that is not in the training set to one that is."),
        (outside, True, middle, "Its steps at 0.45, 0.5 and 0.75."),
    ]
    jobs = jobs if len(numbers) == 6 else [*jobs[:2], *jobs[4:]]
    found = []
    for number, (pair, latent, shares, caption) in zip(numbers, jobs, strict=True):
        path = drawn(folder / f"figure_{number}.png", run, way(pair, latent, shares))
        start = folder / ("train_0.png" if pair is within else "test_0.png")
        steps = WAY if len(shares) == WAY else 21  # of which 0.45, 0.5 and 0.75 are three
        command = f"flowgen interpolate {start} {folder / 'train_1.png'} --steps {steps} --run {run.folder}"
        found.append(Figure(number, caption, path, [run.folder], command, f"Other images. {AS_ABOVE}"))
    return found
