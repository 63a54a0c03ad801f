"""How close samples come to images and how diverse they are, among the images' principal components: without a network's weights.

A Fréchet distance there is no FID, which is measured among the features of one particular network, see `fidelity`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.interpolation import changes, unevenness, walk
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import UserError

COMPONENTS, NEIGHBOURS = 64, 5


class PrincipalComponents:
    """The coordinates (N, components) of images (N, ...) along the directions in which the images given at the start vary most."""

    def __init__(self, images: Tensor, components: int = COMPONENTS):
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that every model is judged in the same space
            self.basis = torch.pca_lowrank(
                flat - self.mean, min(components, *flat.shape), center=False, niter=4
            )[2]

    def __call__(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - self.mean) @ self.basis


class SampleQuality(NamedTuple):
    """Samples beside real images, see `likeness`."""

    frechet: float
    coverage: float
    spread: float


def likeness(samples: Tensor, real: Tensor) -> SampleQuality:
    """Of points (N, d) to real points (M, d).

    frechet: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of the Gaussians that fit them. Heusel et al. (1706.08500), section 2.
    coverage: the share of real points with a sample within the distance to their fifth real neighbour; outliers, in whose reach
    even a blank picture lies, count once each. Naeem et al. (2002.09797), section 3.
    spread: the mean distance of two samples over that of two real points.
    """
    return SampleQuality(
        frechet(samples.double(), real.double()),
        coverage(samples, real),
        (torch.pdist(samples).mean() / torch.pdist(real).mean()).item(),
    )


def frechet(one: Tensor, other: Tensor) -> float:
    """See `likeness`."""
    covariances = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return (
        (one.mean(0) - other.mean(0)).square().sum()
        + covariances[0].trace()
        + covariances[1].trace()
        - 2 * roots.sum()
    ).item()


def coverage(samples: Tensor, real: Tensor) -> float:
    """See `likeness`."""
    reach = torch.cdist(real, real).kthvalue(min(NEIGHBOURS + 1, len(real)), dim=1).values
    return (torch.cdist(samples, real) <= reach).any(0).float().mean().item()


def distance_from_mean(point: Tensor, real: Tensor) -> float:
    """How far a point (d,) lies from the mean of real points (M, d), a real point's own mean distance from it being 1."""
    middle = real.mean(0)
    return ((point - middle).norm() / (real - middle).norm(dim=1).mean()).item()


WEIGHTS = "FID_WEIGHTS"  # the environment's name of the network's file


class _Pictures(Dataset[Tensor]):
    """Images (N, 3, height, width), uint8, one by one, as torch-fidelity takes them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        return self.images[place]


def network() -> Path | None:
    """The file that FID_WEIGHTS names. Raises FlowgenError where it names one and fidelity cannot be had."""
    weights = os.environ.get(WEIGHTS)
    if not weights:
        return None
    if not Path(weights).is_file():
        raise UserError(
            f"{WEIGHTS}={weights} is no file: name that of torch-fidelity's network, or leave it out"
        )
    if find_spec("torch_fidelity") is None:
        raise UserError(
            f"{WEIGHTS} is set, but torch-fidelity is not installed: pip install 'flowgen[fidelity]'"
        )
    return Path(weights)


def fid_metrics(samples: Tensor, real: Tensor, weights: Path) -> dict[str, float]:
    """Of uint8 images (N, channels, height, width): FID (Heusel et al., 1706.08500), precision and recall (1904.06991, section 2)."""
    from torch_fidelity import calculate_metrics

    sets = [_Pictures(images.cpu().expand(-1, 3, -1, -1)) for images in (samples, real)]
    features = {
        "feature_extractor": "inception-v3-compat",
        "feature_extractor_weights_path": str(weights),
    }
    how = {
        "fid": True,
        "prc": True,
        "cuda": torch.cuda.is_available(),
        "verbose": False,
        "save_cpu_ram": True,
    }
    found = calculate_metrics(input1=sets[0], input2=sets[1], **features, **how)
    return {
        "fid": found["frechet_inception_distance"],
        "precision": found["precision"],
        "recall": found["recall"],
    }


SURE = 0.9  # the probability from which on an image counts as readable


class Classifier(nn.Module):
    """Two convolutions and two linear layers, of images (batch, channels, height, width) at `bits`: LeNet, with batch normalisation."""

    def __init__(self, shape: tuple[int, int, int], bits: int, classes: int):
        super().__init__()
        self.scale = 2**bits - 1
        channels, height, width = shape
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * (height // 4) * (width // 4), 128), nn.ReLU(), nn.Linear(128, classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """The log-odds of the classes: (batch, classes)."""
        return self.layers(images.float() / self.scale)

    @torch.no_grad()
    def surety(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest class of every image and its probability: (batch,) each."""
        probabilities = torch.cat([self(part).softmax(1) for part in images.split(500)])
        most, label = probabilities.max(1)
        return label, most

    def readable(self, images: Tensor) -> float:
        """The share of the images that it names with a probability of at least `SURE`."""
        return (self.surety(images)[1] >= SURE).float().mean().item()


def train_classifier(
    data: ImageDataset, epochs: int = 3, batch: int = 100, seed: int = 0
) -> Classifier:
    """A classifier of the training images' labels. Raises FlowgenError where there are none."""
    if data.train.labels is None or data.num_classes is None:
        raise UserError("a classifier needs labels: put the labels-idx1 files beside the images")
    torch.manual_seed(seed)
    model = Classifier(data.image_shape, data.bits, data.num_classes)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = epochs * len(data.train) // batch
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        images, labels = data.train_batch(step * batch, batch, seed)
        assert labels is not None
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


BATCH = 64


def flow_report(
    model: Flow,
    data: ImageDataset,
    samples: Mapping[float, Sequence[Tensor]],
    *,
    weights: Path | None = None,
    pairs: int = 16,
    steps: int = 18,
) -> dict[str, Any]:
    """What is told of a flow by `samples`, levels (N, ...) for each temperature, once or more often, and by walks; plain data, as JSON.

    samples: for each temperature the likeness of each draw to N test images, and its fidelity where there are `weights` for it;
    training: the likeness of N training images, the standard.
    mean_sample: how far the first sample of the lowest temperature lies from the mean test image, a test image's own distance being 1.
    bits: bits/dim of the N test images, one draw of the noise. walk: between `pairs` of them, through latents and pixels, the change
    from picture to picture and bits/dim of each, on average, and of each way through the latents its unevenness. An even number of
    `steps` is fair: half-way between two images rounding favours the even levels. All in one space, of training images not compared.
    """
    count = len(next(iter(samples.values()))[0])
    train, test = (
        torch.cat(list(data.batches(split, 500, most)))
        for split, most in (("train", 5 * count), ("test", count))
    )
    held, others = train[: len(test)], train[len(test) :]
    space = PrincipalComponents(_unit(others, data.bits))
    real, half = space(_unit(test, data.bits)), min(pairs, len(test) // 2)

    def look(images: Tensor) -> dict[str, float]:
        found, more = likeness(space(_unit(images, data.bits)), real)._asdict(), 8 - data.bits
        return found | (fid_metrics(images << more, test << more, weights) if weights else {})

    ways = walk(model, test[:half], test[half : 2 * half], torch.linspace(0, 1, steps))
    return {
        "samples": [[look(images) for images in draws] for draws in samples.values()],
        "training": likeness(space(_unit(held, data.bits)), real)._asdict(),
        "mean_sample": distance_from_mean(
            space(_unit(samples[min(samples)][0][:1], data.bits))[0], real
        ),
        "bits": bits_per_image(model, test).tolist(),
        "walk": {
            "changes": [changes(way, data.bits).mean(1).tolist() for way in ways],
            "bits": [
                [bits_per_image(model, each.round().to(torch.uint8)).mean().item() for each in way]
                for way in ways
            ],
            "unevenness": unevenness(ways[0], data.bits).tolist(),
        },
        "images": len(test),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@torch.no_grad()
def bits_per_image(model: Flow, images: Tensor) -> Tensor:
    """Bits/dim of every image, (N,), under one draw of a noise that is the same at every call."""
    generator = torch.Generator(model.device).manual_seed(0)
    scores = [
        model.score(part.to(model.device), generator=generator).cpu()
        for part in images.split(BATCH)
    ]
    return -torch.cat(scores).double() / (model.dimensions * math.log(2))


def _unit(images: Tensor, bits: int) -> Tensor:
    return images.cpu().float() / (2**bits - 1)
