"""The training runs of the thesis and the slides. `conf/preset` has the presets' settings."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flowgen.config.settings import conf_folder
from flowgen.utils.errors import UserError

sys.path.append(str(Path(__file__).parents[2]))
from run_flowgen import run_flowgen

PRESETS = ("full", "night", "small", "smoke")
GROUPS = ("glow_conv", "glow_resnet", "toy", "slides", "outlook")
FACE_GROUPS = {"glow_conv", "glow_resnet", "outlook"}  # groups that train on faces
DIGITS = {"full": "mnist", "night": "mnist", "small": "mnist", "smoke": "mnist_sample"}
RBMS = ("filters", "l2_1e3", "l2_1e6", "l1_1e3", "l1_1e6", "cd1", "cd10", "tempering")
OUTLOOK_NETWORKS = ("glow_conv_32", "glow_resnet_blocks", "glow_gated")
HIDDEN_UNITS = {"full": (50, 100, 300), "night": (50, 100, 300), "small": (100,), "smoke": (8,)}


class Job(NamedTuple):
    """One training run.

    Attributes:
        group: One of `GROUPS`.
        experiment: Name of the experiment in `conf/experiment`.
        folder: Folder of the run in the folder of the reproduction.
        hidden: Number of hidden units of an RBM.
    """

    group: str
    experiment: str
    folder: str
    hidden: int | None = None

    def command(self, preset: str, face_overrides: list[str], run: Path) -> list[str]:
        """Return the arguments of `flowgen`.

        Args:
            preset: One of `PRESETS`.
            face_overrides: Overrides that choose the images of faces.
            run: Folder of the run.
        """
        kind = self.group
        overrides: list[str] = []
        if self.group in FACE_GROUPS:
            kind = "faces"
            overrides = list(face_overrides)
        elif self.group == "slides":
            kind = "digits"
            overrides = [f"data={DIGITS[preset]}"]
        if self.hidden is not None:
            overrides.append(f"model.hidden={self.hidden}")
        for name in (self.folder, kind):
            if (conf_folder() / "preset" / preset / f"{name}.yaml").exists():
                overrides.insert(0, f"preset={preset}/{name}")
                break
        experiment = f"experiment={self.experiment}"
        return ["train", experiment, *overrides, f"output_dir={run}", "resume=true"]


def data_section(name: str, root: str | None = None) -> dict[str, Any]:
    """Return the settings of a data set, optionally with another root."""
    section = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    return section if root is None else section | {"root": root}


def jobs(preset: str, group: str) -> list[Job]:
    """Return the training runs of a group.

    With the presets full and night, the slides have 24 RBMs and the RBM of the half 6, and the
    outlook has 3 networks. The preset smoke has 3 RBMs, the RBM of the half 6, and 1 network.
    """
    if group == "slides":
        return _slides_jobs(preset)
    if group == "outlook":
        names = ["glow_gated"] if preset == "smoke" else OUTLOOK_NETWORKS
        return [Job(group, f"thesis/{name}", name) for name in names]
    return [Job(group, f"thesis/{group}", group)]


def _slides_jobs(preset: str) -> list[Job]:
    result = []
    for name in ("filters", "l1_1e3", "cd10") if preset == "smoke" else RBMS:
        sizes = HIDDEN_UNITS[preset]
        if preset == "small" and name == "filters":
            sizes = HIDDEN_UNITS["full"]
        for hidden in sizes:
            result.append(Job("slides", f"slides/{name}", f"{name}_{hidden}", hidden))
    half_six_hidden = 8 if preset == "smoke" else None
    result.append(Job("slides", "slides/half_six", "half_six", half_six_hidden))
    return result


def train(args: list[str]) -> None:
    """Run `flowgen ARGS` and wait until it ends.

    Raises:
        UserError: If the command fails or is stopped.
    """
    print(f"\n$ flowgen {' '.join(args)}", flush=True)
    status = run_flowgen(*args).returncode
    if status:
        raise UserError(
            f"{args[-2]} ended with status {status}, see above: run the same command again to "
            "continue"
        )
