"""Sample quality: Fréchet distance, coverage and spread, FID.

The Fréchet distance here uses principal components of the images, and needs no pretrained network.
FID uses the features of one particular network, see `fid_metrics`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from flowgen.utils.errors import UserError

FID_WEIGHTS_VARIABLE = "FID_WEIGHTS"  # environment variable with the path of the network's weights


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

    def __init__(self, images: Tensor, max_value: float = 1.0, components: int = 64):
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


def measure_sample_quality(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Compare samples with real images in a feature space, such as principal components.

    Args:
        samples: Features of samples, (N, d).
        real: Features of real images, (M, d).

    Returns:
        - "frechet": `frechet_distance`.
        - "coverage": `coverage`.
        - "spread": Mean distance of two samples divided by the mean distance of two real images.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> real = torch.randn(200, 2)
        >>> quality = measure_sample_quality(real, real)
        >>> round(abs(quality["frechet"]), 3), quality["coverage"], quality["spread"]
        (0.0, 1.0, 1.0)
    """
    return {
        "frechet": frechet_distance(samples.double(), real.double()),
        "coverage": coverage(samples, real),
        "spread": (torch.pdist(samples).mean() / torch.pdist(real).mean()).item(),
    }


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians that fit points (N, d) and (M, d).

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al., arXiv:1706.08500, section 2).
    """
    first_cov = first.T.cov()
    second_cov = second.T.cov()
    root_trace = torch.linalg.eigvals(first_cov @ second_cov).real.clamp(min=0).sqrt().sum()
    mean_distance = (first.mean(0) - second.mean(0)).square().sum()
    return (mean_distance + first_cov.trace() + second_cov.trace() - 2 * root_trace).item()


def coverage(samples: Tensor, real: Tensor, num_neighbors: int = 5) -> float:
    """Return the share of real points (M, d) that have a sample (N, d) in their neighborhood.

    The neighborhood of a real point is the ball up to its k-th nearest real neighbor, with k =
    `num_neighbors`. Outliers, whose balls contain even a blank image, count only once each (Naeem
    et al., Reliable fidelity and diversity metrics, arXiv:2002.09797, section 3).
    """
    # The nearest neighbor of a point is the point itself.
    radius = torch.cdist(real, real).kthvalue(min(num_neighbors + 1, len(real)), dim=1).values
    return (torch.cdist(samples, real) <= radius).any(0).float().mean().item()


def find_fid_weights() -> Path | None:
    """Return the path of the network's weights in FID_WEIGHTS, or None if it is not set.

    Raises:
        UserError: If the file or the package torch-fidelity is missing.
    """
    path = os.environ.get(FID_WEIGHTS_VARIABLE)
    if path and not Path(path).is_file():
        raise UserError(
            f"{FID_WEIGHTS_VARIABLE}={path} is not a file: set it to the weights of "
            "torch-fidelity's network, or unset it"
        )
    if path and find_spec("torch_fidelity") is None:
        raise UserError(
            f"{FID_WEIGHTS_VARIABLE} is set, but torch-fidelity is not installed: "
            "pip install torch-fidelity"
        )
    return Path(path) if path else None


def fid_metrics(samples: Tensor, real: Tensor, weights: Path) -> dict[str, float]:
    """Return FID, precision and recall of samples.

    FID: Heusel et al., arXiv:1706.08500. Precision and recall: Kynkäänniemi et al.,
    arXiv:1904.06991, section 2.

    Args:
        samples: Images with 8 bits, uint8 (N, channels, height, width), with 1 or 3 channels.
        real: Real images, in the same format.
        weights: File with the weights of torch-fidelity's network, see `find_fid_weights`.
    """
    from torch_fidelity import calculate_metrics

    # torch-fidelity expects data sets of RGB images: a subset of a tensor is one.
    result = calculate_metrics(
        input1=Subset(samples.cpu().expand(-1, 3, -1, -1), range(len(samples))),  # type: ignore
        input2=Subset(real.cpu().expand(-1, 3, -1, -1), range(len(real))),  # type: ignore
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        fid=True,
        prc=True,
        cuda=torch.cuda.is_available(),
        verbose=False,
        save_cpu_ram=True,
    )
    return {
        "fid": result["frechet_inception_distance"],
        "precision": result["precision"],
        "recall": result["recall"],
    }
