"""The kind of each printed likelihood: exact, bound, estimate or none."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import RBM, SMALL
from PIL import Image
from test_models import build_model, random_images
from torch import Tensor, nn

import flowgen
from flowgen.commands import sample
from flowgen.commands.runs import run_likelihood
from flowgen.models.base import EvalConfig
from flowgen.models.likelihood import LikelihoodModel
from flowgen.serving.session import ModelSession
from flowgen.training.run_dir import result_metric
from flowgen.utils import plots
from flowgen.utils.errors import UserError
from flowgen.utils.metrics import BITS_PER_DIM, LOG_LIKELIHOOD, Metrics, MetricValue

BINARY = ["data.bits=1", "data.channels=1"]
TOY = [
    "data=toy",
    "data.num_points=200",
    "trainer.steps=1",
    "trainer.minutes=null",
    "trainer.init_images=16",
    "trainer.eval_images=8",
]


class PointTable(LikelihoodModel):
    """A table of the probabilities of all 16 images of two numbers of two bits."""

    likelihood = "exact"

    def __init__(self) -> None:
        super().__init__((2, 1, 1), 2)
        self.log_probs = nn.Parameter(torch.randn(16).log_softmax(0))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return -self.log_prob(images).mean()

    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        pass

    def log_prob(
        self, images: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        x, y = images.long().flatten(1).T
        return self.log_probs[4 * y + x]

    def sample(
        self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        cells = torch.multinomial(self.log_probs.exp(), count, True, generator=generator)
        images = torch.stack((cells % 4, cells // 4), 1).view(-1, 2, 1, 1).to(torch.uint8)
        return images, self.log_prob(images)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images.flatten(1).float()

    def decode(self, latent: Tensor) -> Tensor:
        return latent.to(torch.uint8).view(-1, 2, 1, 1)


def test_bounds_have_a_sign_and_other_values_have_none():
    for kind in (None, "exact", "estimate", "none"):
        assert str(MetricValue(BITS_PER_DIM, 1.0, likelihood=kind)) == "bits_per_dim 1.000"
    bits = MetricValue(BITS_PER_DIM, 1.018, 0.002, likelihood="bound")
    nats = MetricValue(LOG_LIKELIHOOD, -86.1, 0.2, "test", "bound")
    assert str(bits) == "bits_per_dim <= 1.018 ± 0.002"
    assert str(nats) == "test log_likelihood >= -86.100 ± 0.200"


def test_rows_record_the_kind_and_old_rows_can_be_read():
    value = MetricValue(BITS_PER_DIM, 1.0, 0.1, "test", "bound")
    row = Metrics.of(value, images=7).row() | {"split": "test", "step": 1}
    assert row["likelihood"] == "bound"
    assert MetricValue.from_row(row, BITS_PER_DIM) == value
    old = {key: value for key, value in row.items() if key != "likelihood"}
    assert str(MetricValue.from_row(old, BITS_PER_DIM)) == "test bits_per_dim 1.000 ± 0.100"
    assert MetricValue.from_row(row | {"likelihood": "<="}, BITS_PER_DIM).likelihood is None
    glow = {"_target_": "flowgen.models.flows.glow.Glow"}
    assert run_likelihood(glow, [old]) == run_likelihood(glow, []) == "bound"
    assert run_likelihood(glow, [row | {"likelihood": "estimate"}]) == "estimate"
    assert run_likelihood(glow | {"dequantization": "gaussian:0.1"}, [old]) == "none"
    rbm = {"_target_": "flowgen.models.rbm.rbm.RBM"}
    assert run_likelihood(rbm, [{"log_z_error": 0.1}]) == "estimate"
    assert run_likelihood(rbm, [{"log_z_error": 0.0}]) == "exact"
    # A flow that was fitted by reverse KL estimates log Z too.
    assert run_likelihood(glow, [row | {"log_z_error": 0.0}]) == "bound"


@pytest.mark.parametrize(("exact_trace_dims", "kind"), [(192, "bound"), (191, "estimate")])
def test_flow_matching_of_large_images_estimates_a_bound(exact_trace_dims, kind):
    model = build_model("flow_matching", num_layers=1, exact_trace_dims=exact_trace_dims)
    assert model.likelihood == kind and model.averages_log_probs == (kind == "estimate")


def test_an_rbm_is_exact_if_a_layer_is_enumerated():
    for hidden, kind in ((4, "exact"), (17, "estimate")):
        rbm = flowgen.models.RBM(visible=(1, 5, 5), hidden=hidden).eval()
        images = random_images(1, 8, 1, (5, 5))
        metrics = rbm.evaluate([images], eval_config=EvalConfig(ais_steps=5, ais_chains=5))
        assert metrics["log_likelihood"].likelihood == kind == metrics.row()["likelihood"]


def test_binary_images_are_compared_in_nats():
    bits = {"split": "validation", "step": 1, "bits_per_dim": 0.2, "likelihood": "bound"}
    assert str(result_metric([bits])) == "validation bits_per_dim <= 0.200"
    both = bits | {"log_likelihood": -108.0}
    assert str(result_metric([both])) == "validation log_likelihood >= -108.000"


def test_every_command_prints_the_kind(command, images, monkeypatch):
    """A flow and an RBM of binary images stand on one scale."""
    monkeypatch.setenv("COLUMNS", "1000")
    flow = [*SMALL, *BINARY, "trainer.steps=2", f"data.root={images}", "output_dir=outputs/flow"]
    rbm = [*RBM, f"data.root={images}", "output_dir=outputs/rbm"]
    status, _, error = command("train", *flow)
    assert status == 0, error
    assert re.search(r"step 1  train  bits_per_dim <= \d", error)
    nats = r"log_likelihood >= -[\d.]+ ± [\d.]+"
    assert re.search(rf"test  bits_per_dim <= [\d.]+ ± [\d.]+  {nats}", error)
    assert command("train", *rbm)[0] == 0
    listed = {line.split()[0]: line for line in command("runs")[1].splitlines()}
    assert re.search(rf"bound +test {nats}, last validation {nats}", listed["outputs/flow"])
    assert re.search(r"exact +test log_likelihood -", listed["outputs/rbm"])
    page = Path(command("report", "outputs")[1].strip()).read_text()
    assert re.search(r"<td>bound</td><td>log_likelihood &gt;= -", re.sub(r">\s+<", "><", page))
    assert "<td>exact</td><td>log_likelihood -" in re.sub(r">\s+<", "><", page)
    out = command("evaluate", "--run", "flow")[1]
    assert re.search(r"bits_per_dim +<= [\d.]+ ± ", out)
    assert re.search(r"log_likelihood +>= -[\d.]+ ± [\d.]+ nats", out)
    results = json.loads(command("evaluate", "--run", "flow", "--json")[1])
    assert results["likelihood"] == "bound" and results["bits_per_dim"] > 0
    title, row = command("score", images / "000.png", "--run", "flow")[1].splitlines()[:2]
    assert title.split()[:4] == ["bits", "per", "dim", "log"]
    bits, log_prob = re.match(r" *<= ([\d.]+) +>= (-[\d.]+) ", row).groups()
    assert float(log_prob) == pytest.approx(-float(bits) * 64 * 0.6931, abs=0.05)
    title, row = command("score", images / "000.png", "--run", "rbm")[1].splitlines()[:2]
    assert title.split()[0] == "unnormalized" and "=" not in row
    words = ["--known", "left", "--run", "flow", "--steps", 20]
    status, _, error = command("complete", images / "000.png", *words)
    assert status == 0 and re.search(r"hmc: bits per dim <= \d", error)


def test_commands_that_need_a_likelihood_refuse_a_model_without_one(command, images):
    overrides = [
        "experiment=noise",
        "model.num_layers=[1]",
        *[key for key in SMALL if "steps_per_level" not in key],
        f"data.root={images}",
        "trainer.steps=1",
        "output_dir=outputs/noisy",
    ]
    assert command("train", *overrides)[0] == 0
    image = images / "000.png"
    for words in (
        ["score", image],
        ["score", "--ood", "data=toy"],
        ["evaluate", "compress=true"],
        ["compress", image, "--out", "a.flow"],
        ["complete", image, "--known", "left"],
    ):
        status, _, error = command(words[0], "--run", "noisy", *words[1:])
        assert status == 1 and len(error.splitlines()) == 1, (words, error)
    with pytest.raises(UserError, match="no likelihood of images: choose another run"):
        flowgen.score(flowgen.load("noisy"), random_images(5, 2))
    session = ModelSession("noisy")
    session.score_validation_images()
    assert session.scorer_error == "this model has no likelihood of images"


def test_the_density_of_points_is_constant_within_the_cell_of_an_image():
    model = PointTable()
    with torch.no_grad():
        density = sample._density_of_images(model, torch.Generator())
    assert torch.allclose(density, 16 * model.log_probs.exp().view(4, 4))
    assert density.mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "latents", "expected"),
    [
        ("exact", 2, ["data", "latents", "samples", "density"]),
        ("exact", 3, ["data", "samples", "density"]),
        ("none", 2, ["data", "latents", "samples"]),
    ],
)
def test_points_are_plotted_with_the_panels_that_the_model_has(
    kind, latents, expected, tmp_path, monkeypatch
):
    model = PointTable()
    model.likelihood = kind
    monkeypatch.setattr(model, "encode", lambda images, _: torch.randn(len(images), latents))
    titles: list[str] = []
    figure = plots.figure

    class Titles:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.context = figure(*arguments, **options)

        def __enter__(self):
            self.page = self.context.__enter__()
            return self.page

        def __exit__(self, *error: object) -> None:
            titles.extend(axes.get_title() for axes in self.page.axes)
            self.context.__exit__(*error)

    monkeypatch.setattr(plots, "figure", Titles)
    path = tmp_path / "points.png"
    sample.plot_toy2d(model, random_images(2, 50, 2, (1, 1)), 1.0, 30, 0, path)
    assert list(filter(None, titles)) == expected and Image.open(path).width > 300


def test_an_rbm_of_points_is_plotted_with_its_normalized_density(command):
    rbm = ["model=rbm", *TOY, "data.bits=1", "model.hidden=2", "output_dir=outputs/rbm"]
    status, _, error = command("train", *rbm)
    assert status == 0, error
    assert command("sample", "--run", "rbm", "--count", 50)[0] == 0
    model = flowgen.load("rbm")
    density = sample._density_of_images(model, torch.Generator())
    assert density.shape == (2, 2) and density.mean().item() == pytest.approx(1, abs=1e-5)
