"""How often an attribute flips when held-out faces are moved along it, and how much the other attributes move with it.

`python scripts/attributes.py RUN`: a run on CelebA's faces with list_attr_celeba.txt beside them. A small classifier of all attributes,
trained on the same training images, judges the faces before and after; each goes away from what it shows, by 1 and by 2, along either
kind of direction. `python scripts/attributes.py zoo/glow_mnist --classes 3 8`: threes on their way to eights.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.commands.edit import load_directions
from flowgen.config.instantiate import build_data
from flowgen.config.loading import find_model
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.latent_directions import METHODS, class_directions, move_along
from flowgen.evaluation.sample_quality import SURE, Classifier, train_classifier
from flowgen.evaluation.stats import mean
from flowgen.models.flows.flow import Flow
from flowgen.training.run_dir import Run
from flowgen.utils.console import progress_bar

BATCH, EPOCHS = 64, 6
AMOUNTS = (1.0, 2.0)
Found = tuple[Run, dict[str, Any], Flow]


def train(data: ImageDataset) -> Classifier:
    """A classifier of every attribute by itself, of faces mirrored at random; rare ones count up to tenfold."""
    torch.manual_seed(0)
    known = data.train.attributes.float()
    model = Classifier(data.image_shape, data.bits, known.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = EPOCHS * len(known) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rarity = (1 / known.mean(0).clamp(min=1e-6) - 1).clamp(0.1, 10)
    for _ in progress_bar(range(steps), "classifier", steps):
        chosen = torch.randint(len(known), (BATCH,))
        images = data.train.images[chosen] >> (8 - data.bits)
        images = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, images.flip(3), images)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(
            model(images), known[chosen], pos_weight=rarity
        ).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def seen(classifier: Classifier, images: Tensor) -> Tensor:
    """Which attributes the classifier sees: (N, names)."""
    return torch.cat([classifier(each) for each in images.split(500)]) > 0


def of_faces(
    found: Found, data: ImageDataset, attributes: list[str], count: int, file: Path | None
) -> None:
    """Flips of each attribute and changes of the others, along either kind of direction."""
    run, checkpoint, model = found
    names = data.attributes
    if file and file.exists():
        classifier = Classifier(data.image_shape, data.bits, len(names))
        classifier.load_state_dict(torch.load(file, weights_only=True))
        classifier.eval()
    else:
        classifier = train(data)
        if file:
            torch.save(classifier.state_dict(), file)

    truth = data.test.attributes
    right = seen(classifier, torch.cat(list(data.batches("test", 500)))) == truth
    for name in attributes:
        place = names.index(name)
        sides = [
            100 * right[truth[:, place] == has][:, place].float().mean().item()
            for has in (False, True)
        ]
        print(
            f"{name}: of test faces without it {sides[0]:.1f} % are told rightly, of those with it {sides[1]:.1f} %"
        )
    pixels = torch.cat(list(data.batches("test", BATCH, count)))
    before = seen(classifier, pixels)
    print(
        f"{len(pixels)} test faces\n{'attribute':12} {'direction':10} {'by':>3}  {'flips, %':16} {'each other attribute, %':24} most, %"
    )
    for name in attributes:
        place = names.index(name)
        for method in METHODS:
            directions = load_directions(run, checkpoint, model, method=method)
            moved = torch.empty(len(AMOUNTS), *pixels.shape, dtype=torch.uint8)
            for sign, group in ((1.0, ~before[:, place]), (-1.0, before[:, place])):
                if group.any():
                    moved[:, group] = move_along(
                        model, directions, pixels[group], {name: sign}, torch.tensor(AMOUNTS)
                    )
            for by, images in zip(AMOUNTS, moved, strict=True):
                changed = (seen(classifier, images) != before).double() * 100
                others = [number for number in range(len(names)) if number != place]
                most = max(others, key=lambda number: changed[:, number].mean().item())
                flips, side = (
                    mean(each.tolist()) for each in (changed[:, place], changed[:, others].mean(1))
                )
                worst = f"{names[most]} {mean(changed[:, most].tolist())}"
                print(
                    f"{name:12} {method:10} {by:3g}  {flips!s:16} {side!s:24} {worst}", flush=True
                )


def of_digits(model: Flow, data: ImageDataset, classes: list[int], count: int) -> None:
    """What a classifier of digits names those of the first class that go to the second, and how sure it is."""
    start, end = classes
    classifier = train_classifier(data)
    pixels = data.test.images[data.test.labels == start][:count] >> (8 - data.bits)
    amounts = (0.0, 0.5, 1.0, 1.5, 2.0)
    print(
        f"{len(pixels)} test digits of class {start}\n{'by':>3}  {f'is a {end}, %':16} {f'is still a {start}, %':18} sure, %"
    )
    for by, images in zip(
        amounts,
        move_along(model, class_directions(model), pixels, {str(end): 1.0}, torch.tensor(amounts)),
        strict=True,
    ):
        label, surety = classifier.surety(images)
        shares = [
            mean((100 * each.double()).tolist())
            for each in (label == end, label == start, surety >= SURE)
        ]
        print(f"{by:3g}  {shares[0]!s:16} {shares[1]!s:18} {shares[2]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--attributes",
        nargs="+",
        default=["Smiling", "Eyeglasses", "Male", "Blond_Hair"],
        metavar="NAME",
    )
    parser.add_argument(
        "--classes",
        nargs=2,
        type=int,
        metavar="CLASS",
        help="of digits, from the first to the second",
    )
    parser.add_argument("--count", type=int, default=200, metavar="N", help="test images")
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="FILE",
        help="that of attributes: read where it is, else trained and written",
    )
    options = parser.parse_args()
    found = find_model(options.run, "cpu", Flow)
    data: ImageDataset = build_data(found[1]["config"])
    if options.classes:
        of_digits(found[2], data, options.classes, options.count)
    else:
        of_faces(found, data, options.attributes, options.count, options.classifier)


if __name__ == "__main__":
    main()
