"""What is trained for the thesis and the slides, at each scale, and training it to its end however often it was stopped."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from flowgen.config import read_config
from flowgen.errors import FlowgenError
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.run import Run

COMMAND, DONE = "command.txt", "done"  # in the folder of a part: what it was trained by, and that it has come to its end
SCALES = ("full", "small", "smoke")
GROUPS = ("glow_conv", "glow_resnet", "toy", "slides", "outlook")
FACED = {"glow_conv", "glow_resnet", "outlook"}  # groups that train on faces
FACES = {  # what a scale changes in every experiment with faces
    "full": "",
    "small": "trainer.device=cpu trainer.ema=0.995 trainer.initial_images=256 trainer.log_every=20 trainer.evaluate_every=200 "
    "trainer.evaluate_images=300 trainer.sample_every=400 trainer.save_every=200",
    "smoke": "trainer.device=cpu trainer.initial_images=64 trainer.log_every=1 trainer.evaluate_every=3 trainer.evaluate_images=32 "
    "trainer.sample_every=6 model.levels=2 model.steps_per_level=1 model.width=8 trainer.batch_size=8 trainer.warmup=2 trainer.steps=6",
}
DIGITS = {  # and with digits
    "full": "data=mnist",
    "small": "data=mnist trainer.minutes=0.5",
    "smoke": "data=mnist_sample trainer.minutes=null trainer.steps=20 trainer.evaluate_every=20 model.hidden=16",
}


class Part(NamedTuple):
    """One training: its group, the experiment, what each scale changes in it, and the run's folder below that of the scale."""

    group: str
    experiment: str
    words: dict[str, str]
    folder: str

    def command(self, scale: str, data: list[str], out: Path) -> list[str]:
        """What is trained, as words of `flowgen train`."""
        faces, digits = self.experiment.startswith("thesis/glow"), self.group == "slides"
        common = FACES[scale].split() + data if faces else DIGITS[scale].split() if digits else []
        return [f"experiment={self.experiment}", *common, *self.words.get(scale, "").split(), f"out={out}"]


def thesis(name: str, group: str, small: str, smoke: str = "") -> Part:
    return Part(group, f"thesis/{name}", {"small": small, "smoke": smoke}, name)


def slides(name: str, hidden: int, small: str = "") -> Part:
    return Part(
        "slides", f"slides/{name}", {"full": f"model.hidden={hidden}", "small": f"model.hidden={hidden} {small}"}, f"{name}_{hidden}"
    )


FLOWS = [
    thesis(
        "glow_conv",
        "glow_conv",
        "model.width=64 model.steps_per_level=4 trainer.steps=6000 trainer.warmup=565 trainer.keep_at=[1600,2160,6000]",
        "trainer.keep_at=[2,3,6]",
    ),
    thesis(
        "glow_resnet",
        "glow_resnet",
        "model.width=32 model.steps_per_level=8 trainer.steps=3000 trainer.warmup=275 trainer.keep_at=[725,1135,3000]",
        "trainer.keep_at=[2,3,6]",
    ),
]
TOY = Part("toy", "thesis/toy", {"smoke": "trainer.minutes=null trainer.steps=20"}, "toy")
OUTLOOK = [
    thesis("glow_conv_32", "outlook", "model.width=64 model.steps_per_level=16 trainer.steps=400 trainer.warmup=150"),
    thesis("glow_resnet_blocks", "outlook", "model.width=32 model.steps_per_level=8 trainer.steps=400 trainer.warmup=150"),
    thesis("glow_gated", "outlook", "model.width=24 model.steps_per_level=8 trainer.steps=400 trainer.warmup=150"),
]
HALF_SIX = slides("half_six", 500, "trainer.minutes=3")._replace(folder="half_six")


def parts(scale: str, groups: list[str]) -> list[Part]:
    """Everything that a scale trains for these groups: the slides' 24 machines, ten of them at the small scale, three at the smallest."""
    names = ("filters", "l2_1e3", "l2_1e6", "l1_1e3", "l1_1e6", "cd1", "cd10", "tempering")
    machines = {
        "full": [slides(name, hidden) for name in names for hidden in (50, 100, 300)],
        "small": [slides(name, hidden) for name in names for hidden in ((50, 100, 300) if name == "filters" else (100,))],
        "smoke": [slides(name, 16) for name in ("filters", "l1_1e3", "cd10")],
    }
    return [part for part in (*FLOWS, TOY, *machines[scale], HALF_SIX, *OUTLOOK) if part.group in groups]


def train(part: Part, scale: str, data: list[str], out: Path) -> bool:
    """Train a part to its end, from where it was stopped; whether there was anything to do. Raises FlowgenError where it fails."""
    run = Run(out)
    if is_finished(run):
        return False
    words = ["resume", str(out)] if run.config.exists() else ["train", *part.command(scale, data, out)]
    print(f"\n$ flowgen {' '.join(words)}", flush=True)
    if words[0] == "train":
        out.mkdir(parents=True, exist_ok=True)
        (out / COMMAND).write_text(f"flowgen {' '.join(words)}\n")
    process = subprocess.Popen([sys.executable, "-m", "flowgen", *words])
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        while process.returncode is None:
            with contextlib.suppress(KeyboardInterrupt):  # the training has heard of it too: it saves, and ends
                process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if process.returncode:
        raise FlowgenError(f"{out} ended with status {process.returncode}, see above: the same command goes on from here")
    (out / DONE).touch()
    return True


def command_of(run: Run) -> str:
    """What a part was trained by, as it was noted then."""
    noted = run.folder / COMMAND
    return noted.read_text().strip() if noted.exists() else f"a command that was not noted; its settings: {run.config}"


def is_finished(run: Run) -> bool:
    """Whether the run has come to its end, even where it was killed before that could be noted."""
    if (run.folder / DONE).exists():
        return True
    rows = run.read_metrics() if run.config.exists() and run.last.exists() else []
    if not rows or not _at_its_end(run, rows[-1]["step"], max(row.get("seconds", 0.0) for row in rows)):
        return False  # without a look at the checkpoint, which may be large
    try:
        last = read_checkpoint(run.last)
    except FlowgenError:
        return False
    if ended := _at_its_end(run, last["step"], last["metrics"]["seconds"]):
        (run.folder / DONE).touch()
    return ended


def _at_its_end(run: Run, step: int, seconds: float) -> bool:
    ends = read_config(run.config)["trainer"]
    return (ends["steps"] is not None and step >= ends["steps"]) or (ends["minutes"] is not None and seconds >= 60 * ends["minutes"])
