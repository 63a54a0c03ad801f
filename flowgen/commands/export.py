"""`flowgen export`: a trained model as files to pass on."""

from pathlib import Path
from typing import Any

from flowgen import pictures
from flowgen.commands.cards import card, terms_of, under_its_name
from flowgen.commands.sample import draw
from flowgen.config import model_of
from flowgen.errors import FlowgenError, check_folder_of
from flowgen.training.find import find_checkpoint
from flowgen.training.portable import SUFFIX, about_portable, write_portable
from flowgen.training.run import Run

SAMPLES, COLUMNS = 32, 8
UNKNOWN = "The model and its samples are under the terms of its images: ask whoever made them."


def export(*, name: str, path: Path, called: str | None = None) -> list[Path]:
    """Write the model of a run to `path`, a safetensors file, with a card and samples beside it. Raises FlowgenError.

    Nothing that is there already is replaced. By the card `--run` finds the model as it is `called`, by default as the file.
    """
    if path.suffix != SUFFIX:
        raise FlowgenError(f"{path} is no name of a model to pass on: let it end in {SUFFIX}")
    check_folder_of(path)
    files = [path, path.with_suffix(".md"), path.with_suffix(".png")]
    for file in files:
        if file.exists():
            raise FlowgenError(f"{file} is there already: name another, or move it away")
    run, checkpoint = find_checkpoint(name)
    data = under_its_name(checkpoint["config"]["data"])
    checkpoint["config"] |= {"data": data}
    figures = checkpoint["figures"] or _test_figures(run, checkpoint["step"])
    write_portable(checkpoint, figures, checkpoint.get("command") or "flowgen train", path)
    model = model_of(checkpoint)
    levels, _ = draw(model, SAMPLES, checkpoint["config"]["trainer"]["sample_temperature"], seed=0)
    pictures.to_image(levels, model.bits, COLUMNS).save(files[2])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    terms = terms_of(data)
    said = terms.said if terms else UNKNOWN
    files[1].write_text(card(called or path.stem, called or path.name, files[2].name, about_portable(path), parameters, said))
    return files


def _test_figures(run: Run, step: int) -> dict[str, Any]:
    """What the run's metrics say of the test split at this step."""
    rows = [row for row in run.read_metrics() if row["split"] == "test" and row["step"] == step]
    return {key: value for key, value in rows[-1].items() if key != "step"} if rows else {}
