"""Fréchet distance between sets of images in the space of their principal components."""

import math

import torch
from torch import Tensor

NUM_COMPONENTS = 64


class PrincipalComponents:
    """Projection of images on the principal components of a reference set.

    Args:
        images: Reference images, (N, ...).
        max_value: Pixel values are divided by it.
        components: Maximum number of components.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> images = torch.rand(100, 1, 4, 4)
        >>> PrincipalComponents(images, components=3)(images).shape
        torch.Size([100, 3])
    """

    def __init__(self, images: Tensor, max_value: float = 1.0, components: int = NUM_COMPONENTS):
        self.max_value = max_value
        flat = images.cpu().float().flatten(1) / max_value
        self.mean = flat.mean(0)
        # The algorithm is random: a fixed seed gives all models the same coordinates.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.basis = torch.pca_lowrank(
                flat - self.mean, min(components, *flat.shape), center=False, niter=4
            )[2]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the coordinates (N, components) of images (N, ...)."""
        return (images.cpu().float().flatten(1) / self.max_value - self.mean) @ self.basis


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians that fit two sets of points.

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al., arXiv:1706.08500, section 4). A single
    point has no covariance: the distance is NaN.

    Args:
        first: Points (N, d).
        second: Points (M, d).
    """
    if min(len(first), len(second)) < 2:
        return math.nan
    first_cov = first.T.cov()
    second_cov = second.T.cov()
    root_trace = torch.linalg.eigvals(first_cov @ second_cov).real.clamp(min=0).sqrt().sum()
    mean_distance = (first.mean(0) - second.mean(0)).square().sum()
    return (mean_distance + first_cov.trace() + second_cov.trace() - 2 * root_trace).item()
