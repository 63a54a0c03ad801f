"""Measure the share of readable samples of models of digits.

A sample is readable if a classifier assigns a probability of at least 0.9 to one of the classes.
The classifier is trained on the training images of MNIST. The script also prints the share of
readable test digits, and the share of samples of a class-conditional model that have the requested
class. `flowgen evaluate samples=N` uses a classifier of the data of each run; here all models share
one.
"""

import argparse
from pathlib import Path

import torch

import flowgen
from flowgen.data.mnist import MNIST
from flowgen.evaluation.sample_quality import Classifier, train_classifier
from flowgen.models.base import sample_images


def load_classifier(data: MNIST, path: Path | None) -> Classifier:
    """Load a classifier from a file, or train it and save it to the file."""
    if path and path.exists():
        classifier = Classifier((1, 28, 28), 8, 10).eval()
        classifier.load_state_dict(torch.load(path, weights_only=True))
        return classifier
    classifier = train_classifier(data)
    if path:
        torch.save(classifier.state_dict(), path)
    return classifier


def describe_samples(classifier: Classifier, run: str, temperature: float, count: int) -> str:
    """Sample a model and return the shares of readable and of requested digits as text."""
    model = flowgen.load(run)
    images = sample_images(model, count, temperature, seed=0)[0].cpu()
    if model.bits == 1:
        images = images * 255
    num_readable = int(32 * classifier.share_readable(images[:32]))
    text = (
        f"{run} at temperature {temperature:g}: readable {classifier.share_readable(images):.3f}, "
        f"{num_readable} of the first 32"
    )
    if model.num_classes:
        requested = torch.arange(len(images)) % model.num_classes
        text += f", of the requested class {classifier.accuracy(images, requested):.3f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.7])
    parser.add_argument("--count", type=int, default=320, help="samples per temperature")
    parser.add_argument("--root", help="folder with the IDX files of MNIST")
    parser.add_argument("--classifier", type=Path, help="a file that stores the classifier")
    args = parser.parse_args()
    data = MNIST(
        name="MNIST",
        root=args.root,
        search_dirs=["mnist", "MNIST"],
        size=28,
        bits=8,
        random_flip=False,
    )
    classifier = load_classifier(data, args.classifier)
    assert data.test.labels is not None
    accuracy = classifier.accuracy(data.test.images, data.test.labels)
    readable = classifier.share_readable(data.test.images)
    print(f"test digits: readable {readable:.3f}, accuracy of the classifier {accuracy:.4f}")
    for run in args.runs:
        for temperature in args.temperature:
            print(describe_samples(classifier, run, temperature, args.count))


if __name__ == "__main__":
    main()
