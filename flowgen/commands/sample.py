"""Sampling: `flowgen sample` and `flowgen chain`."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgen.config import instantiate, runs
from flowgen.models.base import (
    ClassConditional,
    GenerativeModel,
    SupportsMCMC,
    SupportsTokenSampling,
    sample_batches,
    sample_images,
    sort_by_log_prob,
)
from flowgen.models.flows.flow import Flow
from flowgen.utils import console, memory, rendering
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import UNNORMALIZED
from flowgen.utils.toy2d import TOY2D_SHAPE, is_toy2d

DEFAULT_IMAGES = 32
DEFAULT_POINTS = 10_000  # samples of the plane
DENSITY_RESOLUTION = 300  # pixels along each side of the density plot of a flow
DENSITY_SAMPLES = 8  # importance samples per image of the density plot of another model
DENSITY_BATCH_SIZE = 4096  # images that are scored at once for this plot


def sample(
    *,
    run: str | None,
    temperatures: Sequence[float],
    count: int | None,
    seed: int,
    label: int | None,
    guidance: float | None,
    jacobi: bool,
    sampler: str | None,
    steps: int | None,
    device: str,
    out: Path | None,
) -> Path:
    """Save samples of a model as a picture or as a zip archive of images.

    The picture has one block of rows per temperature, sorted from high to low log-probability.
    A model of points in the plane is plotted instead, see `plot_toy2d`.

    Args:
        run: Name of the run, or None for the newest one that fits the other options.
        temperatures: Sampling temperatures; empty for the temperature of the run.
        count: Number of samples per temperature.
        seed: Seed of the samples. Every temperature starts from the same random numbers.
        label: Class to sample, for class-conditional models.
        guidance: Classifier-free guidance weight, for TarFlow.
        jacobi: Update all patches in parallel (Jacobi iterations), for TarFlow.
        sampler: MCMC sampler, for RBMs.
        steps: Number of steps of the sampler, for RBMs.
        device: Name of the device, or "auto".
        out: Output file. A name that ends in .zip selects the archive.

    Returns:
        The path of the file.
    """
    settings = {
        "label": label,
        "guidance": guidance,
        "jacobi": jacobi or None,
        "sampler": sampler,
        "steps": steps,
    }
    kwargs = {name: value for name, value in settings.items() if value is not None}
    run_dir, checkpoint, model = runs.find_model(run, device, _required_capability(kwargs))
    model.set_progress(console.progress_bar)
    path = out or run_dir.folder / "sample.png"
    is_zip = path.suffix.lower() == ".zip"
    temperatures = temperatures or [
        runs.default_temperature(checkpoint["config"], model.image_shape)
    ]
    if is_toy2d(model.image_shape):
        if kwargs or is_zip or len(temperatures) > 1:
            raise UserError(
                "points of the plane are plotted in one picture at one temperature: use only "
                "the options --count, --temperature once, --seed and --out FILE.png"
            )
        data = instantiate.build_data(checkpoint["config"])
        target = torch.cat(list(data.batches("test", DEFAULT_POINTS, DEFAULT_POINTS)))
        plot_toy2d(model, target, temperatures[0], count or DEFAULT_POINTS, seed, path)
        return path
    count = count or DEFAULT_IMAGES
    if is_zip:
        if len(temperatures) > 1:
            raise UserError(
                "a zip archive contains the samples of one temperature: run this command once "
                "per temperature, each time with a different --out"
            )
        samples = sample_batches(model, count, temperatures[0], seed, **kwargs)
        rendering.save_zip((images for images, _ in samples), model.bits, path)
    else:
        _save_picture(model, temperatures, count, seed, kwargs, path)
    return path


def _required_capability(kwargs: Mapping[str, Any]) -> type[GenerativeModel]:
    """Return the capability that a model needs for these arguments of its `sample` method."""
    capabilities: dict[str, type[GenerativeModel]] = {
        "guidance": SupportsTokenSampling,
        "jacobi": SupportsTokenSampling,
        "sampler": SupportsMCMC,
        "steps": SupportsMCMC,
        "label": ClassConditional,  # last, because models that sample tokens take a label too
    }
    needed = [capability for name, capability in capabilities.items() if name in kwargs]
    if SupportsMCMC in needed and set(needed) != {SupportsMCMC}:
        raise UserError(
            "--label, --guidance and --jacobi are options for flows, --sampler and --steps for "
            "RBMs: use options of one kind"
        )
    return needed[0] if needed else GenerativeModel


@torch.no_grad()
def plot_toy2d(
    model: GenerativeModel, target: Tensor, temperature: float, count: int, seed: int, path: Path
) -> None:
    """Plot a model of points in the plane: target points, latents, samples, and density.

    A flow that was fitted to a density is shown with this density instead of target points.

    A flow has a continuous density. The density of another model with a likelihood is constant
    within the cell of each image. Latents are shown if they have two dimensions.

    Args:
        model: A model of images of shape (2, 1, 1).
        target: Images of the data.
        temperature: Temperature of the samples.
        count: Number of samples.
        seed: Seed of the samples.
        path: Path of the PNG.
    """
    from flowgen.utils import plots

    noise_generator = torch.Generator().manual_seed(seed)

    def to_points(images: Tensor) -> Tensor:
        noise = torch.rand(images.shape, generator=noise_generator)
        return ((images.cpu() + noise) / 2**model.bits).flatten(1)

    target = to_points(target)
    generator = torch.Generator(model.device).manual_seed(seed)
    latent: Tensor | None = None
    density: Tensor | None = None
    if isinstance(model, Flow):
        latent_title = "N(0, I)" if temperature == 1 else f"N(0, {temperature:g}² I)"
        latent = temperature * torch.randn(count, 2, generator=generator, device=model.device)
        samples = model.decode_continuous(latent).flatten(1)
        density = _density_of_flow(model)
    else:
        latent_title = "latents"
        images, _ = model.sample(count, temperature, generator)
        if model.has_encoder:
            latent = model.encode(images, generator)
        samples = to_points(images)
        if model.likelihood != "none":
            density = _density_of_images(model, generator)
    plots.plane_panels(
        target,
        latent.cpu() if latent is not None and latent.shape[1] == 2 else None,
        samples.cpu(),
        None if density is None else density.cpu(),
        latent_title,
        path,
        _target_density(model),
    )


def _target_density(model: GenerativeModel) -> Tensor | None:
    """Return the density that a flow was fitted to, if any, on a grid of the unit square."""
    from flowgen.models.flows.reverse_kl import ReverseKL
    from flowgen.utils.energies import density_grid

    if not isinstance(model, ReverseKL):
        return None
    grid = density_grid(model.density).float()
    return grid / grid.mean()


def _density_of_flow(model: Flow) -> Tensor:
    """Return the density on a grid of points in the unit square, (rows, columns)."""
    centers = (torch.arange(DENSITY_RESOLUTION, device=model.device) + 0.5) / DENSITY_RESOLUTION
    # (x, y) with x varying fastest, because an image is a list of rows
    grid = torch.cartesian_prod(centers, centers).flip(1).view(-1, *TOY2D_SHAPE)
    density = torch.cat([model.log_density(points).exp() for points in grid.split(10_000)])
    return density.view(DENSITY_RESOLUTION, DENSITY_RESOLUTION)


def _density_of_images(model: GenerativeModel, generator: torch.Generator) -> Tensor:
    """Return K^2 P(image) of all K^2 images, where K = 2^bits: (rows, columns).

    It is the density of points that are uniform within the cell of their image.
    """
    bins = 2**model.bits
    values = torch.arange(bins, dtype=torch.uint8, device=model.device)
    images = torch.cartesian_prod(values, values).flip(1).view(-1, *TOY2D_SHAPE)
    batches = images.split(DENSITY_BATCH_SIZE)
    scores = [
        model.score(batch, num_importance_samples=DENSITY_SAMPLES, generator=generator)
        for batch in console.progress_bar(batches, "density", len(batches))
    ]
    log_probs = torch.cat(scores)
    if model.score_metric == UNNORMALIZED:
        log_probs = log_probs.log_softmax(0)
    return bins**2 * log_probs.exp().view(bins, bins)


def _save_picture(
    model: GenerativeModel,
    temperatures: Sequence[float],
    count: int,
    seed: int,
    kwargs: Mapping[str, Any],
    path: Path,
) -> None:
    """Save one block of rows per temperature, each sorted by log-probability if there is one."""
    side = max(rendering.MIN_SIDE, *model.image_shape[1:])
    memory.check_memory(
        "--count",
        count,
        bytes_each=4 * side**2 * len(temperatures),
        hint=" in a picture, and any number in --out FILE.zip",
    )
    label = f"class {kwargs['label']}, " if "label" in kwargs else ""
    sampler = f"{kwargs['sampler']}, " if "sampler" in kwargs else ""
    blocks = []
    for temperature in temperatures:
        images, log_probs = sample_images(model, count, temperature, seed, **kwargs)
        if log_probs is not None and (overflows := int((~log_probs.isfinite()).sum())):
            console.log.warning(
                "%d of %d samples at temperature %g exceed the range of float32: "
                "use a lower temperature",
                overflows,
                count,
                temperature,
            )
        title = f"{label}{sampler}temperature {temperature:g}"
        blocks.append((title, sort_by_log_prob(images, log_probs)))
    picture = rendering.titled_grids(blocks, model.bits, columns=min(count, 8))
    rendering.save_picture(picture, path)


@torch.no_grad()
def chain(
    *,
    sampler: str,
    run: str | None,
    count: int,
    frames: int,
    steps: int,
    seed: int,
    device: str,
    out: Path | None,
) -> Path:
    """Save an animation of Markov chains that start from white noise.

    Args:
        sampler: MCMC sampler.
        run: Name of the run, or None for the newest run of an RBM.
        count: Number of chains.
        frames: Number of frames after the initial one. A frame shows P(v = 1) of every chain.
        steps: Number of steps of the sampler between two frames.
        seed: Seed of the chains.
        device: Name of the device, or "auto".
        out: Output file, a GIF.

    Returns:
        The path of the file.
    """
    run_dir, _, model = runs.find_model(run, device, SupportsMCMC)
    side = max(rendering.MIN_SIDE, *model.image_shape[1:])
    memory.check_memory("--frames", frames, 3 * count * side**2)
    generator = torch.Generator(model.device).manual_seed(seed)
    states = console.progress_bar(
        model.iter_chains(count, sampler, generator), sampler, steps * frames
    )
    pictures = [rendering.to_uint8(state) for state in islice(states, 0, steps * frames + 1, steps)]
    path = out or run_dir.folder / f"chain_{sampler}.gif"
    rendering.save_gif(pictures, 8, max(1, round(count**0.5)), path)
    return path
