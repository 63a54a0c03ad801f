"""Runs commands on damaged files and with random arguments.

Every command must work or fail with one plain sentence, and write only below its folder.
"""

import gzip
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forkserver import MAX_CPU_SECONDS, Outcome, run_flowgen
from fuzz_cli import random_command_line
from kill_points import make_rng
from kills import Result, Workspace
from mutations import mutate
from training_runs import train_args

MAX_MEMORY_BYTES = 6 * 2**30  # per command
OWN_CACHE_PROBABILITY = 0.1  # of damaging a file of the cache
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR
OUTSIDE = "written outside of the folder:"
NUM_PATHS = {  # audit event: number of its arguments that are paths
    "os.mkdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
}
MODELS = {"flow": "glow", "rbm": "rbm, pcd"}  # name of a run: key of TRAINING_RUNS
COMPRESSED = "images.flow"
RESTORED = "restored"  # folder of `decompress`
FIRST_IMAGE = "images/00.png"
SECOND_IMAGE = "images/01.png"
TRAIN = (
    "train trainer=cpu trainer.minutes=null trainer.steps=1 trainer.init_images=8 "
    "trainer.batch_size=4 model=nice model.width=4 data.size=4 output_dir=new"
)
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte",
)


def limit_resources() -> None:
    """Limit the CPU time and the memory of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def confine(folder: Path) -> Callable[[], None]:
    """Return a function that limits its process and reports every change outside of `folder`.

    Each report is a line on standard error that starts with `OUTSIDE`.
    """
    allowed = (f"{folder.resolve()}/", os.devnull, "/proc/")

    def audit(event: str, args: tuple[Any, ...]) -> None:
        num_paths = NUM_PATHS.get(event, 0)
        if event == "open":
            num_paths = int(args[2] & WRITE_FLAGS != 0)
        for path in args[:num_paths]:
            if isinstance(path, int):
                continue
            if not f"{os.path.realpath(os.fsdecode(path))}/".startswith(allowed):
                os.write(2, f"{OUTSIDE} {path!r}\n".encode())

    def prepare() -> None:
        limit_resources()
        sys.addaudithook(audit)

    return prepare


class Folder:
    """A folder with all kinds of input files, and an empty folder as HOME.

    It has a run and an exported model of a flow and of an RBM; images as files, in a zip, in IDX
    files and compressed with the flow; lists in CelebA's format; and a CSV table of attributes.
    The images that `decompress` restores are in a folder next to it.
    """

    def __init__(self, workspace: Workspace, path: Path):
        self.path = path
        self.home = workspace.folder / "home"
        self.home.mkdir()
        os.environ["HOME"] = str(self.home)
        path.mkdir(parents=True)
        images = path / "images"
        shutil.copytree(workspace.images, images)
        self._make_models(images)
        self._compress(images)
        names = sorted(image.name for image in images.iterdir())
        with zipfile.ZipFile(path / "images.zip", "w") as archive:
            for name in names:
                archive.write(images / name, name)
        self._make_lists(images, names)
        self._make_idx_files()

    def _make_models(self, images: Path) -> None:
        for run_name, training in MODELS.items():
            run = self.path / "outputs" / run_name
            model = self.path / f"{run_name}.safetensors"
            for args in (train_args(training, images, run), ["export", run, model]):
                self._run(*args)

    def _compress(self, images: Path) -> None:
        model = ("--run", "flow", "--out")
        self._run("compress", images, "--prepared", *model, COMPRESSED)
        self._run("decompress", COMPRESSED, *model, self.path.parent / RESTORED)

    def _run(self, *args: object) -> None:
        outcome = run_flowgen(args, self.path)
        assert outcome.status == 0, outcome.error

    def _make_lists(self, images: Path, names: list[str]) -> None:
        folder = self.path / "lists"
        shutil.copytree(images, folder)
        partition = []
        attributes = [f"{len(names)}\n", "Smiling Male\n"]
        table = ["image,smiling,age\n"]
        for index, name in enumerate(names):
            smiling = 1 - index % 2 * 2
            male = 1 - index % 3 % 2 * 2
            partition.append(f"{name} {min(index % 4, 2)}\n")
            attributes.append(f"{name} {smiling} {male}\n")
            table.append(f"images/{name},{-smiling},{index}\n")
        (folder / "list_eval_partition.txt").write_text("".join(partition))
        (folder / "list_attr_celeba.txt").write_text("".join(attributes))
        (self.path / "labels.csv").write_text("".join(table))

    def _make_idx_files(self) -> None:
        folder = self.path / "idx"
        folder.mkdir()
        for name in IDX_FILES:
            if "images" in name:
                data = struct.pack(">4i", 0x803, 24, 4, 4) + bytes(range(256)) + bytes(128)
            else:
                data = struct.pack(">2i", 0x801, 24) + bytes(24)
            (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def commands_for(folder: Path, file: Path) -> list[str]:
    """Return commands that read this file of the folder."""
    name = file.relative_to(folder)
    top = name.parts[0]
    if top == "outputs":
        run = name.parts[1]
        return [
            f"resume {run} trainer.steps=7",
            f"report {run}",
            "runs",
            f"sample --run {run} --count 4",
            f"evaluate --run {run}",
            f"export {run} x.safetensors",
            f"resume {name} trainer.steps=7",
            f"sample --run {name}",
            f"interpolate {FIRST_IMAGE} {SECOND_IMAGE} --run {name} --steps 3",
        ]
    if name.suffix == ".safetensors":
        return [
            f"sample --run {name} --count 4",
            f"evaluate --run {name}",
            f"score {FIRST_IMAGE} --run {name}",
            f"export {name} x.safetensors",
        ]
    if name.suffix == ".flow":
        return [f"decompress {name} {run}--out {RESTORED}" for run in ("--run flow ", "")]
    if top == "idx":
        return [f"{TRAIN} data=mnist data.root=idx"]
    if top == "lists":
        train = f"{TRAIN} data=folder data.root=lists"
        return [train, f"{train} data.attribute=Smiling"]
    if top == "images.zip":
        return [
            f"{TRAIN} data=folder data.root={name}",
            f"score {name} --run flow",
            f"compress {name} --run flow --out new.flow",
        ]
    if top == "labels.csv":
        return [
            f"edit {FIRST_IMAGE} --attribute {attribute} --labels {name} --run flow"
            for attribute in ("smiling", "age")
        ]
    if top == "cache":
        return ["evaluate --run flow", f"{TRAIN} data=folder data.root=images"]
    return [
        f"interpolate {name} {SECOND_IMAGE} --run flow --steps 3",
        f"score {name} --run rbm",
        f"compress {name} {SECOND_IMAGE} --prepared --run flow --out new.flow",
        f"complete {name} --known left --run rbm --steps 2",
        f"{TRAIN} data=folder data.root=images",
    ]


def _check(kind: str, name: str, outcome: Outcome, new_paths: set[str]) -> Result:
    outside = [line for line in outcome.error.splitlines() if line.startswith(OUTSIDE)]
    fault = " ".join(outside[:2]) or outcome.fault
    if not fault and outcome.status in (-signal.SIGXCPU, -signal.SIGKILL):
        fault = "hung"
    if fault:
        fault = f"{fault}: {outcome.last_line[:300]}"
    elif new_paths:
        fault = f"wrote {sorted(new_paths)[:3]}"
    return Result(kind, name, 1, fault)


def _wrong_images(work: Path, right: Path) -> str:
    """Return a fault if `decompress` wrote other images than from the file without damage."""
    contents = [
        sorted(path.read_bytes() for path in folder.rglob("*.png"))
        for folder in (work / RESTORED, right)
    ]
    return "" if contents[0] == contents[1] else "wrong images"


def _paths_outside(folder: Folder) -> set[str]:
    """Return the existing paths in places where a command could write by mistake."""
    paths = set(Path(tempfile.gettempdir()).glob("outside*"))
    for root in (folder.path.parent.parent, folder.path.parent, folder.home):
        paths |= set(root.iterdir())
    return {str(path) for path in paths}


def fuzz_files(folder: Folder, seed: int, count: int, pattern: str = "*") -> Iterator[Result]:
    """Damage a random file of a fresh copy of the folder and use it, `count` times.

    Args:
        folder: The folder, which stays as it is.
        seed: Seed of the damages.
        count: How often.
        pattern: Names of the files that may be damaged, such as `*.flow`.
    """
    work = folder.path.parent / "files"
    files = [
        path.relative_to(folder.path)
        for path in sorted(folder.path.rglob(pattern))
        if path.is_file() and path.suffix not in (".part", ".md")
    ]
    files = [path for path in files if "tensorboard" not in path.parts]
    for index in range(count):
        rng = make_rng(seed, "file", index)
        shutil.copytree(folder.path, work)
        os.environ["FLOWGEN_CACHE"] = str(work / "cache")
        for config in work.glob("outputs/*/config.yaml"):
            config.write_text(config.read_text().replace(str(folder.path), str(work)))
        file = work / rng.choice(files)
        if pattern == "*" and rng.random() < OWN_CACHE_PROBABILITY:
            outcome = run_flowgen(["evaluate", "--run", "flow"], work)
            if outcome.status == 0:
                file = rng.choice(sorted((work / "cache").iterdir()))
        change = mutate(file, rng)
        command = rng.choice(commands_for(work, file))
        before = _paths_outside(folder)
        outcome = run_flowgen(command.split(), work, prepare=confine(work))
        name = f"{index}: {change} in {file.relative_to(work)}, flowgen {command}"
        result = _check("damaged file", name, outcome, _paths_outside(folder) - before)
        if command.startswith("decompress") and outcome.status == 0:
            fault = _wrong_images(work, folder.path.parent / RESTORED)
            result = result._replace(fault=result.fault or fault)
        yield result
        shutil.rmtree(work)


def fuzz_command_lines(folder: Folder, seed: int, count: int) -> Iterator[Result]:
    """Run `count` random command lines."""
    work = folder.path.parent / "command_lines"
    for index in range(count):
        rng = make_rng(seed, "line", index)
        if index % 20 == 0:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder.path, work)
        os.environ["FLOWGEN_CACHE"] = str(work / "cache")
        args = random_command_line(rng, work)
        before = _paths_outside(folder)
        outcome = run_flowgen(args, work, prepare=limit_resources)
        name = f"{index}: flowgen {' '.join(map(repr, args))[:300]}"
        yield _check("command line", name, outcome, _paths_outside(folder) - before)
    shutil.rmtree(work, ignore_errors=True)
