"""`flowgen evaluate`."""

import logging
import math
from typing import Any, NamedTuple

from flowgen.config import build, build_model_and_data, in_todays_words, model_of, override
from flowgen.errors import FlowgenError
from flowgen.measures import Judgement, finite
from flowgen.models import Evaluation
from flowgen.progress import bar
from flowgen.training.doubts import doubt_likelihood, doubt_split
from flowgen.training.find import find_checkpoint

BATCH = 64
log = logging.getLogger("flowgen")


class Evaluated(NamedTuple):
    """What `flowgen evaluate` finds, and of what."""

    of: dict[str, Any]
    judgement: Judgement

    def row(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return self.of | finite(self.judgement.row())


def evaluate(*, name: str | None, overrides: list[str], device: str) -> Evaluated:
    """Measure a model on the whole test split. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name)
    config = in_todays_words(checkpoint["config"])
    words = [f"evaluation.{word}" if word.partition("=")[0] in config["evaluation"] else word for word in overrides]
    checkpoint["config"] = config = override(config, words)
    how = build("evaluation", config["evaluation"])
    if not isinstance(how, Evaluation):
        raise FlowgenError("evaluation._target_ is not flowgen.models.Evaluation: leave it as it is")
    _, data, _ = build_model_and_data(config)
    model = model_of(checkpoint, device)
    doubt_split(data)
    data.to(model.device)
    model.watch(bar)
    batches = bar(data.batches("test", BATCH), "images", -(-len(data.test) // BATCH))
    judgement = model.evaluate(batches, data.batches("train", BATCH, len(data.test)), how).on("test")
    name = model.metric.name
    if not math.isfinite(judgement[name].value):
        log.warning("%s is not finite: for some of these images the model gives no likelihood that float32 holds", name)
    doubt_likelihood(judgement[name], data, data.batches("test", BATCH))
    binarise = {"binarise": config["data"]["binarise"]} if data.bits == 1 else {}
    found = Evaluated({"run": str(run.folder), "step": checkpoint["step"], "split": "test", **binarise}, judgement)
    if model.recall(judgement.row()):
        run.keep_evaluation(checkpoint, found.row())
    return found
