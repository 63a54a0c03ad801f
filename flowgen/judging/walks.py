"""How smoothly an interpolation runs."""

from torch import Tensor


def changes(walk: Tensor, bits: int) -> Tensor:
    """Root mean square change of the pixels, their range being 1, from picture to picture: (steps - 1, N) of levels (steps, N, ...)."""
    return (walk.float() / (2**bits - 1)).diff(dim=0).square().flatten(2).mean(2).sqrt()


def unevenness(walk: Tensor, bits: int) -> Tensor:
    """The largest change of each way over its mean change, (N,): 1 is perfectly even."""
    found = changes(walk, bits)
    return found.max(0).values / found.mean(0)
