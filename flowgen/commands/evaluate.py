"""`flowgen evaluate`."""

from typing import Any

from tqdm import tqdm

from flowgen.config import build_data, model_of, override
from flowgen.training.find import find_checkpoint

BATCH = 64


def evaluate(name: str | None, overrides: list[str], device: str) -> dict[str, Any]:
    """The figures of the whole test split, as `flowgen evaluate --json` prints them. Raises FlowgenError."""
    run, checkpoint = find_checkpoint(name)
    checkpoint["config"] = override(checkpoint["config"], overrides)
    model = model_of(checkpoint, device)
    data = build_data(checkpoint["config"]).to(model.device)
    batches = tqdm(data.batches("test", BATCH), total=-(-len(data.test) // BATCH), unit="batch", disable=None, leave=False)
    return {"run": str(run.folder), "step": checkpoint["step"], "split": "test", **model.evaluate(batches)}
