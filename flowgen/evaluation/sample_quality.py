"""Sample quality: Fréchet distance, coverage and spread, a classifier, FID.

`flowgen evaluate samples=N` prints `SampleQuality.evaluate`. The Fréchet distance here uses
principal components of the images, and needs no pretrained network. FID uses the features of one
particular network, see `fid_metrics`.
"""

import math
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from flowgen.data.dataset import ImageDataset
from flowgen.data.splits import hashed_subset
from flowgen.evaluation import stats
from flowgen.utils import rendering
from flowgen.utils.console import progress_bar
from flowgen.utils.errors import UserError, check, user_error
from flowgen.utils.frechet import PrincipalComponents, frechet_distance
from flowgen.utils.memory import check_memory
from flowgen.utils.metrics import SAMPLE_METRICS, Metrics, MetricValue

CONFIDENCE_THRESHOLD = 0.9  # probability of the predicted class from which an image is readable
FID_WEIGHTS_VARIABLE = "FID_WEIGHTS"  # environment variable with the path of the network's weights
FID_NETWORK = "inception-v3-compat"
FID_FILE = "weights-inception-2015-12-05-6726825d.pth"  # of its weights, as torch-fidelity names it
COMPONENT_IMAGES = 4  # training images for the principal components, for each image compared
MAX_COMPONENT_IMAGES = 10_000
COVERAGE_ROWS = 1000  # real images whose distances are in memory at once
NUM_NEIGHBORS = 5  # of the coverage
CLASSIFIER_EPOCHS = 3
CLASSIFIER_BATCH_SIZE = 100
MIN_CLASSIFIER_STEPS = 1000  # three epochs of a few thousand images are too few
MAX_CLASSIFIER_STEPS = 2000
MIN_CLASSIFIER_SIZE = 4  # pixels; the classifier halves the size twice


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


def coverage(samples: Tensor, real: Tensor) -> float:
    """Return the share of real points that have a sample in their neighborhood.

    The neighborhood of a real point is the ball up to its fifth nearest real neighbor.
    Outliers, whose balls contain even a blank image, count only once each (Naeem et al., Reliable
    fidelity and diversity metrics, arXiv:2002.09797, section 3).

    Args:
        samples: Features of samples, (N, d).
        real: Features of real images, (M, d).
    """
    # The nearest neighbor of a point is the point itself.
    rank = min(NUM_NEIGHBORS + 1, len(real))
    covered = 0
    for block in real.split(COVERAGE_ROWS):
        radius = torch.cdist(block, real).kthvalue(rank, dim=1).values
        covered += int((torch.cdist(samples, block) <= radius).any(0).sum())
    return covered / len(real)


def find_fid_weights() -> Path | None:
    """Return the path of the network's weights in FID_WEIGHTS, or None if it is not set.

    Raises:
        UserError: If the package torch-fidelity is missing, or the file is not its network.
    """
    path = os.environ.get(FID_WEIGHTS_VARIABLE)
    if not path:
        return None
    advice = f"set it to {FID_FILE} from the releases of torch-fidelity, or unset it"
    check(Path(path).is_file(), f"{FID_WEIGHTS_VARIABLE}={path} is not a file: {advice}")
    with user_error(
        f"{FID_WEIGHTS_VARIABLE} is set, but torch-fidelity cannot be imported: "
        "pip install torch-fidelity"
    ):
        from torch_fidelity.utils import create_feature_extractor
    with user_error(
        f"{FID_WEIGHTS_VARIABLE}={path} does not contain the weights of torch-fidelity's "
        f"network: {advice}"
    ):
        torch.load(path, weights_only=True)  # torch-fidelity would run code in the file
        create_feature_extractor(
            FID_NETWORK,
            ["2048"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=path,
        )
    return Path(path)


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
        feature_extractor=FID_NETWORK,
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
        """Return the most probable class and its probability, each (batch,), on the CPU."""
        device = next(self.parameters()).device
        batches = images.split(500)
        probabilities = torch.cat([self(batch.to(device)).softmax(1).cpu() for batch in batches])
        confidence, label = probabilities.max(1)
        return label, confidence

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images whose predicted class is their label (batch,)."""
        return (self.predict(images)[0] == labels.cpu()).double().mean().item()

    def share_readable(self, images: Tensor) -> float:
        """Return the share of images with a confidence of at least `CONFIDENCE_THRESHOLD`."""
        return (self.predict(images)[1] >= CONFIDENCE_THRESHOLD).double().mean().item()


def train_classifier(data: ImageDataset) -> Classifier:
    """Train a classifier of the training images, on the device of the data.

    Args:
        data: Data set with labels.

    Raises:
        UserError: If the data set has no labels.
    """
    if data.train.labels is None or data.num_classes is None:
        raise UserError(
            "a classifier needs labels: put the labels-idx1 files in the folder of the images"
        )
    steps = CLASSIFIER_EPOCHS * len(data.train) // CLASSIFIER_BATCH_SIZE
    steps = min(max(steps, MIN_CLASSIFIER_STEPS), MAX_CLASSIFIER_STEPS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(data.image_shape, data.bits, data.num_classes)
        model.to(data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for step in progress_bar(range(steps), "classifier", steps):
            images, labels = data.train_batch(
                step * CLASSIFIER_BATCH_SIZE, CLASSIFIER_BATCH_SIZE, seed=0
            )
            assert labels is not None
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class SampleQuality:
    """Comparison of samples with test images.

    Features are principal components of training images that are not compared. Other training
    images, as many as samples, are compared in the same way. Their values are those of a perfect
    model: a finite number of images has a Fréchet distance above 0 and a coverage below 1.

    Args:
        data: Data set.
        count: Number of samples, of test images, and of training images.
        weights: File with the weights of the FID network, see `find_fid_weights`, or None.

    Attributes:
        test: The test images, (count, channels, height, width).
        train: The training images, of the same shape.

    Raises:
        UserError: If the data has too few images.

    Example:
        >>> from flowgen.data import MNISTSample
        >>> quality = SampleQuality(MNISTSample(), count=100)
        >>> perfect = quality.measure(quality.test)
        >>> round(abs(perfect["frechet"]), 3), perfect["coverage"], perfect["spread"]
        (0.0, 1.0, 1.0)
    """

    def __init__(self, data: ImageDataset, count: int, weights: Path | None = None):
        largest = min(len(data.test), len(data.train) // 2)
        check(
            count <= largest,
            f"samples={count} needs as many test images and twice as many training images, but "
            f"this data has {len(data.test)} and {len(data.train)}: choose at most {largest}, or "
            "add images",
        )
        num_train = count + min(COMPONENT_IMAGES * count, MAX_COMPONENT_IMAGES)
        dimensions = math.prod(data.image_shape)
        # At most three copies of the images as float32, and the distances of all pairs.
        check_memory("samples", count, 3 * 4 * dimensions * num_train // count + 4 * count)
        self.data = data
        self.weights = weights if data.image_shape[0] in (1, 3) else None  # gray or RGB
        self.test = torch.cat(list(data.batches("test", 500, count)))
        train = _shuffled(torch.cat(list(data.batches("train", 500, num_train))))
        self.train = train[:count]
        self.features = PrincipalComponents(train[count:], max_value=2**data.bits - 1)
        self.real = self.features(self.test)

    @cached_property
    def classifier(self) -> Classifier:
        """A classifier of the data, trained when it is first used."""
        return train_classifier(self.data)

    def measure(self, images: Tensor) -> dict[str, float]:
        """Return `measure_sample_quality`, and `fid_metrics` with weights, of images (N, ...)."""
        result = measure_sample_quality(self.features(images), self.real)
        if self.weights:
            bits = self.data.bits
            samples = rendering.scale_to_8_bits(images, bits)
            result |= fid_metrics(samples, rendering.scale_to_8_bits(self.test, bits), self.weights)
        return result

    def evaluate(self, samples: Tensor, classes: Tensor | None = None) -> Metrics:
        """Return the quality of samples next to that of as many training images.

        The errors of the Fréchet distance, coverage and spread are those of
        `stats.jackknife_errors` over the samples and the test images. That of coverage can be
        up to three times too large.

        Args:
            samples: Samples, uint8 (count, channels, height, width).
            classes: The classes that were asked for, (count,), of class-conditional models.

        Returns:
            - "sample_NAME" and "training_NAME" with the names of `measure`.
            - "sample_readable" and "test_readable": `Classifier.share_readable` if the data has
              classes, with "classifier_accuracy", the share of test images it classifies correctly.
            - "sample_class_accuracy": The share of samples that it assigns to `classes`, if given.
            - "sample_count": Number of samples, of test and of training images.
        """
        values = {}
        for prefix, images in (("sample", samples), ("training", self.train)):
            errors = stats.jackknife_errors(
                measure_sample_quality, self.features(images), self.real
            )
            for name, value in self.measure(images).items():
                metric = replace(SAMPLE_METRICS[name], name=f"{prefix}_{name}")
                values[metric.name] = MetricValue(metric, value, errors.get(name))
        # Each value of the samples is followed by that of the training images.
        names = [name.removeprefix("sample_") for name in values if name.startswith("sample_")]
        pairs = [values[f"{prefix}_{name}"] for name in names for prefix in ("sample", "training")]
        return Metrics.of(*pairs, *self._readability(samples, classes), sample_count=len(samples))

    def _readability(self, samples: Tensor, classes: Tensor | None) -> list[MetricValue]:
        """Return the metrics that need a classifier, if the data has classes."""
        labels = self.data.test.labels
        num_classes = self.data.num_classes or 0
        is_small = min(self.data.image_shape[1:]) < MIN_CLASSIFIER_SIZE
        if self.data.train.labels is None or labels is None or num_classes < 2 or is_small:
            return []
        classifier = self.classifier
        truth = labels[hashed_subset(len(labels), len(self.test))]
        scores = {
            "sample_readable": classifier.share_readable(samples),
            "test_readable": classifier.share_readable(self.test),
            "classifier_accuracy": classifier.accuracy(self.test, truth),
        }
        if classes is not None:
            scores["sample_class_accuracy"] = classifier.accuracy(samples, classes)
        return [
            MetricValue(
                replace(SAMPLE_METRICS["readable"], name=name),
                share,
                math.sqrt(share * (1 - share) / len(samples)),
            )
            for name, share in scores.items()
        ]


def _shuffled(images: Tensor) -> Tensor:
    """Return images in a random order that is the same at every call.

    Many data sets are sorted by class, so that parts of them are not samples of the whole.
    """
    generator = torch.Generator().manual_seed(0)
    return images[torch.randperm(len(images), generator=generator)]
