"""Every command that the README prints runs as it is printed, with small settings put behind it where it trains."""

import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_image

from flowgen.models.flows import inpainting

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
PIECES = re.findall(
    r"^```[a-z]*\n(.*?)^```|`([^`]+)`", README, re.M | re.S
)  # a block, or words in a line, in the order of the page
LINES = [
    line.partition(" #")[0].strip()
    for block, inline in PIECES
    for line in (block.splitlines() if block else [inline.replace("\n", " ")])
]
COMMANDS = [shlex.split(line)[1:] for line in dict.fromkeys(LINES) if line.startswith("flowgen ")]
STANDS_FOR = re.compile(
    r"=(N|M|RUN|FACES|DIR|NAME)$|^[A-Z]+\.*$"
)  # words of the README that mean another word
SMALL = [
    "trainer.steps=2",
    "trainer.minutes=null",
    "trainer.batch_size=4",
    "trainer.init_images=16",
    "trainer.eval_images=8",
    "trainer.device=cpu",
]
SERVE = ("explore", "bot")  # until they are interrupted; what they serve has tests of its own
LESS = {
    "score": ["--count", "10"],
    "complete": ["--sweeps", "5"],
    "chain": ["--frames", "3"],
    "sample --run zoo/rbm_mnist": ["--sweeps", "5"],
}
SHRUNK = {"model.width": "8", "model.hidden": "8", "model.steps_per_level": "1"}


def shrunk(words: list[str]) -> list[str]:
    """A training's words with its ends and sizes replaced by small ones, but for those that it sweeps over."""
    kept = [
        word for word in words if word.split("=")[0] not in {small.split("=")[0] for small in SMALL}
    ]
    kept = [
        f"{key}={SHRUNK[key]}"
        if (key := word.split("=")[0]) in SHRUNK and "," not in word
        else word
        for word in kept
    ]
    rbm = any(word.startswith(("model=rbm", "experiment=slides")) for word in kept)
    given = {word.split("=")[0] for word in kept}
    sizes = (
        ["model.hidden"]
        if rbm
        else ["model.width"]
        if "experiment=noise" in kept
        else ["model.width", "model.steps_per_level"]
    )
    return [*kept, *SMALL, *(f"{key}={SHRUNK[key]}" for key in sizes if key not in given)]


def test_make_has_what_the_readme_types():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    typed = {shlex.split(line)[1] for line in LINES if line.startswith("make ")}
    assert typed and typed <= targets


@pytest.fixture
def newcomer(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's user has: faces at home, digits in place of all of MNIST, pictures here."""
    monkeypatch.setenv("HOME", str(elsewhere))
    for number in range(60):
        save_image(elsewhere / "faces" / f"{number:06d}.png", (218, 178, 3))
    for name in ("one", "another", "six"):
        save_image(elsewhere / f"{name}.png", (28, 28))
    for folder in ("mnist", "fashion-mnist"):
        for split in ("train", "t10k"):
            path = elsewhere / "data" / folder
            path.mkdir(parents=True, exist_ok=True)
            images, labels = (
                torch.randint(0, 256, (120, 28, 28), dtype=torch.uint8),
                (torch.arange(120) % 10).to(torch.uint8),
            )
            for name, header, tensor in (
                ("images-idx3", (0x803, 120, 28, 28), images),
                ("labels-idx1", (0x801, 120), labels),
            ):
                (path / f"{split}-{name}-ubyte").write_bytes(
                    struct.pack(f">{len(header)}i", *header) + tensor.numpy().tobytes()
                )
    return elsewhere


@pytest.mark.long
def test_every_command_runs_as_printed(newcomer, command, monkeypatch):
    monkeypatch.setattr(inpainting, "MODE_STEPS", 2)
    commands = [
        words
        for words in COMMANDS
        if not any(map(STANDS_FOR.search, words)) and words[0] not in SERVE
    ]
    assert len(commands) > 15
    for words in commands:
        named = next((word for word in words if word.startswith("outputs/20")), None)
        if words[0] == "train":
            words = ["train", *shrunk(words[1:])]
        elif (
            named and not Path(named).exists()
        ):  # the README's date and time stand for those of the run just made
            newest = max(
                (path.parent for path in Path("outputs").rglob("config.yaml")),
                key=lambda path: path.stat().st_mtime,
            )
            Path(named).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(newest, named)
        if words[0] == "resume":
            words = [
                *(word for word in words if not word.startswith("trainer.minutes")),
                "trainer.steps=3",
            ]
        status, _, error = command(*words, *LESS.get(words[0], LESS.get(shlex.join(words), [])))
        assert status == 0, f"flowgen {shlex.join(words)}: {error}"


def test_scripts_that_the_readme_names_are_there():
    for script in re.findall(r"python (scripts/[a-z_./]+)", README):
        assert (
            subprocess.run(
                [sys.executable, REPOSITORY / script, "--help"], capture_output=True, check=False
            ).returncode
            == 0
        )
