"""Files from elsewhere and odd command lines, after which only two things are right: it works, or one plain sentence."""

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

from kills import Ground, Result
from lines import odd_line
from mutations import spoil
from points import drawn
from trainings import words_of
from zygote import HANGS, Outcome, flowgen

MEMORY = 6 * 2**30  # bytes that a command may ask for
WRITES = os.O_WRONLY | os.O_RDWR
ELSEWHERE = "written elsewhere:"
NAMES_PATHS = {
    "os.mkdir": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.remove": 1,
    "os.rmdir": 1,
}  # events that name so many
MODELS = ("glow", "rbm, pcd")
ONE, OTHER = "images/00.png", "images/01.png"
SHORT = (
    "trainer=cpu trainer.minutes=null trainer.steps=1 trainer.init_images=8 trainer.batch_size=4"
)
TRAIN = f"train {SHORT} model=nice model.width=4 data.size=4"
IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte",
)


def bound() -> None:
    """In the child: so much time of a core and so much memory; what takes more hangs, or does not fit."""
    resource.setrlimit(resource.RLIMIT_CPU, (HANGS, HANGS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def confined(place: Path) -> Callable[[], None]:
    """What bounds a child, and has it tell of every file and folder elsewhere that it is about to write."""
    allowed = (f"{place.resolve()}/", os.devnull, "/proc/")

    def look(event: str, about: tuple[Any, ...]) -> None:
        named = about[2] & WRITES != 0 if event == "open" else NAMES_PATHS.get(event, 0)
        for path in about[:named]:
            if not isinstance(
                path, int
            ) and not f"{os.path.realpath(os.fsdecode(path))}/".startswith(allowed):
                os.write(2, f"{ELSEWHERE} {path!r}\n".encode())

    def prepare() -> None:
        bound()
        sys.addaudithook(look)

    return prepare


class Folder:
    """A folder with a run of each of two models, a model to pass on, images as files, zip and idx, CelebA's lists, a table."""

    def __init__(self, ground: Ground, path: Path):
        self.path, self.home = path, ground.folder / "home"
        self.home.mkdir()
        os.environ["HOME"] = str(self.home)
        path.mkdir(parents=True)
        images = path / "images"
        shutil.copytree(ground.images, images)
        for name, short in zip(MODELS, ("flow", "rbm"), strict=True):
            ended = flowgen(words_of(name, images, path / "outputs" / short), path)
            assert ended.status == 0, ended.error
            ended = flowgen(
                ["export", path / "outputs" / short, path / f"{short}.safetensors"], path
            )
            assert ended.status == 0, ended.error
        names = sorted(image.name for image in images.iterdir())
        with zipfile.ZipFile(path / "images.zip", "w") as archive:
            for name in names:
                archive.write(images / name, name)
        lists = path / "lists"
        shutil.copytree(images, lists)
        partition = "".join(f"{name} {min(number % 4, 2)}\n" for number, name in enumerate(names))
        (lists / "list_eval_partition.txt").write_text(partition)
        attributes = "".join(
            f"{name} {1 - number % 2 * 2} {1 - number % 3 % 2 * 2}\n"
            for number, name in enumerate(names)
        )
        (lists / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling Male\n{attributes}")
        rows = "".join(
            f"images/{name},{number % 2 * 2 - 1},{number}\n" for number, name in enumerate(names)
        )
        (path / "labels.csv").write_text(f"image,smiling,age\n{rows}")
        (path / "idx").mkdir()
        for name in IDX:
            data = (
                struct.pack(">4i", 0x803, 24, 4, 4) + bytes(range(256)) + bytes(128)
                if "images" in name
                else struct.pack(">2i", 0x801, 24) + bytes(24)
            )
            (path / "idx" / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def commands_for(folder: Path, file: Path) -> list[str]:
    """What one would do with such a file, in `folder`."""
    name = file.relative_to(folder)
    place, train = name.parts[0], f"{TRAIN} output_dir=new data="
    if place == "outputs":
        run = name.parts[1]
        of_run = (
            "resume RUN trainer.steps=7",
            "report RUN",
            "runs",
            "sample --run RUN --count 4",
            "evaluate --run RUN",
            "export RUN x.safetensors",
        )
        of_file = (
            f"resume {name} trainer.steps=7",
            f"sample --run {name}",
            f"interpolate {ONE} {OTHER} --run {name} --steps 3",
        )
        return [*(words.replace("RUN", run) for words in of_run), *of_file]
    if name.suffix == ".safetensors":
        return [
            f"sample --run {name} --count 4",
            f"evaluate --run {name}",
            f"score {ONE} --run {name}",
            f"export {name} x.safetensors",
        ]
    if place == "idx":
        return [f"{train}mnist data.root=idx"]
    if place == "lists":
        return [
            f"{train}folder data.root=lists",
            f"{train}folder data.root=lists data.attribute=Smiling",
        ]
    if place == "images.zip":
        return [f"{train}folder data.root={name}", f"score {name} --run flow"]
    if place == "labels.csv":
        return [
            f"edit {ONE} --attribute {attribute} --labels {name} --run flow"
            for attribute in ("smiling", "age")
        ]
    if place == "cache":
        return ["evaluate --run flow", f"{train}folder data.root=images"]
    of_image = (f"interpolate {name} {OTHER} --run flow --steps 3", f"score {name} --run rbm")
    return [
        *of_image,
        f"complete {name} --keep left --run rbm --sweeps 2",
        f"{train}folder data.root=images",
    ]


def _judge(kind: str, what: str, ended: Outcome, new: set[str]) -> Result:
    elsewhere = [line for line in ended.error.splitlines() if line.startswith(ELSEWHERE)]
    fault = (
        " ".join(elsewhere[:2])
        or ended.fault
        or ("hung" if ended.status in (-signal.SIGXCPU, -signal.SIGKILL) else "")
    )
    return Result(
        kind,
        what,
        1,
        f"{fault}: {ended.last[:300]}" if fault else f"wrote {sorted(new)[:3]}" if new else "",
    )


def _around(folder: Folder) -> Iterator[str]:
    """What lies where no command has anything to write: beside the folder and above it, at home, where odd zips would like to write."""
    for root in (folder.path.parent.parent, folder.path.parent, folder.home):
        yield from (str(path) for path in root.iterdir())
    yield from (str(path) for path in Path(tempfile.gettempdir()).glob("outside*"))


def foreign_files(folder: Folder, seed: int, count: int) -> Iterator[Result]:
    """A file is spoilt and used, `count` times, each in a fresh copy of the folder."""
    whole, work = folder.path, folder.path.parent / "files"
    files = sorted(
        path.relative_to(whole)
        for path in whole.rglob("*")
        if path.is_file() and path.suffix not in (".part", ".md")
    )
    files = [path for path in files if "tensorboard" not in path.parts]
    for number in range(count):
        draw = drawn(seed, "file", number)
        shutil.copytree(whole, work)
        os.environ["FLOWGEN_CACHE"] = str(work / "cache")
        for run in work.glob("outputs/*/config.yaml"):
            run.write_text(run.read_text().replace(str(whole), str(work)))
        file = work / draw.choice(files)
        if draw.random() < 0.1:
            cached = flowgen(["evaluate", "--run", "flow"], work)
            file = draw.choice(sorted((work / "cache").iterdir())) if cached.status == 0 else file
        how = spoil(file, draw)
        words = draw.choice(commands_for(work, file))

        before = set(_around(folder))
        ended = flowgen(words.split(), work, prepare=confined(work))
        yield _judge(
            "foreign file",
            f"{number}: {how} in {file.relative_to(work)}, flowgen {words}",
            ended,
            set(_around(folder)) - before,
        )
        shutil.rmtree(work)


def odd_lines(folder: Folder, seed: int, count: int) -> Iterator[Result]:
    """Command lines drawn from all commands, options, settings and odd values."""
    whole, work = folder.path, folder.path.parent / "lines"
    for number in range(count):
        draw = drawn(seed, "line", number)
        if number % 20 == 0:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(whole, work)
        os.environ["FLOWGEN_CACHE"] = str(work / "cache")
        words = odd_line(draw, work)

        before = set(_around(folder))
        ended = flowgen(words, work, prepare=bound)
        yield _judge(
            "command line",
            f"{number}: flowgen {' '.join(map(repr, words))[:300]}",
            ended,
            set(_around(folder)) - before,
        )
    shutil.rmtree(work, ignore_errors=True)
