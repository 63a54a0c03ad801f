"""The table of flows at equal cost: that each row costs what it may, is taken up where it was stopped, and is measured once."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml


@pytest.fixture
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "table.py"
    spec = importlib.util.spec_from_file_location("table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with commands that spend a second of start and a tenth a step, and no model; `table.words` are what it called."""
    script.words, script.stopped = [], False

    def called(*words: str, last: object = None) -> tuple[str, float]:
        script.words.append(words)
        if words[0] == "train":
            settings = dict(word.split("=", 1) for word in words[1:])
            if script.stopped and "resume" in settings:
                last(3.0)
                raise SystemExit("stopped")
            run, steps = Path(settings["out"]), int(settings["trainer.steps"])
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(
                yaml.safe_dump({"trainer": {"batch_size": 16}, "model": {}, "data": {}, "seed": 0})
            )
            (run / "metrics.jsonl").write_text(json.dumps({"step": steps, "split": "test"}) + "\n")
            return "", 1 + 0.1 * steps
        return json.dumps(
            {"run": "x", "split": "test", "bits_per_dim": 1.25, "bits_per_dim_error": 0.01}
        ), 2.0

    monkeypatch.setattr(script, "called", called)
    monkeypatch.setattr(script, "parameters", lambda name: 150_000)
    monkeypatch.setattr(script, "flops", lambda name: 2.5e7)
    return script


def test_a_row_is_trained_for_its_minutes_and_measured_once(table):
    table.Row("mnist", "glow", 2.0, ["data.root=there"]).fill()
    row = table.Row("mnist", "glow", 2.0, ["data.root=there"])
    assert (
        row.found["steps"] == 1200
        and row.found["images_seen"] == 19200
        and row.found["cpu_seconds"] == 121
    )
    assert (
        row.line()
        == "| mnist | `glow` | 1.250 ± 0.010 | 1.250 ± 0.010 | 0.15 | 19,200 | 2.0 | 0.025 |"
    )
    assert row.line().count("|") == table.HEAD.count("|")
    count = len(table.words)
    row.fill()
    assert len(table.words) == count == 6 and all(
        "data.root=there" in words for words in table.words[:3]
    )


def test_what_a_stopped_training_has_cost_is_counted(table):
    table.stopped = True
    with pytest.raises(SystemExit):
        table.Row("mnist", "glow", 1.0, []).fill()
    table.stopped = False
    row = table.Row("mnist", "glow", 1.0, [])
    row.fill()
    assert row.found["cpu_seconds"] == 3 + 61 and len(table.words) == 2 + 1 + 1 + 3


def test_a_row_of_other_words_is_left_alone(table):
    table.Row("mnist", "glow", 1.0, []).fill()
    with pytest.raises(SystemExit, match="move it away"):
        table.Row("mnist", "glow", 1.0, ["trainer.lr=1e-3"])


def test_what_is_interrupted_is_counted_too(script, monkeypatch):
    def interrupted(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    spent, told = iter([10.0, 13.0]), []
    monkeypatch.setattr(script, "spent", lambda: next(spent))
    monkeypatch.setattr(script.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.called("train", last=told.append)
    assert told == [3.0]


class Attention(torch.nn.Module):
    """Of images whose rows are tokens."""

    classes = None

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.shape, self.scale = (1, tokens, width), torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, labels: None) -> torch.Tensor:
        x = images * self.scale
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()


def test_attention_is_among_the_flops(script, monkeypatch):
    """Of one layer, one head and N tokens of width w, the scores and their sums take 4 N^2 w forwards, and twice that back."""
    counts = []
    for tokens in (4, 16):
        attention = Attention(tokens, width=8)
        monkeypatch.setattr(script.flowgen, "load", lambda name, attention=attention: attention)
        counts.append(script.flops("") / (3 * 4 * tokens**2 * 8))
    assert counts == [1.0, 1.0]
