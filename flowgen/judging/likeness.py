"""How close samples come to images and how diverse they are, among the images' principal components: without a network's weights.

A Fréchet distance there is no FID, which is measured among the features of one particular network, see `fidelity`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COMPONENTS, NEIGHBOURS = 64, 5


class PrincipalComponents:
    """The coordinates (N, components) of images (N, ...) along the directions in which the images given at the start vary most."""

    def __init__(self, images: Tensor, components: int = COMPONENTS):
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that every model is judged in the same space
            self.basis = torch.pca_lowrank(flat - self.mean, min(components, *flat.shape), center=False, niter=4)[2]

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
        frechet(samples.double(), real.double()),
        coverage(samples, real),
        (torch.pdist(samples).mean() / torch.pdist(real).mean()).item(),
    )


def frechet(one: Tensor, other: Tensor) -> float:
    """See `likeness`."""
    covariances = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return ((one.mean(0) - other.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()).item()


def coverage(samples: Tensor, real: Tensor) -> float:
    """See `likeness`."""
    reach = torch.cdist(real, real).kthvalue(min(NEIGHBOURS + 1, len(real)), dim=1).values
    return (torch.cdist(samples, real) <= reach).any(0).float().mean().item()


def distance_from_mean(point: Tensor, real: Tensor) -> float:
    """How far a point (d,) lies from the mean of real points (M, d), a real point's own mean distance from it being 1."""
    middle = real.mean(0)
    return ((point - middle).norm() / (real - middle).norm(dim=1).mean()).item()
