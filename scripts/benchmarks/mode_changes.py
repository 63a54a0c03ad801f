"""Compare the mixing of Gibbs sampling and parallel tempering on an RBM of digits.

A classifier is trained on the training images of the run and labels the states of the chains. A
mode change is a step to a state with another label. Labels with a probability below
`CONFIDENCE_THRESHOLD` are ignored. All chains start at the same test digits.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from flowgen.config.instantiate import build_data
from flowgen.config.runs import find_model
from flowgen.evaluation.sample_quality import CONFIDENCE_THRESHOLD, Classifier, train_classifier
from flowgen.models.rbm.rbm import RBM, SAMPLERS

STYLES = {"gibbs": ("--", "#d55e00"), "tempering": ("-", "#0072b2")}  # line style, color


@torch.no_grad()
def count_visits(
    rbm: RBM, classifier: Classifier, start: Tensor, sampler: str, steps: int
) -> tuple[Tensor, Tensor]:
    """Run chains and count mode changes and different digits.

    Returns:
        changes: Mean number of mode changes per chain up to each step (steps,).
        digits: Mean number of different digits per chain up to each step (steps,).
    """
    generator = torch.Generator().manual_seed(0)
    last, _ = classifier.predict(start.view(-1, *rbm.image_shape))
    visited = F.one_hot(last, 10).bool()
    changes = torch.zeros(len(start))
    mean_changes = []
    mean_digits = []
    for visible, _ in islice(SAMPLERS[sampler](rbm, start, generator=generator), steps):
        digit, confidence = classifier.predict(visible.view(-1, *rbm.image_shape))
        current = torch.where(confidence >= CONFIDENCE_THRESHOLD, digit, last)
        changes += current != last
        visited |= F.one_hot(current, 10).bool()
        last = current
        mean_changes.append(changes.mean())
        mean_digits.append(visited.float().sum(1).mean())
    return torch.stack(mean_changes), torch.stack(mean_digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("mode_changes.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    run, checkpoint, rbm = find_model(args.run, "cpu", RBM)
    data = build_data(checkpoint["config"])
    classifier = train_classifier(data)
    assert data.test.labels is not None
    accuracy = classifier.accuracy(torch.cat(list(data.batches("test", 1000))), data.test.labels)
    print(f"{run.folder}: accuracy of the classifier on test digits: {100 * accuracy:.1f} %")
    start = rbm.to_visible(next(data.batches("test", args.chains)))
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = range(1, args.steps + 1)
    for sampler, (style, color) in STYLES.items():
        changes, digits = count_visits(rbm, classifier, start, sampler, args.steps)
        left.plot(x, changes, style, color=color, label=sampler)
        right.plot(x, digits, style, color=color, label=sampler)
        print(
            f"{sampler}: {changes[-1]:.1f} mode changes and {digits[-1]:.2f} different digits per "
            f"chain in {args.steps} steps"
        )
    left.set(xlabel="steps", ylabel="mode changes per chain")
    right.set(xlabel="steps", ylabel="different digits visited per chain", ylim=(0, 10))
    left.legend()
    num_hidden = len(rbm.hidden_bias)
    figure.suptitle(f"{args.chains} chains from the same test digits, {num_hidden} hidden units")
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
