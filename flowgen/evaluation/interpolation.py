"""The way from one image to another, and how smoothly it runs."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowgen.models.base import GenerativeModel


def line(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """(1 - share) start + share end, which is exactly either end at share 0 and 1."""
    return (1 - share) * start + share * end


def great_circle(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Directions along the great circle, lengths along a line, of vectors (..., D) with share (..., 1).

    Shoemake, Animating rotation with quaternion curves (1985).
    """
    lengths = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    angle = torch.acos(
        ((start * end).sum(-1, keepdim=True) / (lengths[0] * lengths[1])).clamp(-1, 1)
    )
    direction = (
        torch.sin((1 - share) * angle) * start / lengths[0]
        + torch.sin(share * angle) * end / lengths[1]
    ) / torch.sin(angle)
    straight = (torch.sin(angle).abs() < 1e-6) | (share == 0) | (share == 1)
    return torch.where(straight, line(start, end, share), direction * line(*lengths, share))


@torch.no_grad()
def walk(
    model: GenerativeModel,
    first: Tensor,
    second: Tensor,
    shares: Tensor,
    along: Callable[[Tensor, Tensor, Tensor], Tensor] = line,
) -> tuple[Tensor, Tensor]:
    """From each of `first` to its partner in `second`, levels (N, channels, height, width), at `shares` (steps,) of the way.

    Through the latents, as levels (steps, N, channels, height, width), and through the pixels, which lie between levels.
    """
    start, end = (model.encode(images.to(model.device)) for images in (first, second))
    latents = along(start, end, shares.to(start)[:, None, None]).flatten(0, 1)
    decoded = torch.cat(
        [model.decode(part) for part in latents.split(max(len(first), len(shares)))]
    )
    pixels = line(first.float(), second.float(), shares[:, None, None, None, None])
    return decoded.view(len(shares), *first.shape).cpu(), pixels.cpu()


def changes(walk: Tensor, bits: int) -> Tensor:
    """Root mean square change of the pixels, their range being 1, from picture to picture: (steps - 1, N) of levels (steps, N, ...)."""
    return (walk.float() / (2**bits - 1)).diff(dim=0).square().flatten(2).mean(2).sqrt()


def unevenness(walk: Tensor, bits: int) -> Tensor:
    """The largest change of each way over its mean change, (N,): 1 is perfectly even."""
    found = changes(walk, bits)
    return found.max(0).values / found.mean(0)
