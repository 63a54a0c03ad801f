"""What the page can ask, each a JSON object to another; every answer with pictures has the command line that makes the same ones."""

import base64
import binascii
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowgen.serving.session import ModelSession
from flowgen.utils import rendering
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole
from flowgen.utils.html import image_data_url

MOST_SEED = 2**53 - 1  # that a browser's numbers hold exactly
PREFIX = "data:image/png;base64,"
Payload = dict[str, Any]


def about(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    model, config = answers.model, answers.checkpoint["config"]
    return {
        "run": answers.name,
        "model": type(model).__name__,
        "data": config["data"].get("name")
        or str(config["data"].get("_target_")).rpartition(".")[2],
        "step": answers.checkpoint["step"],
        "shape": list(model.image_shape),
        "bits": model.bits,
        "classes": model.num_classes,
        "able_to": answers.capabilities,
        "methods": answers.methods,
        "temperature": config["trainer"]["sample_temperature"],
        "unit": answers.unit,
        "percentiles": answers.judge is not None,
    }


def doing(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    return {
        "doing": answers.turns.doing,
        "percentiles": answers.judge is not None,
        "no_percentiles": answers.no_judge,
    }


def stop(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    answers.turns.stop(str(payload.get("question")))
    return {}


def read(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    return {"picture": _shown(answers, answers.read(_file(payload, "image")))[0]}


def sample(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    count, seed = _whole(payload, "count", 1, 64), _whole(payload, "seed", 0, MOST_SEED)
    label = None if payload.get("label") is None else _whole(payload, "label", 0, 10**6)
    temperature = _number(payload, "temperature")
    method = None if payload.get("method") is None else _method(answers, payload)
    sweeps = None if payload.get("sweeps") is None else _whole(payload, "sweeps", 1, 1000)
    how: dict[str, Any] = {
        "count": count,
        "temperature": temperature,
        "seed": seed,
        "label": label,
        "method": method,
        "sweeps": sweeps,
    }
    images = answers.sample(**how)
    return {
        "seed": seed,
        "pictures": _shown(answers, images),
        "command": answers.command("sample", **how),
    }


def score(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    value, percentile, p = answers.figures(answers.exactly(_file(payload, "image")))
    shown = value if math.isfinite(value) else None  # JSON has no other numbers
    return {
        "value": shown,
        "percentile": percentile,
        "p": p,
        "command": answers.command("score", "a.png"),
    }


def walk(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    first, second = (answers.exactly(_file(payload, name)) for name in ("first", "second"))
    steps, spherical = _whole(payload, "steps", 2, 33), _flag(payload, "spherical")
    latent, pixels = answers.walk(first, second, steps, spherical)
    command = answers.command("interpolate", "a.png", "b.png", steps=steps, spherical=spherical)
    return {
        "latent": _shown(answers, latent),
        "pixels": _shown(answers, pixels),
        "command": command,
    }


def attributes(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    return {"attributes": list(answers.attributes())}


def edit(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    image, amounts = answers.exactly(_file(payload, "image")), payload.get("amounts")
    if not isinstance(amounts, dict) or not amounts:
        raise UserError("amounts must name attributes, each with a number")
    by = {
        name: _number({"amount": amount}, "amount", low=-100.0) for name, amount in amounts.items()
    }
    words = [
        word for name, amount in by.items() for word in ("--attribute", name, "--by", str(amount))
    ]
    return {
        "picture": _shown(answers, answers.edit(image, by))[0],
        "command": answers.command("edit", "a.png", *words),
    }


def complete(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    images, known = answers.exactly(_file(payload, "image")), answers.mask(_file(payload, "mask"))
    how: dict[str, Any] = {
        "method": _method(answers, payload),
        "sweeps": _whole(payload, "sweeps", 1, 2000),
        "seed": _whole(payload, "seed", 0, MOST_SEED),
    }
    question = str(payload["question"]) if "question" in payload else None
    shown, figures = answers.inpaint(images, known, **how, question=question)
    mean, spread, *draws = [
        image_data_url(rendering.encode_png(image, 8), "png") for image in shown
    ]
    command = answers.command("complete", "a.png", keep="mask.png", **how)
    return {"mean": mean, "spread": spread, "draws": draws, "figures": figures, "command": command}


def start_chains(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    return {"chains": answers.start_chains(**_chains(answers, payload))}


def advance(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    """The next frame; `frames` are those before it, which the command counts."""
    sweeps, frames = _whole(payload, "sweeps", 1, 100), _whole(payload, "frames", 0, 10**6)
    frame = answers.advance(str(payload.get("chains")), sweeps)
    command = answers.command(
        "chain", **_chains(answers, payload), sweeps=sweeps, frames=max(frames, 1)
    )
    return {
        "pictures": [image_data_url(rendering.encode_png(image, 8), "png") for image in frame],
        "command": command,
    }


def filters(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    return {"picture": image_data_url(rendering.to_png(answers.filters()), "png")}


HANDLERS = (
    about,
    doing,
    stop,
    read,
    sample,
    score,
    walk,
    attributes,
    edit,
    complete,
    start_chains,
    advance,
    filters,
)
ENDPOINTS: dict[str, Callable[[ModelSession, Payload], dict[str, Any]]] = {
    way.__name__: way for way in HANDLERS
}


def _shown(answers: ModelSession, images: Tensor) -> list[str]:
    """Each image as the address of a PNG that holds its levels exactly."""
    return [
        image_data_url(rendering.encode_png(image, answers.model.bits), "png") for image in images
    ]


def _chains(answers: ModelSession, payload: Payload) -> dict[str, Any]:
    return {
        "method": _method(answers, payload),
        "count": _whole(payload, "count", 1, 64),
        "seed": _whole(payload, "seed", 0, MOST_SEED),
    }


def _method(answers: ModelSession, payload: Payload) -> str:
    check_choice(answers.methods, method=payload.get("method"))
    return str(payload["method"])


def _whole(payload: Payload, name: str, low: int, high: int) -> int:
    check_whole(low, high, **{name: payload.get(name)})
    return int(payload[name])


def _number(payload: Payload, name: str, low: float = 0.0) -> float:
    try:
        check_number(low, **{name: payload.get(name)})
    except OverflowError as error:
        raise UserError(f"{name} is larger than any number: give a smaller one") from error
    return float(payload[name])


def _flag(payload: Payload, name: str) -> bool:
    check_choice((True, False), **{name: payload.get(name)})
    return bool(payload[name])


def _file(payload: Payload, name: str) -> bytes:
    """The bytes of an image, which comes as a data URL of whatever kind."""
    value = payload.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name} must be an image, as a data URL")
    try:
        return base64.b64decode(value.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} must be an image, as a data URL") from error
