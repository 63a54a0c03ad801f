"""Points of the plane as images of two channels and one pixel.

Every flow of images can also be trained on such points.
"""

from collections.abc import Sequence

TOY2D_SHAPE = (2, 1, 1)
TOY2D_SPAN = 4.0  # pixel values of points cover the square [-4, 4] x [-4, 4]


def is_toy2d(shape: Sequence[int]) -> bool:
    """Return whether images of this shape (channels, height, width) are points of the plane."""
    return tuple(shape) == TOY2D_SHAPE
