"""Points of the plane, kept as images of two channels and one pixel, so that every flow of images is one of the plane."""

from collections.abc import Sequence

SHAPE = (2, 1, 1)


def is_plane(shape: Sequence[int]) -> bool:
    """Whether images of this shape (channels, height, width) are points."""
    return tuple(shape) == SHAPE
