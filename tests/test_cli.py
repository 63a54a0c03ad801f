"""The command line: every command, and one plain line for every mistake."""

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image

import flowgen
from flowgen.commands.sample import sample_images
from flowgen.config.compose import read_config
from flowgen.data.preprocess import read_images
from flowgen.evaluation.interpolation import great_circle, line
from flowgen.models.flows.flow import Flow
from flowgen.utils import rendering


def assert_plain(result: tuple[int, str, str], words: str, status: int = 1) -> None:
    code, _, error = result
    last = error.splitlines()[-1]
    assert code == status and last.startswith("flowgen: ") and words in last, result
    assert (
        "Traceback" not in error
        and sum(line.startswith("flowgen: ") for line in error.splitlines()) == 1
    )


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_help_answers_without_torch():
    code = "import sys; sys.argv = ['flowgen', '--help']; from flowgen.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    began = time.monotonic()
    output = run_python("-c", code).stdout
    assert time.monotonic() - began < 2  # 0.15 s on an idle core
    assert output.splitlines()[-1] == "False"
    for command in ("train", "resume", "sample", "interpolate", "evaluate", "runs"):
        assert command in output


def test_python_m_flowgen_is_flowgen():
    assert (
        run_python("-m", "flowgen", "--help").stdout
        == run_python("-c", "from flowgen.cli import main; main()").stdout
        != ""
    )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("model=gl", "model=glow"), ("data=cel", "data=celeba_hq"), ("mod", "model=")],
)
def test_completion(typed, offered):
    result = run_python(
        "-m",
        "flowgen",
        _FLOWGEN_COMPLETE="bash_complete",
        COMP_WORDS=f"flowgen train {typed}",
        COMP_CWORD="2",
    )
    assert f"plain,{offered}" in result.stdout.splitlines()


def test_train_help_lists_what_there_is(command):
    status, output, _ = command("train", "--help")
    assert (
        status == 0
        and "glow" in output
        and "mnist_sample" in output
        and "steps_per_level" in output
    )


def test_cfg_job_prints_and_trains_nothing(command, elsewhere):
    for words in (
        ["--cfg", "job", "data=mnist", "trainer.minutes=9"],
        ["data=mnist", "--cfg", "job", "trainer.minutes=9"],
    ):
        status, output, _ = command("train", *words)
        assert (
            status == 0
            and "flowgen.data.mnist.MNIST" in output
            and "minutes: 9" in output
            and "steps: null" in output
        )
    assert not (elsewhere / "outputs").exists()


def test_commands_take_the_newest_run_by_default(images, command, elsewhere):
    assert command("runs")[1].startswith("no runs")
    assert command("train", *SMALL, f"data.root={images}", "trainer.steps=2")[0] == 0
    folders = list((elsewhere / "outputs").glob("*/*_glow_folder"))
    assert len(folders) == 1
    status, output, _ = command("runs")
    assert (
        status == 0
        and folders[0].name in output
        and "step 2" in output
        and "bits_per_dim" in output
    )
    status, output, _ = command("sample", "--count", 5)
    assert status == 0 and Path(output.strip()).resolve() == folders[0] / "sample.png"
    for name in (
        folders[0],
        folders[0].name,
        folders[0] / "checkpoints" / "best.pt",
        folders[0].relative_to(elsewhere / "outputs"),
    ):
        assert command("evaluate", "--run", name)[0] == 0


def test_sample_draws_a_block_for_each_temperature(tiny_run, command, tmp_path):
    out = tmp_path / "grid.png"
    words = [
        "--run",
        tiny_run,
        "--temperature",
        0,
        "--temperature",
        0.7,
        "--count",
        3,
        "--out",
        out,
    ]
    assert command("sample", *words)[0] == 0
    both = Image.open(out).copy()
    assert command("sample", *words)[0] == 0
    assert Image.open(out).tobytes() == both.tobytes()
    assert (
        command("sample", "--run", tiny_run, "--temperature", 0.7, "--count", 3, "--out", out)[0]
        == 0
    )
    assert both.height == 2 * Image.open(out).height


def test_samples_are_sorted_by_log_probability(tiny_run, monkeypatch, command):
    from flowgen.commands import sample

    drawn = {}

    def blocks(titled, bits, columns):
        drawn.update(titled)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(sample.pictures, "blocks", blocks)
    assert command("sample", "--run", tiny_run, "--count", 6)[0] == 0
    model = flowgen.load(tiny_run)
    images, worth = sample.draw(model, 6, 0.7, 0)
    assert torch.equal(drawn["temperature 0.7"], images[worth.argsort(descending=True)])


@pytest.mark.parametrize("way", [(), ("--spherical",)])
def test_interpolation_ends_at_the_images(tiny_run, images, command, tmp_path, monkeypatch, way):
    from flowgen.commands import interpolate

    rows = []
    monkeypatch.setattr(
        interpolate.pictures,
        "blocks",
        lambda titled, bits, columns: rows.extend(titled) or Image.new("L", (1, 1)),
    )
    ends = [
        images / "000.png",
        save_image(tmp_path / "other.png", (20, 30)),
    ]  # grey, and of another size
    status, _, error = command("interpolate", *ends, "--run", tiny_run, "--steps", 5, *way)
    assert status == 0 and "differ" not in error
    wanted = torch.cat([read_images(path, 8, 3, None, 5) for path in ends])
    for _, pixels in rows:
        assert pixels.shape == (5, 3, 8, 8) and torch.equal(pixels[[0, -1]], wanted)


def test_interpolation_as_a_film(tiny_run, images, command, tmp_path):
    film = tmp_path / "film.gif"
    assert (
        command(
            "interpolate",
            images / "000.png",
            images / "001.png",
            "--run",
            tiny_run,
            "--steps",
            4,
            "--out",
            film,
        )[0]
        == 0
    )
    assert Image.open(film).n_frames == 6


def test_samples_beyond_float32_are_counted(tiny_run, command, tmp_path):
    status, _, error = command(
        "sample",
        "--run",
        tiny_run,
        "--temperature",
        "1e38",
        "--count",
        4,
        "--out",
        tmp_path / "a.png",
    )
    assert status == 0 and "4 of 4 samples at temperature 1e+38" in error


def test_a_title_is_never_cut():
    one = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    narrow, wide = (
        rendering.blocks([(title, one)], 5, 1)
        for title in ("a", "a title that is longer than its grid is wide")
    )
    assert narrow.width < 100 < wide.width


def test_great_circle_keeps_the_length_and_the_ends():
    start, end = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    share = torch.linspace(0, 1, 5)[:, None]
    path = great_circle(start, end, share)
    assert torch.equal(path[0], start) and torch.equal(path[-1], end)
    assert torch.allclose(path.norm(dim=1), torch.linspace(2, 4, 5)) and torch.allclose(
        path[2], torch.tensor([1.0, 1.0]) * 3 / 2**0.5
    )
    assert torch.equal(line(start, end, share)[[0, -1]], torch.stack([start, end]))


def test_evaluate_builds_the_model_once_and_beforehand_as_shapes_alone(
    tiny_run, command, monkeypatch
):
    built, init = [], Flow.__init__

    def watched(flow: Flow, *args: object, **settings: object) -> None:
        built.append(torch.empty(0).device.type)
        init(flow, *args, **settings)

    monkeypatch.setattr(Flow, "__init__", watched)
    assert command("evaluate", "--run", tiny_run)[0] == 0 and built == ["meta", "cpu"]


def test_evaluate_prints_one_json_object_that_names_its_conditions(tiny_run, command):
    status, output, _ = command("evaluate", "--run", tiny_run, "--json")
    figures = json.loads(output)
    assert (
        status == 0
        and figures["split"] == "test"
        and figures["bits"] == 5
        and figures["draws"] == 1
        and figures["images"] > 0
    )
    assert math.isfinite(figures["bits_per_dim"]) and figures["bits_per_dim_error"] > 0
    more = json.loads(
        command("evaluate", "--run", tiny_run, "--json", "num_importance_samples=4")[1]
    )
    assert (
        more["draws"] == 4
        and more["bits_per_dim"] <= figures["bits_per_dim"] + figures["bits_per_dim_error"]
    )
    assert "bits_per_dim" in command("evaluate", "--run", tiny_run)[1]


def test_sweep_lays_its_runs_side_by_side(images, command, tmp_path):
    words = [*SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={tmp_path / 'sweep'}"]
    assert command("train", *words, "model.log_scale=tanh,sigmoid", "-m")[0] == 0
    found = [path.parent.name for path in (tmp_path / "sweep").glob("*/config.yaml")]
    assert len(found) == 2 and any("model.log_scale=tanh" in name for name in found)


def test_a_failing_job_of_a_sweep_is_named_and_the_others_run(images, command, tmp_path):
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=1",
        f"output_dir={tmp_path / 'sweep'}",
        "model.width=zero,8",
        "-m",
    ]
    status, _, error = command("train", *words)
    assert (
        status == 1
        and "1 of 2 runs of the sweep failed" in error
        and "width must be a whole number" in error
    )
    assert len(list((tmp_path / "sweep").glob("*/checkpoints/last.pt"))) == 1


def test_a_folder_that_holds_a_run_is_refused(tiny_run, images, command):
    before = (tiny_run / "metrics.jsonl").read_text()
    assert_plain(
        command(
            "train", *SMALL, f"data.root={images}", "trainer.steps=1", f"output_dir={tiny_run}"
        ),
        "flowgen resume",
    )
    assert (tiny_run / "metrics.jsonl").read_text() == before


def test_runs_whose_folders_are_named_by_the_time_lie_side_by_side(images, command, tmp_path):
    words = [
        *SMALL,
        f"data.root={images}",
        "trainer.steps=1",
        f"output_dir={tmp_path}/runs/${{now:%Y}}",
    ]
    assert [command("train", *words)[0] for _ in range(3)] == [0, 0, 0]
    names = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert [name[4:] for name in names] == ["", "_2", "_3"]
    assert all(
        read_config(tmp_path / "runs" / name / "config.yaml")["out"].endswith(name)
        for name in names
    )


@pytest.mark.parametrize(
    ("words", "answer", "status"),
    [
        (["train", "model=glw"], "glow", 1),
        (["train", "data=celebs"], "celeba", 1),
        (
            ["train", "model=rbm", "model/negative_phase=cdd"],
            "no model/negative_phase=cdd: choose one of cd, mean_field",
            1,
        ),
        (["train", "hydra/launcher=cluster", "-m"], "flowgen[slurm]", 1),
        (["train", "model.wdith=3"], "model.wdith", 1),
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
        (["train", "experiment=true"], "no experiment=", 1),
        (["train", "experiment=nope"], "thesis/toy", 1),
        (["train", "+more=3"], "none can be added", 1),
        (["train", "out="], "name a folder", 1),
        (["train", "data=folder", "data.root="], "name a folder", 1),
        (["train", "trainer.minutes=0"], "minutes must be a number", 1),
        (["sample", "--seed", str(10**25)], "--seed", 2),
        (["report", "x", "--out", "page.pdf"], "end in .html", 2),
        (["train", "trainer.warmup=soon"], "1 epoch", 1),
        (["train", "trainer.ema_decay=[]"], "or several, as in trainer.ema_decay=[0.99,0.999]", 1),
        (["train", "trainer.ema_decay=[0.9,1]"], "ema", 1),
        (["train", "trainer.ema_decay=[0.9,x]"], "ema must be a number", 1),
        (["train", "trainer.ema_decay=abc"], "ema must be a number of at least 0, not 'abc'", 1),
        (["train", "--frobnicate"], "--frobnicate", 2),
        (["train", "data=folder"], "data.root is not set", 1),
        (["train", "data=folder", "data.root=nowhere"], "does not exist", 1),
        (["train", "data=celeba"], "mmlab", 1),
        (["train", "seed=1.5"], "seed must be a whole number", 1),
        (["train", "model.bits=5"], "did you mean data.bits?", 1),
        (
            ["train", "data=mnist", "data.channels=3"],
            "data.channels is a setting of data=celeba",
            1,
        ),
        (["sample", "--out", "grid"], "no name of a picture", 2),
        (["frobnicate"], "frobnicate", 2),
        (["resume", "nowhere"], "flowgen runs", 1),
        (["sample"], "flowgen train", 1),
        (["sample", "--temperature", "-1"], "at least 0", 2),
        (["sample", "--temperature", "nan"], "at least 0", 2),
        (["sample", "--temperature", "warm"], "at least 0", 2),
        (["sample", "--count", "0"], "0", 2),
        (["interpolate", "one.png"], "IMG2", 2),
        (["evaluate", "--run", "nowhere"], "flowgen runs", 1),
        (["train", "data=null"], "data=null chooses nothing: write data=NAME, one of celeba", 1),
        (["train", "data=folder", "data.root=null"], "data.root does not exist", 1),
        (["train", "out=' '"], "name a folder", 1),
        (["train", "--cfg", "nope"], "--cfg must be one of job, hydra, all", 1),
        (["train", "--info", "nope"], "--info must be one of all, config", 1),
        (["train", "seed=" + 5000 * "9"], "99... cannot be read", 1),
        (["train", "--cfg=nope"], "--cfg must be one of job, hydra, all", 1),
        (["train", f"seed={2**63}"], f"at most {2**63 - 1}", 1),
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
        (
            ["train", "trainer.init_images=1000000000000"],
            "trainer.init_images=1000000000000 needs",
            1,
        ),
        (["report", " "], "an empty name is no run", 1),
        (["chain", "--steps", "1" + 30 * "0"], "--steps", 2),
        (["chain", "--frames", "1" + 30 * "0"], "--frames", 2),
        (["interpolate", "a.png", "b.png", "--steps", "1" + 30 * "0"], "--steps", 2),
        (["report", ""], "an empty name is no run", 1),
        (["report", "x", "--out", "/dev/full.html"], "the machine's devices", 1),
        (["sample", "--out", "/dev/full.png"], "the machine's devices", 2),
        *(
            (
                ["train", f"data={name}", "data.root=null", "data.search_dirs=[]"],
                "data.root does not exist",
                1,
            )
            for name in ("mnist", "svhn")
        ),
        (
            ["train", "data=cifar10", "data.root=null", "data.search_dirs=[]"],
            "data.root does not exist",
            1,
        ),
    ],
)
def test_mistakes_get_one_line(command, words, answer, status):
    assert_plain(command(*words), answer, status)


def test_what_cannot_fit_is_refused_with_the_most_that_does(tiny_run, command, tmp_path):
    assert_plain(
        command("sample", "--run", tiny_run, "--count", 10**9), "any number in --out FILE.zip"
    )
    assert_plain(
        command("interpolate", "a.png", "b.png", "--run", tiny_run, "--steps", 10**6 + 1),
        "--steps",
        2,
    )
    assert_plain(command("evaluate", "--run", tiny_run, f"draws={10**12}"), "at most 100000")
    assert_plain(command("sample", "--run", tiny_run, "--device", "meta"), "choose auto")
    words = [
        "sample",
        "--run",
        tiny_run,
        "--temperature",
        1,
        "--temperature",
        0.5,
        "--out",
        tmp_path / "a.zip",
    ]
    assert_plain(command(*words), "one temperature")


def test_a_zip_of_samples_holds_them_one_by_one(tiny_run, command, tmp_path):
    assert (
        command("sample", "--run", tiny_run, "--count", 67, "--out", tmp_path / "samples.zip")[0]
        == 0
    )
    model = flowgen.load(tiny_run)
    images, _ = sample_images(model, 67, 0.7, 0)
    with zipfile.ZipFile(tmp_path / "samples.zip") as archive:
        assert archive.namelist() == [f"{place:07d}.png" for place in range(67)]
        with archive.open("0000066.png") as file:
            pixels = torch.tensor(list(Image.open(file).tobytes())).view(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels, images[66].int() * 255 // (2**model.bits - 1))
    assert [path.name for path in tmp_path.glob("samples*")] == ["samples.zip"]


def test_data_that_is_none_gets_one_line(command, tmp_path):
    def train(root: Path) -> tuple[int, str, str]:
        return command(
            "train",
            *SMALL,
            f"data.root={root}",
            "trainer.steps=1",
            f"output_dir={tmp_path / 'run'}",
        )

    (tmp_path / "empty").mkdir()
    assert_plain(train(tmp_path / "empty"), "holds no image")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("words")
    assert_plain(train(tmp_path / "words"), "holds no image")
    for name in "ab":
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{name}.png").write_text("words")
        save_image(tmp_path / "dots" / f"{name}.png", (1, 1, 3))
    assert_plain(train(tmp_path / "text"), "is not an image")
    assert_plain(train(tmp_path / "dots"), "1x1 pixels")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.write(save_image(tmp_path / "x.png"), "x.png")
    (tmp_path / "short.zip").write_bytes((tmp_path / "whole.zip").read_bytes()[:-30])
    assert_plain(train(tmp_path / "short.zip"), "cut short")
    with zipfile.ZipFile(tmp_path / "bare.zip", "w") as archive:
        archive.writestr("readme.txt", "words")
    assert_plain(train(tmp_path / "bare.zip"), "holds no image")
    assert not (tmp_path / "run").exists()


def test_images_that_are_none_get_one_line(tiny_run, images, command, tmp_path):
    def interpolate(path: Path) -> tuple[int, str, str]:
        return command("interpolate", images / "000.png", path, "--run", tiny_run)

    (tmp_path / "text.png").write_text("words")
    assert_plain(interpolate(tmp_path / "text.png"), "is not an image")
    assert_plain(interpolate(save_image(tmp_path / "dot.png", (1, 1, 3))), "1x1 pixels")
    assert_plain(interpolate(tmp_path / "nowhere.png"), "does not exist")
    assert_plain(interpolate(tmp_path), "is a folder")


def test_checkpoints_that_are_none_get_one_line(tiny_run, command, tmp_path):
    path = tiny_run / "checkpoints" / "last.pt"
    for name, content in {
        "short.pt": path.read_bytes()[:5000],
        "text.pt": b"words",
        "empty.pt": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert_plain(command("sample", "--run", tmp_path / name), "no checkpoint of flowgen")
    torch.save({"weights": torch.rand(3)}, tmp_path / "foreign.pt")
    assert_plain(command("sample", "--run", tmp_path / "foreign.pt"), "no checkpoint of flowgen")
    state = torch.load(path, weights_only=True)
    state["config"]["model"]["width"] = 12
    torch.save(state, tmp_path / "other.pt")
    assert_plain(command("evaluate", "--run", tmp_path / "other.pt"), "weights are not those")


def test_overrides_that_would_part_model_and_data_get_one_line(tiny_run, command):
    assert_plain(command("evaluate", "--run", tiny_run, "data.bits=8"), "does not fit")
    assert_plain(command("resume", tiny_run, "trainer=gpu"), "one by one")


def test_flowgen_alone_and_train_h_are_help(command):
    assert command()[0] == 0 and command("train", "-h")[0] == 0


def test_debug_shows_the_traceback(command):
    with pytest.raises(ValueError, match="flowgen runs"):
        command("--debug", "evaluate", "--run", "nowhere")
