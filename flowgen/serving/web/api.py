"""What the page can ask, each a JSON object to another; every answer with pictures has the command line that makes the same ones."""

import base64
import binascii
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowgen.serving.session import Answers
from flowgen.utils import rendering
from flowgen.utils.errors import FlowgenError, check_choice, check_number, check_whole
from flowgen.utils.html import encoded

MOST_SEED = 2**53 - 1  # that a browser's numbers hold exactly
PREFIX = "data:image/png;base64,"
Asked = dict[str, Any]


def about(answers: Answers, asked: Asked) -> dict[str, Any]:
    model, config = answers.model, answers.checkpoint["config"]
    return {
        "run": answers.name,
        "model": type(model).__name__,
        "data": config["data"].get("name") or str(config["data"].get("_target_")).rpartition(".")[2],
        "step": answers.checkpoint["step"],
        "shape": list(model.shape),
        "bits": model.bits,
        "classes": model.classes,
        "able_to": answers.able_to,
        "methods": answers.methods,
        "temperature": config["trainer"]["sample_temperature"],
        "unit": answers.unit,
        "percentiles": answers.judge is not None,
    }


def doing(answers: Answers, asked: Asked) -> dict[str, Any]:
    return {"doing": answers.turns.doing, "percentiles": answers.judge is not None, "no_percentiles": answers.no_judge}


def stop(answers: Answers, asked: Asked) -> dict[str, Any]:
    answers.turns.stop(str(asked.get("question")))
    return {}


def read(answers: Answers, asked: Asked) -> dict[str, Any]:
    return {"picture": _shown(answers, answers.read(_file(asked, "image")))[0]}


def sample(answers: Answers, asked: Asked) -> dict[str, Any]:
    count, seed = _whole(asked, "count", 1, 64), _whole(asked, "seed", 0, MOST_SEED)
    label = None if asked.get("label") is None else _whole(asked, "label", 0, 10**6)
    temperature = _number(asked, "temperature")
    method = None if asked.get("method") is None else _method(answers, asked)
    sweeps = None if asked.get("sweeps") is None else _whole(asked, "sweeps", 1, 1000)
    how: dict[str, Any] = {"count": count, "temperature": temperature, "seed": seed, "label": label, "method": method, "sweeps": sweeps}
    levels = answers.sample(**how)
    return {"seed": seed, "pictures": _shown(answers, levels), "command": answers.command("sample", **how)}


def score(answers: Answers, asked: Asked) -> dict[str, Any]:
    value, percentile, p = answers.figures(answers.exactly(_file(asked, "image")))
    shown = value if math.isfinite(value) else None  # JSON has no other numbers
    return {"value": shown, "percentile": percentile, "p": p, "command": answers.command("score", "a.png")}


def walk(answers: Answers, asked: Asked) -> dict[str, Any]:
    first, second = (answers.exactly(_file(asked, name)) for name in ("first", "second"))
    steps, spherical = _whole(asked, "steps", 2, 33), _flag(asked, "spherical")
    latent, pixels = answers.walk(first, second, steps, spherical)
    command = answers.command("interpolate", "a.png", "b.png", steps=steps, spherical=spherical)
    return {"latent": _shown(answers, latent), "pixels": _shown(answers, pixels), "command": command}


def attributes(answers: Answers, asked: Asked) -> dict[str, Any]:
    return {"attributes": list(answers.attributes())}


def edit(answers: Answers, asked: Asked) -> dict[str, Any]:
    image, amounts = answers.exactly(_file(asked, "image")), asked.get("amounts")
    if not isinstance(amounts, dict) or not amounts:
        raise FlowgenError("amounts must name attributes, each with a number")
    by = {name: _number({"amount": amount}, "amount", low=-100.0) for name, amount in amounts.items()}
    words = [word for name, amount in by.items() for word in ("--attribute", name, "--by", str(amount))]
    return {"picture": _shown(answers, answers.edit(image, by))[0], "command": answers.command("edit", "a.png", *words)}


def complete(answers: Answers, asked: Asked) -> dict[str, Any]:
    levels, known = answers.exactly(_file(asked, "image")), answers.mask(_file(asked, "mask"))
    how: dict[str, Any] = {
        "method": _method(answers, asked),
        "sweeps": _whole(asked, "sweeps", 1, 2000),
        "seed": _whole(asked, "seed", 0, MOST_SEED),
    }
    question = str(asked["question"]) if "question" in asked else None
    shown, figures = answers.complete(levels, known, **how, question=question)
    mean, spread, *draws = [encoded(rendering.png(image, 8), "png") for image in shown]
    command = answers.command("complete", "a.png", keep="mask.png", **how)
    return {"mean": mean, "spread": spread, "draws": draws, "figures": figures, "command": command}


def start_chains(answers: Answers, asked: Asked) -> dict[str, Any]:
    return {"chains": answers.start_chains(**_chains(answers, asked))}


def advance(answers: Answers, asked: Asked) -> dict[str, Any]:
    """The next frame; `frames` are those before it, which the command counts."""
    sweeps, frames = _whole(asked, "sweeps", 1, 100), _whole(asked, "frames", 0, 10**6)
    frame = answers.advance(str(asked.get("chains")), sweeps)
    command = answers.command("chain", **_chains(answers, asked), sweeps=sweeps, frames=max(frames, 1))
    return {"pictures": [encoded(rendering.png(image, 8), "png") for image in frame], "command": command}


def filters(answers: Answers, asked: Asked) -> dict[str, Any]:
    return {"picture": encoded(rendering.file_of(answers.filters()), "png")}


WAYS = (about, doing, stop, read, sample, score, walk, attributes, edit, complete, start_chains, advance, filters)
QUESTIONS: dict[str, Callable[[Answers, Asked], dict[str, Any]]] = {way.__name__: way for way in WAYS}


def _shown(answers: Answers, levels: Tensor) -> list[str]:
    """Each image as the address of a PNG that holds its levels exactly."""
    return [encoded(rendering.png(image, answers.model.bits), "png") for image in levels]


def _chains(answers: Answers, asked: Asked) -> dict[str, Any]:
    return {"method": _method(answers, asked), "count": _whole(asked, "count", 1, 64), "seed": _whole(asked, "seed", 0, MOST_SEED)}


def _method(answers: Answers, asked: Asked) -> str:
    check_choice(answers.methods, method=asked.get("method"))
    return str(asked["method"])


def _whole(asked: Asked, name: str, low: int, high: int) -> int:
    check_whole(low, high, **{name: asked.get(name)})
    return int(asked[name])


def _number(asked: Asked, name: str, low: float = 0.0) -> float:
    try:
        check_number(low, **{name: asked.get(name)})
    except OverflowError as error:
        raise FlowgenError(f"{name} is larger than any number: give a smaller one") from error
    return float(asked[name])


def _flag(asked: Asked, name: str) -> bool:
    check_choice((True, False), **{name: asked.get(name)})
    return bool(asked[name])


def _file(asked: Asked, name: str) -> bytes:
    """The bytes of an image, which comes as a data URL of whatever kind."""
    value = asked.get(name)
    if not isinstance(value, str):
        raise FlowgenError(f"{name} must be an image, as a data URL")
    try:
        return base64.b64decode(value.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise FlowgenError(f"{name} must be an image, as a data URL") from error
