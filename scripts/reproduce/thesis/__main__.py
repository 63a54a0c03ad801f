"""Every figure of the thesis and of the slides, in one page: `make reproduce-thesis` runs this, from where it was stopped."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import comparison
import faces as of_faces
import machines
from figure import MAKE, Figure
from markupsafe import Markup
from parts import DIGITS, FACED, GROUPS, SCALES, data_section, parts, train

from flowgen.commands.report import overview
from flowgen.config.compose import read_config
from flowgen.config.instantiate import build_data
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation import sample_quality
from flowgen.training.run_dir import Run
from flowgen.utils.console import setup_logging
from flowgen.utils.errors import UserError
from flowgen.utils.html import Picture, Section, data_url, write_html

FACES = ("celeba_hq", "celeba", "folder")
JUDGED = {
    "full": 2000,
    "small": 400,
    "smoke": 32,
}  # samples and test images of the comparison, at most
TITLES = {
    "data": "Data",
    "glow_conv": "Experiment 1: the original coupling network",
    "glow_resnet": "Experiment 2: a ResNet in every coupling",
    "comparison": "The comparison",
    "toy": "The toy figure (appendix B)",
    "slides": "The slides' restricted Boltzmann machines",
    "outlook": "The outlook: other networks, and the other reading of 32 steps",
}
THESIS = [
    "the thesis",
    "Glow",
    "CelebA-HQ",
    "",
    "168,800 and 185,800",
    "",
    "72, from 12 to 144",
    "12",
]  # in the table of costs
SOURCES = (
    "every figure names its command, its runs, and how it differs from the original; errors are standard errors. V. Sydorskyi, bachelor "
    "thesis (Kyiv, 2020); N. Khomutov, slides on restricted Boltzmann machines (Moscow State University, 2014)."
)


class Reproduction:
    """What was asked for: the scale, the data, and the folder in which everything lies."""

    def __init__(self, scale: str, data: str, root: str | None, groups: list[str]):
        self.scale, self.groups = scale, groups
        self.data, root = ("mnist_sample", None) if scale == "smoke" else (data, root)
        self.root = None if root is None else str(Path(root).expanduser().resolve())
        self.folder = Path("outputs/thesis") / f"{scale}_{self.data}"
        self.words = [f"data={self.data}"] + (
            [] if self.root is None else [f"data.root={self.root}"]
        )
        some = [f"PARTS='{' '.join(groups)}'"] if groups != list(GROUPS) else []
        self.command = " ".join(
            [MAKE, f"SCALE={scale}", f"DATA={data}", *([f"ROOT='{root}'"] if root else []), *some]
        )

    def runs(self, group: str) -> list[Run]:
        return [Run(self.folder / part.folder) for part in parts(self.scale, group)]

    def finished(self) -> list[str]:
        """The groups whose every part has come to its end."""
        return [group for group in GROUPS if all(run.has_ended() for run in self.runs(group))]

    def check(self) -> tuple[ImageDataset | None, ImageDataset | None]:
        """The faces and the digits, where they will be shown. Raises FlowgenError with the cure where anything is missing."""
        sample_quality.network()
        shown = {*self.groups, *self.finished()}
        for run in (run for group in FACED for run in self.runs(group) if run.config.exists()):
            if (used := read_config(run.config)["data"].get("root")) != self.root:
                cure = f"give ROOT={used or ''} as then, or move {self.folder} away to begin anew"
                raise UserError(
                    f"{run.folder} was trained on {used or 'images found in FLOWGEN_DATA'}: {cure}"
                )
        faces = of_faces.prepared(self.data, self.root, self.scale) if FACED & shown else None
        return faces, build_data(
            {"data": data_section(DIGITS[self.scale]) | {"bits": 1}}
        ) if "slides" in shown else None

    def train(self, group: str) -> bool:
        """Train what has not come to its end, from where it was stopped; whether there was any. Raises FlowgenError where one fails."""
        left = [
            part
            for part in parts(self.scale, group)
            if not Run(self.folder / part.folder).has_ended()
        ]
        for part in left:
            train(part.command(self.scale, self.words, self.folder / part.folder))
        return bool(left)

    def sections(
        self, faces: ImageDataset | None, digits: ImageDataset | None
    ) -> Iterator[Section]:
        runs = {group: self.runs(group) for group in self.finished()}
        both = {
            f"experiment {number}": runs[name][0]
            for number, name in enumerate(of_faces.EXPERIMENTS, 1)
            if name in runs
        }
        if faces is not None:
            yield self._section("data", of_faces.of_data(faces, self.data, self.root))
            for name in [name for name in of_faces.EXPERIMENTS if name in runs]:
                yield self._section(
                    name, of_faces.of_experiment(runs[name][0], name, faces, self.folder)
                )
        if faces is not None and len(both) == 2:
            found = {
                name: comparison.judged(run, faces, JUDGED[self.scale])
                for name, run in both.items()
            }
            said, table = (
                comparison.sentences(found, faces.bits),
                [*overview(list(both.values())), THESIS],
            )
            yield self._section("comparison", comparison.figures(both, found, faces), said, table)
        if "toy" in runs:
            yield self._section("toy", [machines.of_toy(runs["toy"][0])])
        if "slides" in runs and digits is not None:
            said, table = (
                [machines.best_of_prior(machines.likelihoods(runs["slides"]))],
                overview(runs["slides"]),
            )
            yield self._section(
                "slides", machines.of_slides(runs["slides"], self.folder, digits), said, table
            )
        if faces is not None and "outlook" in runs:
            yield self._section(
                "outlook", of_faces.of_outlook([*both.values(), *runs["outlook"]], faces.bits)
            )

    def _section(
        self,
        name: str,
        figures: Iterable[Figure],
        said: Sequence[str] = (),
        table: Sequence[list[str]] = (),
    ) -> Section:
        trained = []
        for part, run in zip(parts(self.scale, name), self.runs(name), strict=True):
            command = " ".join(["flowgen", *part.command(self.scale, self.words, run.folder)])
            departs = of_faces.changes(run, part.experiment, self.data) if name in FACED else ""
            trained.append(
                Markup("Trained by <code>{}</code>; {}. {}").format(
                    command, run.environment(), departs
                )
            )
        return Section(
            name,
            TITLES[name],
            [*trained, *said],
            table,
            [self._picture(figure) for figure in figures],
        )

    def _picture(self, figure: Figure) -> Picture:
        links = Markup("").join(
            Markup(', run <a href="{0}">{0}</a>').format(run.folder.name) for run in figure.runs
        )
        command = figure.command.replace(MAKE, self.command)
        caption = Markup("{}<br>\n<code>{}</code>{}. {}").format(
            figure.caption, command, links, figure.difference
        )
        return Picture(caption, data_url(figure.drawn(self.folder / "figures")), figure.number)

    def write(self, faces: ImageDataset | None, digits: ImageDataset | None) -> Path:
        """The page of all that has been trained."""
        target, missing = (
            self.folder / "thesis.html",
            "; ".join(TITLES[group] for group in GROUPS if group not in self.finished()),
        )
        made = Markup("{:%Y-%m-%d}. Scale: {}, data: {}. Made by <code>{}</code>; {}")
        lead: list[str] = [
            made.format(datetime.now(UTC), self.scale, self.data, self.command, SOURCES)
        ]
        lead += (
            [f"Not there yet: {missing}. The same command goes on with that."] if missing else []
        )
        write_html(
            target,
            "The thesis and the slides, reproduced",
            lead,
            list(self.sections(faces, digits)),
            contents=True,
        )
        return target


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/thesis", description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--data", choices=FACES, default="celeba_hq", help="the faces")
    parser.add_argument("--root", help="where they are: a folder or a zip")
    parser.add_argument("--parts", nargs="*", choices=GROUPS, default=list(GROUPS))
    given = parser.parse_args()
    setup_logging()
    try:
        wanted = Reproduction(given.scale, given.data, given.root, given.parts or list(GROUPS))
        faces, digits = wanted.check()
        for group in wanted.groups:
            if wanted.train(group) or group == wanted.groups[-1]:
                print(wanted.write(faces, digits), flush=True)
    except UserError as error:
        sys.exit(f"make reproduce-thesis: {error}")


if __name__ == "__main__":
    main()
