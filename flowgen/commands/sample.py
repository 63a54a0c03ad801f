"""`flowgen sample`."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from flowgen.commands.complete import to_uint8
from flowgen.config.instantiate import build_data
from flowgen.config.loading import find_model
from flowgen.models.base import (
    ClassConditional,
    GenerativeModel,
    SupportsMCMC,
    SupportsTokenSampling,
)
from flowgen.models.flows.flow import Flow
from flowgen.utils import plots, rendering
from flowgen.utils.console import progress_bar
from flowgen.utils.errors import UserError
from flowgen.utils.memory import check_memory
from flowgen.utils.rendering import TOY2D_SHAPE, is_toy2d

BATCH = 64
COLUMNS = 8  # images in a row
IMAGES, POINTS = (
    32,
    10000,
)  # samples where no number is given: of images, and of a flow of the plane
GRID = 300  # the side of the picture of its density
log = logging.getLogger("flowgen")


def sample(
    *,
    name: str | None,
    temperatures: Sequence[float],
    count: int | None,
    seed: int,
    label: int | None,
    guidance: float | None,
    jacobi: bool,
    method: str | None,
    sweeps: int | None,
    device: str,
    out: Path | None,
) -> Path:
    """Save `count` samples for each temperature, a block of rows each, from high to low log-probability. Raises FlowgenError.

    Without temperatures, at the one that the run's own samples had. A zip takes any number, each an image of its own. `label` is the
    class to draw, of a flow that knows any, `guidance` and `jacobi` are a TarFlow's; `method` and `sweeps` choose an RBM's sampler. A flow
    of the plane is drawn as a whole instead, at one temperature, by default 1.
    """
    by_tokens = guidance is not None or jacobi
    if (label is not None or by_tokens) and (method or sweeps):
        raise UserError(
            "--label, --guidance and --jacobi are for flows, --method and --sweeps for RBMs: leave out some"
        )
    options = {
        "label": label,
        "guidance": guidance,
        "jacobi": jacobi or None,
        "method": method,
        "sweeps": sweeps,
    }
    how = {key: value for key, value in options.items() if value is not None}
    ability = (
        SupportsMCMC
        if method or sweeps
        else SupportsTokenSampling
        if by_tokens
        else ClassConditional
        if label is not None
        else GenerativeModel
    )
    run, checkpoint, model = find_model(name, device, ability)
    model.set_progress(progress_bar)
    path = out or run.folder / "sample.png"
    if is_toy2d(model.image_shape) and isinstance(model, Flow):
        if len(temperatures) > 1:
            raise UserError(
                "a flow of the plane is drawn at one temperature: call this once for each, with an --out of its own"
            )
        if how or path.suffix.lower() == ".zip":
            raise UserError(
                "a flow of the plane is drawn as a whole, into one picture: leave out all but --count, --temperature and --out FILE.png"
            )
        target = torch.cat(list(build_data(checkpoint["config"]).batches("test", POINTS, POINTS)))
        temperature = temperatures[0] if temperatures else 1.0
        plane(model, target, temperature, count or POINTS, seed, path)
        return path
    titled, count, temperatures = (
        [],
        count or IMAGES,
        temperatures or [checkpoint["config"]["trainer"]["sample_temperature"]],
    )
    if path.suffix.lower() == ".zip":
        if len(temperatures) > 1:
            raise UserError(
                "a zip holds the samples of one temperature: call this once for each, with an --out of its own"
            )
        batches = draws(model, count, temperatures[0], seed, **how)
        rendering.archive(
            (images for images, _ in progress_bar(batches, "samples", -(-count // BATCH))),
            model.bits,
            path,
        )
        return path
    side = max(rendering.SMALLEST_SIDE, *model.image_shape[1:])
    check_memory(
        "--count",
        count,
        4 * side**2 * len(temperatures),
        cure=" in a picture, and any number in --out FILE.zip",
    )
    for temperature in temperatures:
        images, scores = draw(model, count, temperature, seed, **how)
        if broken := int((~scores.isfinite()).sum()):
            log.warning(
                "%d of %d samples at temperature %g are beyond what float32 holds: try a lower one",
                broken,
                count,
                temperature,
            )
        said = (
            [f"class {label}"] * (label is not None)
            + [str(method)] * bool(method)
            + [f"temperature {temperature:g}"]
        )
        titled.append((", ".join(said), images[scores.argsort(descending=True)]))
    rendering.blocks(titled, model.bits, columns=min(count, COLUMNS)).save(path)
    return path


def draw(
    model: GenerativeModel, count: int, temperature: float, seed: int, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` samples and how probable they are; the same latents at every temperature, since each starts from the same seed."""
    images, scores = zip(
        *progress_bar(draws(model, count, temperature, seed, **how), "samples", -(-count // BATCH)),
        strict=True,
    )
    return torch.cat(images), torch.cat(scores)


def draws(
    model: GenerativeModel, count: int, temperature: float, seed: int, **how: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same in batches, which go on with the classes where the one before ended."""
    generator = torch.Generator(model.device).manual_seed(seed)
    sweeps: list[list[int]] = []
    for start in range(0, count, BATCH):
        place = (
            {"first": start}
            if isinstance(model, ClassConditional) and model.num_classes is not None
            else {}
        )
        yield model.sample(min(BATCH, count - start), temperature, generator, **place, **how)
        if isinstance(model, SupportsTokenSampling) and "jacobi" in how:
            sweeps.append(model.sweeps())
    if sweeps:
        log.info(
            "sweeps of the blocks: %s",
            ", ".join(str(max(each)) for each in zip(*sweeps, strict=True)),
        )


@torch.no_grad()
def plane(
    model: Flow, target: torch.Tensor, temperature: float, count: int, seed: int, path: Path
) -> None:
    """A flow of the plane in four pictures: the target, N(0, I), the one carried into the other, and the density."""
    generator = torch.Generator(model.device).manual_seed(seed)
    latent = temperature * torch.randn(count, 2, generator=generator, device=model.device)
    carried = model.points(latent).flatten(1)
    side = (torch.arange(GRID, device=model.device) + 0.5) / GRID
    x, y = torch.meshgrid(side, side, indexing="xy")
    grid = torch.stack((x, y), -1).view(-1, *TOY2D_SHAPE)
    density = torch.cat([model.log_density(part).exp() for part in grid.split(10000)]).view(
        GRID, GRID
    )
    noise = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))
    target = ((target.cpu() + noise) / model.bins).flatten(1)
    plots.plane(target, latent.cpu(), carried.cpu(), density.cpu(), temperature, path)


@torch.no_grad()
def chain(
    *,
    method: str,
    name: str | None,
    count: int,
    frames: int,
    sweeps: int,
    seed: int,
    device: str,
    out: Path | None,
) -> Path:
    """Save a film of `count` chains from white noise: P(v = 1) after every `sweeps` sweeps. Raises FlowgenError."""
    run, _, model = find_model(name, device, SupportsMCMC)
    side = max(rendering.SMALLEST_SIDE, *model.image_shape[1:])
    check_memory("--frames", frames, 3 * count * side**2)
    states = model.iter_chains(count, method, torch.Generator(model.device).manual_seed(seed))
    shown = islice(progress_bar(states, method, sweeps * frames), 0, sweeps * frames + 1, sweeps)
    target = out or run.folder / f"chain_{method}.gif"
    columns = max(1, round(count**0.5))
    rendering.film([to_uint8(frame) for frame in shown], 8, columns, target)
    return target
