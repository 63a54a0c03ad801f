"""Plots and titled pictures: averages that follow, frames that a bad start does not flatten."""

import math

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from flowgen.utils import plots, rendering
from flowgen.utils.metrics import BITS_PER_DIM


def test_a_moving_average_forgets_its_first_value():
    """After a jump it is within a twentieth of the jump in twenty points; a constant is its own average."""
    found = plots.moving_average([(step, 9.0 if step == 0 else 1.0) for step in range(100)])
    assert [x for x, _ in found] == list(range(100))
    assert (
        found[0][1] == 9
        and found[20][1] - 1 < 8 / 20
        and found[99][1] == pytest.approx(1, abs=0.01)
    )
    assert [
        y for _, y in plots.moving_average([(step, 3.0) for step in range(50)])
    ] == pytest.approx([3.0] * 50)
    weights = [0.95**age for age in (2, 1, 0)]
    expected = sum(weight * value for weight, value in zip(weights, (5, 7, 2), strict=True)) / sum(
        weights
    )
    assert plots.moving_average([(0, 5), (1, 7), (2, 2)])[-1][1] == pytest.approx(expected)


def test_limits_leave_out_what_is_beyond_and_what_is_not_finite():
    values = [1e6, math.nan, math.inf, *range(100)]
    low, high = plots.limits(values, (0.0, 0.02))
    assert -10 < low < 0 and 99 < high < 110
    assert plots.limits([math.nan]) is None
    low, high = plots.limits([2.0, 2.0])
    assert low < 2 < high
    low, high = plots.limits([1.0, 2.0], (0.05, 0.05))  # of a few values none is left out
    assert low < 1 and high > 2


@pytest.fixture
def drawn(monkeypatch):
    """Every line drawn: its name and its values."""
    named, errorbar = {}, Axes.errorbar

    def note(self, x, y, *rest, label, **style):
        named[label] = list(y)
        return errorbar(self, x, y, *rest, label=label, **style)

    monkeypatch.setattr(Axes, "errorbar", note)
    return named


@pytest.mark.parametrize("loss_is_metric", [True, False])
def test_curves_show_every_split_and_survive_what_is_not_finite(loss_is_metric, drawn, tmp_path):
    train = [
        {"step": step, "split": "train", "loss": 9 / step, "lr": 1e-3, "grad_norm": None}
        for step in range(1, 50)
    ]
    train[7]["loss"] = None
    if loss_is_metric:
        train = [row | {"bits_per_dim": row["loss"]} for row in train]
    held_out = [
        {"step": 10, "split": split, "bits_per_dim": 2.0} for split in ("validation", "test")
    ]
    plots.curves([*train, *held_out], BITS_PER_DIM, tmp_path / "curves.png")
    assert drawn.keys() == {
        "training loss",
        "training loss, moving average",
        "validation bits_per_dim",
        "test bits_per_dim",
    }
    assert len(drawn["training loss"]) == 48 and drawn["test bits_per_dim"] == [2.0]
    Image.open(tmp_path / "curves.png").verify()


@pytest.mark.filterwarnings("error")
def test_before_anything_is_judged_the_loss_stands_alone(drawn, tmp_path):
    plots.curves(
        [{"step": step, "split": "train", "loss": 9 / step} for step in (1, 2, 3)],
        BITS_PER_DIM,
        tmp_path / "curves.png",
    )
    assert drawn.keys() == {"training loss", "training loss, moving average"}


def test_curves_of_nothing_draw_nothing(tmp_path):
    plots.curves([], BITS_PER_DIM, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_blocks_lie_one_above_the_other_each_under_its_title():
    dark, bright = (
        torch.zeros(2, 1, 64, 64, dtype=torch.uint8),
        torch.full((2, 1, 64, 64), 31, dtype=torch.uint8),
    )
    one, two = (rendering.blocks([("a", dark), ("b", bright)][:count], 5, 8) for count in (1, 2))
    assert two.size == (one.width, 2 * one.height)
    assert two.getpixel((20, 60)) == (0, 0, 0) and two.getpixel((20, one.height + 60)) == (
        255,
        255,
        255,
    )
