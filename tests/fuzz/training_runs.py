"""Short training runs of every model, and the comparison of their results."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

STEPS = 6
FLOW = ("data.bits=5", "model.width=4")
RBM = (
    "data.bits=1",
    "data.channels=1",
    "data.random_flip=false",
    "model=rbm",
    "model.hidden=6",
    "evaluation.ais_steps=10",
    "evaluation.ais_chains=4",
)
VQVAE = (*FLOW, "model=vqvae", "model.num_layers=1", "model.num_heads=1", "model.patch=2")
TRAINING_RUNS = {
    "nice": (*FLOW, "model=nice", "model.num_layers=1"),
    "realnvp": (
        *FLOW,
        "model=realnvp",
        "model.num_blocks=1",
        "model.levels=1",
        "model.dequantization=variational",
    ),
    "glow": (*FLOW, "model=glow", "model.steps_per_level=1", "model.levels=1"),
    "flow_gan": (
        *FLOW,
        "model=flow_gan",
        "model.steps_per_level=1",
        "model.levels=1",
        "model.discriminator_width=4",
    ),
    "gan": (
        "data.bits=5",
        "model=gan",
        "model.latent_dim=4",
        "model.width=4",
        "model.discriminator_width=4",
    ),
    "iaf": (*FLOW, "model=iaf", "model.num_transforms=2", "model.num_layers=1"),
    "maf": (*FLOW, "model=maf", "model.num_transforms=2", "model.num_layers=1"),
    "tarflow": (*FLOW, "model=tarflow", "model.num_layers=[1,1]", "model.num_heads=1"),
    "jet": (*FLOW, "model=jet", "model.num_couplings=2", "model.num_heads=1"),
    "flow_matching": (
        *FLOW,
        "model=flow_matching",
        "model.num_layers=1",
        "model.num_heads=1",
        "model.tolerance=0.1",
    ),
    "diffusion": (
        *FLOW,
        "model=diffusion",
        "model.num_heads=1",
        "model.sampling_steps=2",
        "model.eval_times=2",
    ),
    "planar": ("data.bits=5", "model=planar", "model.num_transforms=2"),
    "reverse_kl": (
        "data=energy",
        "data.num_points=100",
        "model=reverse_kl",
        "model.width=4",
        "model.anneal_samples=20",
    ),
    "sylvester": (*FLOW, "model=sylvester", "model.num_transforms=2"),
    "pixelcnn": (*FLOW, "model=pixelcnn", "model.num_layers=1"),
    "pixelcnn, mixture": (*FLOW, "model=pixelcnn", "model.num_layers=1", "model.num_components=2"),
    "vae": (*FLOW, "model=vae", "model.free_bits=0.1", "model.warmup_images=10"),
    "vae, flows": (*FLOW, "model=vae", "model.posterior=planar", "model.prior=flow"),
    "vae, pixelcnn": (*FLOW, "model=vae", "model.decoder=pixelcnn", "model.prior=vamp"),
    "vqvae": (*VQVAE, "model.fsq_levels=[3,3]"),
    "vqvae, vq": (*VQVAE, "model.quantizer=vq", "model.codebook_size=8"),
    "rbm, pcd": (*RBM, "model/negative_phase=pcd"),
    "rbm, tempering": (*RBM, "model/negative_phase=tempering"),
}
TRAINER = (
    "trainer=cpu",
    "trainer.minutes=null",
    f"trainer.steps={STEPS}",
    "trainer.batch_size=4",
    "trainer.init_images=8",
    "trainer.lr=1e-3",
    "trainer.eval_images=4",
    "trainer.log_every=1",
    "trainer.eval_every=2",
    "trainer.save_every=4",
    "trainer.sample_every=6",
    "trainer.checkpoint_every=3",
)
VARYING_METRICS = ("seconds", "images_per_second", "memory_gib")  # differ from run to run


def folder_name(name: str) -> str:
    """Return the name of a training run without spaces."""
    return name.replace(", ", "-")


def make_images(folder: Path) -> Path:
    """Save twelve random images."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02d}.png")
    return folder


def train_args(name: str, images: Path, run: Path, *overrides: str) -> list[str]:
    """Return the arguments of `flowgen` for a training run."""
    data = ["data=folder", f"data.root={images}", "data.size=4"]
    if any(override.startswith("data=") for override in TRAINING_RUNS[name]):
        data = []  # the run names its own data
    output = [f"output_dir={run}", "resume=true"]
    return ["train", *data, *output, *TRAINING_RUNS[name], *TRAINER, *overrides]


def state_of(run: Path) -> dict[str, Any]:
    """Return the contents of a run's folder that depend on the seed alone.

    These are checkpoints, metrics and pictures, but no times. The names of partly written files
    are listed too.
    """
    partial = sorted(str(path.relative_to(run)) for path in run.rglob("*.part"))
    state: dict[str, Any] = {"partial files": partial}
    checkpoints: dict[int, Any] = {}  # by inode, since a file may have several names
    for path in sorted((run / "checkpoints").glob("*.pt")):
        inode = path.stat().st_ino
        if inode not in checkpoints:
            checkpoints[inode] = torch.load(path, weights_only=True)
            checkpoints[inode]["progress"].pop("seconds")
            checkpoints[inode].pop("config")
        state[path.name] = checkpoints[inode]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in VARYING_METRICS:
            row.pop(key, None)
    state["metrics"] = rows
    samples = sorted((run / "samples").iterdir())
    state["samples"] = {path.name: path.read_bytes() for path in samples}
    return state


def same(first: Any, second: Any) -> bool:
    """Return True if two states are equal bit by bit."""
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and _bytes(first) == _bytes(second)
        )
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(same(value, second[key]) for key, value in first.items())
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
