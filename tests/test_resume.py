"""A training that was stopped and resumed ends with the same bits as one without a break."""

import pytest
from training_runs import make_images, same, train_args

from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.run_dir import Run

# test_training.py kills and resumes flows, and test_rbm_runs.py resumes RBMs.
NAMES = [
    "diffusion",
    "flow_gan",
    "gan",
    "pixelcnn",
    "pixelcnn, mixture",
    "reverse_kl",
    "vae",
    "vqvae, vq",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_ends_with_the_same_bits(name, tmp_path, command):
    images = make_images(tmp_path / "images")
    for run, steps in (("whole", 6), ("parts", 3)):
        overrides = [f"trainer.steps={steps}", "trainer.warmdown_ratio=0"]
        status, _, error = command(*train_args(name, images, tmp_path / run, *overrides))
        assert status == 0, error
    status, _, error = command("resume", tmp_path / "parts", "trainer.steps=6")
    assert status == 0, error
    whole, parts = (read_checkpoint(Run(tmp_path / run).last) for run in ("whole", "parts"))
    for part in ("model", "ema", "optimizer"):
        assert same(whole[part], parts[part]), part
