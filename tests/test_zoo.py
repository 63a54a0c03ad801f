"""Models to pass on: written, read, used like any run, and refused where they are none."""

import json
import math
import subprocess
import sys

import pytest
import torch
from enumeration import machine
from safetensors.torch import save_file

import flowgen
from flowgen.config.runs import find_checkpoint
from flowgen.training.checkpoint import (
    SUFFIX,
    ZOO,
    export_safetensors,
    read_portable_metadata,
    read_safetensors,
    zoo,
)

MODELS = zoo()


@pytest.fixture
def portable(tiny_run, tmp_path):
    checkpoint = find_checkpoint(str(tiny_run))[1]
    checkpoint["config"] |= {"init": str(tiny_run)}
    export_safetensors(
        checkpoint,
        {"bits_per_dim": 5.0, "run": str(tiny_run)},
        "flowgen train",
        tmp_path / "model.safetensors",
    )
    return tmp_path / "model.safetensors"


def test_a_portable_model_is_the_runs_averaged_one(tiny_run, portable):
    one, other = flowgen.load(tiny_run), flowgen.load(portable)
    assert all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )
    assert not other.training


def test_half_precision_halves_the_convolutions_alone(tiny_run, tmp_path):
    checkpoint = find_checkpoint(str(tiny_run))[1]
    for half in (False, True):
        export_safetensors(
            checkpoint, {}, "flowgen train", tmp_path / f"{half}.safetensors", half=half
        )
    whole, halved = (
        read_safetensors(tmp_path / f"{half}.safetensors")["model"] for half in (False, True)
    )
    for name, tensor in whole.items():
        assert torch.equal(tensor.half() if tensor.dim() == 4 else tensor, halved[name])
    assert (tmp_path / "True.safetensors").stat().st_size < (
        tmp_path / "False.safetensors"
    ).stat().st_size


def test_a_portable_model_names_no_folder_of_the_machine(tiny_run, portable, images):
    assert (
        str(images).encode() not in portable.read_bytes()
        and str(tiny_run).encode() not in portable.read_bytes()
    )


def test_commands_read_a_portable_model_like_a_run(tiny_run, portable, command, tmp_path):
    for run, name in ((tiny_run, "one.png"), (portable, "other.png")):
        status, _, error = command("sample", "--run", run, "--count", 4, "--out", tmp_path / name)
        assert status == 0, error
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_what_is_no_portable_model_gets_one_line(portable, command, tmp_path):
    cut = tmp_path / f"cut{SUFFIX}"
    cut.write_bytes(portable.read_bytes()[:-100])
    foreign, empty = tmp_path / f"foreign{SUFFIX}", tmp_path / f"empty{SUFFIX}"
    save_file({"weight": torch.zeros(2)}, foreign)
    save_file(
        {"weight": torch.zeros(2)},
        empty,
        metadata={"flowgen": json.dumps({"config": {}, "step": "many"})},
    )
    for path in (cut, foreign, empty):
        status, _, error = command("sample", "--run", path)
        assert status == 1 and "model of flowgen" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda about: about["config"].pop("trainer"),
        lambda about: about["config"]["trainer"].update(sample_temperature="hot"),
        lambda about: about["config"].update(seed="0"),
        lambda about: about["config"].update(evaluation=3),
        lambda about: (
            about["config"]["data"].update({"_target_": []})
            or about["config"]["model"].update({"_target_": [1]})
        ),
        lambda about: about.update(figures={"bits_per_dim": "low"}),
        lambda about: about.update(figures={"log_z": [1]}),
        lambda about: about.update(images_seen=-1),
        lambda about: about.update(format=99),
        lambda about: about.update(command="flowgen train \ud800"),
    ],
)
def test_a_model_to_pass_on_is_checked_like_a_checkpoint(portable, command, tmp_path, spoil):
    about, path = read_portable_metadata(portable), tmp_path / f"spoilt{SUFFIX}"
    spoil(about)
    save_file(read_safetensors(portable)["model"], path, metadata={"flowgen": json.dumps(about)})
    for words in (
        ["sample", "--run", path, "--count", 1],
        ["export", path, tmp_path / f"x{SUFFIX}"],
    ):
        status, _, error = command(*words)
        assert (
            status == 1
            and str(path) in error
            and len(error.splitlines()) == 1
            and "fault" not in error
        )


def test_a_model_to_pass_on_says_as_little_as_it_may(portable):
    """What an older file leaves out is as it was then; a verdict without its log Z is none."""
    about, path = read_portable_metadata(portable), portable.with_name(f"old{SUFFIX}")
    for key in ("sample_temperature", "memory", "betas"):
        del about["config"]["trainer"][key]
    about = {key: value for key, value in about.items() if key != "format"} | {
        "metrics": {"reliable": True}
    }
    save_file(read_safetensors(portable)["model"], path, metadata={"flowgen": json.dumps(about)})
    checkpoint = read_safetensors(path)
    assert (
        checkpoint["config"]["trainer"]["sample_temperature"] == 1.0
        and checkpoint["config"]["trainer"]["activation_memory"] == "keep"
    )
    rbm = machine(6, 4)
    rbm.load_eval_results(checkpoint["metrics"])
    assert rbm.log_z is None and isinstance(flowgen.load(path), flowgen.models.Glow)


def test_a_name_that_is_not_in_the_zoo_gets_one_line(command):
    status, _, error = command("sample", "--run", "zoo/nothing")
    assert status == 1 and "not in the zoo" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_zoo_is_small_and_samples_at_once(name, command, elsewhere):
    assert (ZOO.parent / f"{name}{SUFFIX}").stat().st_size < 2_000_000
    status, out, error = command("sample", "--run", name, "--count", 2)
    assert status == 0, error
    assert (
        out.strip() == f"outputs/{name}/sample.png"
        and (elsewhere / "outputs" / name / "sample.png").exists()
    )


@pytest.mark.skipif(not MODELS, reason="the zoo is empty")
def test_runs_lists_the_zoo_without_torch(elsewhere):
    code = "import sys; from flowgen.commands.runs import runs; print(*(row.name for row in runs())); print('torch' in sys.modules)"
    names, torch_too = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert names.split() == MODELS and torch_too == "False"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_zoo_says_how_it_was_made_and_judged(name):
    about = read_safetensors(ZOO.parent / f"{name}{SUFFIX}")
    figures = about["metrics"]
    assert (
        about["command"].startswith("flowgen train experiment=zoo/")
        and figures["split"] == "test"
        and figures["images"] == 10_000
    )
    assert any(
        math.isfinite(figures.get(name, math.nan)) for name in ("bits_per_dim", "log_likelihood")
    )


def test_an_exported_model_is_the_run_with_its_card_and_samples(tiny_run, command, tmp_path):
    path = tmp_path / "mine.safetensors"
    status, out, error = command("export", tiny_run, path)
    assert status == 0 and out.split() == [
        str(path),
        str(path.with_suffix(".md")),
        str(path.with_suffix(".png")),
    ], error
    one, other = flowgen.load(tiny_run), flowgen.load(path)
    assert all(
        torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items()
    )
    card, figures = path.with_suffix(".md").read_text(), read_safetensors(path)["metrics"]
    assert (
        figures["split"] == "test"
        and str(figures["bits_per_dim"]) in card
        and "steps_per_level: 2" in card
    )
    assert "ask whoever made them" in card and str(tmp_path) not in card
    assert f"On {figures['images']} images of the test split" in card
    assert command("export", path, tmp_path / "again.safetensors")[0] == 0
    assert read_safetensors(tmp_path / "again.safetensors")["metrics"] == figures


def test_an_exported_model_says_what_its_evaluation_found(tiny_run, images, command, tmp_path):
    """That of the run's own images, if there was any: another's is not the run's."""
    status, output, error = command(
        "evaluate", "--run", tiny_run, "--json", "num_importance_samples=2"
    )
    assert status == 0, error
    assert command("evaluate", "--run", tiny_run, "data.random_flip=false")[0] == 0
    assert command("export", tiny_run, tmp_path / "mine.safetensors")[0] == 0
    found = {key: value for key, value in json.loads(output).items() if key != "run"}
    assert (
        read_safetensors(tmp_path / "mine.safetensors")["metrics"] == found and found["draws"] == 2
    )


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["mine.pt"], "let it end in .safetensors"),
        (["nowhere/mine.safetensors"], "does not exist: create it"),
        (["there.safetensors"], "there.md is there already"),
    ],
)
def test_what_cannot_be_exported_gets_one_line(tiny_run, command, elsewhere, words, answer):
    (elsewhere / "there.md").write_text("mine")
    status, _, error = command("export", tiny_run, *words)
    assert status == 1 and answer in error and len(error.splitlines()) == 1
    assert not list(elsewhere.glob("*.safetensors"))
    assert "flowgen runs" in command("export", "nowhere", "mine.safetensors")[2]
