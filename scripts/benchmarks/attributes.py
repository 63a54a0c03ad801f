"""Measure the share of test images that change an attribute when they are edited.

Faces: python scripts/benchmarks/attributes.py RUN, where RUN was trained on CelebA with its file
list_attr_celeba.txt. A small classifier of all attributes is trained on the same training images
and labels the test faces before and after the edit. Each face is moved to the opposite of an
attribute, by the amounts 1 and 2, along both kinds of directions. The table also has the share of
changes of the other attributes.

Digits: python scripts/benchmarks/attributes.py zoo/glow_mnist --classes 3 8 moves threes towards
eights.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.commands.edit import load_directions
from flowgen.config.instantiate import build_data
from flowgen.config.runs import find_model
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.latent_directions import (
    METHODS,
    Directions,
    class_directions,
    move_along,
)
from flowgen.evaluation.sample_quality import CONFIDENCE_THRESHOLD, Classifier, train_classifier
from flowgen.evaluation.stats import mean
from flowgen.models.flows.flow import Flow
from flowgen.utils.console import progress_bar

BATCH_SIZE = 64
EPOCHS = 6
FACE_AMOUNTS = (1.0, 2.0)
DIGIT_AMOUNTS = (0.0, 0.5, 1.0, 1.5, 2.0)


def train_attribute_classifier(data: ImageDataset) -> Classifier:
    """Train a classifier with one output per attribute.

    Images are flipped at random. Rare attributes have up to ten times the weight.
    """
    torch.manual_seed(0)
    attributes = data.train.attributes.float()
    model = Classifier(data.image_shape, data.bits, attributes.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    num_steps = EPOCHS * len(attributes) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=num_steps)
    weights = (1 / attributes.mean(0).clamp(min=1e-6) - 1).clamp(0.1, 10)
    for _ in progress_bar(range(num_steps), "classifier", num_steps):
        indices = torch.randint(len(attributes), (BATCH_SIZE,))
        images = data.train.images[indices] >> (8 - data.bits)
        images = torch.where(torch.rand(BATCH_SIZE, 1, 1, 1) < 0.5, images.flip(3), images)
        logits = model(images)
        loss = F.binary_cross_entropy_with_logits(logits, attributes[indices], pos_weight=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load_attribute_classifier(data: ImageDataset, path: Path | None) -> Classifier:
    """Load the classifier from a file, or train it and save it to the file."""
    if path and path.exists():
        classifier = Classifier(data.image_shape, data.bits, len(data.attributes))
        classifier.load_state_dict(torch.load(path, weights_only=True))
        return classifier.eval()
    classifier = train_attribute_classifier(data)
    if path:
        torch.save(classifier.state_dict(), path)
    return classifier


@torch.no_grad()
def predict(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the predicted attributes, bool (N, attributes)."""
    return torch.cat([classifier(batch) for batch in images.split(500)]) > 0


def print_accuracy(classifier: Classifier, data: ImageDataset, names: list[str]) -> None:
    """Print the classifier's accuracy on test faces with and without each attribute."""
    truth = data.test.attributes
    correct = predict(classifier, torch.cat(list(data.batches("test", 500)))) == truth
    for name in names:
        index = data.attributes.index(name)
        has = truth[:, index]
        without, with_it = (
            100 * correct[selected, index].float().mean() for selected in (~has, has)
        )
        print(f"{name}: accuracy {without:.1f} % without it, {with_it:.1f} % with it")


def flip_attribute(
    model: Flow, directions: Directions, images: Tensor, name: str, has: Tensor
) -> Tensor:
    """Move images to the opposite of an attribute.

    Returns:
        Images, uint8 (amounts, N, channels, height, width).
    """
    amounts = torch.tensor(FACE_AMOUNTS)
    moved = torch.empty(len(amounts), *images.shape, dtype=torch.uint8)
    for sign, group in ((1.0, ~has), (-1.0, has)):
        if group.any():
            moved[:, group] = move_along(model, directions, images[group], {name: sign}, amounts)
    return moved


def evaluate_faces(run: str, names: list[str], count: int, path: Path | None) -> None:
    """Print the share of faces that change the edited attribute and the other attributes."""
    run_dir, checkpoint, model = find_model(run, "cpu", Flow)
    data: ImageDataset = build_data(checkpoint["config"])
    classifier = load_attribute_classifier(data, path)
    print_accuracy(classifier, data, names)
    images = torch.cat(list(data.batches("test", BATCH_SIZE, count)))
    before = predict(classifier, images)
    print(f"{len(images)} test faces")
    print(
        f"{'attribute':12} {'direction':10} {'amount':>6}  {'changed, %':16} "
        f"{'mean of the others, %':24} maximum, %"
    )
    for name in names:
        index = data.attributes.index(name)
        others = [other for other in range(len(data.attributes)) if other != index]
        for method in METHODS:
            directions = load_directions(run_dir, checkpoint, model, method=method)
            moved = flip_attribute(model, directions, images, name, before[:, index])
            for amount, edited in zip(FACE_AMOUNTS, moved, strict=True):
                changed = (predict(classifier, edited) != before).double() * 100
                most_changed = max(others, key=lambda other: changed[:, other].mean().item())
                share = mean(changed[:, index].tolist())
                of_others = mean(changed[:, others].mean(1).tolist())
                maximum = (
                    f"{data.attributes[most_changed]} {mean(changed[:, most_changed].tolist())}"
                )
                row = f"{name:12} {method:10} {amount:6g}  {share!s:16} {of_others!s:24} {maximum}"
                print(row, flush=True)


def evaluate_digits(run: str, classes: list[int], count: int) -> None:
    """Print the labels that a classifier of digits gives to digits moved to another class."""
    _, checkpoint, model = find_model(run, "cpu", Flow)
    data: ImageDataset = build_data(checkpoint["config"])
    start, end = classes
    classifier = train_classifier(data)
    images = data.test.images[data.test.labels == start][:count] >> (8 - data.bits)
    amounts = torch.tensor(DIGIT_AMOUNTS)
    moved = move_along(model, class_directions(model), images, {str(end): 1.0}, amounts)
    print(f"{len(images)} test digits of class {start}")
    print(f"{'amount':>6}  {f'class {end}, %':16} {f'class {start}, %':18} readable, %")
    for amount, edited in zip(DIGIT_AMOUNTS, moved, strict=True):
        label, confidence = classifier.predict(edited)
        conditions = (label == end, label == start, confidence >= CONFIDENCE_THRESHOLD)
        shares = [mean((100 * condition.double()).tolist()) for condition in conditions]
        print(f"{amount:6g}  {shares[0]!s:16} {shares[1]!s:18} {shares[2]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--attributes",
        nargs="+",
        default=["Smiling", "Eyeglasses", "Male", "Blond_Hair"],
        metavar="NAME",
    )
    parser.add_argument(
        "--classes", nargs=2, type=int, metavar="CLASS", help="move digits from class to class"
    )
    parser.add_argument("--count", type=int, default=200, metavar="N", help="test images")
    parser.add_argument(
        "--classifier", type=Path, metavar="FILE", help="stores the classifier of attributes"
    )
    args = parser.parse_args()
    if args.classes:
        evaluate_digits(args.run, args.classes, args.count)
    else:
        evaluate_faces(args.run, args.attributes, args.count, args.classifier)


if __name__ == "__main__":
    main()
