"""A flow's samples and interpolations beside the images of its data."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgen.data import Images
from flowgen.judging.fidelity import fidelity
from flowgen.judging.likeness import PrincipalComponents, distance_from_mean, likeness
from flowgen.judging.walks import changes, unevenness, walk
from flowgen.models import Flow

BATCH = 64


def judge_flow(
    model: Flow, data: Images, samples: Mapping[float, Sequence[Tensor]], *, weights: Path | None = None, pairs: int = 16, steps: int = 18
) -> dict[str, Any]:
    """What is told of a flow by `samples`, levels (N, ...) for each temperature, once or more often, and by walks; plain data, as JSON.

    samples: for each temperature the likeness of each draw to N test images, and its fidelity where there are `weights` for it;
    training: the likeness of N training images, the standard.
    mean_sample: how far the first sample of the lowest temperature lies from the mean test image, a test image's own distance being 1.
    bits: bits/dim of the N test images, one draw of the noise. walk: between `pairs` of them, through latents and pixels, the change
    from picture to picture and bits/dim of each, on average, and of each way through the latents its unevenness. An even number of
    `steps` is fair: half-way between two images rounding favours the even levels. All in one space, of training images not compared.
    """
    count = len(next(iter(samples.values()))[0])
    train, test = (torch.cat(list(data.batches(split, 500, most))) for split, most in (("train", 5 * count), ("test", count)))
    held, others = train[: len(test)], train[len(test) :]
    space = PrincipalComponents(_unit(others, data.bits))
    real, half = space(_unit(test, data.bits)), min(pairs, len(test) // 2)

    def look(levels: Tensor) -> dict[str, float]:
        found, more = likeness(space(_unit(levels, data.bits)), real)._asdict(), 8 - data.bits
        return found | (fidelity(levels << more, test << more, weights) if weights else {})

    ways = walk(model, test[:half], test[half : 2 * half], torch.linspace(0, 1, steps))
    return {
        "samples": [[look(levels) for levels in draws] for draws in samples.values()],
        "training": likeness(space(_unit(held, data.bits)), real)._asdict(),
        "mean_sample": distance_from_mean(space(_unit(samples[min(samples)][0][:1], data.bits))[0], real),
        "bits": bits_per_image(model, test).tolist(),
        "walk": {
            "changes": [changes(way, data.bits).mean(1).tolist() for way in ways],
            "bits": [[bits_per_image(model, each.round().to(torch.uint8)).mean().item() for each in way] for way in ways],
            "unevenness": unevenness(ways[0], data.bits).tolist(),
        },
        "images": len(test),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@torch.no_grad()
def bits_per_image(model: Flow, levels: Tensor) -> Tensor:
    """Bits/dim of every image, (N,), under one draw of a noise that is the same at every call."""
    generator = torch.Generator(model.device).manual_seed(0)
    scores = [model.score(part.to(model.device), generator=generator).cpu() for part in levels.split(BATCH)]
    return -torch.cat(scores).double() / (model.dimensions * math.log(2))


def _unit(levels: Tensor, bits: int) -> Tensor:
    return levels.cpu().float() / (2**bits - 1)
