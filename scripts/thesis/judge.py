"""How close samples come to images, how diverse they are, and how smoothly an interpolation runs: without a network's weights.

Closeness and diversity are measured among the leading principal components of training images: a Fréchet distance there is no FID, whose
network flowgen does not ship.
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowgen.errors import FlowgenError
from flowgen.models import Flow

COMPONENTS, NEIGHBOURS = 64, 3


class Space:
    """The leading principal components of images (N, channels, height, width) in [0, 1], and distances there."""

    def __init__(self, images: Tensor):
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that every model is judged in the same space
            self.basis = torch.pca_lowrank(flat - self.mean, min(COMPONENTS, *flat.shape), center=False, niter=4)[2]

    def __call__(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - self.mean) @ self.basis


class Likeness(NamedTuple):
    """Samples beside real images, see `likeness`."""

    frechet: float
    precision: float
    recall: float
    spread: float


def likeness(samples: Tensor, real: Tensor) -> Likeness:
    """Of points (N, d) to real points (M, d).

    frechet: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the Gaussians that fit them. Heusel et al. (1706.08500), section 2.
    precision: the share of samples that lie within a real point's distance to its third neighbour; recall: the reverse.
    Kynkäänniemi et al. (1904.06991), section 2. spread: the mean distance of two samples over that of two real points.
    """
    return Likeness(
        _frechet(samples.double(), real.double()),
        _covered(samples, real),
        _covered(real, samples),
        (torch.pdist(samples).mean() / torch.pdist(real).mean()).item(),
    )


def _frechet(one: Tensor, other: Tensor) -> float:
    covariances = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return ((one.mean(0) - other.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()).item()


def _covered(points: Tensor, of: Tensor) -> float:
    """The share of `points` within reach of at least one point of `of`, whose reach is its distance to its third neighbour."""
    reach = torch.cdist(of, of).kthvalue(min(NEIGHBOURS + 1, len(of)), dim=1).values
    return (torch.cdist(points, of) <= reach).any(1).float().mean().item()


class Pictures(Dataset[Tensor]):
    """Images (N, 3, height, width), uint8, one by one, as torch-fidelity takes them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        return self.images[place]


def check_fid() -> None:
    """Raises FlowgenError where FID is asked for and cannot be had."""
    weights = os.environ.get("FID_WEIGHTS")
    if weights and not Path(weights).is_file():
        raise FlowgenError(f"FID_WEIGHTS={weights} is no file: name that of torch-fidelity's network, or leave it out")
    if weights and find_spec("torch_fidelity") is None:
        raise FlowgenError("FID_WEIGHTS is set, but torch-fidelity is not installed: pip install -e '.[fidelity]'")


def fid(samples: Tensor, real: Tensor) -> float:
    """FID by torch-fidelity of uint8 images (N, channels, height, width), with the network of FID_WEIGHTS."""
    from torch_fidelity import calculate_metrics

    weights = os.environ["FID_WEIGHTS"]
    sets = [Pictures(images.expand(-1, 3, -1, -1)) for images in (samples, real)]
    how = {"fid": True, "cuda": torch.cuda.is_available(), "verbose": False, "save_cpu_ram": True}
    return calculate_metrics(input1=sets[0], input2=sets[1], feature_extractor_weights_path=weights, **how)["frechet_inception_distance"]


class Walk(NamedTuple):
    """Means over pairs of images, at every place of the way, but for the last."""

    steps: list[float]  # root mean square change of the pixels from each picture to the next, of the whole range
    pixel_steps: list[float]
    bits: list[float]  # bits/dim of the pictures along the latents
    pixel_bits: list[float]
    unevenness: list[float]  # of every pair: the largest step over the mean step; 1 is perfectly even


@torch.no_grad()
def walk(model: Flow, first: Tensor, second: Tensor, steps: int) -> Walk:
    """From each of `first` to its partner in `second`, levels (N, channels, height, width), through the latents and through the pixels."""
    share = torch.linspace(0, 1, steps, device=model.device)
    ends = model.encode(first.to(model.device)), model.encode(second.to(model.device))
    latent = torch.stack([model.decode((1 - a) * ends[0] + a * ends[1]) for a in share])
    pixels = torch.stack([((1 - a) * first.to(model.device) + a * second.to(model.device)).round().to(torch.uint8) for a in share])
    changes = _changes(latent, model.bins)
    uneven = changes.max(0).values / changes.mean(0)
    return Walk(
        changes.mean(1).tolist(),
        _changes(pixels, model.bins).mean(1).tolist(),
        [_bits(model, picture) for picture in latent],
        [_bits(model, picture) for picture in pixels],
        uneven.tolist(),
    )


def _changes(way: Tensor, bins: int) -> Tensor:
    """(steps - 1, N)."""
    return (way.float() / (bins - 1)).diff(dim=0).square().flatten(2).mean(2).sqrt()


def _bits(model: Flow, levels: Tensor) -> float:
    generator = torch.Generator(model.device).manual_seed(0)
    return (-model.log_prob(levels, generator).mean() / (model.dimensions * math.log(2))).item()
