"""`flowgen evaluate`."""

import logging
import math
from typing import Any

from flowgen.config import build, build_model_and_data, in_todays_words, model_of, override
from flowgen.progress import bar
from flowgen.training.find import find_checkpoint

BATCH = 64
log = logging.getLogger("flowgen")


def evaluate(*, name: str | None, overrides: list[str], device: str) -> dict[str, Any]:
    """The figures of the whole test split, as `flowgen evaluate --json` prints them. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name)
    config = in_todays_words(checkpoint["config"])
    words = [f"evaluation.{word}" if word.partition("=")[0] in config["evaluation"] else word for word in overrides]
    checkpoint["config"] = config = override(config, words)
    how = build("evaluation", config["evaluation"])
    _, data, _ = build_model_and_data(config)
    model = model_of(checkpoint, device)
    data.to(model.device)
    model.watch(bar)
    batches = bar(data.batches("test", BATCH), "images", -(-len(data.test) // BATCH))
    figures = model.evaluate(batches, data.batches("train", BATCH, len(data.test)), how)
    if not math.isfinite(figures[model.figure]):
        log.warning("%s is not finite: for some of these images the model gives no likelihood that float32 holds", model.figure)
    figures = {name: None if value != value or value in (math.inf, -math.inf) else value for name, value in figures.items()}
    binarise = {"binarise": config["data"]["binarise"]} if data.bits == 1 else {}
    found = {"step": checkpoint["step"], "split": "test", **binarise, **figures}
    if model.recall(found):
        run.keep_evaluation(checkpoint, found)
    return {"run": str(run.folder), **found}
