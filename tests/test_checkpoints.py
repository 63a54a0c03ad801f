"""Checkpoints: complete or not there, harmless, and readable by later versions."""

import gzip
import json
import os
import pickle
import resource
from functools import reduce
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, SMALL
from test_training import same

from flowgen.config.settings import group_options
from flowgen.training.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

CHECKPOINTS = Path(__file__).with_name("checkpoints")  # one of each model, see its make.py


def test_a_damaged_last_checkpoint_is_skipped(images, tmp_path, command):
    run = tmp_path / "run"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=6", "trainer.checkpoint_every=4"]
    assert command("train", *overrides, f"output_dir={run}")[0] == 0
    last = run / "checkpoints" / "last.pt"
    whole = read_checkpoint(last)
    last.write_bytes(last.read_bytes()[:1000])
    assert command("resume", run)[0] == 0
    assert same(read_checkpoint(last)["model"], whole["model"])


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    state = CHECKPOINT | {"model": {"weight": torch.rand(1000)}}
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    write_checkpoint(state, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match="could not save") as error:
            write_checkpoint(state | {"model": {"weight": torch.rand(100_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "flowgen resume" in str(error.value)
    assert same(read_checkpoint(path)["model"], state["model"])
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_a_kill_between_the_names_of_a_checkpoint_keeps_the_best(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(CHECKPOINT | {"step": 1}, is_best=True)
    replace = Path.replace

    def kill_before_last(self, target):
        if target == run.last:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", kill_before_last)
        run.save(CHECKPOINT | {"step": 2}, is_best=True)
    assert read_checkpoint(run.best)["step"] == 2
    assert read_checkpoint(run.last)["step"] == 1
    # A kill by the system leaves the temporary file, which is another name of best.pt.
    os.link(run.best, run.last.with_name("last.pt.part"))

    def kill(*arguments, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", kill)
        run.save(CHECKPOINT | {"step": 2}, is_best=True)
    assert read_checkpoint(run.best)["step"] == 2
    assert read_checkpoint(run.last)["step"] == 1
    run.save(CHECKPOINT | {"step": 2}, is_best=True)
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.pt", "last.pt"]


def test_a_numbered_checkpoint_does_not_change_with_the_last(tmp_path):
    run = Run(tmp_path)
    run.save(CHECKPOINT | {"step": 5}, is_best=True, numbered=True)
    run.save(CHECKPOINT | {"step": 6})
    assert read_checkpoint(run.best)["step"] == 5
    assert read_checkpoint(run.step_path(5))["step"] == 5
    assert read_checkpoint(run.last)["step"] == 6


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickled_code_does_not_run(tmp_path, command):
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "torch.pt")
    for name in ("pickle.pt", "torch.pt"):
        status, _, error = command("sample", "--run", tmp_path / name)
        assert status == 1
        assert error.count("\n") == 1
        assert "not a checkpoint of flowgen" in error
    assert not Path("exploded").exists()


TRAINER = {"sample_temperature": 1.0}


@pytest.mark.parametrize(
    "part",
    [
        {"config": {}},
        {"config": {"model": [], "data": {}, "trainer": TRAINER, "seed": 0}},
        {"config": {"model": {}, "data": "x", "trainer": TRAINER, "seed": 0}},
        {"config": {"model": {}, "data": {}, "trainer": None, "seed": 0}},
        {"config": {"model": {}, "data": {}, "trainer": {}, "seed": 0}},
        {"config": {"model": {}, "data": {}, "trainer": TRAINER, "seed": "0"}},
        {
            "config": {
                "model": {},
                "data": {},
                "trainer": TRAINER,
                "seed": 0,
                "more": [{"a": torch.zeros(2, 2)}],
            }
        },
        {"config": {"model": {}, "data": {}, "trainer": TRAINER, "seed": 0, "more": "\ud800"}},
        {"format": torch.zeros(2, 2)},
        {"format": -1},
        {"format": "2"},
        {"step": 1.5},
        {"step": -1},
        {"images_seen": -1},
        {"images_seen": 2**70},
        {"model": [1]},
        {"model": {"a": 1}},
        {"ema": {"a": "b"}},
        {"emas": None},
        {"emas": [{}, {"a": 1}]},
        {"progress": {"best": 0.0, "seconds": 0.0, "best_ema": 1}},
        {"optimizer": 3},
        {"progress": None},
        {"progress": {"best": "x", "seconds": 0.0}},
        {"nan_recovery": {"unknown": 1}},
    ],
    ids=str,
)
def test_a_checkpoint_with_invalid_values_causes_a_one_line_error(tiny_run, command, part):
    path = Run(tiny_run).last
    write_checkpoint(read_checkpoint(path) | part, path)
    for argv in (["sample", "--run", path], ["resume", path]):
        status, _, error = command(*argv)
        assert status == 1
        assert str(path) in error
        assert len(error.splitlines()) == 1
        assert "bug in flowgen" not in error


INVALID_VALUES = ([], "x", None, 3, "missing")


@pytest.mark.parametrize(
    "key", ["model", "data", "trainer", "seed", "data.size", "model.steps_per_level"]
)
def test_a_checkpoint_with_an_invalid_configuration_causes_a_one_line_error(tiny_run, command, key):
    path = Run(tiny_run).last
    section_name, _, name = key.rpartition(".")
    values = INVALID_VALUES
    if key == "model.steps_per_level":
        values = (*INVALID_VALUES, 10**9)
    if key == "seed":
        values = tuple(value for value in INVALID_VALUES if value != 3)
    for value in values:
        state = read_checkpoint(path)
        section = state["config"][section_name] if section_name else state["config"]
        section[name] = value
        if value == "missing":
            del section[name]
        other = path.with_name("other.pt")
        write_checkpoint(state, other)
        for argv in (
            ["sample", "--run", other],
            ["evaluate", "--run", other],
            ["resume", other, "trainer.steps=8"],
        ):
            status, _, error = command(*argv)
            if status == 0:  # the model knows the size of its images
                assert (key, argv[0]) == ("data.size", "sample"), (value, argv)
                continue
            assert status == 1, (value, argv, error)
            assert error.count("flowgen: ") == 1, (value, argv, error)
            assert "bug in flowgen" not in error, (value, argv, error)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nmodel: {}\ndata: {}\ntrainer: {}\n",
        "model: &m {next: *m}\n",
        "[" * 3000,
        "model: " + "9" * 5000 + "\ndata: {}\ntrainer: {}\n",
        'model: {name: "\\ud800"}\ndata: {}\ntrainer: {}\nseed: 0\n',
        "model: {}\ndata: {}\ntrainer: {}\n",
        "model: {}\n" + "#" * 2**20,
        "- a list",
    ],
    ids=lambda text: text[:12],
)
def test_an_invalid_config_file_causes_a_one_line_error(tiny_run, command, text):
    run = Run(tiny_run)
    run.config.write_text(text)
    run.last.unlink()
    run.best.unlink(missing_ok=True)
    status, _, error = command("resume", tiny_run)
    assert status == 1
    assert str(run.config) in error
    assert len(error.splitlines()) == 1
    assert "bug in flowgen" not in error
    status, _, error = command("report", tiny_run)
    assert status == 1
    assert "bug in flowgen" not in error
    assert len(error.splitlines()) <= 2


def test_a_configuration_that_repeats_itself_without_end_is_refused(tiny_run, tmp_path):
    """A few bytes of a file stand for four million numbers."""
    more = reduce(lambda inner, _: [inner, inner], range(22), [0])
    state = read_checkpoint(Run(tiny_run).last)
    path = tmp_path / "large.pt"
    write_checkpoint(state | {"config": state["config"] | {"more": more}}, path)
    with pytest.raises(UserError, match="values that no training writes"):
        read_checkpoint(path)


def test_a_huge_configuration_is_not_read_when_looking_for_a_run(tiny_run, command):
    Path("outputs").mkdir()
    run = Run(tiny_run.rename(Path("outputs") / "run"))
    assert command("sample", "--count", 1)[0] == 0
    run.config.write_text(run.config.read_text() + "#" * 2**20)
    status, _, error = command("sample", "--count", 1)
    assert status == 1
    assert "no run under outputs/ has a checkpoint" in error
    assert len(error.splitlines()) == 1


def test_pipes_are_not_read(tiny_run, command):
    run = Run(tiny_run)
    for path in (run.config, run.last):
        path.unlink()
        os.mkfifo(path)
    assert command("report", tiny_run)[0] == 1
    assert command("sample", "--run", run.last)[0] == 1
    Path("outputs").mkdir()
    os.mkfifo("outputs/config.yaml")
    assert command("runs")[0] == 0
    assert command("sample")[0] == 1


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "flowgen.cli.main",
        "flowgen.config.importlib.import_module",
        "flowgen.nothing.Here",
        "flowgen.data.mnist.MNIST",
        "flowgen.models.base.EvalConfig",
        "flowgen.training.run_dir.Run",
    ],
)
def test_a_checkpoint_can_only_call_models_of_flowgen(tiny_run, command, target):
    path = tiny_run / "checkpoints" / "last.pt"
    state = read_checkpoint(path)
    state["config"]["model"] = {"_target_": target, "command": "touch exploded"}
    write_checkpoint(state, path)
    status, _, error = command("sample", "--run", path)
    assert status == 1
    assert "model._target_" in error or str(path) in error
    assert len(error.splitlines()) == 1
    assert not Path("exploded").exists()


def test_a_checkpoint_of_a_later_format_asks_for_an_upgrade(tiny_run, command):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    assert state["format"] == FORMAT
    assert "random" not in state
    write_checkpoint(state | {"format": FORMAT + 1}, path)
    status, _, error = command("sample", "--run", path)
    assert status == 1
    assert "later version of flowgen" in error
    assert len(error.splitlines()) == 1


def test_a_checkpoint_from_before_format_1_tells_the_fix(tiny_run, command):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    progress = state.pop("progress")
    recovery = state.pop("nan_recovery")
    first = {key: value for key, value in state.items() if key != "format"}
    third = state | {"format": 3, "rescue": recovery}
    for old in (first, third):
        torch.save(old | {"metrics": progress}, path)
        status, _, error = command("sample", "--run", path)
        assert status == 1
        assert "before 0.2.0" in error
        assert "train the model again" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_named(tiny_run, command, value):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    name = list(state["model"])[3]
    for weights in (state["model"][name], state["ema"][f"module.{name}"]):
        weights.view(-1)[-1] = value
    write_checkpoint(state, path)
    for argv in (["sample", "--run", path], ["resume", tiny_run, "trainer.steps=8"]):
        status, _, error = command(*argv)
        assert status == 1
        assert name in error
        assert len(error.splitlines()) == 1


@pytest.fixture(params=sorted(path.stem for path in CHECKPOINTS.glob("*.json")))
def stored(request, tmp_path) -> tuple[Path, dict]:
    """A stored checkpoint of format 1 and its metrics at that time."""
    path = tmp_path / request.param / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.decompress((CHECKPOINTS / f"{request.param}.pt.gz").read_bytes()))
    return path, json.loads((CHECKPOINTS / f"{request.param}.json").read_text())


@pytest.mark.parametrize("name", group_options("model"))
def test_there_is_a_stored_checkpoint_of_every_model(name):
    stored_models = {path.stem.partition("-")[0] for path in CHECKPOINTS.glob("*.json")}
    assert name in stored_models, (
        f"add {name} to MODELS in tests/checkpoints/make.py and run the file with this name"
    )


def test_later_versions_evaluate_a_stored_checkpoint(stored, command):
    path, expected = stored
    assert read_checkpoint(path)["format"] == 1
    status, output, error = command("evaluate", "--run", path, "--json")
    assert status == 0, error
    metrics = json.loads(output)
    # Processors round differently, which shows in differences of nearly equal numbers.
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=5e-7)


def test_later_versions_resume_a_stored_checkpoint(stored, command):
    path, _ = stored
    before = read_checkpoint(path)
    end = before["step"] + 2
    overrides = ["trainer.eval_every=1000", "trainer.sample_every=1000"]
    status, _, error = command("resume", path, f"trainer.steps={end}", *overrides)
    assert status == 0, error
    after = read_checkpoint(path)
    assert after["step"] == end
    assert after["format"] == FORMAT
    assert after["progress"]["seconds"] > before["progress"]["seconds"]
    moments = after["optimizer"]["state"].get(0, {})
    assert moments.get("step", end) == end
    assert moments.keys() == before["optimizer"]["state"].get(0, {}).keys()
