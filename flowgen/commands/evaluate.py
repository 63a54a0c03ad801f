"""`flowgen evaluate`."""

from flowgen import api


def evaluate(*, run: str | None, overrides: list[str], device: str) -> api.EvalReport:
    """Evaluate a model on the whole test split; see `flowgen.evaluate`."""
    return api.evaluate(run, *overrides, device=device)
