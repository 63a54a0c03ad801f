"""Exported models and the zoo: written, read, used like runs, and refused if they are invalid."""

import json
import math
import subprocess
import sys

import pytest
import torch
from enumeration import small_rbm
from safetensors.torch import save_file
from test_cli import assert_error
from torch import nn

import flowgen
from flowgen.config.runs import find_checkpoint
from flowgen.models.flows.glow import Glow
from flowgen.training.checkpoint import (
    EXPORT_SUFFIX,
    ZOO,
    export_safetensors,
    read_safetensors,
    zoo,
)
from flowgen.utils.errors import UserError

MODELS = zoo()


def assert_same_weights(first, second):
    weights = second.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())


@pytest.fixture
def exported(tiny_run, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint = find_checkpoint(str(tiny_run))[1]
    checkpoint["config"]["init_from"] = str(tiny_run)
    metrics = {"bits_per_dim": 5.0, "run": str(tiny_run)}
    export_safetensors(checkpoint, metrics, "flowgen train", path)
    return path


def test_an_exported_model_has_the_averaged_weights(tiny_run, exported):
    model = flowgen.load(exported)
    assert_same_weights(flowgen.load(tiny_run), model)
    assert not model.training


def test_half_precision_is_for_the_weights_of_layers_only(command, images, tmp_path):
    size = ["data.size=8", "model.num_layers=[1]", "model.width=8", "trainer.init_images=16"]
    overrides = ["model=tarflow", "data=folder", *size, f"data.root={images}", "trainer.steps=1"]
    assert command("train", *overrides, f"output_dir={tmp_path / 'run'}")[0] == 0
    checkpoint = find_checkpoint(str(tmp_path / "run"))[1]
    full = tmp_path / "full.safetensors"
    half = tmp_path / "half.safetensors"
    export_safetensors(checkpoint, {}, "flowgen train", full)
    export_safetensors(checkpoint, {}, "flowgen train", half, half=True)
    weights = read_safetensors(full)["model"]
    half_weights = read_safetensors(half)["model"]
    layers = [
        name for name, layer in flowgen.load(full).named_modules() if isinstance(layer, nn.Linear)
    ]
    assert layers
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        expected = value.half() if layer in layers and kind == "weight" else value
        assert torch.equal(expected, half_weights[name])
        assert expected.dtype == half_weights[name].dtype
    assert half.stat().st_size < full.stat().st_size


def test_an_exported_model_contains_no_path_of_this_machine(tiny_run, exported, images):
    content = exported.read_bytes()
    assert str(images).encode() not in content
    assert str(tiny_run).encode() not in content


def test_commands_use_an_exported_model_like_a_run(tiny_run, exported, command, tmp_path):
    for run, name in ((tiny_run, "run.png"), (exported, "exported.png")):
        sample = ["sample", "--run", run, "--count", 4, "--out", tmp_path / name]
        status, _, error = command(*sample)
        assert status == 0, error
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "exported.png").read_bytes()


def test_other_files_are_refused_in_one_line(exported, command, tmp_path):
    truncated = tmp_path / f"truncated{EXPORT_SUFFIX}"
    truncated.write_bytes(exported.read_bytes()[:-100])
    foreign = tmp_path / f"foreign{EXPORT_SUFFIX}"
    save_file({"weight": torch.zeros(2)}, foreign)
    incomplete = tmp_path / f"incomplete{EXPORT_SUFFIX}"
    metadata = {"flowgen": json.dumps({"config": {}, "step": "many"})}
    save_file({"weight": torch.zeros(2)}, incomplete, metadata=metadata)
    for path in (truncated, foreign, incomplete):
        status, _, error = command("sample", "--run", path)
        assert status == 1
        assert "model of flowgen" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda metadata: metadata["config"].pop("trainer"),
        lambda metadata: metadata["config"]["trainer"].update(sample_temperature="hot"),
        lambda metadata: metadata["config"].update(seed="0"),
        lambda metadata: metadata["config"].update(evaluation=3),
        lambda metadata: metadata["config"]["data"].update({"_target_": []}),
        lambda metadata: metadata["config"]["model"].update({"_target_": [1]}),
        lambda metadata: metadata.update(metrics={"bits_per_dim": "low"}),
        lambda metadata: metadata.update(metrics={"log_z": [1]}),
        lambda metadata: metadata.update(images_seen=-1),
        lambda metadata: metadata.pop("format"),
        lambda metadata: metadata.update(format=99),
        lambda metadata: metadata.update(command="flowgen train \ud800"),
    ],
)
def test_an_exported_model_is_validated_like_a_checkpoint(exported, command, tmp_path, corrupt):
    metadata = read_safetensors(exported, with_weights=False)
    corrupt(metadata)
    path = tmp_path / f"corrupt{EXPORT_SUFFIX}"
    weights = read_safetensors(exported)["model"]
    save_file(weights, path, metadata={"flowgen": json.dumps(metadata)})
    sample = ["sample", "--run", path, "--count", 1]
    export = ["export", path, tmp_path / f"x{EXPORT_SUFFIX}"]
    for arguments in (sample, export):
        status, _, error = command(*arguments)
        assert status == 1
        assert str(path) in error
        assert len(error.splitlines()) == 1
        assert "bug in flowgen" not in error


def test_an_older_format_is_refused(exported):
    metadata = read_safetensors(exported, with_weights=False)
    del metadata["format"]
    weights = read_safetensors(exported)["model"]
    save_file(weights, exported, metadata={"flowgen": json.dumps(metadata)})
    with pytest.raises(UserError, match=r"version of flowgen before 0.2.0"):
        read_safetensors(exported)


def test_a_verdict_without_log_z_is_ignored(exported):
    metadata = read_safetensors(exported, with_weights=False) | {"metrics": {"reliable": True}}
    weights = read_safetensors(exported)["model"]
    save_file(weights, exported, metadata={"flowgen": json.dumps(metadata)})
    rbm = small_rbm(6, 4)
    rbm.load_eval_results(read_safetensors(exported)["metrics"])
    assert rbm.log_z is None
    assert isinstance(flowgen.load(exported), Glow)


def test_a_name_that_is_not_in_the_zoo_is_an_error(command):
    status, _, error = command("sample", "--run", "zoo/nothing")
    assert status == 1
    assert "not in the zoo" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_zoo_model_is_small_and_can_be_sampled(name, command, elsewhere):
    assert (ZOO.parent / f"{name}{EXPORT_SUFFIX}").stat().st_size < 2_000_000
    status, output, error = command("sample", "--run", name, "--count", 2)
    assert status == 0, error
    assert output.strip() == f"outputs/{name}/sample.png"
    assert (elsewhere / "outputs" / name / "sample.png").exists()


def test_runs_lists_the_zoo_without_importing_torch(elsewhere):
    code = """
import sys
from flowgen.commands.runs import runs
print(*(row.name for row in runs()))
print("torch" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    names, imported_torch = result.stdout.splitlines()
    assert names.split() == MODELS
    assert imported_torch == "False"


@pytest.mark.parametrize("name", MODELS)
def test_a_zoo_model_contains_its_command_and_test_metrics(name):
    checkpoint = read_safetensors(ZOO.parent / f"{name}{EXPORT_SUFFIX}")
    metrics = checkpoint["metrics"]
    assert checkpoint["command"].startswith("flowgen train experiment=zoo/")
    assert metrics["split"] == "test"
    assert metrics["images"] == 10_000
    likelihoods = [metrics.get(key, math.nan) for key in ("bits_per_dim", "log_likelihood")]
    assert any(math.isfinite(value) for value in likelihoods)


def test_export_writes_the_model_of_the_run_with_card_and_samples(tiny_run, command, tmp_path):
    path = tmp_path / "mine.safetensors"
    status, output, error = command("export", tiny_run, path)
    assert status == 0, error
    files = [path, path.with_suffix(".md"), path.with_suffix(".png")]
    assert output.split() == [str(file) for file in files]
    assert_same_weights(flowgen.load(tiny_run), flowgen.load(path))
    card = path.with_suffix(".md").read_text()
    metrics = read_safetensors(path)["metrics"]
    assert metrics["split"] == "test"
    assert str(metrics["bits_per_dim"]) in card
    assert "steps_per_level: 2" in card
    assert "Ask the owner of the images" in card
    assert str(tmp_path) not in card
    assert f"On {metrics['images']} images of the test split" in card
    assert command("export", path, tmp_path / "again.safetensors")[0] == 0
    assert read_safetensors(tmp_path / "again.safetensors")["metrics"] == metrics


def test_export_includes_the_evaluation_of_the_run(tiny_run, command, tmp_path):
    """An evaluation on other images is not included."""
    evaluate = ["evaluate", "--run", tiny_run]
    status, output, error = command(*evaluate, "--json", "num_importance_samples=2")
    assert status == 0, error
    assert command(*evaluate, "data.random_flip=false")[0] == 0
    path = tmp_path / "mine.safetensors"
    assert command("export", tiny_run, path)[0] == 0
    expected = {key: value for key, value in json.loads(output).items() if key != "run"}
    assert expected["num_importance_samples"] == 2
    assert read_safetensors(path)["metrics"] == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.pt", "choose a name that ends in .safetensors"),
        ("nowhere/mine.safetensors", "does not exist: create it"),
        ("there.safetensors", "there.md exists already"),
    ],
)
def test_export_errors_are_one_line(tiny_run, command, elsewhere, name, message):
    (elsewhere / "there.md").write_text("mine")
    assert_error(command("export", tiny_run, name), message)
    assert not list(elsewhere.glob("*.safetensors"))
    assert_error(command("export", "nowhere", "mine.safetensors"), "flowgen runs")
