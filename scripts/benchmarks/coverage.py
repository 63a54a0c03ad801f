"""How often the truth lies in a completion's 90 % intervals: held-out images, one half of each kept.

`python scripts/coverage.py --count 200`: a Glow's Langevin chains, training images at random, and, where it is of
such images, an RBM's Gibbs chains on binary pixels.
"""

import argparse

import torch
from torch import Tensor

from flowgen.commands.complete import mask
from flowgen.config.instantiate import build_data
from flowgen.config.loading import find_model
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.stats import mean
from flowgen.models.flows.flow import Flow
from flowgen.models.rbm.rbm import RBM
from flowgen.training.device import autocast_dtype

CHAINS, BATCH = (
    9,
    8,
)  # of ten places among nine draws the truth takes each equally often: half of the first and last lie outside


def places(draws: Tensor, truth: Tensor) -> Tensor:
    """The place of every true number (N, P) among its draws (N, chains, P), from 0 to 1, ties broken at random."""
    below, ties = (draws < truth[:, None]).sum(1), (draws == truth[:, None]).sum(1)
    return (below + torch.rand(truth.shape) * (ties + 1)) / (draws.shape[1] + 1)


def report(name: str, draws: Tensor, truth: Tensor) -> None:
    """Coverage over all missing numbers and over those that vary among the draws, with the error over images; and the mean's own error."""
    inside = ((places(draws, truth) - 0.5).abs() < 0.45).double()
    varied = (draws.amax(1) > draws.amin(1)).double()
    over = [
        ((each * some).sum() / some.sum()).item()
        for each, some in zip(inside, varied, strict=True)
        if some.any()
    ]
    absolute = (draws.mean(1) - truth).abs().mean(1)
    print(
        f"{name:24} {mean(inside.mean(1).tolist())!s:18} {mean(over)!s:18} {mean(absolute.tolist())}",
        flush=True,
    )


def of_flow(flow: Flow, images: Tensor, known: Tensor, steps: int) -> Tensor:
    """Levels of the missing pixels over their largest, (N, chains, P)."""
    dtype, drawn = autocast_dtype("auto", flow.device), []
    for number, part in enumerate(images.split(BATCH)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = flow.restore(part, known, CHAINS, steps, torch.Generator().manual_seed(number))
        pixels = (found.points * flow.bins).floor().clamp(0, flow.bins - 1) / (flow.bins - 1)
        drawn.append(pixels.view(len(part), CHAINS, -1)[..., ~known.flatten()])
        print(
            f"{number * BATCH + len(part)} of {len(images)} images, acceptance {found.acceptance:.2f}",
            flush=True,
        )
    return torch.cat(drawn)


def of_machine(machine: RBM, images: Tensor, known: Tensor) -> Tensor:
    drawn = []
    for number, image in enumerate(images):
        generator = torch.Generator().manual_seed(number)
        chains = machine.inpaint(
            image[None], known, method="gibbs", sweeps=500, generator=generator
        ).draws[:CHAINS]
        drawn.append(torch.bernoulli(chains, generator=generator).flatten(1)[:, ~known.flatten()])
    return torch.stack(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flow", default="zoo/glow_mnist", metavar="RUN")
    parser.add_argument("--machine", default="zoo/rbm_mnist", metavar="RUN")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="test images")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="gradients a chain")
    parser.add_argument(
        "--keep", default="left", metavar="SIDE|MASK", help="as of flowgen complete"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    _, checkpoint, flow = find_model(options.flow, "cpu", Flow)
    data: ImageDataset = build_data(checkpoint["config"])
    known = mask(options.keep, data.image_shape)
    pixels = torch.cat(list(data.batches("test", 100, options.count)))

    def missing(images: Tensor) -> Tensor:
        return images.flatten(1)[:, ~known.flatten()].float() / (2**data.bits - 1)

    draws = of_flow(flow, pixels, known, options.steps)
    print(f"{'':24} {'coverage':18} {'where draws vary':18} mean absolute error")
    report(f"flow, {options.keep} kept", draws, missing(pixels))
    chosen = torch.randint(len(data.train), (len(pixels), CHAINS))
    report(
        "training images",
        missing(data.train.images[chosen.flatten()] >> (8 - data.bits)).view(
            len(pixels), CHAINS, -1
        ),
        missing(pixels),
    )
    _, _, machine = find_model(options.machine, "cpu", RBM)
    if machine.image_shape != data.image_shape:
        return
    bits = (pixels >= 2 ** (data.bits - 1)).to(torch.uint8)
    report(
        "RBM, binary pixels",
        of_machine(machine, bits, known),
        bits.flatten(1)[:, ~known.flatten()].float(),
    )


if __name__ == "__main__":
    main()
