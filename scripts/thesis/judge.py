"""How close samples come to images, how diverse they are, and how smoothly an interpolation runs: without a network's weights.

Closeness and diversity are measured among the leading principal components of training images: a Fréchet distance there is no FID, whose
network flowgen does not ship.
"""

import math
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowgen.errors import FlowgenError
from flowgen.models import Flow

COMPONENTS, NEIGHBOURS = 64, 5


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
    coverage: float
    spread: float


def likeness(samples: Tensor, real: Tensor) -> Likeness:
    """Of points (N, d) to real points (M, d).

    frechet: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the Gaussians that fit them. Heusel et al. (1706.08500), section 2.
    coverage: the share of real points with a sample within the distance to their fifth real neighbour; outliers, in whose reach
    even a blank picture lies, count once each. Naeem et al. (2002.09797), section 3.
    spread: the mean distance of two samples over that of two real points.
    """
    return Likeness(
        _frechet(samples.double(), real.double()),
        _coverage(samples, real),
        (torch.pdist(samples).mean() / torch.pdist(real).mean()).item(),
    )


def offset(point: Tensor, real: Tensor) -> float:
    """How far a point (d,) lies from the mean of real points (M, d), a real point's own mean distance from it being 1."""
    middle = real.mean(0)
    return ((point - middle).norm() / (real - middle).norm(dim=1).mean()).item()


def _frechet(one: Tensor, other: Tensor) -> float:
    covariances = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return ((one.mean(0) - other.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()).item()


def _coverage(samples: Tensor, real: Tensor) -> float:
    reach = torch.cdist(real, real).kthvalue(min(NEIGHBOURS + 1, len(real)), dim=1).values
    return (torch.cdist(samples, real) <= reach).any(0).float().mean().item()


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


def fidelity(samples: Tensor, real: Tensor) -> dict[str, float]:
    """FID, precision and recall by torch-fidelity of uint8 images (N, channels, height, width), with the network of FID_WEIGHTS."""
    from torch_fidelity import calculate_metrics

    sets = [Pictures(images.expand(-1, 3, -1, -1)) for images in (samples, real)]
    network = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": os.environ["FID_WEIGHTS"]}
    how = {"fid": True, "prc": True, "cuda": torch.cuda.is_available(), "verbose": False, "save_cpu_ram": True}
    found = calculate_metrics(input1=sets[0], input2=sets[1], **network, **how)
    return {"fid": found["frechet_inception_distance"], "precision": found["precision"], "recall": found["recall"]}


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
    pixels = torch.stack([(1 - a) * first.to(model.device) + a * second.to(model.device) for a in share])
    changes = _changes(latent, model.bins)
    uneven = changes.max(0).values / changes.mean(0)
    return Walk(
        changes.mean(1).tolist(),
        _changes(pixels, model.bins).mean(1).tolist(),
        [_mean_bits(model, picture) for picture in latent],
        [_mean_bits(model, picture.round().to(torch.uint8)) for picture in pixels],
        uneven.tolist(),
    )


def _changes(way: Tensor, bins: int) -> Tensor:
    """(steps - 1, N)."""
    return (way.float() / (bins - 1)).diff(dim=0).square().flatten(2).mean(2).sqrt()


def _mean_bits(model: Flow, levels: Tensor) -> float:
    return bits_per_image(model, [levels]).mean().item()


@torch.no_grad()
def bits_per_image(model: Flow, batches: Iterable[Tensor]) -> Tensor:
    """Bits/dim of every image, (N,), under one draw of a noise that is the same at every call, for the same batches."""
    generator = torch.Generator(model.device).manual_seed(0)
    found = [-model.log_prob(levels.to(model.device), generator).cpu() for levels in batches]
    return torch.cat(found).double() / (model.dimensions * math.log(2))
