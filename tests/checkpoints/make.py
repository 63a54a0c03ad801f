"""Train the stored checkpoints of tests/test_checkpoints.py: python tests/checkpoints/make.py.

The checkpoints prove that later versions read format 1. Once a checkpoint is part of a release,
never train it again: run this file only with the names of new models, in the environment of
`make setup`:

    .venv/bin/python tests/checkpoints/make.py NAME...

Each NAME.pt.gz has a NAME.json with the metrics of `flowgen evaluate`. The part of NAME before a
dash is the model.
"""

import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
IMAGES = ["data=mnist_sample", "data.bits=5", "trainer.batch_size=4", "trainer.init_images=16"]
POINTS = ["data=toy", "data.num_points=500", "data.bits=5", "trainer.batch_size=16"]
COMMON = [
    "trainer=cpu",
    "trainer.minutes=null",
    "trainer.steps=4",
    "trainer.eval_images=16",
    "trainer.precision=float32",
    "trainer.num_threads=1",
    "evaluation.ais_steps=20",
    "evaluation.ais_chains=10",
    "evaluation.cross_check=false",
]
GLOW = ["model.width=2", "model.levels=1", "model.steps_per_level=1"]
NARROW = ["model.width=4", "model.num_layers=1"]
TRANSFORMER = ["model.width=4", "model.num_heads=1", "model.patch=4"]
VAE = ["model.width=2", "model.latent_dim=2", "model.num_components=2"]
VQVAE = [*TRANSFORMER, "model.num_layers=1", "model.prior_layers=1", "model.num_components=2"]
MODELS = {
    "glow": [*IMAGES, *GLOW, "trainer.ema_decay=[0.5,0.9]"],
    "glow-classes": [*IMAGES, *GLOW, "model.num_classes=10", "trainer.ema_decay=0"],
    "flow_gan": [*IMAGES, *GLOW, "model.discriminator_width=2"],
    "gan": [*IMAGES, "model.width=2", "model.discriminator_width=2", "model.latent_dim=4"],
    "realnvp": [*IMAGES, "model.width=2", "model.levels=1", "model.num_blocks=1"],
    "nice": [*POINTS, *NARROW],
    "maf": [*POINTS, *NARROW, "model.num_transforms=2"],
    "iaf": [*POINTS, *NARROW, "model.num_transforms=2"],
    "planar": [*POINTS, "model.num_transforms=2"],
    "sylvester": [*POINTS, "model.num_transforms=2", "model.width=2"],
    "reverse_kl": ["data=energy", "data.num_points=200", *NARROW, "model.num_transforms=2"],
    "tarflow": [*IMAGES, *TRANSFORMER, "model.num_layers=[1,1]"],
    "jet": [*IMAGES, *TRANSFORMER, "model.num_layers=1", "model.num_couplings=2"],
    "flow_matching": [*POINTS, "model.width=4", "model.num_heads=1", "model.num_layers=1"],
    "pixelcnn": [*IMAGES, *NARROW],
    "pixelcnn-mixture": [*IMAGES, *NARROW, "model.num_components=3"],
    "vae": [*IMAGES, *VAE, "model.posterior=planar", "model.warmup_images=100"],
    "vae-pixelcnn": [
        *IMAGES,
        *VAE,
        "model.prior=vamp",
        "model.num_pseudo_inputs=2",
        "model.decoder=pixelcnn",
        "model.pixelcnn_layers=1",
    ],
    "diffusion": [*IMAGES, "model.width=4", "model.num_heads=1", "model.sampling_steps=4"],
    "vqvae": [*IMAGES, *VQVAE, "model.fsq_levels=[3,2]"],
    "vqvae-vq": [*IMAGES, *VQVAE, "model.quantizer=vq", "model.codebook_size=4"],
    "rbm": [*IMAGES, "data.bits=1", "model.hidden=2", "model.negative_phase.num_chains=2"],
    "rbm-tempering": [
        *IMAGES,
        "data.bits=1",
        "model/negative_phase=tempering",
        "model.hidden=2",
        "model.negative_phase.num_chains=2",
        "model.negative_phase.num_temperatures=3",
    ],
}


def make(name: str) -> None:
    """Train and evaluate one model."""
    model = f"model={name.partition('-')[0]}"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flowgen("train", model, *COMMON, *MODELS[name], f"output_dir={run}")
        path = run / "checkpoints" / "last.pt"
        metrics = json.loads(flowgen("evaluate", "--run", str(path), "--json"))
        compressed = gzip.compress(path.read_bytes(), mtime=0)
    stored_metrics = {
        key: value
        for key, value in metrics.items()
        if isinstance(value, float) and not key.endswith("seconds")
    }
    (FOLDER / f"{name}.pt.gz").write_bytes(compressed)
    (FOLDER / f"{name}.json").write_text(json.dumps(stored_metrics, indent=1) + "\n")
    print(name, len(compressed), "bytes", stored_metrics)


def flowgen(*arguments: str) -> str:
    """Run a command of flowgen and return its standard output."""
    argv = [sys.executable, "-m", "flowgen", *arguments]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    for model_name in sys.argv[1:] or MODELS:
        make(model_name)
