"""Progress of long work, and one-line messages."""

import errno
import io
import logging
import re
import sys

import pytest

from flowgen import cli
from flowgen.utils import console
from flowgen.utils.console import (
    format_duration,
    format_table,
    no_progress,
    progress_bar,
    user_message,
)
from flowgen.utils.errors import UserError


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12, "12 s"),
        (61, "2 min"),
        (119, "2 min"),
        (1800, "30 min"),
        (7200, "2 h"),
        (3e5, "3 days"),
        (1e5, "28 h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UserError("choose another run"), "choose another run"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied", "a.png"), "a.png: Permission denied"),
        (
            OSError(errno.ENOTDIR, "Not a directory", "a/b.png.part"),
            "a/b.png: a folder of this path is a file: rename it, or choose another path",
        ),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory"), "not enough memory"),
        (ValueError("Expected more than 1 value per channel when training"), "more than one image"),
        (KeyError("x\ny"), "bug in flowgen"),
    ],
)
def test_every_error_is_one_line(error, text):
    message = user_message(error)
    assert text in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("step_seconds", "messages"),
    [(4.0, ["images: 3 of 100, about 6 min to go"]), (0.5, []), (0.001, [])],
)
def test_without_a_terminal_the_remaining_time_is_logged_once(
    monkeypatch, caplog, step_seconds, messages
):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    caplog.set_level(logging.INFO, "flowgen")
    clock = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: clock)
    for _ in progress_bar(range(100), "images", 100):
        clock += step_seconds
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == messages


def test_training_without_a_terminal_logs_the_remaining_time(tiny_run, command, monkeypatch):
    monkeypatch.setattr(console, "ETA_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(console, "MIN_REMAINING_SECONDS", 0.0)
    assert "steps: 7 of 9, about" in command("resume", tiny_run, "trainer.steps=9")[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_of_training_shows_the_loss_and_the_remaining_time_first(
    tiny_run, monkeypatch
):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["resume", str(tiny_run), "trainer.steps=9"])
    last = terminal.getvalue().split("\r")[-1]
    assert re.match(r"<= \d\.\d+ bits/dim, \d\d:\d\d left \|[█#]+\| 9/9 steps, \d+ images/s", last)
    assert len(last.splitlines()[0]) <= 80


@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80, 10**6])
def test_tables_fit_the_width_and_cut_nothing(width):
    rows = [("run", "step", "result"), ("outputs/2026-11-29/a", 12, "bits/dim 1.25 of a long run")]
    lines = format_table(rows, width)
    words = " ".join(lines).split()
    assert sorted(words) == sorted(word for row in rows for word in " ".join(map(str, row)).split())
    assert max(map(len, lines)) <= max(width, len("outputs/2026-11-29/a"))
    assert width < 10**6 or len(lines) == 2


def test_models_report_the_progress_of_loops(glow, rbm):
    loops = []

    def record(steps, description, total=None):
        loops.append((description, total))
        return steps

    for session in (glow, rbm):
        kwargs = {"sampler": "gibbs", "steps": 4} if session is rbm else {}
        session.model.set_progress(record)
        images, _ = session.model.sample(2, **kwargs)
        session.model.score(images, num_importance_samples=3)
        session.model.set_progress(no_progress)
    assert loops == [("importance samples", 3), ("gibbs", 4)]
