"""Every figure of the thesis and of the slides, in one page: `make reproduce-thesis` runs this, from where it was stopped."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import faces as of_faces
import images
import judge
import machines as of_digits
from claims import best_of_prior
from comparison import compare
from figure import MAKE, Figure
from markupsafe import Markup
from outlook import of_outlook
from parts import FACED, GROUPS, SCALES, command_of, is_finished, parts, train

from flowgen import document
from flowgen.config import read_config
from flowgen.data import Images
from flowgen.document import write_document
from flowgen.errors import FlowgenError
from flowgen.messages import show_messages
from flowgen.training.run import Run

FACES = ("celeba_hq", "celeba", "folder")
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
SOURCES = (
    "every figure names the command that makes it, the runs that it is drawn from, and how it differs from the original. Errors are "
    "standard errors. V. Sydorskyi, bachelor thesis (Kyiv Polytechnic Institute, 2020); N. Khomutov, slides on restricted Boltzmann "
    "machines (Moscow State University, 2014)."
)


class Section(NamedTuple):
    anchor: str
    title: str
    figures: list[Figure]
    trained: Sequence[tuple[str, str]] = ()  # a run's command, and what is to be said of it
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
        self.config = images.config_of(self.data_name)
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
        return (
            images.faces(self.config, self.scale) if FACED & shown else None,
            images.digits(self.scale) if "slides" in shown else None,
        )

    def finished(self) -> list[str]:
        """The groups whose every part has come to its end."""
        return [group for group in GROUPS if all(is_finished(Run(self.folder / part.folder)) for part in parts(self.scale, [group]))]

    def sections(self, faces: Images | None, digits: Images | None, finished: list[str]) -> list[Section]:
        runs = {group: [Run(self.folder / part.folder) for part in parts(self.scale, [group])] for group in finished}
        drawings = self.folder / "figures"
        drawings.mkdir(parents=True, exist_ok=True)
        found = []
        if faces is not None:
            shown = of_faces.of_data(drawings, faces, images.originals(self.config, faces), self.data_name, self.config.get("crop"))
            found.append(Section("data", "Data", shown))
            for name in [name for name in EXPERIMENTS if name in runs]:
                found.append(Section(name, TITLES[name], self._experiment(runs[name][0], drawings, faces), self._trained(runs[name])))
        if faces is not None and set(EXPERIMENTS) <= set(runs):
            both = {f"experiment {number}": runs[name][0] for number, name in enumerate(EXPERIMENTS, 1)}
            figures, table, sentences = compare(both, faces, drawings, JUDGED[self.scale])
            found.append(Section("comparison", "The comparison", figures, (), sentences, table))
        if "toy" in runs:
            found.append(Section("toy", TITLES["toy"], [of_digits.of_toy(runs["toy"][0], drawings)], self._trained(runs["toy"])))
        if "slides" in runs and digits is not None and digits.test.labels is not None:
            *machines, half_six = runs["slides"]
            six = (digits.test.images >> 7)[digits.test.labels == 6][0]
            figures, table = of_digits.of_slides(machines, half_six, drawings, six), of_digits.table(runs["slides"])
            claim = best_of_prior({name: row["log_likelihood"] for name, row in of_digits.last_tests(machines).items()})
            found.append(Section("slides", TITLES["slides"], figures, self._trained(runs["slides"]), [claim], table))
        if faces is not None and "outlook" in runs:
            named = {run.folder.name: run for name in ("glow_conv", "glow_resnet", "outlook") for run in runs.get(name, [])}
            found.append(Section("outlook", TITLES["outlook"], of_outlook(named, drawings), self._trained(runs["outlook"])))
        return found

    def _trained(self, runs: list[Run]) -> list[tuple[str, str]]:
        """The command of every run, and, of a flow of faces, where it departs from the original."""
        experiments = {part.folder: part.experiment for part in parts(self.scale, list(GROUPS))}
        told = []
        for run in runs:
            experiment = experiments[run.folder.name]
            departs = of_faces.changes(run, experiment) if experiment.startswith("thesis/glow") else ""
            told.append((command_of(run), f"{run.environment()}. {departs}"))
        return told

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
        finished = self.finished()
        missing = "; ".join(TITLES[group] for group in GROUPS if group not in finished)
        lead = [
            Markup("{}. Scale: {}, data: {}. Made by <code>{}</code>; {}").format(
                f"{datetime.now(UTC):%Y-%m-%d}", self.scale, self.data_name, self.command, SOURCES
            ),
            *([f"Not there yet: {missing}. The same command goes on with that."] if missing else []),
        ]
        sections = [self._shown(section) for section in self.sections(faces, digits, finished)]
        write_document(target, "The thesis and the slides, reproduced", lead, sections, contents=True)
        return target

    def _shown(self, section: Section) -> document.Section:
        trained = [Markup("Trained by <code>{}</code>; {}").format(command, told) for command, told in section.trained]
        pictures = [self._picture(figure) for figure in section.figures]
        return document.Section(section.anchor, section.title, [*trained, *section.sentences], section.table, pictures)

    def _picture(self, figure: Figure) -> document.Picture:
        command, names = figure.command.replace(MAKE, self.command), [str(run.relative_to(self.folder)) for run in figure.runs]
        links = Markup("").join(Markup(', run <a href="{0}">{0}</a>').format(name) for name in names)
        caption = Markup("{}<br>\n<code>{}</code>{}. {}").format(figure.caption, command, links, figure.difference)
        return document.Picture(caption, document.data_url(figure.path), figure.number)


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
            new = [train(part, wanted.scale, wanted.words, wanted.folder / part.folder) for part in parts(wanted.scale, [group])]
            if any(new) or group == wanted.groups[-1]:
                print(wanted.write(faces, digits), flush=True)
    except FlowgenError as error:
        sys.exit(f"make reproduce-thesis: {error}")


if __name__ == "__main__":
    main()
