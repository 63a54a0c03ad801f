"""What goes with a model that is passed on: what it is, how good, and what the terms of its images forbid."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from yaml import safe_dump

from flowgen.commands.sample import draw
from flowgen.config.loading import load_from_checkpoint
from flowgen.config.runs import FILE, PREFIX, check_name, find_checkpoint, upload
from flowgen.training.checkpoint import SUFFIX, export_safetensors, read_portable_metadata
from flowgen.training.run_dir import Run
from flowgen.utils import rendering
from flowgen.utils.errors import UserError, check_folder_of


class License(NamedTuple):
    """Of images, in a sentence, and the licence of a model of them that is passed on, as the Hub spells it; None where they forbid it."""

    said: str
    license: str | None


FACES = License(
    "CelebA's faces are for non-commercial research alone, and so is a model of them; do not use it to tell who somebody is.",
    None,
)
TERMS = {  # by the names that data sections give images
    "MNIST": License("MNIST (LeCun, Cortes, Burges) is under CC BY-SA 3.0.", "cc-by-sa-3.0"),
    "FashionMNIST": License("FashionMNIST (Zalando) is under the MIT licence.", "mit"),
    "KMNIST": License("KMNIST (ROIS-DS, CODH) is under CC BY-SA 4.0.", "cc-by-sa-4.0"),
    "MNISTSample": License(
        "The digits are MNIST's (LeCun, Cortes, Burges), under CC BY-SA 3.0.", "cc-by-sa-3.0"
    ),
    "Toy": License("The points were drawn by flowgen.", "mit"),
    "celeba": FACES,
    "celeba_hq": FACES,
    "celeb": FACES,
    "ffhq": License(
        "FFHQ (NVIDIA) is under CC BY-NC-SA 4.0, its photographs under terms of their own; do not tell who somebody is by it.",
        None,
    ),
}
FOLDERS = ("celeb", "ffhq")  # what is in the names of folders of faces for research


def dataset_name(data: dict[str, Any]) -> str:
    """What the images of a data section are called: those of a folder as faces for research where its path says so."""
    kind = str(data["_target_"]).rpartition(".")[2]
    named = str(
        (data.get("name") if kind == "MNIST" else next(iter(data.get("search_dirs") or []), None))
        or kind
    )
    where = str(data.get("root") or "").lower()
    return named if named in TERMS else next((word for word in FOLDERS if word in where), named)


def with_dataset_name(data: dict[str, Any]) -> dict[str, Any]:
    """The section with the name of its images where the path alone says it, which is not passed on: their terms go with it."""
    images, names = dataset_name(data), data.get("search_dirs") or []
    return (
        data | {"search_dirs": [images, *names]}
        if images in FOLDERS and images not in names
        else data
    )


def license_of_dataset(data: dict[str, Any]) -> License | None:
    """What is known of the terms of a data section's images."""
    return TERMS.get(dataset_name(data))


def license_id(data: dict[str, Any], given: str | None) -> str:
    """That of a model of the images that is passed on, as it is `given` where nothing is known of them.

    Raises FlowgenError where it is forbidden.
    """
    terms = license_of_dataset(data)
    if terms is None:
        if given is None:
            raise UserError(
                "nothing is known of the terms of these images: say by --licence under which they let you pass a model on"
            )
        return given
    if terms.license is None:
        raise UserError(
            f"this model is not for everybody: {terms.said} Keep it, or `flowgen export` it for yourself"
        )
    if given not in (None, terms.license):
        raise UserError(f"{terms.said} So --licence is {terms.license}: leave it out")
    return terms.license


def front_matter(about: dict[str, Any], license: str) -> str:
    """What the Hub reads of a card."""
    model = str(about["config"]["model"]["_target_"]).rpartition(".")[2]
    data = dataset_name(about["config"]["data"])
    tags = ["flowgen", "boltzmann-machine" if model == "RBM" else "normalizing-flow", model.lower()]
    facts = {
        "license": license,
        "library_name": "flowgen",
        "pipeline_tag": "unconditional-image-generation",
        "tags": tags,
    }
    datasets = {
        "MNIST": "ylecun/mnist",
        "MNISTSample": "ylecun/mnist",
        "FashionMNIST": "zalando-datasets/fashion_mnist",
    }
    known = {"datasets": [datasets[data]]} if data in datasets else {}
    return f"---\n{safe_dump(facts | known, sort_keys=False)}---\n"


def card(
    title: str, run: str, picture: str, about: dict[str, Any], parameters: int, terms: str
) -> str:
    """Of a model that commands find as `run`, as Markdown: what it is, how good, how to use it, what the terms of its images forbid."""
    config, figures = about["config"], about["metrics"]
    model = str(config["model"]["_target_"]).rpartition(".")[2]
    judged = json.dumps(figures, indent=1) if figures else "Not judged yet."
    some = f"{count:,} images of " if (count := figures.get("images")) else ""
    return f"""# {title}

A {model} of {dataset_name(config["data"])}, {config["data"].get("bits")} bits, {parameters:,} parameters, trained by flowgen
for {about["step"]:,} steps, in which it saw {about["images_seen"]:,} images.

![Samples]({picture})

```
flowgen sample --run {run}
flowgen evaluate --run {run} --json
```

## Figures

On {some}the test split:

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


SAMPLES, COLUMNS = 32, 8
UNKNOWN = "The model and its samples are under the terms of its images: ask whoever made them."


def export(*, name: str, path: Path, called: str | None = None) -> list[Path]:
    """Write the model of a run to `path`, a safetensors file, with a card and samples beside it. Raises FlowgenError.

    Nothing that is there already is replaced. By the card `--run` finds the model as it is `called`, by default as the file.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path} is no name of a model to pass on: let it end in {SUFFIX}")
    check_folder_of(path)
    files = [path, path.with_suffix(".md"), path.with_suffix(".png")]
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already: name another, or move it away")
    run, checkpoint = find_checkpoint(name)
    data = with_dataset_name(checkpoint["config"]["data"])
    checkpoint["config"] |= {"data": data}
    figures = checkpoint["metrics"] or _test_figures(run, checkpoint["step"])
    export_safetensors(checkpoint, figures, checkpoint.get("command") or "flowgen train", path)
    model = load_from_checkpoint(checkpoint)
    images, _ = draw(model, SAMPLES, checkpoint["config"]["trainer"]["sample_temperature"], seed=0)
    rendering.image_grid(images, model.bits, COLUMNS).save(files[2])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    terms = license_of_dataset(data)
    said = terms.said if terms else UNKNOWN
    files[1].write_text(
        card(
            called or path.stem,
            called or path.name,
            files[2].name,
            read_portable_metadata(path),
            parameters,
            said,
        )
    )
    return files


def _test_figures(run: Run, step: int) -> dict[str, Any]:
    """What the run's metrics say of the test split at this step."""
    rows = [row for row in run.read_metrics() if row["split"] == "test" and row["step"] == step]
    return {key: value for key, value in rows[-1].items() if key != "step"} if rows else {}


def push(*, name: str, repository: str, license_name: str | None, private: bool) -> list[str]:
    """Put a run's model on the Hub as OWNER/NAME, with its card and samples: where it lies, and how to use it.

    Raises FlowgenError where the terms of its images forbid to pass it on.
    """
    repository = check_name(repository.removeprefix(PREFIX))
    license_name = license_id(find_checkpoint(name)[1]["config"]["data"], license_name)
    with TemporaryDirectory() as folder:
        model, text, _ = export(name=name, path=Path(folder) / FILE, called=PREFIX + repository)
        text.with_name("README.md").write_text(
            front_matter(read_portable_metadata(model), license_name) + text.read_text()
        )
        text.unlink()
        address = upload(Path(folder), repository, private)
    return [address, f"flowgen sample --run {PREFIX}{repository}"]
