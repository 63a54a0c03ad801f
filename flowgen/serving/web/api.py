"""The JSON endpoints of the web page.

Each endpoint maps a JSON object to a JSON object. Images travel as data URLs. Every response with
images has the command line that makes the same images.
"""

import base64
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowgen.commands.runs import data_name
from flowgen.config.runs import default_temperature
from flowgen.serving.session import ModelSession
from flowgen.utils import rendering
from flowgen.utils.errors import UserError, check_choice, check_number, check_whole, user_error
from flowgen.utils.html import image_data_url

MAX_SEED = 2**53 - 1  # the largest integer that JavaScript represents exactly
MAX_SAMPLES = 64

Json = dict[str, Any]


def about(session: ModelSession, payload: Json) -> Json:
    """Describe the model."""
    model = session.model
    config = session.checkpoint["config"]
    return {
        "run": session.name,
        "model": type(model).__name__,
        "data": data_name(config["data"]),
        "step": session.checkpoint["step"],
        "shape": list(model.image_shape),
        "bits": model.bits,
        "num_classes": model.num_classes,
        "capabilities": session.capabilities,
        "samplers": session.samplers,
        "temperature": default_temperature(config, model.image_shape),
        "unit": session.unit,
        "bound_sign": session.bound_sign,
    }


def status(session: ModelSession, payload: Json) -> Json:
    """Describe the work in progress, and tell if scores have percentiles."""
    return {
        "status": session.lock.status,
        "percentiles": session.scorer is not None,
        "scorer_error": session.scorer_error,
    }


def cancel(session: ModelSession, payload: Json) -> Json:
    """Cancel the request with this request_id."""
    session.lock.cancel(str(payload.get("request_id")))
    return {}


def upload(session: ModelSession, payload: Json) -> Json:
    """Preprocess an image of the user like the training images."""
    image = session.read_upload(_file(payload, "image"))
    return {"image": _data_urls(image, session.model.bits)[0]}


def sample(session: ModelSession, payload: Json) -> Json:
    """Draw images."""
    given = {name for name, value in payload.items() if value is not None}
    options: dict[str, Any] = {
        "count": _integer(payload, "count", 1, MAX_SAMPLES),
        "temperature": _number(payload, "temperature"),
        "seed": _integer(payload, "seed", 0, MAX_SEED),
        "label": _integer(payload, "label", 0, 10**6) if "label" in given else None,
        "sampler": _sampler(session, payload) if "sampler" in given else None,
        "steps": _integer(payload, "steps", 1, 1000) if "steps" in given else None,
    }
    images = session.sample(**options)
    return {
        "seed": options["seed"],
        "images": _data_urls(images, session.model.bits),
        "command": session.command_line("sample", **options),
    }


def score(session: ModelSession, payload: Json) -> Json:
    """Return the likelihood of an image."""
    result = session.score(session.read_image(_file(payload, "image")))
    return {
        "value": result.value if math.isfinite(result.value) else None,  # JSON has no infinity
        "percentile": result.percentile,
        "p_value": result.p_value,
        "command": session.command_line("score", "a.png"),
    }


def interpolate(session: ModelSession, payload: Json) -> Json:
    """Interpolate between two images."""
    first = session.read_image(_file(payload, "first"))
    second = session.read_image(_file(payload, "second"))
    steps = _integer(payload, "steps", 2, 33)
    spherical = payload.get("spherical")
    check_choice((True, False), spherical=spherical)
    latent, pixels = session.interpolate(first, second, steps, bool(spherical))
    return {
        "latent": _data_urls(latent, session.model.bits),
        "pixels": _data_urls(pixels, session.model.bits),
        "command": session.command_line(
            "interpolate", "a.png", "b.png", steps=steps, spherical=spherical
        ),
    }


def attributes(session: ModelSession, payload: Json) -> Json:
    """Return the names of the attributes that `edit` can change."""
    return {"attributes": list(session.directions.names)}


def edit(session: ModelSession, payload: Json) -> Json:
    """Move an image along attributes."""
    image = session.read_image(_file(payload, "image"))
    requested = payload.get("amounts")
    if not isinstance(requested, dict) or not requested:
        raise UserError("amounts must be an object with a number for each attribute")
    amounts = {
        name: _number({"amount": value}, "amount", low=-100.0) for name, value in requested.items()
    }
    args = [
        word
        for name, amount in amounts.items()
        for word in ("--attribute", name, "--amount", str(amount))
    ]
    return {
        "image": _data_urls(session.edit(image, amounts), session.model.bits)[0],
        "command": session.command_line("edit", "a.png", *args),
    }


def complete(session: ModelSession, payload: Json) -> Json:
    """Draw the unknown pixels of an image."""
    image = session.read_image(_file(payload, "image"))
    known = session.read_mask(_file(payload, "mask"))
    options: dict[str, Any] = {
        "sampler": _sampler(session, payload),
        "steps": _integer(payload, "steps", 1, 2000),
        "seed": _integer(payload, "seed", 0, MAX_SEED),
    }
    images, metrics = session.inpaint(
        image,
        known,
        **options,
        request_id=str(payload["request_id"]) if "request_id" in payload else None,
    )
    mean, spread, *draws = _data_urls(images, 8)
    return {
        "mean": mean,
        "spread": spread,
        "draws": draws,
        "metrics": metrics,
        "command": session.command_line("complete", "a.png", known="mask.png", **options),
    }


def start_chains(session: ModelSession, payload: Json) -> Json:
    """Start Markov chains in white noise."""
    return {"chain_id": session.start_chains(**_chain_options(session, payload))}


def advance_chains(session: ModelSession, payload: Json) -> Json:
    """Return the next frame of chains.

    `frames` is the number of earlier frames. Only the command line depends on it.
    """
    steps = _integer(payload, "steps", 1, 100)
    frames = _integer(payload, "frames", 0, 10**6)
    images = session.advance_chains(str(payload.get("chain_id")), steps)
    options = _chain_options(session, payload)
    return {
        "images": _data_urls(images, 8),
        "command": session.command_line("chain", **options, steps=steps, frames=max(frames, 1)),
    }


def filters(session: ModelSession, payload: Json) -> Json:
    """Return the weights of hidden units as one image."""
    return {"image": image_data_url(rendering.to_png(session.filters()), "png")}


ENDPOINTS: dict[str, Callable[[ModelSession, Json], Json]] = {
    handler.__name__: handler
    for handler in (
        about,
        status,
        cancel,
        upload,
        sample,
        score,
        interpolate,
        attributes,
        edit,
        complete,
        start_chains,
        advance_chains,
        filters,
    )
}


def _data_urls(images: Tensor, bits: int) -> list[str]:
    """Encode each image as the data URL of a PNG, without loss."""
    return [image_data_url(rendering.encode_png(image, bits), "png") for image in images]


def _chain_options(session: ModelSession, payload: Json) -> dict[str, Any]:
    return {
        "sampler": _sampler(session, payload),
        "count": _integer(payload, "count", 1, MAX_SAMPLES),
        "seed": _integer(payload, "seed", 0, MAX_SEED),
    }


def _sampler(session: ModelSession, payload: Json) -> str:
    check_choice(session.samplers, sampler=payload.get("sampler"))
    return str(payload["sampler"])


def _integer(payload: Json, name: str, low: int, high: int) -> int:
    check_whole(low, high, **{name: payload.get(name)})
    return int(payload[name])


def _number(payload: Json, name: str, low: float = 0.0) -> float:
    check_number(low, **{name: payload.get(name)})
    with user_error(f"{name} is too large: choose a smaller number"):
        return float(payload[name])


def _file(payload: Json, name: str) -> bytes:
    """Decode a data URL of any media type."""
    with user_error(f"{name} must be an image as a data URL"):
        return base64.b64decode(payload[name].rpartition("base64,")[2], validate=True)
