"""The report of one experiment: sample quality, likelihood and interpolations of its flow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from glow_figures import random_images
from torch import Tensor

from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.interpolation import interpolate_pairs, step_sizes, unevenness
from flowgen.evaluation.sample_quality import SampleQuality
from flowgen.models.flows.flow import Flow

BATCH_SIZE = 64


def flow_report(
    model: Flow,
    data: ImageDataset,
    samples: Mapping[float, Sequence[Tensor]],
    *,
    weights: Path | None = None,
    pairs: int = 16,
    steps: int = 18,
) -> dict[str, Any]:
    """Return a report of a flow's samples and interpolations, which can be written as JSON.

    Args:
        model: The flow.
        data: Its data set.
        samples: One or more sets of N samples for each temperature, uint8 (N, ...).
        weights: File with the weights of the FID network, see `find_fid_weights`, or None.
        pairs: Number of pairs of test images to interpolate between.
        steps: Number of images on each path. Use an even number: halfway between two images,
            rounding favors even pixel values.

    Returns:
        A dictionary.

        - "samples": For each temperature and set the result of `SampleQuality.measure`.
        - "training": The quality of N training images.
        - "mean_sample": `distance_from_mean` of the first sample of the lowest temperature.
        - "bits": Bits/dim of each of the N test images, with one sample of the noise.
        - "walk": Along paths through the latent space and through the pixels, the mean step sizes
          ("changes") and bits/dim ("bits"), and the "unevenness" of each path through the latent
          space.
        - "images": N.
        - "parameters": Number of parameters.
    """
    quality = SampleQuality(data, len(next(iter(samples.values()))[0]), weights)
    test = quality.test
    mean_sample = quality.features(samples[min(samples)][0][:1])[0]
    half = min(pairs, len(test) // 2)
    ends = random_images(test, len(test))
    paths = interpolate_pairs(
        model, ends[:half], ends[half : 2 * half], torch.linspace(0, 1, steps)
    )
    return {
        "samples": [[quality.measure(images) for images in sets] for sets in samples.values()],
        "training": quality.measure(quality.train),
        "mean_sample": distance_from_mean(mean_sample, quality.real),
        "bits": bits_per_dim_of_images(model, test).tolist(),
        "walk": {
            "changes": [step_sizes(path, data.bits).mean(1).tolist() for path in paths],
            "bits": [
                [bits_per_dim_of_images(model, images).mean().item() for images in path]
                for path in (paths[0], paths[1].round().to(torch.uint8))
            ],
            "unevenness": unevenness(paths[0], data.bits).tolist(),
        },
        "images": len(test),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def distance_from_mean(point: Tensor, real: Tensor) -> float:
    """Return the distance of a point from the mean of real points.

    The unit is the mean distance of a real point from that mean.

    Args:
        point: Features of an image, (d,).
        real: Features of real images, (M, d).
    """
    center = real.mean(0)
    return ((point - center).norm() / (real - center).norm(dim=1).mean()).item()


@torch.no_grad()
def bits_per_dim_of_images(model: Flow, images: Tensor) -> Tensor:
    """Return bits/dim of each image, (N,), with one sample of the noise, the same at every call."""
    generator = torch.Generator(model.device).manual_seed(0)
    log_probs = [
        model.score(batch.to(model.device), generator=generator).cpu()
        for batch in images.split(BATCH_SIZE)
    ]
    return model.bits_per_dim(torch.cat(log_probs).double())
