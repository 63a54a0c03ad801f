"""What is trained for the thesis and the slides; `conf/scale` says what a scale changes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flowgen.config.compose import conf_folder
from flowgen.utils.errors import UserError

SCALES = ("full", "small", "smoke")
GROUPS = ("glow_conv", "glow_resnet", "toy", "slides", "outlook")
FACED = {"glow_conv", "glow_resnet", "outlook"}  # groups that train on faces
DIGITS = {"full": "mnist", "small": "mnist", "smoke": "mnist_sample"}
MACHINES = ("filters", "l2_1e3", "l2_1e6", "l1_1e3", "l1_1e6", "cd1", "cd10", "tempering")


class Part(NamedTuple):
    """One training: its group, the experiment, the run's folder below that of the scale, and the hidden units of a machine."""

    group: str
    experiment: str
    folder: str
    hidden: int | None = None

    def command(self, scale: str, faces: list[str], out: Path) -> list[str]:
        """What is trained, as words of `flowgen`; `faces` are those that name the faces."""
        kind = (
            "faces" if self.group in FACED else "digits" if self.group == "slides" else self.group
        )
        files = [
            name
            for name in (self.folder, kind)
            if (conf_folder() / "preset" / scale / f"{name}.yaml").exists()
        ]
        data = {"faces": faces, "digits": [f"data={DIGITS[scale]}"]}.get(kind, [])
        hidden = [] if self.hidden is None else [f"model.hidden={self.hidden}"]
        settings = [f"scale={scale}/{name}" for name in files[:1]]
        return [
            "train",
            f"experiment={self.experiment}",
            *settings,
            *data,
            *hidden,
            f"output_dir={out}",
            "resume=true",
        ]


def data_section(name: str, root: str | None = None) -> dict[str, Any]:
    """`conf/data/NAME.yaml`, at `root` where that is given."""
    found = yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text())
    return found if root is None else found | {"root": root}


def parts(scale: str, group: str) -> list[Part]:
    """What a scale trains for a group: of the slides' 24 machines and the outlook's 3 networks, 3 and 1 at the smallest scale."""
    if group == "slides":
        sizes = {"full": (50, 100, 300), "small": (100,), "smoke": (8,)}[scale]
        names = ("filters", "l1_1e3", "cd10") if scale == "smoke" else MACHINES
        chosen = [
            (name, size)
            for name in names
            for size in ((50, 100, 300) if (scale, name) == ("small", "filters") else sizes)
        ]
        machines = [
            Part(group, f"slides/{name}", f"{name}_{hidden}", hidden) for name, hidden in chosen
        ]
        return [
            *machines,
            Part(group, "slides/half_six", "half_six", 8 if scale == "smoke" else None),
        ]
    networks = (
        ["glow_gated"] if scale == "smoke" else ["glow_conv_32", "glow_resnet_blocks", "glow_gated"]
    )
    return [
        Part(group, f"thesis/{name}", name)
        for name in (networks if group == "outlook" else [group])
        if group in GROUPS
    ]


def train(words: list[str]) -> None:
    """Run `flowgen train` in a process whose memory is its own, to its end or until it is stopped. Raises FlowgenError for the latter."""
    print(f"\n$ flowgen {' '.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "flowgen", *words])
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it by itself
    terminate = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    status = process.wait()
    signal.signal(signal.SIGINT, interrupt), signal.signal(signal.SIGTERM, terminate)
    if status:
        raise UserError(
            f"{words[-2]} ended with status {status}, see above: the same command goes on from here"
        )
