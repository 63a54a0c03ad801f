"""`flowgen evaluate`."""

import math
from typing import Any

from tqdm import tqdm

from flowgen.config import build_model_and_data, model_of, override
from flowgen.training.find import find_checkpoint

BATCH = 64


def evaluate(name: str | None, overrides: list[str], device: str) -> dict[str, Any]:
    """The figures of the whole test split, as `flowgen evaluate --json` prints them. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name)
    checkpoint["config"] = override(checkpoint["config"], overrides)
    _, data = build_model_and_data(checkpoint["config"])
    model = model_of(checkpoint, device)
    data.to(model.device)
    batches = tqdm(data.batches("test", BATCH), total=-(-len(data.test) // BATCH), unit="batch", disable=None, leave=False)
    figures = {name: value if math.isfinite(value) else None for name, value in model.evaluate(batches).items()}
    return {"run": str(run.folder), "step": checkpoint["step"], "split": "test", **figures}
