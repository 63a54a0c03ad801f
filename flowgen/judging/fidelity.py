"""FID, precision and recall by torch-fidelity, where it is installed and its network's weights are at hand."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowgen.errors import FlowgenError

WEIGHTS = "FID_WEIGHTS"  # the environment's name of the network's file


class _Pictures(Dataset[Tensor]):
    """Images (N, 3, height, width), uint8, one by one, as torch-fidelity takes them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        return self.images[place]


def network() -> Path | None:
    """The file that FID_WEIGHTS names. Raises FlowgenError where it names one and fidelity cannot be had."""
    weights = os.environ.get(WEIGHTS)
    if not weights:
        return None
    if not Path(weights).is_file():
        raise FlowgenError(f"{WEIGHTS}={weights} is no file: name that of torch-fidelity's network, or leave it out")
    if find_spec("torch_fidelity") is None:
        raise FlowgenError(f"{WEIGHTS} is set, but torch-fidelity is not installed: pip install 'flowgen[fidelity]'")
    return Path(weights)


def fidelity(samples: Tensor, real: Tensor, weights: Path) -> dict[str, float]:
    """Of uint8 images (N, channels, height, width): FID (Heusel et al., 1706.08500), precision and recall (1904.06991, section 2)."""
    from torch_fidelity import calculate_metrics

    sets = [_Pictures(images.cpu().expand(-1, 3, -1, -1)) for images in (samples, real)]
    features = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(weights)}
    how = {"fid": True, "prc": True, "cuda": torch.cuda.is_available(), "verbose": False, "save_cpu_ram": True}
    found = calculate_metrics(input1=sets[0], input2=sets[1], **features, **how)
    return {"fid": found["frechet_inception_distance"], "precision": found["precision"], "recall": found["recall"]}
