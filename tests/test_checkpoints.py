"""Checkpoints: whole or not there, harmless, and readable for ever."""

import json
import os
import pickle
import resource
import shutil
from functools import reduce
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, SMALL
from test_training import same

import flowgen
from flowgen.training.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError


def test_a_damaged_last_checkpoint_is_passed_over(images, tmp_path, command):
    words = [*SMALL, f"data.root={images}", "trainer.steps=6", "trainer.checkpoint_every=4"]
    assert command("train", *words, f"output_dir={tmp_path / 'run'}")[0] == 0
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    whole = read_checkpoint(last)
    last.write_bytes(last.read_bytes()[:1000])
    assert command("resume", tmp_path / "run")[0] == 0
    assert same(read_checkpoint(last)["model"], whole["model"])


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
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
    assert same(read_checkpoint(path)["model"], state["model"]) and [
        file.name for file in path.parent.iterdir()
    ] == ["last.pt"]


def test_a_kill_between_the_names_of_a_checkpoint_loses_no_best(tmp_path, monkeypatch):
    run, state = Run(tmp_path), CHECKPOINT
    run.save(state | {"step": 1}, best=True)
    replace = Path.replace

    def killed(self, target):
        if target == run.last:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        run.save(state | {"step": 2}, best=True)
    assert read_checkpoint(run.best)["step"] == 2 and read_checkpoint(run.last)["step"] == 1

    def killed_in_a_write(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", killed_in_a_write)
        run.save(state | {"step": 2}, best=True)
    assert read_checkpoint(run.best)["step"] == 2 and read_checkpoint(run.last)["step"] == 1
    run.save(state | {"step": 2}, best=True)
    assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.pt", "last.pt"]


def test_a_named_checkpoint_does_not_change_with_the_last(tmp_path):
    run = Run(tmp_path)
    state = CHECKPOINT | {"step": 5}
    run.save(state, best=True, keep=True)
    run.save(state | {"step": 6})
    assert read_checkpoint(run.best)["step"] == read_checkpoint(run.step_path(5))["step"] == 5
    assert read_checkpoint(run.last)["step"] == 6


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_that_is_no_checkpoint_does_not_run(tmp_path, command):
    path = tmp_path / "bomb.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        status, _, error = command("sample", "--run", tmp_path / name)
        assert status == 1 and error.count("\n") == 1 and "no checkpoint of flowgen" in error
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "part",
    [
        {"config": {}},
        {"config": {"model": [], "data": {}, "trainer": {}, "seed": 0}},
        {"config": {"model": {}, "data": "x", "trainer": {}, "seed": 0}},
        {"config": {"model": {}, "data": {}, "trainer": None, "seed": 0}},
        {"config": {"model": {}, "data": {}, "trainer": {}, "seed": "0"}},
        {
            "config": {
                "model": {},
                "data": {},
                "trainer": {},
                "seed": 0,
                "more": [{"a": torch.zeros(2, 2)}],
            }
        },
        {"config": {"model": {}, "data": {}, "trainer": {}, "seed": 0, "more": "\ud800"}},
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
    ],
    ids=str,
)
def test_a_checkpoint_of_the_wrong_parts_gets_one_line(tiny_run, command, part):
    path = Run(tiny_run).last
    write_checkpoint(read_checkpoint(path) | part, path)
    for words in (["sample", "--run", path], ["resume", path]):
        status, _, error = command(*words)
        assert (
            status == 1
            and str(path) in error
            and len(error.splitlines()) == 1
            and "fault of flowgen" not in error
        )


ODD = ([], "x", None, 3, "missing")


@pytest.mark.parametrize(
    "place", ["model", "data", "trainer", "seed", "data.size", "model.steps_per_level"]
)
def test_a_configuration_in_a_checkpoint_without_a_part_gets_one_line(tiny_run, command, place):
    path = Run(tiny_run).last
    for value in (*ODD, 10**9) if place == "model.steps_per_level" else ODD:
        if (place, value) == ("seed", 3):
            continue
        state = read_checkpoint(path)
        section, _, key = place.rpartition(".")
        part = state["config"][section] if section else state["config"]
        part |= {key: value}
        if value == "missing":
            del part[key]
        write_checkpoint(state, other := path.with_name("other.pt"))
        for words in (
            ["sample", "--run", other],
            ["evaluate", "--run", other],
            ["resume", other, "trainer.steps=8"],
        ):
            status, _, error = command(*words)
            ends_well = (
                status == 0 and place == "data.size" and words[0] == "sample"
            )  # for which the model knows its images
            assert ends_well or (
                status == 1 and error.count("flowgen: ") == 1 and "fault of flowgen" not in error
            ), (value, words, error)


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
def test_a_configuration_from_elsewhere_gets_one_line(tiny_run, command, text):
    config = Run(tiny_run).config
    config.write_text(text)
    Run(tiny_run).last.unlink()
    Run(tiny_run).best.unlink(missing_ok=True)
    status, _, error = command("resume", tiny_run)
    assert (
        status == 1
        and str(config) in error
        and len(error.splitlines()) == 1
        and "fault of flowgen" not in error
    )
    status, _, error = command("report", tiny_run)
    assert status == 1 and "fault of flowgen" not in error and len(error.splitlines()) <= 2


def test_a_configuration_that_repeats_itself_without_end_is_refused(tiny_run, tmp_path):
    """A few bytes of a file, and four million numbers when they are written out."""
    more = reduce(lambda inner, _: [inner, inner], range(22), [0])
    state = read_checkpoint(Run(tiny_run).last)
    write_checkpoint(state | {"config": state["config"] | {"more": more}}, tmp_path / "it.pt")
    with pytest.raises(UserError, match="values that no training writes"):
        read_checkpoint(tmp_path / "it.pt")


def test_a_huge_configuration_is_not_read_where_no_run_is_named(tiny_run, command):
    Path("outputs").mkdir()
    run = Run(tiny_run.rename(Path("outputs") / "run"))
    assert command("sample", "--count", 1)[0] == 0
    run.config.write_text(run.config.read_text() + "#" * 2**20)
    status, _, error = command("sample", "--count", 1)
    assert (
        status == 1
        and "no run under outputs/ has a checkpoint" in error
        and len(error.splitlines()) == 1
    )


def test_pipes_are_not_waited_for(tiny_run, command):
    config, last = Run(tiny_run).config, Run(tiny_run).last
    for path in (config, last):
        path.unlink()
        os.mkfifo(path)
    assert command("report", tiny_run)[0] == 1
    assert command("sample", "--run", last)[0] == 1
    Path("outputs").mkdir()
    os.mkfifo("outputs/config.yaml")
    assert command("runs")[0] == 0 and command("sample")[0] == 1


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "flowgen.cli.main",
        "flowgen.config.importlib.import_module",
        "flowgen.nothing.Here",
        "flowgen.data.mnist.MNIST",
        "flowgen.models.base.Evaluation",
        "flowgen.training.run_dir.Run",
    ],
)
def test_a_checkpoint_cannot_call_anything_but_classes_of_flowgen(tiny_run, command, target):
    path = tiny_run / "checkpoints" / "last.pt"
    state = read_checkpoint(path)
    state["config"]["model"] = {"_target_": target, "command": "touch exploded"}
    write_checkpoint(state, path)
    status, _, error = command("sample", "--run", path)
    assert (
        status == 1
        and ("model._target_" in error or "is no run" in error)
        and not Path("exploded").exists()
    )


def test_a_checkpoint_names_its_format_and_holds_no_random_state(tiny_run, command):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    assert state["format"] == FORMAT and "random" not in state
    write_checkpoint(state | {"format": FORMAT + 1}, path)
    status, _, error = command("sample", "--run", path)
    assert status == 1 and "a later flowgen" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tiny_run, command, value):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    name = list(state["model"])[3]
    for weights in (state["model"][name], state["ema"][f"module.{name}"]):
        weights.view(-1)[-1] = value
    write_checkpoint(state, path)
    for words in (["sample", "--run", path], ["resume", tiny_run, "trainer.steps=8"]):
        status, _, error = command(*words)
        assert status == 1 and name in error and len(error.splitlines()) == 1


@pytest.fixture(params=["glow", "realnvp", "pcd", "tempering"])
def of_the_first_format(request, tmp_path) -> tuple[Path, dict]:
    """A run with a checkpoint that names no format, and what the code that wrote it gave for it."""
    kept = Path(__file__).parent / "checkpoints" / request.param
    path = tmp_path / request.param / "checkpoints" / "last.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(kept.with_suffix(".pt"), path)
    return path, json.loads(kept.with_suffix(".json").read_text())


def test_the_first_format_keeps_its_figures_and_samples(of_the_first_format, command):
    path, expected = of_the_first_format
    status, output, error = command("evaluate", "--run", path, "--json")
    assert status == 0, error
    figures = json.loads(output)
    assert {name: figures[name] for name in expected["metrics"]} == pytest.approx(
        expected["metrics"], rel=1e-6
    )
    wanted = torch.tensor([list(bytes.fromhex(image)) for image in expected["levels"]])
    drawn, _ = flowgen.load(path).sample(
        len(wanted), generator=torch.Generator().manual_seed(expected["seed"]), **expected["sample"]
    )
    apart = (drawn.flatten(1).int() - wanted).abs()
    assert (
        apart.max() <= 1 and (apart > 0).float().mean() < 0.01
    )  # what other processors may round otherwise


def test_the_first_format_can_be_gone_on_with(of_the_first_format, command):
    path, _ = of_the_first_format
    before = read_checkpoint(path)
    end = before["step"] + 2
    status, _, error = command(
        "resume",
        path,
        f"trainer.steps={end}",
        "trainer.eval_every=1000",
        "trainer.sample_every=1000",
    )
    assert status == 0, error
    after = read_checkpoint(path)
    assert (
        after["step"] == end
        and after["format"] == FORMAT
        and after["progress"]["seconds"] > before["progress"]["seconds"]
    )
    moments = after["optimizer"]["state"].get(0, {})
    assert (
        moments.get("step", end) == end
        and moments.keys() == before["optimizer"]["state"].get(0, {}).keys()
    )
