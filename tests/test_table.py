"""The table of flows at equal cost: rows are trained for their CPU time and measured once."""

import json
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import table as script
import torch
import yaml
from PIL import Image


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script without models. Commands take one second and 0.1 seconds per training step.

    `table.commands` has the arguments of all commands. If `table.fails` is set, a training run that
    can be resumed fails after three seconds.
    """
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(script, "commands", commands, raising=False)
    monkeypatch.setattr(script, "fails", False, raising=False)

    def timed_flowgen(*args: str, on_failure: object = None) -> tuple[str, float]:
        commands.append(args)
        if args[0] != "train":
            metrics = {"bits_per_dim": 1.25, "bits_per_dim_error": 0.01, "likelihood": "bound"}
            return json.dumps({"run": "x", "split": "test", **metrics}), 2.0
        overrides = dict(arg.split("=", 1) for arg in args[1:])
        if script.fails and "resume" in overrides:
            on_failure(3.0)
            raise SystemExit("stopped")
        run = Path(overrides["output_dir"])
        steps = int(overrides["trainer.steps"])
        run.mkdir(parents=True)
        config = {"trainer": {"batch_size": 16}, "model": {}, "data": {}, "seed": 0}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        rows = [
            {"step": step, "split": "validation", "bits_per_dim": 2 - step / (2 * steps)}
            for step in (steps // 2, steps)
        ]
        rows.append({"step": steps, "split": "test"})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "", 1 + 0.1 * steps

    monkeypatch.setattr(script, "timed_flowgen", timed_flowgen)
    monkeypatch.setattr(script, "has_tighter_bound", lambda run: True)
    monkeypatch.setattr(script, "count_parameters", lambda run: 150_000)
    monkeypatch.setattr(script, "flops_per_image", lambda run: 2.5e7)
    monkeypatch.setattr(script, "time_samples", lambda run, temperature: 32.0)
    return script


def test_a_row_is_trained_for_its_minutes_and_measured_once(table):
    table.Row("mnist", "glow", 2.0, ["data.root=there"]).fill()
    row = table.Row("mnist", "glow", 2.0, ["data.root=there"])
    assert row.values["steps"] == 1200
    assert row.values["images_seen"] == 19200
    assert row.values["cpu_seconds"] == 121
    assert row.values["curve"] == [[9600, 1.75], [19200, 1.5]]
    assert row.line() == (
        "| mnist | `glow` | bound | <= 1.250 ± 0.010 | <= 1.250 ± 0.010 | 0.15 | 19,200 | 2.0 "
        "| 0.025 | 0.500 |  |  |"
    )
    assert row.line().count("|") == len(table.COLUMNS) + 1
    num_commands = len(table.commands)
    row.fill()
    assert len(table.commands) == num_commands == 8
    assert all("data.root=there" in args for args in table.commands[:5])


def test_the_quality_of_samples_is_measured_once(table):
    row = table.Row("mnist", "glow", 1.0, [], temperature=1.0, samples=500)
    row.fill()
    evaluations = [args for args in table.commands if args[0] == "evaluate"]
    assert [list(args[5:]) for args in evaluations] == [["samples=500", "temperature=1"], []]
    results = {"sample_frechet": 1.5, "training_frechet": 0.25, "sample_readable": 0.9}
    row.values["metrics_1"] |= results
    assert row.line().endswith("| 1.50 (0.25) | 90.0% |")


def test_a_figure_that_samples_do_not_change_is_evaluated_once(table, monkeypatch):
    monkeypatch.setattr(table, "has_tighter_bound", lambda run: False)
    row = table.Row("mnist", "pixelcnn", 1.0, [])
    row.fill()
    assert [args[0] for args in table.commands].count("evaluate") == 1
    assert row.values["metrics_16"] == row.values["metrics_1"]


@pytest.mark.parametrize(("run", "expected"), (("zoo/glow_mnist", True), ("zoo/rbm_mnist", False)))
def test_samples_of_the_noise_tighten_the_bound_of_a_flow_only(run, expected):
    assert script.has_tighter_bound(run) is expected


def test_a_model_without_a_likelihood_has_sample_quality_only(table):
    row = table.Row("mnist", "gan", 1.0, [], samples=500)
    row.fill()
    quality = {"sample_frechet": 1.5, "training_frechet": 0.25, "sample_readable": 0.9}
    row.values["metrics_1"] = {"frechet": 2.0, "likelihood": "none"} | quality
    row.values["metrics_16"] = {"frechet": 2.0, "likelihood": "none"}
    assert row.line().startswith("| mnist | `gan` | none |  |  | 0.15 |")
    assert row.line().endswith("| 1.50 (0.25) | 90.0% |")


def test_the_cpu_time_of_a_failed_training_is_counted(table):
    table.fails = True
    with pytest.raises(SystemExit):
        table.Row("mnist", "glow", 1.0, []).fill()
    table.fails = False
    row = table.Row("mnist", "glow", 1.0, [])
    row.fill()
    assert row.values["cpu_seconds"] == 3 + 61
    assert len(table.commands) == 4 + 1 + 1 + 3


@pytest.mark.parametrize(
    "other", ({"overrides": ["trainer.lr=1e-3"]}, {"temperature": 1.0}, {"samples": 500})
)
def test_a_row_with_other_options_is_not_changed(table, other):
    table.Row("mnist", "glow", 1.0, []).fill()
    with pytest.raises(SystemExit, match="another --folder"):
        table.Row("mnist", "glow", 1.0, **{"overrides": []} | other)


def test_the_cpu_time_of_interrupted_and_failed_commands_is_counted(monkeypatch):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def fail(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "")

    times = iter([10.0, 13.0, 20.0, 24.0])
    seconds = []
    monkeypatch.setattr(script, "children_cpu_seconds", lambda: next(times))
    monkeypatch.setattr(script, "run_flowgen", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.timed_flowgen("train", on_failure=seconds.append)
    monkeypatch.setattr(script, "run_flowgen", fail)
    with pytest.raises(SystemExit, match="status 1"):
        script.timed_flowgen("train", on_failure=seconds.append)
    assert seconds == [3.0, 4.0]


def test_a_curve_is_extrapolated_to_ten_times_the_compute(table, tmp_path):
    compute = np.array([1.0, 10.0, 100.0])
    ends, values = script.extrapolate(compute, np.array([4.0, 3.5, 2.8]))
    assert ends.tolist() == [100.0, 1000.0]
    assert values.tolist() == pytest.approx([2.8, 2.3])
    row = table.Row("mnist", "glow", 1.0, [])
    row.fill()
    table.plot_compute([row.values], tmp_path / "compute.png")
    assert Image.open(tmp_path / "compute.png").width > 100


class Attention(torch.nn.Module):
    """Self-attention over the rows of an image."""

    num_classes = None

    def __init__(self, num_tokens: int, width: int):
        super().__init__()
        self.image_shape = (1, num_tokens, width)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, labels: None) -> torch.Tensor:
        x = images * self.scale
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()


def test_flops_include_attention(monkeypatch):
    """The scores and sums of N tokens of width w take 4 N^2 w FLOPs, and twice that backward."""
    ratios = []
    for num_tokens in (4, 16):
        attention = Attention(num_tokens, width=8)
        monkeypatch.setattr(script.flowgen, "load", lambda run, device, model=attention: model)
        ratios.append(script.flops_per_image("") / (3 * 4 * num_tokens**2 * 8))
    assert ratios == [1.0, 1.0]
