"""The figures of the networks that the thesis only names."""

from pathlib import Path

import kinds
from figure import MAKE, Figure, drawn

import flowgen
import flowgen.pictures
from flowgen.commands.sample import draw
from flowgen.config import read_config
from flowgen.training.run import Run


def of_outlook(runs: dict[str, Run], folder: Path) -> list[Figure]:
    """The validation figures of all flows by images seen, and samples of each."""
    newest = max(runs.values(), key=lambda run: run.last.stat().st_mtime)
    configs, rows = {name: read_config(run.config) for name, run in runs.items()}, {name: run.read_metrics() for name, run in runs.items()}
    named = {
        name: [
            (configs[name]["trainer"]["batch_size"] * row["step"] / 1000, row["bits_per_dim"])
            for row in of_one
            if row["split"] == "validation"
        ]
        for name, of_one in rows.items()
    }

    def samples(at: Path) -> None:
        grids = {}
        for name, run in runs.items():
            model = flowgen.load(run.folder, "auto")
            grids[f"{name}\n{rows[name][-1]['step']:,} steps"] = flowgen.pictures.to_image(draw(model, 12, 0.7, 0)[0], model.bits, 12)
        kinds.page_of(grids, at)

    label = f"validation bits/dim at {configs[next(iter(runs))]['data']['bits']} bits"
    curves = drawn(
        folder / "figure_O.1.png", newest, lambda at: kinds.lines(named, "thousands of training images seen", label, at, skip=0.03)
    )
    own = "The thesis only names these networks, but for those of its two experiments."
    command, folders = "flowgen sample --temperature 0.7 --count 12 --run RUN", [run.folder for run in runs.values()]
    caption = "Validation bits/dim of every network by the images seen; the first steps lie above the frame."
    ends = "Samples of each at temperature 0.7, at the end of their trainings, which differ."
    return [
        Figure("O.1", caption, curves, folders, MAKE, own),
        Figure("O.2", ends, drawn(folder / "figure_O.2.png", newest, samples), folders, command, own),
    ]
