"""Sample quality: Fréchet distance, coverage and spread, a classifier, FID, reports of flows.

The Fréchet distance here uses principal components of the images, and needs no pretrained network.
FID uses the features of one particular network, see `fid_metrics`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.interpolation import interpolate_pairs, step_sizes, unevenness
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import UserError

CONFIDENCE_THRESHOLD = 0.9  # probability of the predicted class from which an image is readable
FID_WEIGHTS_VARIABLE = "FID_WEIGHTS"  # environment variable with the path of the network's weights
BATCH_SIZE = 64


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


def distance_from_mean(point: Tensor, real: Tensor) -> float:
    """Return the distance of a point (d,) from the mean of real points (M, d).

    The unit is the mean distance of a real point from that mean.
    """
    center = real.mean(0)
    return ((point - center).norm() / (real - center).norm(dim=1).mean()).item()


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


class Classifier(nn.Module):
    """Convolutional classifier that checks whether samples are readable: LeNet with batch norm.

    Args:
        image_shape: Number of channels, height and width of the images.
        bits: Bits per pixel value.
        num_classes: Number of classes.

    Example:
        >>> classifier = Classifier((1, 28, 28), bits=8, num_classes=10).eval()
        >>> label, confidence = classifier.predict(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
        >>> label.shape, confidence.shape
        (torch.Size([2]), torch.Size([2]))
    """

    def __init__(self, image_shape: tuple[int, int, int], bits: int, num_classes: int):
        super().__init__()
        self.scale = 2**bits - 1
        channels, height, width = image_shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(32 * (height // 4) * (width // 4), 128), nn.ReLU(),
            nn.Linear(128, num_classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes, (batch, classes)."""
        return self.layers(images.float() / self.scale)

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most probable class and its probability, each of shape (batch,)."""
        probabilities = torch.cat([self(batch).softmax(1) for batch in images.split(500)])
        confidence, label = probabilities.max(1)
        return label, confidence

    def share_readable(self, images: Tensor) -> float:
        """Return the share of images with a confidence of at least `CONFIDENCE_THRESHOLD`."""
        return (self.predict(images)[1] >= CONFIDENCE_THRESHOLD).float().mean().item()


def train_classifier(
    data: ImageDataset, epochs: int = 3, batch_size: int = 100, seed: int = 0
) -> Classifier:
    """Train a classifier of the training images.

    Raises:
        UserError: If the data set has no labels.
    """
    if data.train.labels is None or data.num_classes is None:
        raise UserError(
            "a classifier needs labels: put the labels-idx1 files in the folder of the images"
        )
    torch.manual_seed(seed)
    model = Classifier(data.image_shape, data.bits, data.num_classes)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = epochs * len(data.train) // batch_size
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        images, labels = data.train_batch(step * batch_size, batch_size, seed)
        assert labels is not None
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


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

    Features are principal components of training images that are not compared.

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

        - "samples": For each temperature and set the quality compared with N test images, with
          FID metrics if `weights` is given.
        - "training": The quality of N training images, as a reference.
        - "mean_sample": `distance_from_mean` of the first sample of the lowest temperature.
        - "bits": Bits/dim of each of the N test images, with one sample of the noise.
        - "walk": Along paths through the latent space and through the pixels, the mean step sizes
          ("changes") and bits/dim ("bits"), and the "unevenness" of each path through the latent
          space.
        - "images": N.
        - "parameters": Number of parameters.
    """
    count = len(next(iter(samples.values()))[0])
    train = _shuffled(torch.cat(list(data.batches("train", 500, 5 * count))))
    test = torch.cat(list(data.batches("test", 500, count)))
    features = PrincipalComponents(train[len(test) :], max_value=2**data.bits - 1)
    real = features(test)

    def quality(images: Tensor) -> dict[str, float]:
        result = measure_sample_quality(features(images), real)
        if weights:
            shift = 8 - data.bits
            result |= fid_metrics(images << shift, test << shift, weights)
        return result

    half = min(pairs, len(test) // 2)
    ends = _shuffled(test)
    paths = interpolate_pairs(
        model, ends[:half], ends[half : 2 * half], torch.linspace(0, 1, steps)
    )
    return {
        "samples": [[quality(images) for images in sets] for sets in samples.values()],
        "training": measure_sample_quality(features(train[: len(test)]), real),
        "mean_sample": distance_from_mean(features(samples[min(samples)][0][:1])[0], real),
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


def _shuffled(images: Tensor) -> Tensor:
    """Return images in a random order that is the same at every call.

    Many data sets are sorted by class, so that parts of them are not samples of the whole.
    """
    generator = torch.Generator().manual_seed(0)
    return images[torch.randperm(len(images), generator=generator)]


@torch.no_grad()
def bits_per_dim_of_images(model: Flow, images: Tensor) -> Tensor:
    """Return bits/dim of each image, (N,), with one sample of the noise, the same at every call."""
    generator = torch.Generator(model.device).manual_seed(0)
    log_probs = [
        model.score(batch.to(model.device), generator=generator).cpu()
        for batch in images.split(BATCH_SIZE)
    ]
    return -torch.cat(log_probs).double() / (model.dimensions * math.log(2))
