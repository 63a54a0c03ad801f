"""Classifier of images, which benchmarks use to check that samples are readable."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.data.dataset import ImageDataset
from flowgen.utils.errors import UserError

CONFIDENCE_THRESHOLD = 0.9  # probability of the predicted class from which an image is readable


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
