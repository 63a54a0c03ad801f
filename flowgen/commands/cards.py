"""What goes with a model that is passed on: what it is, how good, and what the terms of its images forbid."""

import json
from typing import Any, NamedTuple

from yaml import safe_dump

from flowgen.errors import FlowgenError


class Terms(NamedTuple):
    """Of images, in a sentence, and the licence of a model of them that is passed on, as the Hub spells it; None where they forbid it."""

    said: str
    licence: str | None


FACES = Terms(
    "CelebA's faces are for non-commercial research alone, and so is a model of them; do not use it to tell who somebody is.", None
)
TERMS = {  # by the names that data sections give images
    "MNIST": Terms("MNIST (LeCun, Cortes, Burges) is under CC BY-SA 3.0.", "cc-by-sa-3.0"),
    "FashionMNIST": Terms("FashionMNIST (Zalando) is under the MIT licence.", "mit"),
    "KMNIST": Terms("KMNIST (ROIS-DS, CODH) is under CC BY-SA 4.0.", "cc-by-sa-4.0"),
    "MNISTSample": Terms("The digits are MNIST's (LeCun, Cortes, Burges), under CC BY-SA 3.0.", "cc-by-sa-3.0"),
    "Toy": Terms("The points were drawn by flowgen.", "mit"),
    "celeba": FACES,
    "celeba_hq": FACES,
    "celeb": FACES,
    "ffhq": Terms(
        "FFHQ (NVIDIA) is under CC BY-NC-SA 4.0, its photographs under terms of their own; do not tell who somebody is by it.", None
    ),
}
FOLDERS = ("celeb", "ffhq")  # what is in the names of folders of faces for research


def images_of(data: dict[str, Any]) -> str:
    """What the images of a data section are called: those of a folder as faces for research where its path says so."""
    kind = str(data["_target_"]).rpartition(".")[2]
    named = str((data.get("name") if kind == "MNIST" else next(iter(data.get("names") or []), None)) or kind)
    where = str(data.get("root") or "").lower()
    return named if named in TERMS else next((word for word in FOLDERS if word in where), named)


def under_its_name(data: dict[str, Any]) -> dict[str, Any]:
    """The section with the name of its images where the path alone says it, which is not passed on: their terms go with it."""
    images, names = images_of(data), data.get("names") or []
    return data | {"names": [images, *names]} if images in FOLDERS and images not in names else data


def terms_of(data: dict[str, Any]) -> Terms | None:
    """What is known of the terms of a data section's images."""
    return TERMS.get(images_of(data))


def licence_of(data: dict[str, Any], given: str | None) -> str:
    """That of a model of the images that is passed on, as it is `given` where nothing is known of them.

    Raises FlowgenError where it is forbidden.
    """
    terms = terms_of(data)
    if terms is None:
        if given is None:
            raise FlowgenError("nothing is known of the terms of these images: say by --licence under which they let you pass a model on")
        return given
    if terms.licence is None:
        raise FlowgenError(f"this model is not for everybody: {terms.said} Keep it, or `flowgen export` it for yourself")
    if given not in (None, terms.licence):
        raise FlowgenError(f"{terms.said} So --licence is {terms.licence}: leave it out")
    return terms.licence


def front_matter(about: dict[str, Any], licence: str) -> str:
    """What the Hub reads of a card."""
    model = str(about["config"]["model"]["_target_"]).rpartition(".")[2]
    data = images_of(about["config"]["data"])
    tags = ["flowgen", "boltzmann-machine" if model == "RBM" else "normalizing-flow", model.lower()]
    facts = {"license": licence, "library_name": "flowgen", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    datasets = {"MNIST": "ylecun/mnist", "MNISTSample": "ylecun/mnist", "FashionMNIST": "zalando-datasets/fashion_mnist"}
    known = {"datasets": [datasets[data]]} if data in datasets else {}
    return f"---\n{safe_dump(facts | known, sort_keys=False)}---\n"


def card(title: str, run: str, picture: str, about: dict[str, Any], parameters: int, terms: str) -> str:
    """Of a model that commands find as `run`, as Markdown: what it is, how good, how to use it, what the terms of its images forbid."""
    config, figures = about["config"], about["figures"]
    model = str(config["model"]["_target_"]).rpartition(".")[2]
    judged = json.dumps(figures, indent=1) if figures else "Not judged yet."
    some = f"{count:,} images of " if (count := figures.get("images")) else ""
    return f"""# {title}

A {model} of {images_of(config["data"])}, {config["data"].get("bits")} bits, {parameters:,} parameters, trained by flowgen
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
