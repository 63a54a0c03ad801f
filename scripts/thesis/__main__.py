"""Every figure of the thesis and of the slides, in one page: `make reproduce-thesis` runs this, from where it was stopped."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import faces as of_faces
import judge
import machines as of_digits
import torch
import yaml
from comparison import compare
from figure import MAKE, Figure
from jinja2 import Environment, FileSystemLoader
from parts import FACED, GROUPS, SCALES, is_finished, parts, train
from PIL import Image, ImageOps
from torch import Tensor

import flowgen.commands.report
from flowgen.commands.report import data_url
from flowgen.config import build_data, conf_folder, read_config
from flowgen.data import Images
from flowgen.data.folder import hashed_split, official_split, open_source
from flowgen.data.locate import locate
from flowgen.errors import FlowgenError
from flowgen.messages import one_sentence, show_messages
from flowgen.training.run import Run

FACES = ("celeba_hq", "celeba", "folder")
SHOWN = 16  # training images in figures 3.1 and 3.2
JUDGED = {"full": 2000, "small": 400, "smoke": 32}  # samples and test images of the comparison, at most
EXPERIMENTS = {
    "glow_conv": ("3.4", "3.5", "3.6", "3.7", "3.8", "3.9", "3.10-3.14", "3.15", "3.16", "3.17", "3.18", "3.19", "3.20"),
    "glow_resnet": ("3.21", "3.22", "3.23", "3.24", "3.25", "3.26-3.27", "3.28-3.32", "3.33", "3.34", "3.35", "3.36"),
}
TITLES = {
    "glow_conv": "Experiment 1: the original coupling network",
    "glow_resnet": "Experiment 2: a ResNet in every coupling",
    "toy": "The toy figure (appendix B)",
    "slides": "The slides' restricted Boltzmann machines",
    "outlook": "The outlook: other networks, and the other reading of 32 steps",
}


class Section(NamedTuple):
    anchor: str
    title: str
    figures: list[Figure]
    command: str = ""
    sentences: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()


class Reproduction:
    """What was asked for: the scale, the data, and the folder in which everything lies."""

    def __init__(self, scale: str, data: str, root: str | None, groups: list[str]):
        self.scale, self.groups = scale, groups
        data, root = ("mnist_sample", None) if scale == "smoke" else (data, root)
        self.data_name, self.root = data, None if root is None else str(Path(root).expanduser().resolve())
        self.words = [f"data={self.data_name}"]
        self.folder = Path("outputs/thesis") / f"{scale}_{self.data_name}"
        self.config = yaml.safe_load((conf_folder() / "data" / f"{self.data_name}.yaml").read_text())
        if self.root is not None:
            self.config["root"] = self.root
            quoted = self.root.replace("\\", "\\\\").replace("'", "\\'")  # Hydra's grammar gives commas and brackets a meaning
            self.words.append(f"data.root='{quoted}'")
        given = {"DATA": data if data in FACES[1:] else None, "ROOT": root, "PARTS": " ".join(groups) if groups != list(GROUPS) else None}
        said = " ".join(f"{key}='{value}'" if " " in value else f"{key}={value}" for key, value in given.items() if value)
        self.command = f"make reproduce-thesis SCALE={scale} {said}".strip()

    def check(self) -> tuple[Images | None, Images | None]:
        """The faces and the digits, where they will be shown. Raises FlowgenError with the cure where anything is missing."""
        judge.check_fid()
        shown = {*self.groups, *self.finished()}
        for part in parts(self.scale, list(FACED)):
            run = Run(self.folder / part.folder)
            if run.config.exists() and (used := read_config(run.config)["data"].get("root")) != self.root:
                raise FlowgenError(
                    f"{run.folder} was trained on {used or 'images found in FLOWGEN_DATA'}: give ROOT={used or ''} as then, or move "
                    f"{self.folder} away to begin anew"
                )
        return self._faces() if FACED & shown else None, self._digits() if "slides" in shown else None

    def finished(self) -> list[str]:
        """The groups whose every part has come to its end."""
        return [group for group in GROUPS if all(is_finished(Run(self.folder / part.folder)) for part in parts(self.scale, [group]))]

    def _faces(self) -> Images:
        if self.scale == "full" and not torch.cuda.is_available():
            raise FlowgenError("SCALE=full trains for days on one GPU, and this machine has none: SCALE=small takes an hour on two cores")
        if self.config.get("root", "") == "???":
            raise FlowgenError("DATA=folder needs ROOT=, a folder or a zip of images: make reproduce-thesis DATA=folder ROOT=~/faces")
        try:
            return build_data({"data": self.config})
        except FlowgenError as error:
            raise FlowgenError(
                f"{one_sentence(error).removesuffix('.')}. Give its place as ROOT=FOLDER, or take a substitute: "
                "DATA=celeba ROOT=FOLDER, or DATA=folder ROOT=FOLDER with images of your own"
            ) from error

    def _digits(self) -> Images:
        name = "mnist_sample" if self.scale == "smoke" else "mnist"
        return build_data({"data": yaml.safe_load((conf_folder() / "data" / f"{name}.yaml").read_text()) | {"bits": 1}})

    def originals(self, faces: Images) -> Tensor:
        """The first training images as they are before they are prepared, each in a white square."""
        if "names" not in self.config or self.data_name == "mnist_sample":
            return faces.train[:SHOWN].float() / 255
        place = locate(self.config["root"], self.config["names"], self.config["cure"])
        source = open_source(place)
        names = (official_split(place, list(source.stamps)) or hashed_split(list(source.stamps)))[0]
        readable: list[Tensor] = []
        for name in names:
            with contextlib.suppress(OSError):  # such a file is left out of the training images too
                readable.append(_padded(Image.open(io.BytesIO(source.read(name))).convert("RGB")))
            if len(readable) == SHOWN:
                break
        return torch.cat(readable)

    def sections(self, faces: Images | None, digits: Images | None) -> list[Section]:
        runs = {group: [Run(self.folder / part.folder) for part in parts(self.scale, [group])] for group in self.finished()}
        drawings = self.folder / "figures"
        drawings.mkdir(parents=True, exist_ok=True)
        found = []
        if faces is not None:
            found.append(Section("data", "Data", of_faces.of_data(drawings, faces, self.originals(faces), self.data_name)))
            for name in [name for name in EXPERIMENTS if name in runs]:
                command = f"flowgen train {' '.join(parts(self.scale, [name])[0].command(self.scale, self.words, runs[name][0].folder))}"
                told = [f"By {runs[name][0].environment()}.", of_faces.changes(runs[name][0], f"thesis/{name}")]
                found.append(Section(name, TITLES[name], self._experiment(runs[name][0], drawings, faces), command, told))
        if faces is not None and set(EXPERIMENTS) <= set(runs):
            both = {f"experiment {number}": runs[name][0] for number, name in enumerate(EXPERIMENTS, 1)}
            figures, table, sentences = compare(both, faces, drawings, JUDGED[self.scale])
            found.append(Section("comparison", "The comparison", figures, "", sentences, table))
        if "toy" in runs:
            found.append(Section("toy", TITLES["toy"], [of_digits.of_toy(runs["toy"][0], drawings)]))
        if "slides" in runs and digits is not None and digits.labels is not None:
            *machines, half_six = runs["slides"]
            six = (digits.test >> 7)[digits.labels[1] == 6][0]
            found.append(Section("slides", TITLES["slides"], of_digits.of_slides(machines, half_six, drawings, six)))
        if faces is not None and "outlook" in runs:
            named = {run.folder.name: run for name in ("glow_conv", "glow_resnet", "outlook") for run in runs.get(name, [])}
            found.append(Section("outlook", TITLES["outlook"], of_faces.of_outlook(named, drawings)))
        return found

    def _experiment(self, run: Run, drawings: Path, faces: Images) -> list[Figure]:
        numbers = EXPERIMENTS[run.folder.name]
        training, samples, one, walks = numbers[:3], numbers[3:6], numbers[6], numbers[7:]
        return [
            *of_faces.of_training(run, drawings, training, len(faces.train), first=training[0] == "3.4"),
            *of_faces.of_samples(run, drawings, samples, f"thesis/{run.folder.name}"),
            of_faces.of_temperatures(run, drawings, one),
            *of_faces.of_interpolations(run, drawings, walks, faces),
        ]

    def write(self, faces: Images | None, digits: Images | None) -> Path:
        """The page of all that has been trained."""
        target = self.folder / "thesis.html"
        shown: list[dict[str, Any]] = []
        for section in self.sections(faces, digits):
            pictures = [self._shown(figure) for figure in section.figures]
            shown.append(section._asdict() | {"figures": pictures})
        folders = [Path(__file__).parent, Path(flowgen.commands.report.__file__).parent]
        pages = Environment(loader=FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = pages.get_template("page.html").render(
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            scale=self.scale,
            data=self.data_name,
            command=self.command,
            missing=[TITLES[group] for group in GROUPS if group not in self.finished()],
            sections=shown,
        )
        aside = target.with_suffix(".part")
        aside.write_text(page)
        aside.replace(target)
        return target

    def _shown(self, figure: Figure) -> dict[str, Any]:
        command = figure.command.replace(MAKE, self.command)
        runs = [str(run.relative_to(self.folder)) for run in figure.runs]
        return figure._asdict() | {"source": data_url(figure.path), "command": command, "runs": runs}


def _padded(image: Image.Image, size: int = 128) -> Tensor:
    """The image at its own proportions in the middle of a white square: (1, 3, size, size) in [0, 1]."""
    square = ImageOps.pad(image, (size, size), color="white")
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, size, size, 3).permute(0, 3, 1, 2) / 255


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/thesis", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--data", choices=FACES, default="celeba_hq", help="the faces")
    parser.add_argument("--root", help="where they are: a folder or a zip")
    parser.add_argument("--parts", nargs="*", choices=GROUPS, default=list(GROUPS))
    given = parser.parse_args()
    show_messages()
    try:
        wanted = Reproduction(given.scale, given.data, given.root, given.parts or list(GROUPS))
        faces, digits = wanted.check()
        for group in wanted.groups:
            for part in parts(wanted.scale, [group]):
                train(part, wanted.scale, wanted.words, wanted.folder / part.folder)
            print(wanted.write(faces, digits), flush=True)
    except FlowgenError as error:
        sys.exit(f"make reproduce-thesis: {error}")


if __name__ == "__main__":
    main()
