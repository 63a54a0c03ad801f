"""The Python API: the examples of the design, errors, threads, and the lists of models and data."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import flowgen
from flowgen.config import start as start_module
from flowgen.config.compose import read_config
from flowgen.config.runs import find_checkpoint
from flowgen.config.settings import group_options
from flowgen.evaluation import sample_quality
from flowgen.models.base import sample_images
from flowgen.models.flows.glow import Glow
from flowgen.models.rbm.rbm import RBM
from flowgen.training.checkpoint import read_checkpoint, write_checkpoint
from flowgen.training.logger import Logger

TINY = [
    "data=mnist_sample",
    "model=glow",
    "model.levels=1",
    "model.steps_per_level=1",
    "model.width=4",
    "trainer.steps=2",
    "trainer.init_images=16",
    "trainer.eval_images=16",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the design's example with tiny settings."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return flowgen.train(*TINY, f"output_dir={folder / 'run'}")


def test_import_needs_no_torch():
    code = "import sys, flowgen; print('torch' in sys.modules, sorted(flowgen.__all__))"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.startswith("False")
    assert all(name in dir(flowgen) for name in flowgen.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        flowgen.nothing  # noqa: B018


def test_package_is_marked_as_typed():
    assert Path(flowgen.__file__).with_name("py.typed").exists()


def test_example_of_the_design(run, capsys):
    assert isinstance(run, flowgen.Run)
    assert run.last.exists()
    model = flowgen.load(run, device="cpu")
    assert not model.training
    images, log_prob = model.sample(16, temperature=0.7)
    assert images.shape == (16, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert log_prob.shape == (16,)
    result = flowgen.evaluate(run, device="cpu")
    assert set(result) == {"bits_per_dim"}
    assert result["bits_per_dim"].error > 0
    assert result.row()["images"] == 500
    assert re.search(r"bits_per_dim +<= \d+\.\d{4} ± \d\.\d{4} bits/dim", str(result))
    scores = flowgen.score(model, images)
    assert scores.shape == (16,)
    assert torch.equal(scores, flowgen.score(model, images))
    assert capsys.readouterr().out == ""


def test_run_can_be_named_by_folder_name_and_checkpoint(run):
    states = [
        flowgen.load(name, device="cpu").state_dict()
        for name in (run, run.folder, str(run.folder), run.last)
    ]
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())


def test_training_works_twice_in_one_process_with_the_same_bits(tmp_path, run):
    again = flowgen.train(*TINY, f"output_dir={tmp_path / 'run'}")
    weights = [torch.load(each.last, weights_only=True)["model"] for each in (run, again)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_default_folder_is_that_of_the_command_line(elsewhere):
    run = flowgen.train(*TINY)
    assert run.folder.resolve().is_relative_to(elsewhere / "outputs")
    assert run.folder.name.endswith("_glow_mnist_sample")
    assert read_config(run.config)["output_dir"] == str(run.folder)


def test_training_works_in_a_thread(tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(flowgen.train(*TINY, f"output_dir={tmp_path / 'run'}"))
    )
    thread.start()
    thread.join()
    assert results[0].last.exists()


def test_resume_continues_a_run(tmp_path):
    run = flowgen.train(*TINY, f"output_dir={tmp_path / 'run'}")
    with pytest.raises(flowgen.UserError, match="has ended at step 2"):
        flowgen.resume(run)
    assert flowgen.resume(run, "trainer.steps=3").folder == run.folder
    assert torch.load(run.last, weights_only=True)["step"] == 3


def test_finished_run_is_skipped_if_resume_is_set(tmp_path):
    overrides = [*TINY, f"output_dir={tmp_path / 'run'}", "resume=true"]
    run = flowgen.train(*overrides)
    before = run.last.stat().st_mtime_ns
    assert flowgen.train(*overrides).folder == run.folder
    assert run.last.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=glw"], "no model=glw, did you mean glow"),
        (["trainer.stepz=3"], "did you mean trainer.steps"),
        (["model.width=zero"], "width must be a whole number"),
        (["data=folder"], "data.root is not set"),
        (["nonsense"], "not an override"),
        (["trainer.steps=1,2"], "several values"),
        (["trainer.device=cuda:99"], "choose auto"),
    ],
)
def test_mistakes_raise_user_errors(tmp_path, overrides, message):
    with pytest.raises(flowgen.UserError, match=message):
        flowgen.train(*TINY, f"output_dir={tmp_path / 'run'}", *overrides)
    assert not (tmp_path / "run").exists()


def test_unknown_runs_and_devices_raise_user_errors(run):
    for function in (flowgen.load, flowgen.evaluate, flowgen.resume):
        with pytest.raises(flowgen.UserError, match="is not a run"):
            function("nowhere")
    with pytest.raises(flowgen.UserError, match="choose auto"):
        flowgen.load(run, device="cuda:99")
    with pytest.raises(flowgen.UserError, match="no setting"):
        flowgen.evaluate(run, "num_samples=3")


def test_keyboard_interrupt_saves_the_run_and_propagates(tmp_path, monkeypatch):
    write = Logger.write

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)
        write(*arguments)

    monkeypatch.setattr(Logger, "write", interrupt)
    overrides = [*TINY, "trainer.steps=9", "trainer.log_every=1", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(KeyboardInterrupt, match="is saved") as caught:
        flowgen.train(*overrides)
    assert caught.value.signal == signal.SIGINT
    assert torch.load(caught.value.run.last, weights_only=True)["step"] == 1
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    flowgen.resume(caught.value.run)
    assert torch.load(caught.value.run.last, weights_only=True)["step"] == 9


def test_failure_of_another_process_is_an_error_and_exits_nothing(tmp_path, monkeypatch):
    def launch(num_processes, arguments, hint):
        raise SystemExit(3)

    monkeypatch.setattr(start_module, "launch", launch)
    with pytest.raises(flowgen.UserError, match="one of the processes failed") as caught:
        flowgen.train(*TINY, "trainer.num_processes=2", f"output_dir={tmp_path / 'run'}")
    assert caught.value.status == 3
    assert not (tmp_path / "run").exists()


def test_second_process_cannot_train_the_same_run(run):
    with (
        start_module.lock_run(run),
        pytest.raises(flowgen.UserError, match="another process is training"),
    ):
        flowgen.resume(run, "trainer.steps=9")


def test_scores_check_their_images(run):
    model = flowgen.load(run, device="cpu")
    with pytest.raises(flowgen.UserError, match=r"shape \(N, 1, 28, 28\)"):
        flowgen.score(model, torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    for images in (torch.zeros(2, 1, 28, 28), torch.full((2, 1, 28, 28), 256)):
        with pytest.raises(flowgen.UserError, match="from 0 to 255"):
            flowgen.score(model, images)


def test_scores_are_those_of_the_evaluation(run):
    from flowgen.config.instantiate import build_data

    model = flowgen.load(run, device="cpu")
    images = torch.cat(list(build_data(read_config(run.config)).batches("test", 64)))
    bits = -flowgen.score(model, images).mean() / (784 * torch.tensor(2.0).log())
    value = flowgen.evaluate(run, device="cpu")["bits_per_dim"]
    assert abs(bits - value.value) < 3 * value.error


@pytest.fixture(scope="module")
def sampled_runs(tmp_path_factory):
    """A copy of the tiny run, as an older version would have written it, and an RBM."""
    folder = tmp_path_factory.mktemp("sampled")
    small_rbm = ["data=mnist_sample", "model=rbm", "model.hidden=8", "trainer.steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs = {
            "glow": flowgen.train(*TINY, "output_dir=outputs/glow"),
            "rbm": flowgen.train(*small_rbm, "output_dir=outputs/rbm"),
        }
        path = runs["glow"].last.absolute()
    state = read_checkpoint(path)
    state["config"]["evaluation"] = {"num_importance_samples": 2}
    write_checkpoint(state, path)
    return folder


@pytest.mark.parametrize("name", ["glow", "rbm"])
def test_sample_quality_of_a_run(name, sampled_runs, command, monkeypatch):
    monkeypatch.chdir(sampled_runs)
    monkeypatch.setattr(sample_quality, "MAX_CLASSIFIER_STEPS", 5)
    drawn = []

    def draw(model, count, temperature, seed):
        drawn.append((count, temperature, seed))
        fewer_steps = {"steps": 20} if name == "rbm" else {}
        return sample_images(model, count, temperature, seed, **fewer_steps)

    monkeypatch.setattr("flowgen.models.base.sample_images", draw)
    result = flowgen.evaluate(f"outputs/{name}", "samples=100", device="cpu")
    default = {"glow": 0.7, "rbm": 1.0}[name]
    assert drawn == [(100, default, 0)]
    assert result["sample_frechet"].value > result["training_frechet"].value > 0
    assert result["sample_coverage"].value < result["training_coverage"].value
    for metric in ("frechet", "coverage", "spread"):
        assert result[f"sample_{metric}"].error > 0
    assert {"sample_readable", "test_readable", "classifier_accuracy"} < set(result)
    row = result.row()
    assert row["images"] == 500
    assert (row["sample_count"], row["sample_temperature"], row["sample_seed"]) == (100, default, 0)
    assert re.search(r"\nsample_frechet +\d+\.\d+ ± \d+\.\d+ squared distance", str(result))

    overrides = ("samples=100", "temperature=0.25", "seed=3", "--json")
    status, output, error = command("evaluate", "--run", f"outputs/{name}", *overrides)
    assert status == 0, error
    assert drawn[1:] == [(100, 0.25, 3)]
    metrics = json.loads(output)
    assert metrics["sample_temperature"] == 0.25
    assert metrics["sample_frechet"] != row["sample_frechet"]
    assert metrics["training_frechet"] == row["training_frechet"]
    assert command("evaluate", "--run", f"outputs/{name}")[0] == 0
    assert find_checkpoint(f"outputs/{name}")[1]["metrics"].items() >= metrics.items()
    page = Path(command("report", f"outputs/{name}")[1].strip()).read_text()
    expected = f"{metrics['sample_coverage']:.3f} ± {metrics['sample_coverage_error']:.3f}"
    assert "<td>0.25</td>" in page
    assert f"{expected} ({metrics['training_coverage']:.3f})" in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samples=99"], "samples must be a whole number of at least 100"),
        (["samples=501"], "this data has 500 and 4000: choose at most 500"),
        (["samples=100", "temperature=-1"], "temperature must be a number of at least 0"),
        (["samples=100", "seed=x"], "seed must be a whole number"),
    ],
)
def test_impossible_samples_are_one_sentence(overrides, message, run, command, monkeypatch):
    monkeypatch.setattr(Glow, "evaluate", None)
    status, output, error = command("evaluate", "--run", run.folder, *overrides)
    assert (status, output) == (1, "")
    assert message in error
    assert len(error.splitlines()) == 1


def test_missing_fid_weights_are_an_error_before_anything_is_evaluated(run, command, monkeypatch):
    monkeypatch.setenv("FID_WEIGHTS", "nowhere.pth")
    monkeypatch.setattr(Glow, "evaluate", None)
    status, _, error = command("evaluate", "--run", run.folder, "samples=100")
    assert status == 1
    assert "FID_WEIGHTS=nowhere.pth is not a file" in error


def test_create_model_has_the_defaults_of_the_yaml():
    model = flowgen.create_model("glow", image_shape=(3, 32, 32), bits=5, levels=2, width=8)
    assert isinstance(model, Glow)
    assert model.image_shape == (3, 32, 32)
    assert model.bits == 5
    rbm = flowgen.create_model("rbm", hidden=7, negative_phase="cd")
    assert isinstance(rbm, RBM)
    assert rbm.bits == 1
    assert rbm.negative_phase.gibbs_steps == 1
    with pytest.raises(
        flowgen.UserError, match="negative_phase must be a dict of its settings, not 5"
    ):
        flowgen.create_model("rbm", negative_phase=5)
    changed = flowgen.create_model("rbm", hidden=7, negative_phase={"num_chains": 3})
    assert changed.negative_phase.num_chains == 3


def test_create_model_names_the_closest_setting():
    message = "no setting wdith, did you mean width?: see conf/model/glow.yaml"
    with pytest.raises(flowgen.UserError, match=re.escape(message)):
        flowgen.create_model("glow", wdith=8)
    with pytest.raises(flowgen.UserError, match="choose one of"):
        flowgen.create_model("glowing")


@pytest.mark.parametrize("name", group_options("model"))
def test_every_model_is_listed_and_created(name):
    info = next(model for model in flowgen.list_models() if model.name == name)
    assert info.description
    assert info.paper
    if name == "reverse_kl":  # the data section of a configuration names its density
        with pytest.raises(flowgen.UserError, match="set data=energy"):
            flowgen.create_model(name)
        return
    shape = (2, 1, 1) if "data=toy" in info.description else (1, 8, 8)
    small = {"rbm": {"hidden": 4}, "nice": {"width": 8}, "maf": {"width": 8}}
    model = flowgen.create_model(name, image_shape=shape, **small.get(name, {}))
    assert isinstance(model, nn.Module)
    assert info.likelihood == model.likelihood


def test_data_sets_are_listed_with_their_availability(elsewhere):
    before = {data.name: data.availability for data in flowgen.list_datasets()}
    assert list(before) == group_options("data")
    assert before["mnist_sample"] == before["toy"] == "present"
    assert before["mnist"] == before["cifar10"] == before["svhn"] == "downloadable"
    assert before["celeba"] == before["imagenet32"] == "missing"
    (elsewhere / "data" / "celeba").mkdir(parents=True)
    after = {data.name: data.availability for data in flowgen.list_datasets()}
    assert after == before | {"celeba": "present"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flowgen.train(["model=glow"]), "is not a string"),
        (lambda: flowgen.evaluate(3), "int is not a run"),
        (lambda: flowgen.score("zoo/glow_mnist", torch.zeros(1, 1, 28, 28)), "is not a model"),
        (lambda: flowgen.create_model("glow", image_shape=(1, 28)), "image_shape must be"),
        (lambda: flowgen.create_model("glow", image_shape=28), "image_shape must be"),
    ],
)
def test_wrong_arguments_are_user_errors(call, message):
    with pytest.raises(flowgen.UserError, match=message):
        call()


def test_no_images_have_no_scores():
    model = flowgen.create_model("nice", image_shape=(1, 4, 4), width=4)
    assert flowgen.score(model, torch.zeros(0, 1, 4, 4, dtype=torch.uint8)).shape == (0,)
