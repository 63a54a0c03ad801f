"""`flowgen export`: a trained model as files to pass on."""

import json
from pathlib import Path
from typing import Any

from yaml import safe_dump

from flowgen import pictures
from flowgen.commands.sample import draw
from flowgen.config import model_of
from flowgen.errors import FlowgenError
from flowgen.training.find import find_checkpoint
from flowgen.training.portable import SUFFIX, about_portable, write_portable
from flowgen.training.run import Run

SAMPLES, COLUMNS = 32, 8
FACES = "CelebA's faces are for non-commercial research alone, and so is a model of them; do not use it to tell who somebody is."
TERMS = {  # of the images, by the names that data sections give them
    "MNIST": "MNIST (LeCun, Cortes, Burges) is under CC BY-SA 3.0.",
    "FashionMNIST": "FashionMNIST (Zalando) is under the MIT licence.",
    "KMNIST": "KMNIST (ROIS-DS, CODH) is under CC BY-SA 4.0.",
    "celeba": FACES,
    "celeba_hq": FACES,
}


def export(*, name: str, path: Path) -> list[Path]:
    """Write the model of a run to `path`, a safetensors file, with a card and samples beside it. Raises FlowgenError.

    Nothing that is there already is replaced.
    """
    if path.suffix != SUFFIX:
        raise FlowgenError(f"{path} is no name of a model to pass on: let it end in {SUFFIX}")
    if not path.absolute().parent.is_dir():
        raise FlowgenError(f"the folder of {path} does not exist: make it, or name another")
    files = [path, path.with_suffix(".md"), path.with_suffix(".png")]
    for file in files:
        if file.exists():
            raise FlowgenError(f"{file} is there already: name another, or move it away")
    run, checkpoint = find_checkpoint(name)
    figures = checkpoint.get("figures") or _test_figures(run, checkpoint["step"])
    write_portable(checkpoint, figures, checkpoint.get("command") or "flowgen train", path)
    model = model_of(checkpoint)
    levels, _ = draw(model, SAMPLES, checkpoint["config"]["trainer"]["sample_temperature"], seed=0)
    pictures.to_image(levels, model.bits, COLUMNS).save(files[2])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    files[1].write_text(card(path.name, about_portable(path), parameters))
    return files


def card(file: str, about: dict[str, Any], parameters: int) -> str:
    """What to know of the model in `file`, as Markdown: what it is, how good, how to use it, what the images' terms forbid."""
    config, figures = about["config"], about["figures"]
    model, data = (str(config[section]["_target_"]).rpartition(".")[2] for section in ("model", "data"))
    images = str(config["data"].get("name") or next(iter(config["data"].get("names") or [data])))
    terms = TERMS.get(images, "The model and its samples are under the terms of its images: ask whoever made them.")
    judged = json.dumps(figures, indent=1) if figures else "Not judged yet."
    return f"""# {Path(file).stem}

A {model} of {images}, {config["data"].get("bits")} bits, {parameters:,} parameters, trained by flowgen
for {about["step"]:,} steps, in which it saw {about["images_seen"]:,} images.

![Samples]({Path(file).stem}.png)

```
flowgen sample --run {file}
flowgen evaluate --run {file} --json
```

## Figures

On the test split, as the second command prints them:

```
{judged}
```

## Terms

{terms}

## Configuration

`{about["command"]}`, with

```yaml
{safe_dump(config, sort_keys=False).strip()}
```
"""


def _test_figures(run: Run, step: int) -> dict[str, Any]:
    """What the run's metrics say of the test split at this step."""
    rows = [row for row in run.read_metrics() if row["split"] == "test" and row["step"] == step]
    return {key: value for key, value in rows[-1].items() if key != "step"} if rows else {}
