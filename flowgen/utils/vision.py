"""The one door to torchvision.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators cannot load and `import torchvision` fails,
although its Python parts are all that flowgen needs. Declaring the two operators that it looks up at import makes it import.
"""

import torch

try:
    import torchvision
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

from torchvision import datasets

__all__ = ["datasets", "torchvision"]
