"""Run the commands and Python code of the README and the user guide, with small settings."""

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
PAGES = [
    README,
    (REPOSITORY / "docs" / "guide.md").read_text(),
    (REPOSITORY / "docs" / "results" / "benchmarks.md").read_text(),
]
# Blocks of code, and code within a line, in the order of the pages
CODE = [
    match
    for page in PAGES
    for match in re.findall(r"^```[a-z]*\n(.*?)^```|`([^`]+)`", page, re.M | re.S)
]
LINES = [
    line.partition(" #")[0].strip()
    for block, inline in CODE
    for line in (block.splitlines() if block else [inline.replace("\n", " ")])
]
COMMANDS = [shlex.split(line)[1:] for line in dict.fromkeys(LINES) if line.startswith("flowgen ")]
PLACEHOLDER = re.compile(r"=(N|M|RUN|FACES|DIR|NAME|PICTURES)$|^[A-Z]+(/[A-Z]+)?\.*$")
SMALL_SETTINGS = [
    "trainer.steps=2",
    "trainer.minutes=null",
    "trainer.batch_size=4",
    "trainer.init_images=16",
    "trainer.eval_images=8",
    "trainer.device=cpu",
]
SERVERS = ("explore", "bot")  # run until interrupted; other tests cover them
EXTRA_OPTIONS = {
    "score": ["--count", "10"],
    "complete": ["--steps", "5"],
    "chain": ["--frames", "3"],
    "shell-completion": ["--shell", "bash"],
    "sample --run zoo/rbm_mnist": ["--steps", "5"],
}
SMALL_SIZES = {"model.width": "8", "model.hidden": "8", "model.steps_per_level": "1"}


def shrink(overrides: list[str]) -> list[str]:
    """Replace the number of steps and the sizes by small ones, except for swept values."""
    replaced = {setting.split("=")[0] for setting in SMALL_SETTINGS}
    result = []
    for override in overrides:
        key = override.split("=")[0]
        if key in replaced:
            continue
        if key in SMALL_SIZES and "," not in override:
            override = f"{key}={SMALL_SIZES[key]}"
        result.append(override)
    keys = {override.split("=")[0] for override in result}
    if any(override.startswith(("model=rbm", "experiment=slides")) for override in result):
        sizes = ["model.hidden"]
    elif "experiment=noise" in result:
        sizes = ["model.width"]
    else:
        sizes = ["model.width", "model.steps_per_level"]
    missing = [f"{key}={SMALL_SIZES[key]}" for key in sizes if key not in keys]
    return [*result, *SMALL_SETTINGS, *missing]


def test_makefile_has_every_documented_target():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    documented = {shlex.split(line)[1] for line in LINES if line.startswith("make ")}
    assert documented and documented <= targets


def test_readme_is_short():
    assert len(README.splitlines()) <= 120 and len(README.split()) <= 900


@pytest.fixture
def user_folder(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of a reader: faces in HOME, small MNIST files, and three pictures."""
    monkeypatch.setenv("HOME", str(elsewhere))
    for number in range(60):
        save_image(elsewhere / "faces" / f"{number:06d}.png", (218, 178, 3))
    for name in ("one", "another", "six"):
        save_image(elsewhere / f"{name}.png", (28, 28))
    for folder in ("mnist", "fashion-mnist"):
        for split in ("train", "t10k"):
            path = elsewhere / "data" / folder
            path.mkdir(parents=True, exist_ok=True)
            images = torch.randint(0, 256, (120, 28, 28), dtype=torch.uint8)
            labels = (torch.arange(120) % 10).to(torch.uint8)
            files = (
                ("images-idx3", (0x803, 120, 28, 28), images),
                ("labels-idx1", (0x801, 120), labels),
            )
            for name, header, tensor in files:
                content = struct.pack(f">{len(header)}i", *header) + tensor.numpy().tobytes()
                (path / f"{split}-{name}-ubyte").write_bytes(content)
    return elsewhere


@pytest.mark.long
def test_every_documented_command_runs(user_folder, command, monkeypatch):
    monkeypatch.setattr(inpainting, "MODE_STEPS", 2)
    commands = [
        arguments
        for arguments in COMMANDS
        if not any(map(PLACEHOLDER.search, arguments))
        and arguments[0] not in SERVERS
        and arguments != ["resume"]  # a mention in the text
    ]
    assert len(commands) > 15
    for arguments in commands:
        run = next((word for word in arguments if word.startswith("outputs/20")), None)
        if arguments[0] == "train":
            arguments = ["train", *shrink(arguments[1:])]
        elif run and not Path(run).exists():  # the documented run is the one trained last
            configs = Path("outputs").rglob("config.yaml")
            newest = max((path.parent for path in configs), key=lambda path: path.stat().st_mtime)
            Path(run).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(newest, run)
        if arguments[0] == "resume":
            arguments = [word for word in arguments if not word.startswith("trainer.minutes")]
            arguments.append("trainer.steps=3")
        extra = EXTRA_OPTIONS.get(arguments[0], EXTRA_OPTIONS.get(shlex.join(arguments), []))
        status, _, error = command(*arguments, *extra)
        assert status == 0, f"flowgen {shlex.join(arguments)}: {error}"


def test_readme_python_runs(user_folder):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    code = code.replace('"trainer.steps=100"', ", ".join(f'"{word}"' for word in shrink([])))
    exec(compile(code, "README.md", "exec"), {})


def test_documented_scripts_exist():
    scripts = {
        script for page in PAGES for script in re.findall(r"python (scripts/[a-z_./]+)", page)
    }
    assert scripts
    for script in scripts:
        result = subprocess.run(
            [sys.executable, REPOSITORY / script, "--help"], capture_output=True, check=False
        )
        assert result.returncode == 0
