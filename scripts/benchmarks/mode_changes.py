"""How many digits do the chains of an RBM visit? Gibbs sampling and parallel tempering from the same start, in a figure.

A classifier, trained on the run's training images, names the digit of every state; a mode change is a state
whose digit it is sure of (`SURE`) and which is not the last one that it was sure of.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from flowgen.config.instantiate import build_data
from flowgen.config.loading import load_from_checkpoint
from flowgen.config.runs import find_checkpoint
from flowgen.evaluation.sample_quality import SURE, Classifier, train_classifier
from flowgen.models.rbm.rbm import METHODS, RBM


@torch.no_grad()
def visits(
    rbm: RBM, classifier: Classifier, start: Tensor, method: str, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Mode changes and different digits so far, on average over the chains: (sweeps,) each."""
    generator = torch.Generator().manual_seed(0)
    last = classifier.surety(start.view(-1, *rbm.image_shape))[0]
    seen = F.one_hot(last, 10).bool()
    changes, totals, digits = torch.zeros(len(start)), [], []
    for visible, _ in islice(METHODS[method](rbm, start, generator=generator), sweeps):
        digit, surety = classifier.surety(visible.view(-1, *rbm.image_shape))
        now = torch.where(surety >= SURE, digit, last)
        changes += now != last
        seen |= F.one_hot(now, 10).bool()
        last = now
        totals.append(changes.mean())
        digits.append(seen.float().sum(1).mean())
    return torch.stack(totals), torch.stack(digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?")
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--sweeps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("mode_changes.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    run, checkpoint = find_checkpoint(options.run, wanted=RBM)
    rbm, data = load_from_checkpoint(checkpoint), build_data(checkpoint["config"])
    assert isinstance(rbm, RBM)
    classifier = train_classifier(data)
    assert data.test.labels is not None
    named = classifier.surety(torch.cat(list(data.batches("test", 1000))))[0]
    print(
        f"{run.folder}: the classifier names {100 * named.eq(data.test.labels).float().mean():.1f} % of the test digits rightly"
    )
    start = rbm.units(next(data.batches("test", options.chains)))
    page = Figure(figsize=(9, 4), layout="constrained")
    left, right = page.subplots(1, 2)
    for method, style in (("gibbs", "--"), ("tempering", "-")):
        changes, digits = visits(rbm, classifier, start, method, options.sweeps)
        colour = {"gibbs": "#d55e00", "tempering": "#0072b2"}[method]
        left.plot(range(1, options.sweeps + 1), changes, style, color=colour, label=method)
        right.plot(range(1, options.sweeps + 1), digits, style, color=colour, label=method)
        print(
            f"{method}: {changes[-1]:.1f} mode changes and {digits[-1]:.2f} different digits a chain in {options.sweeps} sweeps"
        )
    left.set(xlabel="sweeps", ylabel="mode changes a chain")
    right.set(xlabel="sweeps", ylabel="different digits visited a chain", ylim=(0, 10))
    left.legend()
    page.suptitle(f"{options.chains} chains from the same test digits, {rbm.hidden} hidden units")
    page.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
