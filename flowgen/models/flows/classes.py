"""Which classes to draw."""

import torch
from torch import Tensor

from flowgen.errors import FlowgenError

NO_CLASSES = "this model knows no classes: train one with model.classes=10 on data that has labels"


def labels_to_draw(count: int, label: int | None, first: int, classes: int | None, device: torch.device) -> Tensor | None:
    """Those of `count` samples: `label`, or each class in turn as from sample number `first` on, or None where there are no classes.

    Raises FlowgenError for a class that there is not.
    """
    if label is None:
        return None if classes is None else torch.arange(first, first + count, device=device) % classes
    if classes is None:
        raise FlowgenError(NO_CLASSES)
    if not 0 <= label < classes:
        raise FlowgenError(f"label {label} is none of the model's {classes} classes: give a number from 0 to {classes - 1}")
    return torch.full((count,), label, device=device)
