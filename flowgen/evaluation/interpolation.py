"""Interpolation between images in the latent space of a model, and its smoothness."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowgen.models.base import GenerativeModel

MIN_SINE = 1e-6  # below it the vectors are parallel, and slerp falls back to lerp


def lerp(start: Tensor, end: Tensor, fraction: Tensor) -> Tensor:
    """Return (1 - fraction) start + fraction end, exact at the ends unlike `torch.lerp`.

    Args:
        start: Result for a fraction of 0.
        end: Result for a fraction of 1.
        fraction: Position between them.

    Example:
        >>> lerp(torch.tensor(1.0), torch.tensor(3.0), torch.tensor([0.0, 0.5, 1.0]))
        tensor([1., 2., 3.])
    """
    return (1 - fraction) * start + fraction * end


def slerp(start: Tensor, end: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate directions along a great circle, and lengths linearly.

    Shoemake, Animating rotation with quaternion curves (1985).

    Args:
        start: Vectors (..., D).
        end: Vectors (..., D).
        fraction: Position from 0 (`start`) to 1 (`end`), (..., 1).

    Example:
        >>> start, end = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> slerp(start, end, torch.tensor([0.5]))
        tensor([0.7071, 0.7071])
    """
    start_length = start.norm(dim=-1, keepdim=True)
    end_length = end.norm(dim=-1, keepdim=True)
    cosine = (start * end).sum(-1, keepdim=True) / (start_length * end_length)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    from_start = torch.sin((1 - fraction) * angle) * start / start_length
    from_end = torch.sin(fraction * angle) * end / end_length
    on_circle = (from_start + from_end) / sine * lerp(start_length, end_length, fraction)
    has_no_angle = (start_length == 0) | (end_length == 0)
    is_straight = has_no_angle | (sine.abs() < MIN_SINE) | (fraction == 0) | (fraction == 1)
    return torch.where(is_straight, lerp(start, end, fraction), on_circle)


@torch.no_grad()
def interpolate_pairs(
    model: GenerativeModel,
    first: Tensor,
    second: Tensor,
    fractions: Tensor,
    interpolation: Callable[[Tensor, Tensor, Tensor], Tensor] = lerp,
) -> tuple[Tensor, Tensor]:
    """Interpolate between pairs of images through the latent space, and through the pixels.

    Args:
        model: The model.
        first: Images (N, channels, height, width).
        second: The other image of each pair, in the same shape.
        fractions: Positions from 0 (`first`) to 1 (`second`), (steps,).
        interpolation: Interpolation of the latents, `lerp` or `slerp`.

    Returns:
        Decoded images (uint8) and interpolated pixel values (float), each of shape
        (steps, N, channels, height, width), on the CPU.

    Example:
        >>> from flowgen.models.rbm.rbm import RBM
        >>> first, second = torch.zeros(2, 2, 1, 4, 4, dtype=torch.uint8)
        >>> model = RBM(visible=(1, 4, 4), hidden=8)
        >>> decoded, pixels = interpolate_pairs(model, first, second, torch.linspace(0, 1, 5))
        >>> decoded.shape
        torch.Size([5, 2, 1, 4, 4])
    """
    start, end = (model.encode(images.to(model.device)) for images in (first, second))
    latents = interpolation(start, end, fractions.to(start)[:, None, None]).flatten(0, 1)
    batches = latents.split(max(len(first), len(fractions)))
    decoded = torch.cat([model.decode(batch) for batch in batches])
    pixels = lerp(first.float(), second.float(), fractions[:, None, None, None, None])
    return decoded.view(len(fractions), *first.shape).cpu(), pixels.cpu()


def step_sizes(path: Tensor, bits: int) -> Tensor:
    """Return the root mean square change of the pixels from each image of a path to the next.

    Args:
        path: Images (steps, N, channels, height, width) with values 0..2^bits-1.
        bits: Bits per pixel value; pixels are scaled to the range from 0 to 1.

    Returns:
        The step sizes, (steps - 1, N).
    """
    return (path.float() / (2**bits - 1)).diff(dim=0).square().flatten(2).mean(2).sqrt()


def unevenness(path: Tensor, bits: int) -> Tensor:
    """Return the largest step size of each path divided by its mean, (N,); 1 is perfectly even.

    A path of identical images is even.

    Example:
        >>> path = torch.tensor([0, 1, 4]).view(3, 1, 1, 1, 1)
        >>> unevenness(path, bits=8)
        tensor([1.5000])
    """
    sizes = step_sizes(path, bits)
    mean = sizes.mean(0)
    return torch.where(mean > 0, sizes.amax(0) / mean, 1.0)
