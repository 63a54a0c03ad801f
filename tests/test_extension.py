"""A new flow is one file and one YAML, and so is a new data set, as in CONTRIBUTING.md."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

FLOW = '''
"""A flow for the test."""

from collections.abc import Sequence

from flowgen.bijections import coupling, elementwise, networks
from flowgen.models.flows.builders import flat_chain, make_transform
from flowgen.models.flows.flow import Flow


class Tiny(Flow):
    """One affine coupling.

    Args:
        image_shape: (channels, height, width).
        bits: Bits per pixel value.
        width: Units of the hidden layer.
    """

    def __init__(
        self, *, image_shape: Sequence[int] = (1, 28, 28), bits: int = 8, width: int = 4
    ):
        transform = make_transform("affine")

        def layers(dim: int):
            out_features = transform.num_params * (dim - dim // 2)
            yield elementwise.Standardize(dim)
            network = networks.DenseNetwork(dim // 2, width, out_features, 1)
            yield coupling.Coupling(network, transform)

        super().__init__(flat_chain(image_shape, bits, True, layers), image_shape, bits, "uniform")
'''

MODEL = """
# One affine coupling (Nobody, arXiv 0000.00000)
# Likelihood: bound, because pixel values are dequantized
_target_: flowgen.models.flows.tiny.Tiny
width: 4  # units of the hidden layer
"""

DATA_SET = '''
"""Noise for the test."""

import torch

from flowgen.data.dataset import ImageDataset
from flowgen.data.splits import Split


class Noise(ImageDataset):
    """Random images of 4x4 pixels.

    Args:
        count: Images in each split.
        options: `bits` and further options of `ImageDataset`.
    """

    def __init__(self, *, count: int = 64, **options):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (3, count, 1, 4, 4), generator=generator, dtype=torch.uint8)
        super().__init__(*map(Split, images), **options)
'''

DATA = """
# Random images
_target_: flowgen.data.noise.Noise
count: 64  # images in each split
bits: 8  # bits of a pixel value, 1 to 8
random_flip: false  # mirror half of the training images
random_shift: 0  # shift training images by up to this many pixels in each direction
binarization: threshold  # for bits=1: threshold (at 128), static or dynamic (random)
"""


def test_a_flow_and_a_data_set_are_one_file_and_one_yaml_each(tmp_path):
    for folder in ("flowgen", "conf"):
        ignored = shutil.ignore_patterns("__pycache__", "zoo")
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=ignored)
    for name, text in (
        ("flowgen/models/flows/tiny.py", FLOW),
        ("conf/model/tiny.yaml", MODEL),
        ("flowgen/data/noise.py", DATA_SET),
        ("conf/data/noise.yaml", DATA),
    ):
        (tmp_path / name).write_text(text.lstrip())

    def flowgen(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "flowgen", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "One affine coupling (Nobody, arXiv 0000.00000)" in flowgen("models")
    assert "Random images" in flowgen("data")
    run = tmp_path / "run"
    flowgen("train", "model=tiny", "data=noise", "trainer.steps=2", f"output_dir={run}")
    flowgen("sample", "--run", str(run), "--out", "sample.png")
    assert (tmp_path / "sample.png").exists()
    evaluation = flowgen("evaluate", "--run", str(run))
    assert "bits_per_dim" in evaluation and "<= " in evaluation
    assert "64 images" in flowgen("compress", "--split", "test", "--run", str(run), "--out", "a.fg")
