"""What flows of patches share: into how large ones an image is cut, and of what shape their transformers can be."""

from flowgen.errors import FlowgenError, check_number, check_whole
from flowgen.models.base import DEEPEST


def patch_size(size: int, patch: int | None) -> int:
    """`patch`, or, where that is None, the largest of 4, 2 and 1 that divides `size`. Raises FlowgenError where it does not divide it."""
    if patch is None:
        return next(patch for patch in (4, 2, 1) if size % patch == 0)
    check_whole(patch=patch)
    if size % patch:
        raise FlowgenError(f"patch={patch} does not divide images of size={size}: choose one that does, or null")
    return patch


def check_transformers(layers: list[int], width: int, heads: int, dropout: float) -> None:
    """Raises FlowgenError where these are no transformers, of so many layers each."""
    if not isinstance(layers, list) or not layers:
        raise FlowgenError(f"layers must be a list of numbers, one for each block, as in model.layers=[2,2,4], not {layers!r}")
    for depth in layers:
        check_whole(high=DEEPEST, layers=depth)
    check_whole(width=width, heads=heads)
    check_number(dropout=dropout)
    if dropout >= 1:
        raise FlowgenError(f"dropout must be below 1, not {dropout}")
    if width % heads:
        raise FlowgenError(f"width={width} is not a multiple of heads={heads}: choose other numbers")
