"""How many samples can be read? The share that a classifier of MNIST, trained on all its training images, is sure of (0.9).

The same share of the test digits stands beside it, and for class-conditional models how often a sample is of the class asked for.
"""

import argparse
from pathlib import Path

import torch

import flowgen
from flowgen.commands.sample import sample_images
from flowgen.data.mnist import MNIST
from flowgen.evaluation.sample_quality import Classifier, train_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.7])
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument(
        "--root", help="the folder with MNIST's idx files; by default looked for, or downloaded"
    )
    parser.add_argument("--keep", type=Path, help="a file that keeps the trained classifier")
    options = parser.parse_args()
    data = MNIST(
        name="MNIST",
        root=options.root,
        search_dirs=["mnist", "MNIST"],
        size=28,
        bits=8,
        random_flip=False,
    )
    if options.keep and options.keep.exists():
        classifier = Classifier((1, 28, 28), 8, 10).eval()
        classifier.load_state_dict(torch.load(options.keep, weights_only=True))
    else:
        classifier = train_classifier(data)
        if options.keep:
            torch.save(classifier.state_dict(), options.keep)
    label, surety = classifier.surety(data.test.images)
    accuracy = (label == data.test.labels).float().mean().item()
    print(
        f"test digits: readable {(surety >= 0.9).float().mean():.3f}, named rightly {accuracy:.4f}"
    )
    for run in options.runs:
        model = flowgen.load(run)
        for temperature in options.temperature:
            images, _ = sample_images(model, options.count, temperature, seed=0)
            images = images.cpu() * 255 if model.bits == 1 else images.cpu()
            right = ""
            if model.num_classes:
                payload = torch.arange(len(images)) % model.num_classes
                right = f", of the class asked for {(classifier.surety(images)[0] == payload).float().mean():.3f}"
            first = int(32 * classifier.readable(images[:32]))
            print(
                f"{run} at temperature {temperature:g}: readable {classifier.readable(images):.3f}, {first} of the first 32{right}"
            )


if __name__ == "__main__":
    main()
