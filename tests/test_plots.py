"""Plots and titled pictures."""

import io
import math
import zipfile

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from flowgen.utils import plots, rendering
from flowgen.utils.metrics import BITS_PER_DIM


def test_a_moving_average_forgets_its_first_value():
    points = [(step, 9.0 if step == 0 else 1.0) for step in range(100)]
    averages = plots.moving_average(points)
    assert [x for x, _ in averages] == list(range(100))
    assert averages[0][1] == 9
    assert averages[1][1] == pytest.approx(1 + 8 * 1 / 10)
    assert averages[20][1] == pytest.approx(1, abs=0.001)


def test_a_moving_average_is_a_weighted_mean():
    constant = plots.moving_average([(step, 3.0) for step in range(50)])
    assert [y for _, y in constant] == pytest.approx([3.0] * 50)
    average = plots.moving_average([(0, 5), (1, 7), (2, 2)])[-1][1]
    assert average == pytest.approx(2 / 11 * (0.1 * 5 + 0.9 * 7) + 9 / 11 * 2)
    late = plots.moving_average([(step, float(step == 300)) for step in range(302)])
    assert [y for _, y in late[-2:]] == pytest.approx([0.05, 0.95 * 0.05])


def test_limits_ignore_outliers_and_values_that_are_not_finite():
    values = [1e6, math.nan, math.inf, *range(100)]
    low, high = plots.limits(values, (0.0, 0.02))
    assert -10 < low < 0
    assert 99 < high < 110
    assert plots.limits([math.nan]) is None
    low, high = plots.limits([2.0, 2.0])
    assert low < 2 < high
    low, high = plots.limits([1.0, 2.0], (0.05, 0.05))  # with few values none is an outlier
    assert low < 1
    assert high > 2


@pytest.fixture
def drawn(monkeypatch):
    """The y values of every line that is drawn, by its name."""
    values = {}
    errorbar = Axes.errorbar

    def record(self, x, y, *rest, label, **style):
        values[label] = list(y)
        return errorbar(self, x, y, *rest, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", record)
    return values


@pytest.mark.parametrize("loss_is_metric", [True, False])
def test_curves_show_every_split_and_skip_missing_values(loss_is_metric, drawn, tmp_path):
    train = [
        {"step": step, "split": "train", "loss": 9 / step, "lr": 1e-3, "grad_norm": None}
        for step in range(1, 50)
    ]
    train[7]["loss"] = None
    if loss_is_metric:
        train = [row | {"bits_per_dim": row["loss"]} for row in train]
    evaluations = [
        {"step": step, "split": split, "bits_per_dim": 2.0}
        for step, split in ((5, "validation"), (10, "validation"), (10, "test"))
    ]
    plots.curves([*train, *evaluations], BITS_PER_DIM, tmp_path / "curves.png")
    assert drawn.keys() == {
        "training loss",
        "training loss, moving average",
        "validation bits_per_dim",
        "test bits_per_dim",
    }
    assert len(drawn["training loss"]) == 48
    assert drawn["test bits_per_dim"] == [2.0]
    Image.open(tmp_path / "curves.png").verify()


@pytest.mark.filterwarnings("error")
def test_before_the_first_evaluation_only_the_loss_is_plotted(drawn, tmp_path):
    rows = [{"step": step, "split": "train", "loss": 9 / step} for step in (1, 2, 3)]
    plots.curves(rows, BITS_PER_DIM, tmp_path / "curves.png")
    assert drawn.keys() == {"training loss", "training loss, moving average"}


def test_panels_of_single_points_are_skipped(drawn, tmp_path):
    train = [{"step": step, "split": "train", "loss": 9 / step} for step in (1, 2, 3)]
    validation = [{"step": 3, "split": "validation", "bits_per_dim": 2.0}]
    plots.curves([*train, *validation], BITS_PER_DIM, tmp_path / "curves.png")
    assert drawn.keys() == {"training loss", "training loss, moving average"}
    plots.curves([*train[:1], *validation], BITS_PER_DIM, tmp_path / "single.png")
    assert not (tmp_path / "single.png").exists()


def test_curves_without_rows_write_no_file(tmp_path):
    plots.curves([], BITS_PER_DIM, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_titled_grids_are_stacked():
    dark = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    bright = torch.full((2, 1, 64, 64), 31, dtype=torch.uint8)
    first = rendering.titled_grids([("a", dark)], 5, 8)
    both = rendering.titled_grids([("a", dark), ("b", bright)], 5, 8)
    assert both.size == (first.width, 2 * first.height)
    assert both.getpixel((20, 60)) == (0, 0, 0)
    assert both.getpixel((20, first.height + 60)) == (255, 255, 255)


def test_a_zip_has_every_image_in_its_own_size(tmp_path):
    images = torch.randint(32, (5, 3, 6, 4), dtype=torch.uint8)
    rendering.save_zip(images.split(2), 5, tmp_path / "images.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["images.zip"]
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        assert archive.namelist() == [f"{index:07d}.png" for index in range(5)]
        picture = Image.open(io.BytesIO(archive.read("0000003.png")))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(6, 4, 3)
    assert torch.equal(pixels.permute(2, 0, 1), (images[3].int() * 255 // 31).to(torch.uint8))
