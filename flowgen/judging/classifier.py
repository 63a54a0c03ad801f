"""A small classifier of labelled images, which tells what samples show."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowgen.data import Images
from flowgen.errors import FlowgenError

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

    def forward(self, levels: Tensor) -> Tensor:
        """The log-odds of the classes: (batch, classes)."""
        return self.layers(levels.float() / self.scale)

    @torch.no_grad()
    def surety(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest class of every image and its probability: (batch,) each."""
        probabilities = torch.cat([self(part).softmax(1) for part in levels.split(500)])
        most, label = probabilities.max(1)
        return label, most

    def readable(self, levels: Tensor) -> float:
        """The share of the images that it names with a probability of at least `SURE`."""
        return (self.surety(levels)[1] >= SURE).float().mean().item()


def train_classifier(data: Images, epochs: int = 3, batch: int = 100, seed: int = 0) -> Classifier:
    """A classifier of the training images' labels. Raises FlowgenError where there are none."""
    if data.train.labels is None or data.classes is None:
        raise FlowgenError("a classifier needs labels: put the labels-idx1 files beside the images")
    torch.manual_seed(seed)
    model = Classifier(data.shape, data.bits, data.classes)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = epochs * len(data.train) // batch
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        levels, labels = data.draw(step * batch, batch, seed)
        assert labels is not None
        optimizer.zero_grad()
        F.cross_entropy(model(levels), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()
