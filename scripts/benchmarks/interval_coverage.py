"""Measure the coverage of the 90% intervals of inpainted test images.

The coverage is the share of unknown pixels whose true value lies in the central 90% interval of the
samples. The script compares the HMC chains of a flow, random training images, and the Gibbs chains
of an RBM on binary pixels, if the RBM has images of the same shape.
"""

import argparse

import torch
from torch import Tensor

from flowgen.commands.complete import mask
from flowgen.config.instantiate import build_data
from flowgen.config.runs import find_model
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation.stats import mean
from flowgen.models.flows.flow import Flow
from flowgen.models.rbm.rbm import RBM
from flowgen.training.device import autocast_dtype

# Among nine samples, the true value has ten possible ranks of equal probability. The 90% interval
# excludes half of the first rank and half of the last rank.
NUM_CHAINS = 9
BATCH_SIZE = 8
RBM_STEPS = 500


def ranks(samples: Tensor, truth: Tensor) -> Tensor:
    """Return the ranks of true values among samples, scaled to [0, 1], with ties broken at random.

    Args:
        samples: Samples of the unknown pixels (N, chains, pixels).
        truth: Their true values (N, pixels).
    """
    below = (samples < truth[:, None]).sum(1)
    ties = (samples == truth[:, None]).sum(1)
    return (below + torch.rand(truth.shape) * (ties + 1)) / (samples.shape[1] + 1)


def print_row(name: str, samples: Tensor, truth: Tensor) -> None:
    """Print coverage of all pixels, coverage of pixels that vary, and mean error.

    A pixel varies if its samples and its true value are not all equal. The true value must be part
    of this criterion: pixels that are selected by the samples alone have a coverage above 90% even
    if the samples have the right distribution. Standard errors are over images.
    """
    is_covered = ((ranks(samples, truth) - 0.5).abs() < 0.45).double()
    values = torch.cat((samples, truth[:, None]), 1)
    varies = (values.amax(1) > values.amin(1)).double()
    of_varying = [
        ((image_covered * image_varies).sum() / image_varies.sum()).item()
        for image_covered, image_varies in zip(is_covered, varies, strict=True)
        if image_varies.any()
    ]
    error = (samples.mean(1) - truth).abs().mean(1)
    cells = [mean(is_covered.mean(1).tolist()), mean(of_varying)]
    print(f"{name:24} {cells[0]!s:18} {cells[1]!s:18} {mean(error.tolist())}", flush=True)


def complete_with_flow(flow: Flow, images: Tensor, known: Tensor, num_steps: int) -> Tensor:
    """Return samples of the unknown pixels with values in [0, 1], (N, chains, pixels)."""
    dtype = autocast_dtype("auto", flow.device)
    samples = []
    for index, batch in enumerate(images.split(BATCH_SIZE)):
        generator = torch.Generator().manual_seed(index)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            chains = flow.inpainting_chains(batch, known, NUM_CHAINS, num_steps, generator)
        pixels = (chains.samples * flow.bins).floor().clamp(0, flow.bins - 1) / (flow.bins - 1)
        samples.append(pixels.view(len(batch), NUM_CHAINS, -1)[..., ~known.flatten()])
        num_done = index * BATCH_SIZE + len(batch)
        print(f"{num_done} of {len(images)} images, acceptance {chains.acceptance:.2f}", flush=True)
    return torch.cat(samples)


def complete_with_rbm(rbm: RBM, images: Tensor, known: Tensor) -> Tensor:
    """Return binary samples of the unknown pixels (N, chains, pixels)."""
    samples = []
    for index, image in enumerate(images):
        generator = torch.Generator().manual_seed(index)
        result = rbm.inpaint(
            image[None], known, sampler="gibbs", steps=RBM_STEPS, generator=generator
        )
        pixels = torch.bernoulli(result.draws[:NUM_CHAINS], generator=generator)
        samples.append(pixels.flatten(1)[:, ~known.flatten()])
    return torch.stack(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flow", default="zoo/glow_mnist", metavar="RUN")
    parser.add_argument("--rbm", default="zoo/rbm_mnist", metavar="RUN")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="test images")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="gradients per chain")
    parser.add_argument(
        "--known", default="left", metavar="SIDE|MASK", help="as for flowgen complete"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    _, checkpoint, flow = find_model(args.flow, "cpu", Flow)
    data: ImageDataset = build_data(checkpoint["config"])
    known = mask(args.known, data.image_shape)
    images = torch.cat(list(data.batches("test", 100, args.count)))

    def unknown_pixels(images: Tensor) -> Tensor:
        return images.flatten(1)[:, ~known.flatten()].float() / (2**data.bits - 1)

    samples = complete_with_flow(flow, images, known, args.steps)
    print(f"{'':24} {'coverage':18} {'of varying pixels':18} mean absolute error")
    print_row(f"flow, known: {args.known}", samples, unknown_pixels(images))
    indices = torch.randint(len(data.train), (len(images), NUM_CHAINS))
    others = unknown_pixels(data.train.images[indices.flatten()] >> (8 - data.bits))
    others = others.view(len(images), NUM_CHAINS, -1)
    print_row("training images", others, unknown_pixels(images))
    _, _, rbm = find_model(args.rbm, "cpu", RBM)
    if rbm.image_shape == data.image_shape:
        binary = (images >= 2 ** (data.bits - 1)).to(torch.uint8)
        truth = binary.flatten(1)[:, ~known.flatten()].float()
        print_row("RBM, binary pixels", complete_with_rbm(rbm, binary, known), truth)


if __name__ == "__main__":
    main()
