"""How often an attribute flips when held-out faces are moved along it, and how much the other attributes move with it.

`python scripts/attributes.py RUN`: a run on CelebA's faces with list_attr_celeba.txt beside them. A small classifier of all attributes,
trained on the same training images, judges the faces before and after; each goes away from what it shows, by 1 and by 2, along either
kind of direction.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowgen.commands.directions import directions_of
from flowgen.config import build_data, find_model
from flowgen.data import Images
from flowgen.directions import METHODS, edit
from flowgen.judging import Classifier, mean
from flowgen.models import Flow
from flowgen.progress import bar

BATCH, EPOCHS = 64, 6
AMOUNTS = (1.0, 2.0)


def train(data: Images) -> Classifier:
    """A classifier of every attribute by itself, of faces mirrored at random; rare ones count up to tenfold."""
    torch.manual_seed(0)
    known = data.train.attributes.float()
    model = Classifier(data.shape, data.bits, known.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = EPOCHS * len(known) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rarity = (1 / known.mean(0).clamp(min=1e-6) - 1).clamp(0.1, 10)
    for _ in bar(range(steps), "classifier", steps):
        chosen = torch.randint(len(known), (BATCH,))
        levels = data.train.images[chosen] >> (8 - data.bits)
        levels = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, levels.flip(3), levels)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(levels), known[chosen], pos_weight=rarity).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def seen(classifier: Classifier, levels: Tensor) -> Tensor:
    """Which attributes the classifier sees: (N, names)."""
    return torch.cat([classifier(each) for each in levels.split(500)]) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--attributes", nargs="+", default=["Smiling", "Eyeglasses", "Male", "Blond_Hair"], metavar="NAME")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="test images")
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="its weights: read where they are, else trained and written")
    options = parser.parse_args()
    run, checkpoint, model = find_model(options.run, "cpu", Flow)
    data: Images = build_data(checkpoint["config"])
    names = data.attributes
    if options.classifier and options.classifier.exists():
        classifier = Classifier(data.shape, data.bits, len(names))
        classifier.load_state_dict(torch.load(options.classifier, weights_only=True))
        classifier.eval()
    else:
        classifier = train(data)
        if options.classifier:
            torch.save(classifier.state_dict(), options.classifier)

    truth = data.test.attributes
    right = seen(classifier, torch.cat(list(data.batches("test", 500)))) == truth
    for name in options.attributes:
        place = names.index(name)
        sides = [100 * right[truth[:, place] == has][:, place].float().mean().item() for has in (False, True)]
        print(f"{name}: of test faces without it {sides[0]:.1f} % are told rightly, of those with it {sides[1]:.1f} %")
    levels = torch.cat(list(data.batches("test", BATCH, options.count)))
    before = seen(classifier, levels)
    print(f"{len(levels)} test faces\n{'attribute':12} {'direction':10} {'by':>3}  {'flips, %':16} {'each other attribute, %':24} most, %")
    for name in options.attributes:
        place = names.index(name)
        for method in METHODS:
            directions = directions_of(run, checkpoint, model, method=method)
            moved = torch.empty(len(AMOUNTS), *levels.shape, dtype=torch.uint8)
            for sign, group in ((1.0, ~before[:, place]), (-1.0, before[:, place])):
                if group.any():
                    moved[:, group] = edit(model, directions, levels[group], {name: sign}, torch.tensor(AMOUNTS))
            for by, images in zip(AMOUNTS, moved, strict=True):
                changed = (seen(classifier, images) != before).double() * 100
                others = [number for number in range(len(names)) if number != place]
                most = max(others, key=lambda number: changed[:, number].mean().item())
                flips, side = (mean(each.tolist()) for each in (changed[:, place], changed[:, others].mean(1)))
                print(
                    f"{name:12} {method:10} {by:3g}  {flips!s:16} {side!s:24} {names[most]} {mean(changed[:, most].tolist())}", flush=True
                )


if __name__ == "__main__":
    main()
