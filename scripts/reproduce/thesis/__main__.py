"""Reproduce every figure of the thesis and of the slides on one page: `make reproduce-thesis`.

If the script was stopped, the same command continues.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import comparison
import glow_figures
import rbm_figures
from figure import MAKE, Figure
from jobs import DIGITS, FACE_GROUPS, GROUPS, PRESETS, data_section, jobs, train
from markupsafe import Markup

from flowgen.commands.report import overview
from flowgen.config.compose import read_config
from flowgen.config.instantiate import build_data
from flowgen.data.dataset import ImageDataset
from flowgen.evaluation import sample_quality
from flowgen.training.run_dir import Run
from flowgen.utils.console import setup_logging
from flowgen.utils.errors import UserError
from flowgen.utils.html import Picture, Section, data_url, write_html

FACE_DATA = ("celeba_hq", "celeba", "folder")
MAX_COMPARED = {"full": 2000, "night": 1000, "small": 400, "smoke": 32}  # samples and test images
TITLES = {
    "data": "Data",
    "glow_conv": "Experiment 1: the original coupling network",
    "glow_resnet": "Experiment 2: a ResNet in every coupling",
    "comparison": "Comparison of the experiments",
    "toy": "The toy figure (appendix B)",
    "slides": "The restricted Boltzmann machines of the slides",
    "outlook": "Outlook: other networks, and the other meaning of 32 steps",
}
THESIS_ROW = [  # of the table of costs
    "the thesis",
    "Glow",
    "CelebA-HQ",
    "bound",
    "",
    "",
    "168,800 and 185,800",
    "",
    "72, from 12 to 144",
    "12",
]
SOURCES = (
    "each figure has its command, its runs, and its differences from the original. Errors are "
    "standard errors. Sources: V. Sydorskyi, bachelor thesis (Kyiv, 2020); N. Khomutov, slides on "
    "restricted Boltzmann machines (Moscow State University, 2014)."
)


class Reproduction:
    """The training runs and the page of one preset and data set.

    Args:
        preset: One of `PRESETS`.
        data: One of `FACE_DATA`.
        root: Folder or zip of the images, or None to search for them.
        groups: Groups of training runs to start.
    """

    def __init__(self, preset: str, data: str, root: str | None, groups: list[str]):
        if preset == "smoke":
            self.data = "mnist_sample"
            root = None
        else:
            self.data = data
        self.preset = preset
        self.groups = groups
        self.root = None if root is None else str(Path(root).expanduser().resolve())
        self.folder = Path("outputs/thesis") / f"{preset}_{self.data}"
        self.face_overrides = [f"data={self.data}"]
        if self.root is not None:
            self.face_overrides.append(f"data.root={self.root}")
        variables = [f"SCALE={preset}", f"DATA={data}"]
        if root:
            variables.append(f"ROOT='{root}'")
        if groups != list(GROUPS):
            variables.append(f"PARTS='{' '.join(groups)}'")
        self.command = " ".join([MAKE, *variables])

    def runs(self, group: str) -> list[Run]:
        """Return the runs of a group."""
        return [Run(self.folder / job.folder) for job in jobs(self.preset, group)]

    def finished_groups(self) -> list[str]:
        """Return the groups whose runs have all ended."""
        return [group for group in GROUPS if all(run.has_ended() for run in self.runs(group))]

    def load_data(self) -> tuple[ImageDataset | None, ImageDataset | None]:
        """Return the images of faces and of digits, or None for those that the page does not show.

        Raises:
            UserError: If data or weights are missing. Nothing has been trained then.
        """
        sample_quality.find_fid_weights()
        for group in FACE_GROUPS:
            for run in self.runs(group):
                self._check_root(run)
        shown = {*self.groups, *self.finished_groups()}
        faces = None
        digits = None
        if FACE_GROUPS & shown:
            faces = glow_figures.load_faces(self.data, self.root, self.preset)
        if "slides" in shown:
            digits = build_data({"data": data_section(DIGITS[self.preset]) | {"bits": 1}})
        return faces, digits

    def _check_root(self, run: Run) -> None:
        if not run.config.exists():
            return
        root = read_config(run.config)["data"].get("root")
        if root != self.root:
            images = root or "images found in FLOWGEN_DATA"
            raise UserError(
                f"{run.folder} was trained on {images}: set ROOT={root or ''}, or move "
                f"{self.folder} away to start again"
            )

    def train(self, group: str) -> bool:
        """Run or resume the unfinished training runs of a group. Return True if there were any.

        Raises:
            UserError: If a training run fails.
        """
        unfinished = [
            job for job in jobs(self.preset, group) if not Run(self.folder / job.folder).has_ended()
        ]
        for job in unfinished:
            train(job.command(self.preset, self.face_overrides, self.folder / job.folder))
        return bool(unfinished)

    def sections(
        self, faces: ImageDataset | None, digits: ImageDataset | None
    ) -> Iterator[Section]:
        """Yield the sections of the page for all finished groups."""
        runs = {group: self.runs(group) for group in self.finished_groups()}
        experiments = {
            f"experiment {number}": runs[name][0]
            for number, name in enumerate(glow_figures.EXPERIMENTS, 1)
            if name in runs
        }
        if faces is not None:
            yield self._section("data", glow_figures.data_figures(faces, self.data, self.root))
            for name in glow_figures.EXPERIMENTS:
                if name in runs:
                    figures = glow_figures.experiment_figures(
                        runs[name][0], name, faces, self.folder
                    )
                    yield self._section(name, figures)
        if faces is not None and len(experiments) == 2:
            yield self._comparison_section(experiments, faces)
        if "toy" in runs:
            yield self._section("toy", [rbm_figures.toy_figure(runs["toy"][0])])
        if "slides" in runs and digits is not None:
            yield self._section(
                "slides",
                rbm_figures.slides_figures(runs["slides"], self.folder, digits),
                [rbm_figures.compare_claims(rbm_figures.likelihoods(runs["slides"]))],
                overview(runs["slides"]),
            )
        if faces is not None and "outlook" in runs:
            flows = [*experiments.values(), *runs["outlook"]]
            yield self._section("outlook", glow_figures.outlook_figures(flows, faces.bits))

    def _comparison_section(self, experiments: dict[str, Run], faces: ImageDataset) -> Section:
        count = MAX_COMPARED[self.preset]
        reports = {name: comparison.report(run, faces, count) for name, run in experiments.items()}
        return self._section(
            "comparison",
            comparison.figures(experiments, reports, faces),
            comparison.sentences(reports, faces.bits),
            [*overview(list(experiments.values())), THESIS_ROW],
        )

    def _section(
        self,
        name: str,
        figures: Iterable[Figure],
        sentences: Sequence[str] = (),
        table: Sequence[list[str]] = (),
    ) -> Section:
        paragraphs: list[str] = []
        if name in GROUPS:
            for job, run in zip(jobs(self.preset, name), self.runs(name), strict=True):
                args = job.command(self.preset, self.face_overrides, run.folder)
                differences = ""
                if name in FACE_GROUPS:
                    differences = glow_figures.differences(run, job.experiment, self.data)
                text = Markup("Trained by <code>{}</code>; {}. {}")
                command = " ".join(["flowgen", *args])
                paragraphs.append(text.format(command, run.environment(), differences))
        pictures = [self._picture(figure) for figure in figures]
        return Section(name, TITLES[name], [*paragraphs, *sentences], table, pictures)

    def _picture(self, figure: Figure) -> Picture:
        link = Markup(', run <a href="{0}">{0}</a>')
        links = Markup("").join(link.format(run.folder.name) for run in figure.runs)
        caption = Markup("{}<br>\n<code>{}</code>{}. {}").format(
            figure.caption,
            figure.command.replace(MAKE, self.command),
            links,
            figure.difference,
        )
        return Picture(caption, data_url(figure.path(self.folder / "figures")), figure.number)

    def write_page(self, faces: ImageDataset | None, digits: ImageDataset | None) -> Path:
        """Write the page with all finished groups."""
        path = self.folder / "thesis.html"
        template = Markup("{:%Y-%m-%d}. Preset: {}, data: {}. Made by <code>{}</code>; {}")
        lead: list[str] = [
            template.format(datetime.now(UTC), self.preset, self.data, self.command, SOURCES)
        ]
        finished = self.finished_groups()
        missing = [TITLES[group] for group in GROUPS if group not in finished]
        if missing:
            lead.append(f"Missing: {'; '.join(missing)}. Run the same command again to add it.")
        title = "The thesis and the slides, reproduced"
        write_html(path, title, lead, list(self.sections(faces, digits)), contents=True)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/reproduce/thesis", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--data", choices=FACE_DATA, default="celeba_hq", help="images of faces")
    parser.add_argument("--root", help="folder or zip of the images")
    parser.add_argument("--parts", nargs="*", choices=GROUPS, default=list(GROUPS))
    args = parser.parse_args()
    setup_logging()
    try:
        reproduction = Reproduction(args.preset, args.data, args.root, args.parts or list(GROUPS))
        faces, digits = reproduction.load_data()
        for group in reproduction.groups:
            if reproduction.train(group) or group == reproduction.groups[-1]:
                print(reproduction.write_page(faces, digits), flush=True)
    except UserError as error:
        sys.exit(f"make reproduce-thesis: {error}")


if __name__ == "__main__":
    main()
