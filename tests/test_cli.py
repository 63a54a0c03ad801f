"""The command line: every command, its help, and one plain line for every mistake."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image

import flowgen
from flowgen.cli import HELP_SECTIONS, cli
from flowgen.config.compose import read_config
from flowgen.config.settings import (
    GROUPS,
    SECTIONS,
    group_options,
    settings_of_file,
    settings_of_option,
)
from flowgen.data.preprocess import read_image
from flowgen.evaluation.interpolation import lerp, slerp
from flowgen.models.base import sample_images
from flowgen.models.flows.flow import Flow
from flowgen.utils import rendering


def assert_error(result: tuple[int, str, str], text: str, status: int = 1) -> None:
    """Check that a command failed with one line that contains the text."""
    code, _, error = result
    lines = error.splitlines()
    assert code == status, result
    assert text in lines[-1], result
    assert [line.startswith("flowgen: ") for line in lines].count(True) == 1, result
    assert lines[-1].startswith("flowgen: ")
    assert "Traceback" not in error


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_does_not_import_torch(arguments):
    code = f"""if True:
        import sys
        from flowgen.cli import main
        from flowgen.config import settings
        settings.GPU_DRIVERS = ()
        main({arguments})
        print('torch' in sys.modules, 'hydra' in sys.modules)
    """
    output = run_python("-c", code).stdout
    assert output.splitlines()[-1] == "False False"


@pytest.mark.parametrize("name", ["data", "models", "runs"])
def test_lists_do_not_import_torch(name):
    code = (
        f"import sys; from flowgen.cli import main; main(['{name}']); print('torch' in sys.modules)"
    )
    output = run_python("-c", code).stdout
    assert output.splitlines()[-1] == "False"


def test_help_shows_complete_summaries_in_groups(command):
    status, output, _ = command("--help")
    assert status == 0
    assert "..." not in output.partition("\n")[2]
    lines = [line.strip() for line in output.splitlines()]
    titles = [f"{title}:" for title in HELP_SECTIONS]
    assert [line for line in lines if line in titles] == titles
    summaries = [line for line in lines if line.split(" ")[0] in flowgen_commands()]
    assert len(summaries) == len(flowgen_commands())
    assert all(line.endswith(".") for line in summaries)


def flowgen_commands() -> list[str]:
    return list(cli.commands)


def test_command_without_arguments_and_short_option_show_help(command):
    assert command()[0] == 0
    assert command()[1] == command("-h")[1]
    assert command("train", "-h")[1] == command("train", "--help")[1]


def test_python_m_flowgen_is_flowgen():
    module = run_python("-m", "flowgen", "--help").stdout
    assert module == run_python("-c", "from flowgen.cli import main; main(['-h'])").stdout
    assert module


@pytest.mark.parametrize("name", flowgen_commands())
def test_every_command_has_help(command, name):
    status, output, _ = command(name, "--help")
    assert status == 0
    assert output.startswith(f"Usage: flowgen {name}")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("model = gl", "glow"),  # bash splits at the equals sign, and keeps `model=`
        ("model =", "glow"),
        ("--cfg = j", "job"),
        ("model=gl", "model=glow"),
        ("data=cel", "data=celeba_hq"),
        ("mod", "model="),
        ("trainer.st", "trainer.steps="),
        ("evaluation.ais_c", "evaluation.ais_chains="),
    ],
)
def test_completion(typed, completed):
    result = run_python(
        "-m",
        "flowgen",
        _FLOWGEN_COMPLETE="bash_complete",
        COMP_WORDS=f"flowgen train {typed}",
        COMP_CWORD=str(1 + len(typed.split())),
    )
    assert f"plain,{completed}" in result.stdout.splitlines()


def shown_keys(output: str) -> list[str]:
    lines = [line for line in output.splitlines() if line.startswith("  ") and line[2] != " "]
    return [line.split()[0] for line in lines]


def test_train_help_shows_every_setting_with_its_default_and_meaning(command):
    status, output, _ = command("train", "--help")
    assert status == 0
    keys = shown_keys(output)
    chosen = {"model": "glow", "data": "mnist_sample", "trainer": "auto"}
    for section, option in chosen.items():
        for key, setting in settings_of_option(section, option).items():
            assert key in keys
            assert setting.meaning.split(" ")[0] in output
    assert all(key in keys for key in settings_of_file("train"))
    for section in SECTIONS:
        assert f"{section}= is one of" in output


def test_train_help_shows_one_group(command):
    keys = shown_keys(command("train", "--help", "trainer")[1])
    assert "trainer.steps" in keys
    assert all(key.startswith("trainer.") for key in keys)
    output = command("train", "--help", "model=rbm")[1]
    keys = shown_keys(output)
    assert {"model.hidden", "model.negative_phase.gibbs_steps"} <= set(keys)
    assert all(key.startswith("model.") for key in keys)
    assert command("train", "model=rbm", "--help")[1] == output
    assert shown_keys(command("train", "--help", "experiment")[1]) == group_options("experiment")


def test_train_help_shows_the_defaults_that_a_model_changes(command):
    lines = command("train", "--help", "model=rbm", "trainer")[1].splitlines()
    (line,) = (line for line in lines if line.startswith("  trainer.optimizer "))
    assert line.split()[1] == "sgd"


def test_train_help_of_unknown_groups(command):
    assert_error(command("train", "--help", "models"), "no group 'models': choose one of model")
    assert_error(command("train", "--help", "model=glw"), "did you mean glow?")


def test_cfg_job_prints_the_configuration_and_trains_nothing(command, elsewhere):
    for arguments in (
        ["--cfg", "job", "data=mnist", "trainer.minutes=9"],
        ["data=mnist", "--cfg=job", "trainer.minutes=9"],
    ):
        status, output, _ = command("train", *arguments)
        assert status == 0
        assert "flowgen.data.mnist.MNIST" in output
        assert "minutes: 9" in output
        assert "steps: null" in output
    assert not (elsewhere / "outputs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        *([name] for name in flowgen_commands()),
        *(["train", group] for group in (*GROUPS, "model=rbm", "data=celeba", "trainer=gpu")),
    ],
    ids=" ".join,
)
def test_help_fits_80_columns_and_needs_no_knowledge_of_click(command, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    output = command(*arguments[:1], "--help", *arguments[1:])[1]
    assert max(map(len, output.splitlines())) <= 80
    assert "RANGE" not in output
    assert "${" not in output


def test_models_and_data_are_listed(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for name, rows in (("models", flowgen.list_models()), ("data", flowgen.list_datasets())):
        lines = command(name)[1].splitlines()[1:]
        assert [line.split()[0] for line in lines] == [row.name for row in rows]
        assert all(row.description in line for row, line in zip(rows, lines, strict=True))
        assert json.loads(command(name, "--json")[1]) == [row._asdict() for row in rows]


@pytest.mark.parametrize("width", [1000, 80, 40])
def test_tables_do_not_cut_names(command, monkeypatch, images, width):
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"outputs/{'a_long_name_' * repeats}end" for repeats in (1, 3)]
    for name in names:
        overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={name}"]
        assert command("train", *overrides)[0] == 0
    output = command("runs")[1]
    for name in (*names, "zoo/glow_fashion_mnist"):
        assert any(line.split()[0] == name for line in output.splitlines())
    assert re.search("glow +images +1 +bound", output)
    for name in ("models", "data"):
        assert max(map(len, command(name)[1].splitlines())) <= max(width, 95)


def test_runs_show_the_kind_of_likelihood(command, monkeypatch, two_runs):
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("glow", "rbm"):
        shutil.copytree(two_runs / name, f"outputs/{name}")
    shutil.copytree("outputs/glow", "outputs/noise")
    config = Path("outputs/noise/config.yaml")
    config.write_text(
        re.sub("dequantization: .*", "dequantization: gaussian:0.05", config.read_text())
    )
    # Runs of older versions do not record the kind.
    metrics = Path("outputs/noise/metrics.jsonl")
    metrics.write_text(metrics.read_text().replace(', "likelihood": "bound"', ""))
    lines = [line.split() for line in command("runs")[1].splitlines()]
    kinds = {words[0]: words[4] for words in lines if words[0].startswith(("outputs", "zoo/rbm"))}
    assert kinds == {
        "outputs/glow": "bound",
        "outputs/rbm": "exact",  # because four hidden units are enumerated
        "outputs/noise": "none",
        "zoo/rbm_mnist": "estimate",
    }


def test_commands_use_the_newest_run_by_default(images, command, elsewhere):
    assert command("runs")[1].startswith("no runs")
    assert command("train", *SMALL, f"data.root={images}", "trainer.steps=2")[0] == 0
    (folder,) = (elsewhere / "outputs").glob("*/*_glow_folder")
    status, output, _ = command("runs")
    assert status == 0
    assert folder.name in output
    assert "  2 " in output
    assert "bits_per_dim" in output
    status, output, _ = command("sample", "--count", 5)
    assert status == 0
    assert Path(output.strip()).resolve() == folder / "sample.png"
    for name in (
        folder,
        folder.name,
        folder / "checkpoints" / "best.pt",
        folder.relative_to(elsewhere / "outputs"),
    ):
        assert command("evaluate", "--run", name)[0] == 0


def test_sample_draws_a_block_for_each_temperature(tiny_run, command, tmp_path):
    out = tmp_path / "grid.png"
    options = ["--run", tiny_run, "--count", 3, "--out", out]
    both = [*options, "--temperature", 0, "--temperature", 0.7]
    assert command("sample", *both)[0] == 0
    first = Image.open(out).copy()
    assert command("sample", *both)[0] == 0
    assert Image.open(out).tobytes() == first.tobytes()
    assert command("sample", *options, "--temperature", 0.7)[0] == 0
    assert first.height == 2 * Image.open(out).height


def test_samples_are_sorted_by_log_probability(tiny_run, monkeypatch, command):
    drawn = {}

    def titled_grids(rows, bits, columns):
        drawn.update(rows)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(rendering, "titled_grids", titled_grids)
    assert command("sample", "--run", tiny_run, "--count", 6)[0] == 0
    images, scores = sample_images(flowgen.load(tiny_run, device="cpu"), 6, 0.7, 0)
    assert torch.equal(drawn["temperature 0.7"], images[scores.argsort(descending=True)])


@pytest.mark.parametrize("options", [(), ("--spherical",)])
def test_interpolation_ends_at_the_images(
    tiny_run, images, command, tmp_path, monkeypatch, options
):
    rows = []

    def titled_grids(titled, bits, columns):
        rows.extend(titled)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(rendering, "titled_grids", titled_grids)
    gray_of_another_size = save_image(tmp_path / "other.png", (20, 30))
    ends = [images / "000.png", gray_of_another_size]
    status, _, error = command("interpolate", *ends, "--run", tiny_run, "--steps", 5, *options)
    assert status == 0
    assert "differ" not in error
    expected = torch.cat([read_image(path, 8, 3, None, 5) for path in ends])
    for _, pixels in rows:
        assert pixels.shape == (5, 3, 8, 8)
        assert torch.equal(pixels[[0, -1]], expected)


def test_interpolation_as_an_animation(tiny_run, images, command, tmp_path):
    out = tmp_path / "film.gif"
    ends = [images / "000.png", images / "001.png"]
    options = ["--run", tiny_run, "--steps", 4, "--out", out]
    assert command("interpolate", *ends, *options)[0] == 0
    assert Image.open(out).n_frames == 6


def test_samples_beyond_float32_are_counted(tiny_run, command, tmp_path):
    options = ["--temperature", "1e38", "--count", 4, "--out", tmp_path / "a.png"]
    status, _, error = command("sample", "--run", tiny_run, *options)
    assert status == 0
    assert "4 of 4 samples at temperature 1e+38" in error


def test_titles_are_never_cut():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    narrow, wide = (
        rendering.titled_grids([(title, image)], 5, 1)
        for title in ("a", "a title that is longer than its grid is wide")
    )
    assert narrow.width < 100 < wide.width


def test_great_circle_keeps_the_length_and_the_ends():
    start = torch.tensor([2.0, 0.0])
    end = torch.tensor([0.0, 4.0])
    share = torch.linspace(0, 1, 5)[:, None]
    path = slerp(start, end, share)
    assert torch.equal(path[0], start)
    assert torch.equal(path[-1], end)
    assert torch.allclose(path.norm(dim=1), torch.linspace(2, 4, 5))
    assert torch.allclose(path[2], torch.tensor([1.0, 1.0]) * 3 / 2**0.5)
    assert torch.equal(lerp(start, end, share)[[0, -1]], torch.stack([start, end]))


def test_evaluate_builds_the_model_once_and_before_that_without_memory(
    tiny_run, command, monkeypatch
):
    devices = []
    init = Flow.__init__

    def recorded(flow: Flow, *args: object, **kwargs: object) -> None:
        devices.append(torch.empty(0).device.type)
        init(flow, *args, **kwargs)

    monkeypatch.setattr(Flow, "__init__", recorded)
    assert command("evaluate", "--run", tiny_run)[0] == 0
    assert devices == ["meta", "cpu"]


def test_evaluate_prints_one_json_object_with_its_conditions(tiny_run, command):
    status, output, _ = command("evaluate", "--run", tiny_run, "--json")
    row = json.loads(output)
    assert status == 0
    assert row["split"] == "test"
    assert row["bits"] == 5
    assert row["likelihood"] == "bound"
    assert row["num_importance_samples"] == 1
    assert row["images"] > 0
    assert math.isfinite(row["bits_per_dim"])
    assert row["bits_per_dim_error"] > 0
    output = command("evaluate", "--run", tiny_run, "--json", "num_importance_samples=4")[1]
    more = json.loads(output)
    assert more["num_importance_samples"] == 4
    assert more["bits_per_dim"] <= row["bits_per_dim"] + row["bits_per_dim_error"]
    assert "bits_per_dim" in command("evaluate", "--run", tiny_run)[1]


def test_runs_of_a_sweep_lie_side_by_side(images, command, tmp_path):
    sweep = tmp_path / "sweep"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={sweep}"]
    assert command("train", *overrides, "model.log_scale=tanh,sigmoid", "-m")[0] == 0
    names = [path.parent.name for path in sweep.glob("*/config.yaml")]
    assert len(names) == 2
    assert any("model.log_scale=tanh" in name for name in names)


def test_failing_job_of_a_sweep_is_named_and_the_others_run(images, command, tmp_path):
    sweep = tmp_path / "sweep"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={sweep}"]
    result = command("train", *overrides, "model.width=zero,8", "-m")
    assert result[0] == 1
    assert "1 of 2 runs of the sweep failed" in result[2]
    assert "width must be a whole number" in result[2]
    assert len(list(sweep.glob("*/checkpoints/last.pt"))) == 1
    assert len([path for path in sweep.iterdir() if path.is_dir()]) == 1


def test_folder_with_a_run_is_refused(tiny_run, images, command):
    before = (tiny_run / "metrics.jsonl").read_text()
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={tiny_run}"]
    assert_error(command("train", *overrides), "flowgen resume")
    assert (tiny_run / "metrics.jsonl").read_text() == before


def test_folders_named_by_the_time_get_a_number(images, command, tmp_path):
    folder = tmp_path / "runs"
    overrides = [*SMALL, f"data.root={images}", "trainer.steps=1"]
    for _ in range(3):
        assert command("train", *overrides, f"output_dir={folder}/${{now:%Y}}")[0] == 0
    names = sorted(run.name for run in folder.iterdir())
    assert [name[4:] for name in names] == ["", "_2", "_3"]
    for name in names:
        assert read_config(folder / name / "config.yaml")["output_dir"] == str(folder / name)


MISTAKES = [
    (["train", "model=glw"], "no model=glw, did you mean glow?", 1),
    (["train", "data=celebs"], "celeba", 1),
    (
        ["train", "model=rbm", "model/negative_phase=cdd"],
        "no model/negative_phase=cdd, did you mean cd?: choose one of cd, mean_field",
        1,
    ),
    (["train", "model/negative_phase=cd"], "model/negative_phase", 1),
    (["train", "hydra/launcher=cluster", "-m"], "pip install hydra-submitit-launcher", 1),
    (["train", "hydra/launcher=basic"], "-m", 1),
    (["train", "model.wdith=3"], "did you mean model.width?: see conf/model/glow.yaml", 1),
    (["train", "model.wdith=3,4", "-m"], "did you mean model.width?", 1),
    (["train", "model=glow,glw", "-m"], "no model=glw", 1),
    (["train", "seed=1,2"], "flowgen train -m", 1),
    (["train", "model=glow,nice"], "flowgen train -m", 1),
    (["train", "model.width=five"], "whole number", 1),
    (["train", "trainer.lr=-1"], "lr must be a number", 1),
    (
        ["train", "trainer.steps=null", "trainer.minutes=null"],
        "trainer.steps or trainer.minutes",
        1,
    ),
    (["train", "trainer.device=cuda:99"], "choose auto", 1),
    (["train", "trainer.stepz=3"], "did you mean trainer.steps?", 1),
    (["train", "model=1000000"], "no model=1000000: choose one of", 1),
    (
        ["train", "model=rbm", "model/negative_phase=1.5"],
        "no model/negative_phase=1.5: choose one of cd",
        1,
    ),
    (["train", "experiment=true"], "no experiment=true", 1),
    (["train", "experiment=nope"], "thesis/toy", 1),
    (["train", "+more=3"], "not added", 1),
    (["train", "trainer"], "write KEY=VALUE", 1),
    (["train", "trainer=null"], "there is no trainer=null: choose one of auto", 1),
    (["train", "trainer={}"], "no trainer={}", 1),
    (["train", "evaluation={}"], "whole section", 1),
    (["train", "output_dir="], "name a folder", 1),
    (["train", "output_dir=' '"], "name a folder", 1),
    (["train", "data=folder", "data.root="], "name a folder", 1),
    (["train", "trainer.minutes=0"], "minutes must be a number", 1),
    (["train", "trainer.warmup=soon"], "1 epoch", 1),
    (["train", "trainer.ema_decay=[]"], "or several, as in trainer.ema_decay=[0.99,0.999]", 1),
    (["train", "trainer.ema_decay=[0.9,1]"], "ema", 1),
    (["train", "trainer.ema_decay=[0.9,x]"], "ema_decay must be a number", 1),
    (["train", "trainer.ema_decay=abc"], "ema_decay must be a number of at least 0, not 'abc'", 1),
    (["train", "--frobnicate"], "No such option '--frobnicate' (see `flowgen train --help`)", 2),
    (["train", "--cfg", "nope"], "--cfg", 2),
    (["train", "--cfg=nope"], "--cfg", 2),
    (["train", "--cfg", "job", "-m", "seed=1,2"], "leave -m out", 2),
    (["train", "data=folder"], "data.root is not set", 1),
    (["train", "data=folder", "data.root=nowhere"], "nowhere", 1),
    (["train", "data=folder", "data.root=null"], "data.root", 1),
    (["train", "data=celeba"], "mmlab", 1),
    (["train", "data=null"], "there is no data=null: choose one of celeba", 1),
    (["train", "seed=1.5"], "seed must be a whole number", 1),
    (["train", "seed=" + 5000 * "9"], "99... cannot be parsed", 1),
    (["train", f"seed={2**63}"], f"at most {2**63 - 1}", 1),
    (["train", "model.bits=5"], "did you mean data.bits?", 1),
    (["train", "model.ais_steps=5"], "did you mean evaluation.ais_steps?: see conf/train.yaml", 1),
    (["train", "data=mnist", "data.channels=3"], "data.channels is a setting of data=celeba", 1),
    (["train", "trainer.device=meta"], "choose auto", 1),
    (["train", "trainer.batch_size=1000000000000"], "at most", 1),
    (["train", "model.steps_per_level=1000000000"], "at most 1000", 1),
    (["train", "model.levels=1000000000000"], "at most 30", 1),
    (["train", "model=nice", "model.width=10000000"], "GiB of memory for its weights alone", 1),
    (
        [
            "train",
            "model=rbm",
            "model/negative_phase=cd",
            "model.negative_phase.gibbs_steps=1000000000000",
        ],
        "at most 100000",
        1,
    ),
    (["train", "trainer.init_images=1000000000000"], "trainer.init_images=1000000000000 needs", 1),
    *(
        (["train", f"data={name}", "data.root=null", "data.search_dirs=[]"], "data.root", 1)
        for name in ("mnist", "svhn", "cifar10")
    ),
    (["frobnicate"], "frobnicate", 2),
    (["resume", "nowhere"], "flowgen runs", 1),
    (["resume", "--frobnicate"], "(see `flowgen resume --help`)", 2),
    (["sample"], "flowgen train", 1),
    (["sample", "--out", "grid"], "not the path of an image", 2),
    (["sample", "--out", "/dev/full.png"], "/dev/full.png", 2),
    (["sample", "--seed", str(10**25)], "--seed", 2),
    (["sample", "--temperature", "-1"], "at least 0", 2),
    (["sample", "--temperature", "nan"], "at least 0", 2),
    (["sample", "--temperature", "warm"], "at least 0", 2),
    (["sample", "--count", "0"], "give a whole number from 1 to 1000000000", 2),
    (["sample", "--count", "many"], "give a whole number from 1 to 1000000000", 2),
    (["sample", "--guidance", "-1"], "at least 0", 2),
    (["explore", "--port", "65536"], "from 0 to 65535", 2),
    (["shell-completion"], "install", 2),
    (["shell-completion", "install", "--shell", "tcsh"], "bash", 2),
    (["chain", "--steps", "1" + 30 * "0"], "--steps", 2),
    (["chain", "--frames", "1" + 30 * "0"], "--frames", 2),
    (["chain", "--out", "chain.png"], ".gif", 2),
    (["interpolate", "one.png"], "IMG2", 2),
    (["interpolate", "a.png", "b.png", "--steps", "1" + 30 * "0"], "--steps", 2),
    (["evaluate", "--run", "nowhere"], "flowgen runs", 1),
    (["score"], "nothing to score", 2),
    (["report", " "], "an empty name", 1),
    (["report", ""], "an empty name", 1),
    (["report", "x", "--out", "page.pdf"], "end in .htm or .html", 2),
    (["report", "x", "--out", "/dev/full.html"], "/dev/full.html", 2),
]


@pytest.mark.parametrize(("arguments", "text", "status"), MISTAKES)
def test_mistakes_get_one_line(command, arguments, text, status):
    assert_error(command(*arguments), text, status)


def test_sizes_beyond_the_memory_are_refused_with_the_largest_that_fits(
    tiny_run, command, tmp_path
):
    run = ["--run", tiny_run]
    assert_error(command("sample", *run, "--count", 10**9), "any number in --out FILE.zip")
    steps = ["--steps", 10**6 + 1]
    assert_error(command("interpolate", "a.png", "b.png", *run, *steps), "--steps", 2)
    samples = f"num_importance_samples={10**12}"
    assert_error(command("evaluate", *run, samples), "at most 100000")
    assert_error(command("sample", *run, "--device", "meta"), "choose auto")
    temperatures = ["--temperature", 1, "--temperature", 0.5]
    archive = ["--out", tmp_path / "a.zip"]
    assert_error(command("sample", *run, *temperatures, *archive), "one temperature")


def test_zip_of_samples_has_one_file_per_sample(tiny_run, command, tmp_path):
    out = tmp_path / "samples.zip"
    assert command("sample", "--run", tiny_run, "--count", 67, "--out", out)[0] == 0
    model = flowgen.load(tiny_run, device="cpu")
    images, _ = sample_images(model, 67, 0.7, 0)
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == [f"{index:07d}.png" for index in range(67)]
        with archive.open("0000066.png") as file:
            pixels = torch.tensor(list(Image.open(file).tobytes())).view(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels, images[66].int() * 255 // (2**model.bits - 1))
    assert [path.name for path in tmp_path.glob("samples*")] == ["samples.zip"]


def test_invalid_data_gets_one_line(command, tmp_path):
    def train(root: Path) -> tuple[int, str, str]:
        run = f"output_dir={tmp_path / 'run'}"
        return command("train", *SMALL, f"data.root={root}", "trainer.steps=1", run)

    (tmp_path / "empty").mkdir()
    assert_error(train(tmp_path / "empty"), "contains no images")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("words")
    assert_error(train(tmp_path / "words"), "contains no images")
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.png").write_text("words")
        save_image(tmp_path / "dots" / f"{name}.png", (1, 1, 3))
    assert_error(train(tmp_path / "text"), "is not an image")
    assert_error(train(tmp_path / "dots"), "1x1 pixels")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.write(save_image(tmp_path / "x.png"), "x.png")
    (tmp_path / "short.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:-30])
    assert_error(train(tmp_path / "short.zip"), "cut short")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        archive.writestr("readme.txt", "words")
    assert_error(train(tmp_path / "bare.zip"), "contains no images")
    assert not (tmp_path / "run").exists()


def test_invalid_images_get_one_line(tiny_run, images, command, tmp_path):
    def interpolate(path: Path) -> tuple[int, str, str]:
        return command("interpolate", images / "000.png", path, "--run", tiny_run)

    (tmp_path / "text.png").write_text("words")
    assert_error(interpolate(tmp_path / "text.png"), "is not an image")
    assert_error(interpolate(save_image(tmp_path / "dot.png", (1, 1, 3))), "1x1 pixels")
    assert_error(interpolate(tmp_path / "nowhere.png"), "nowhere.png")
    assert_error(interpolate(tmp_path), "is a folder")


def test_invalid_checkpoints_get_one_line(tiny_run, command, tmp_path):
    path = tiny_run / "checkpoints" / "last.pt"
    contents = {"short.pt": path.read_bytes()[:5000], "text.pt": b"words", "empty.pt": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert_error(command("sample", "--run", tmp_path / name), "checkpoint of flowgen")
    torch.save({"weights": torch.rand(3)}, tmp_path / "foreign.pt")
    assert_error(command("sample", "--run", tmp_path / "foreign.pt"), "checkpoint of flowgen")
    state = torch.load(path, weights_only=True)
    state["config"]["model"]["width"] = 12
    torch.save(state, tmp_path / "other.pt")
    assert_error(command("evaluate", "--run", tmp_path / "other.pt"), "do not fit the model")


def test_overrides_that_separate_model_and_data_get_one_line(tiny_run, command):
    assert_error(command("evaluate", "--run", tiny_run, "data.bits=8"), "does not fit")
    assert_error(command("resume", tiny_run, "trainer=gpu"), "one by one")


def test_debug_shows_the_traceback(command):
    with pytest.raises(flowgen.UserError, match="flowgen runs"):
        command("--debug", "evaluate", "--run", "nowhere")
