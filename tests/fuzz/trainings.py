"""Short trainings of every model, and whether two of them ended the same."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

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
TRAININGS = {
    "nice": (*FLOW, "model=nice", "model.num_layers=1"),
    "realnvp": (
        *FLOW,
        "model=realnvp",
        "model.num_blocks=1",
        "model.levels=1",
        "model.dequantization=variational",
    ),
    "glow": (*FLOW, "model=glow", "model.steps_per_level=1", "model.levels=1"),
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
    "planar": ("data.bits=5", "model=planar", "model.num_transforms=2"),
    "sylvester": (*FLOW, "model=sylvester", "model.num_transforms=2"),
    "rbm, pcd": (*RBM, "model/negative_phase=pcd"),
    "rbm, tempering": (*RBM, "model/negative_phase=tempering"),
}
STEPS = 6
EVERY = f"trainer=cpu trainer.minutes=null trainer.steps={STEPS} trainer.batch_size=4 trainer.init_images=8 trainer.lr=1e-3".split()
TIMELY = {"log": 1, "evaluate": 2, "save": 4, "sample": 6, "keep": 3}
OFTEN = [
    "trainer.eval_images=4",
    *(f"trainer.{what}_every={steps}" for what, steps in TIMELY.items()),
]
TIMES = ("seconds", "images_per_second", "memory_gib")  # which differ from run to run


def make_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02d}.png")
    return folder


def words_of(name: str, images: Path, out: Path, *more: str) -> list[str]:
    here = ["data=folder", f"data.root={images}", "data.size=4", f"output_dir={out}", "resume=true"]
    return ["train", *here, *TRAININGS[name], *EVERY, *OFTEN, *more]


def state_of(run: Path) -> dict[str, Any]:
    """All that a training leaves, but for times: checkpoints, rows, pictures; and the names of files that are half written."""
    state: dict[str, Any] = {
        "half written": sorted(str(path.relative_to(run)) for path in run.rglob("*.part"))
    }
    files: dict[int, Any] = {}  # several names may be of one
    for path in sorted((run / "checkpoints").glob("*.pt")):
        if (file := path.stat().st_ino) not in files:
            files[file] = torch.load(path, weights_only=True)
            files[file]["progress"].pop("seconds")
            files[file].pop("config")
        state[path.name] = files[file]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state["rows"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    state["samples"] = {
        path.name: path.read_bytes() for path in sorted((run / "samples").iterdir())
    }
    return state


def same(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and _bytes(one) == _bytes(other)
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
