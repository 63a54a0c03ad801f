"""How strange images are: the scores, what they are worth, and `flowgen score`."""

import csv
import logging
import math
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_image
from PIL import Image
from test_cli import assert_plain
from test_models import MODELS, glow, initialized, random_images

import flowgen
from flowgen.bijections.reshape import FactorOut
from flowgen.commands import score as against
from flowgen.commands.score import Scorer
from flowgen.config.instantiate import build_data
from flowgen.data.preprocess import ImageStream
from flowgen.evaluation.ood import OODDetector, auroc, log_kernel_density, png_complexity
from flowgen.models.flows.flow import Flow
from flowgen.utils.errors import UserError

FLOWS = [name for name in MODELS if name not in ("iaf",)]


def held_out(count: int, **changes: float) -> dict[str, torch.Tensor]:
    """Statistics of a made-up flow: independent normals of deviation 10 about a mean."""
    means = {
        "log_prob": -500.0,
        "log_base": -1000.0,
        "log_det": 500.0,
        "last_level": -100.0,
        "complexity": 900.0,
    } | changes
    return {name: mean + 10 * torch.randn(count) for name, mean in means.items()}


def test_auroc_of_two_gaussians_is_the_closed_form_within_its_error():
    """Phi(d / sqrt 2) for unit Gaussians at a distance d."""
    for distance in (0.0, 1.0, 2.5):
        found = auroc(torch.randn(2000).double(), distance + torch.randn(2000).double())
        expected = 0.5 * (1 + math.erf(distance / 2))
        assert abs(found.value - expected) < 4 * found.error and 0 < found.error < 0.02
    assert auroc(torch.zeros(50), torch.zeros(50)).value == 0.5
    assert (
        auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).value == 0.875
    )  # one tie among four pairs


def test_the_error_of_auroc_is_that_of_new_images():
    found = [
        auroc(torch.randn(300), 1 + torch.randn(300), resamples=100, seed=seed)
        for seed in range(100)
    ]
    spread = torch.tensor([each.value for each in found]).std().item()
    assert found[0].error == pytest.approx(spread, rel=0.3)


def test_p_values_raise_the_false_alarms_that_they_promise():
    outliers, own = OODDetector(held_out(4000)), held_out(4000)
    for name, p in outliers.p_values(outliers.scores(own)).items():
        for rate in (0.01, 0.05, 0.1):
            error = math.sqrt(rate * (1 - rate) * (1 / 4000 + 1 / 2000))
            assert abs((p <= rate).double().mean().item() - rate) < 4 * error, name
    few = OODDetector(held_out(18))
    assert min(
        p.min().item() for p in few.p_values(few.scores(held_out(500))).values()
    ) == pytest.approx(1 / 10)  # 9 calibrate


@pytest.mark.parametrize(
    ("changes", "blind", "seeing"),
    [
        (
            {"log_prob": -300.0, "complexity": 300.0},
            ["likelihood"],
            ["complexity", "typicality", "combined", "density_of_states"],
        ),
        (
            {"log_prob": -700.0, "complexity": 1500.0},
            ["complexity"],
            ["likelihood", "typicality", "combined", "density_of_states"],
        ),
        ({"last_level": -200.0}, ["likelihood", "complexity"], ["last_level", "density_of_states"]),
    ],
)
def test_each_score_sees_what_it_is_for(changes, blind, seeing):
    outliers = OODDetector(held_out(1000))
    own, others = (outliers.scores(held_out(200, **each)) for each in ({}, changes))
    found = {name: auroc(own[name], others[name]).value for name in own}
    assert all(found[name] > 0.99 for name in seeing) and all(
        found[name] < 0.6 for name in blind
    ), found


def test_what_is_usual_needs_four_images():
    with pytest.raises(UserError, match="at least 4 validation images"):
        OODDetector(held_out(3))
    assert all(
        scores.isfinite().all() for scores in OODDetector(held_out(4)).scores(held_out(2)).values()
    )


def test_percentile_is_the_share_of_likelier_images():
    outliers = OODDetector(held_out(10) | {"log_prob": torch.arange(10.0)})
    assert outliers.percentile(torch.tensor([-1.0, 0.0, 4.5, 9.0, 10.0])).tolist() == [
        100,
        90,
        50,
        0,
        0,
    ]
    assert outliers.percentile(torch.tensor([math.nan, -math.inf])).tolist() == [100, 100], (
        "all others are likelier"
    )


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_held_out_image_beyond_floats_is_the_strangest_and_leaves_the_others_their_p_values(
    broken, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    usual = held_out(40)
    usual["log_prob"][[0, 1]] = broken  # one of those that fit, one of those that calibrate
    outliers = OODDetector(usual)
    assert "2 of 40 validation images have scores beyond the range of float32" in caplog.text
    strange = held_out(1, log_prob=-900.0)
    p_values = outliers.p_values(outliers.scores(strange))
    for name in ("likelihood", "complexity", "combined", "typicality", "density_of_states"):
        assert p_values[name].item() == pytest.approx(2 / 21), name
    assert outliers.percentile(strange["log_prob"]).item() == 95
    with pytest.raises(UserError, match="nearly all"):
        OODDetector(usual | {"log_prob": torch.full((40,), broken)})


def test_the_kernel_density_is_that_of_the_points():
    found = log_kernel_density(torch.linspace(-2, 2, 5).double(), torch.randn(20_000).double())
    assert found == pytest.approx(
        (-0.5 * torch.linspace(-2, 2, 5).square() - 0.5 * math.log(2 * math.pi)).double(), abs=0.3
    )


def test_a_lossless_code_is_short_for_what_is_simple():
    ramp = torch.arange(0, 224, 8, dtype=torch.uint8)
    flat, slope, random = (
        torch.zeros(28, 28),
        (ramp[:, None] + ramp).float(),
        torch.randint(0, 256, (28, 28)).float(),
    )
    images = torch.stack((flat, slope, slope.T.roll(1), random)).to(torch.uint8)[:, None]
    found = png_complexity(images) / 784
    assert found[0] < 0.2 and found[1] < 0.6 and found[2] < 0.8 and 8 <= found[3] < 8.2
    surface = (
        128 + 100 * torch.sin(torch.arange(28.0)[:, None] / 5) * torch.cos(torch.arange(28.0) / 4)
    ).to(torch.uint8)
    assert png_complexity(surface[None, None]) < 8 * len(png_of(surface))


def png_of(images: torch.Tensor) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(images.numpy()).save(file, "PNG", optimize=True)
    return file.getvalue()


@pytest.mark.parametrize("name", FLOWS)
def test_the_terms_of_a_flow_add_up(name):
    model, images = initialized(name), random_images(5, 4)
    assert isinstance(model, Flow)
    found = model.statistics(images, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(found["log_prob"], model.score(images, generator=generator), rtol=1e-4)
    x, _ = model._dequantize(images, torch.Generator().manual_seed(0))
    assert torch.allclose(found["log_base"] + found["log_det"], model.log_density(x), rtol=1e-4)
    splits = [module for module in model.bijection.modules() if isinstance(module, FactorOut)]
    if not splits:
        assert torch.allclose(found["last_level"], model.log_density(x), rtol=1e-4)
        return
    given = []
    splits[-1].inner.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    model.log_density(x)
    z, log_det = splits[-1].inner(given[0])
    assert z.shape[1] < model.dimensions and torch.allclose(
        found["last_level"], flow_log_normal(z) + log_det, rtol=1e-4
    )


def flow_log_normal(z: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(0, 1).log_prob(z).sum(1)


@pytest.mark.parametrize("networks", [True, False])
def test_the_terms_of_a_flow_with_classes_are_means_over_its_posterior(networks):
    model, images = (
        MODELS["glow"](bits=5, classes=3, condition_networks=networks),
        random_images(5, 4),
    )
    model.initialize(random_images(5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    found = model.statistics(images, torch.Generator().manual_seed(0))
    assert torch.allclose(
        found["log_prob"],
        model.score(images, generator=torch.Generator().manual_seed(0)),
        rtol=1e-5,
    )
    x, _ = model._dequantize(images, torch.Generator().manual_seed(0))
    of_classes = model.class_log_density(x)
    expected = (of_classes.softmax(1) * of_classes).sum(1)
    assert torch.allclose(found["log_base"] + found["log_det"], expected, rtol=1e-5)


def test_a_stream_reads_images_folders_and_zips_and_counts_what_it_cannot(tmp_path, images, caplog):
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.write(images / "000.png", "a.png")
        archive.writestr("b.png", "words")
    stream = ImageStream(
        [images / "001.png", images, tmp_path / "some.zip"], size=8, channels=3, crop=None, bits=5
    )
    batches = list(stream.batches(16))
    assert len(stream) == 43 and [len(names) for names, _ in batches] == [16, 16, 10]
    assert batches[0][1].shape == (16, 3, 8, 8) and batches[0][1].max() < 32
    assert torch.equal(batches[0][1][0], batches[0][1][2]) and batches[2][0][-1].endswith(
        "some.zip/a.png"
    )
    assert "1 of 43 images skipped: b.png" in caplog.text
    for path in (tmp_path / "nowhere", tmp_path / "nowhere.zip"):
        with pytest.raises(UserError, match="does not exist"):
            ImageStream([path], size=8, channels=3, crop=None, bits=5)


def test_score_lists_the_strangest_first_and_writes_all(tiny_run, images, command, tmp_path):
    torch.manual_seed(1)
    Image.fromarray(torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()).save(
        images / "noise.png"
    )
    for name in ("validation_mine.pt", f"validation_{16 * 'a'}_{8 * '1'}.pt"):
        (tiny_run / name).touch()
    words = [
        "score",
        images,
        images / "noise.png",
        "--run",
        tiny_run,
        "--csv",
        tmp_path / "all.csv",
        "--out",
        tmp_path / "score.png",
    ]
    status, output, error = command(*words)
    assert status == 0, error
    lines = output.splitlines()
    assert "noise.png" in lines[1] and len(lines) == 1 + 20 + 1 + 2 and "and 22 more" in output
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert (
        len(rows) == 42
        and {"bits_per_dim", "percentile", "combined", "combined_p", "last_level_p"}
        <= rows[0].keys()
    )
    strange = max(rows, key=lambda row: float(row["bits_per_dim"]))
    assert strange["image"].endswith("noise.png") and float(strange["percentile"]) == 100
    picture = (tmp_path / "score.png").read_bytes()
    assert (
        command(*words)[1] == output and (tmp_path / "score.png").read_bytes() == picture
    )  # the second time from what was kept
    assert (
        len(list(tiny_run.glob("validation_*.pt"))) == 2
        and (tiny_run / "validation_mine.pt").exists()
    ), "only what it kept itself goes"


def test_the_bits_per_dim_of_score_are_the_models(tiny_run, images, command, tmp_path):
    assert (
        command("score", images / "000.png", "--run", tiny_run, "--csv", tmp_path / "all.csv")[0]
        == 0
    )
    model = flowgen.load(tiny_run)
    from flowgen.data.preprocess import read_images

    pixels = read_images(images / "000.png", 8, 3, None, 5)
    expected = -model.score(pixels, generator=torch.Generator().manual_seed(0)).item() / (
        192 * math.log(2)
    )
    assert float(
        next(csv.DictReader((tmp_path / "all.csv").open()))["bits_per_dim"]
    ) == pytest.approx(expected, rel=1e-4)


def test_against_prints_both_ways_where_a_run_of_the_other_data_is_there(
    tiny_run, command, tmp_path, monkeypatch
):
    other = tmp_path / "others"
    for number in range(80):
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
        other.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(other / f"{number}.png")
    words = [
        "score",
        "--run",
        tiny_run,
        "--against",
        "data=folder",
        "--against",
        f"data.root={os.path.relpath(other)}",
    ]
    status, output, error = command(*words)
    assert status == 0 and "train one" in error, error
    rows = {line.split()[0]: line.split() for line in output.splitlines() if "±" in line}
    assert float(rows["likelihood"][1]) > 0.9 and len(rows["likelihood"]) == 4
    assert (
        command(
            "train",
            *SMALL,
            f"data.root={other}",
            "trainer.steps=2",
            "output_dir=outputs/model.width=8",
        )[0]
        == 0
    )
    both = command(*words)[1]
    assert (
        len(
            {line.split()[0]: line.split() for line in both.splitlines() if "±" in line}[
                "likelihood"
            ]
        )
        == 7
    )
    assert command("score", "--run", tiny_run, "--against", "outputs/model.width=8")[1] == both, (
        "a run of a sweep"
    )


TOY = {
    "_target_": "flowgen.data.toy2d.Toy2D",
    "name": "moons",
    "num_points": 8,
    "bits": 8,
    "random_flip": False,
}


def judge_with(model: Flow) -> Scorer:
    return Scorer(model, {"data": TOY}, build_data({"data": TOY}), Path(), OODDetector(held_out(4)))


def test_data_that_does_not_fit_either_way_fails_before_any_is_scored(monkeypatch):
    monkeypatch.setattr(against, "find_checkpoint", lambda name: (None, {"config": {"data": TOY}}))
    monkeypatch.setattr(against, "load_scorer", lambda *given: judge_with(glow()))
    monkeypatch.setattr(against, "compare_ood", lambda *given: pytest.fail("scored"))
    with pytest.raises(UserError, match="do not fit"):
        list(against.compare(judge_with(glow(image_shape=(2, 1, 1), bits=8)), ["run"], 8, 0, "cpu"))


@pytest.mark.parametrize(
    ("words", "answer", "status"),
    [
        ([], "nothing to score", 2),
        (["nowhere.png"], "does not exist", 1),
        (["nowhere"], "does not exist: choose images", 1),
        (["text.png"], "is not an image", 1),
        (["empty"], "contains no images: choose images", 1),
        (["a.png", "--by", "beauty"], "beauty", 2),
        (["a.png", "--csv", "nowhere/all.csv"], "does not exist: create it", 1),
        (["a.png", "--out", "page.html"], "no name of a picture", 2),
        (["a.png", "--count", "1"], "--count", 2),
        (["--against", "data=cats"], "names no data", 1),
        (["--against", "data=folder"], "data.root", 1),
        (["--against", "data=folder", "--against", "data.colour=3"], "data.colour", 1),
        (["--against", "data=mnist"], "torchvision", 1),
        (["--against", "nowhere"], "flowgen runs", 1),
        (["--against", "a", "--against", "b"], "several runs", 1),
    ],
)
def test_what_cannot_be_scored_gets_one_line(
    tiny_run, command, elsewhere, monkeypatch, words, answer, status
):
    save_image(elsewhere / "a.png")
    (elsewhere / "text.png").write_text("words")
    (elsewhere / "empty").mkdir()
    monkeypatch.setattr("flowgen.data.dataset.download", refuse)
    assert_plain(command("score", *words, "--run", tiny_run), answer, status)


def refuse(files, folder):
    raise UserError("torchvision could not download it: get it")


def test_an_rbm_scores_in_nats_images_whose_bits_are_drawn_like_its_own(
    command, elsewhere, images, monkeypatch
):
    words = [
        "model=rbm",
        "data=folder",
        f"data.root={images}",
        "data.size=8",
        "model.hidden=4",
        "trainer.steps=3",
        "trainer.minutes=null",
    ]
    assert command("train", *words, "output_dir=outputs/rbm")[0] == 0
    status, _, error = command("score", images, "--csv", "all.csv")
    assert status == 0, error
    rows = list(csv.DictReader((elsewhere / "all.csv").open()))
    assert (
        len(rows) == 40
        and "bits_per_dim" not in rows[0]
        and "last_level" not in rows[0]
        and math.isfinite(float(rows[0]["combined"]))
    )
    assert_plain(
        command("score", images, "--by", "last_level"),
        "choose one of likelihood, complexity, combined, typicality",
    )
    grey = ImageStream([images], size=8, channels=1, crop=None, bits=1, binarization="dynamic")
    shares = torch.stack([pixels for _, pixels in grey.batches(40)][:1]).float().mean()
    exact = (
        torch.stack(
            [
                pixels
                for _, pixels in ImageStream(
                    [images], size=8, channels=1, crop=None, bits=8
                ).batches(40)
            ]
        )
        .float()
        .mean()
        / 255
    )
    assert shares == pytest.approx(exact.item(), abs=0.05)


def test_what_is_usual_is_found_anew_where_log_z_is(command, images):
    words = [
        "model=rbm",
        "data=folder",
        f"data.root={images}",
        "data.size=8",
        "model.hidden=4",
        "trainer.steps=3",
        "trainer.minutes=null",
    ]
    assert command("train", *words, "output_dir=outputs/rbm")[0] == 0

    def scored() -> list[dict[str, str]]:
        assert command("score", images, "--csv", "all.csv")[0] == 0
        with open("all.csv") as file:
            return list(csv.DictReader(file))

    before = scored()
    assert command("evaluate")[0] == 0
    after = scored()
    assert "unnormalized_log_probability" in before[0] and "log_probability" in after[0]
    for name in ("percentile", "likelihood_p"):
        assert [row[name] for row in after] == [row[name] for row in before]
