"""`flowgen evaluate`."""

import logging
import math
from typing import Any, NamedTuple

from flowgen.config.compose import override
from flowgen.config.instantiate import build, build_data, check_fits_data
from flowgen.config.loading import load_from_checkpoint
from flowgen.config.runs import find_checkpoint
from flowgen.models.base import EvalConfig
from flowgen.training.sanity_checks import warn_implausible_likelihood, warn_test_leakage
from flowgen.utils.console import progress_bar
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import Metrics, finite

BATCH = 64
OF_LOG_Z = ("log_z", "log_z_error", "reliable", "verdict")
log = logging.getLogger("flowgen")


class EvalReport(NamedTuple):
    """What `flowgen evaluate` finds, and of what."""

    of: dict[str, Any]
    judgement: Metrics

    def row(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return self.of | finite(self.judgement.row())


def evaluate(*, name: str | None, overrides: list[str], device: str) -> EvalReport:
    """Measure a model on the whole test split. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name)
    trained = checkpoint["config"]
    config = override(
        trained,
        [
            f"evaluation.{word}" if word.partition("=")[0] in trained["evaluation"] else word
            for word in overrides
        ],
    )
    how = build("evaluation", config["evaluation"])
    if not isinstance(how, EvalConfig):
        raise UserError("evaluation._target_ is not flowgen.models.Evaluation: leave it as it is")
    data = build_data(config)
    model = load_from_checkpoint(checkpoint | {"config": config}, device)
    check_fits_data(model, data)
    warn_test_leakage(data)
    data.to(model.device)
    model.set_progress(progress_bar)
    batches = progress_bar(data.batches("test", BATCH), "images", -(-len(data.test) // BATCH))
    judgement = model.evaluate(batches, data.batches("train", BATCH, len(data.test)), how).on(
        "test"
    )
    name = model.metric.name
    if not math.isfinite(judgement[name].value):
        log.warning(
            "%s is not finite: for some of these images the model gives no likelihood that float32 holds",
            name,
        )
    warn_implausible_likelihood(judgement[name], data, data.batches("test", BATCH))
    binarization = {"binarization": config["data"]["binarization"]} if data.bits == 1 else {}
    found = EvalReport(
        {"run": str(run.folder), "step": checkpoint["step"], "split": "test", **binarization},
        judgement,
    )
    own = all(config[section] == trained[section] for section in ("model", "data"))
    if kept := merged(checkpoint["metrics"], found.row(), own):
        run.save_evaluation(checkpoint, kept)
    return found


def merged(kept: dict[str, Any], found: dict[str, Any], own: bool) -> dict[str, Any]:
    """What is kept of two evaluations of the same weights: figures of the run's `own` images alone, and the log Z of the smaller error."""
    surest = min((found, kept), key=_doubt)
    of_images = found if own and (surest is found or "images" not in kept) else kept
    return of_images | {key: surest[key] for key in OF_LOG_Z if key in surest}


def _doubt(figures: dict[str, Any]) -> float:
    error = figures.get("log_z_error")
    return error if error is not None and figures.get("reliable") else math.inf
