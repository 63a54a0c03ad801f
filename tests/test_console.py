"""What is long says how long."""

import logging

import pytest

from flowgen.utils import console as progress
from flowgen.utils.console import in_words, no_progress, progress_bar


@pytest.mark.parametrize(
    ("seconds", "words"),
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
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("each", "said"), [(4.0, ["images: 3 of 100, about 6 min to go"]), (0.5, []), (0.001, [])]
)
def test_where_there_is_no_terminal_a_line_says_how_long_the_rest_takes(
    monkeypatch, caplog, each, said
):
    monkeypatch.setattr(logging.getLogger("flowgen"), "propagate", True)
    caplog.set_level(logging.INFO, "flowgen")
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    for _ in progress_bar(range(100), "images", 100):
        clock[0] += each
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == said


def test_a_training_without_a_terminal_says_how_long_it_will_take(tiny_run, command, monkeypatch):
    monkeypatch.setattr(progress, "ENOUGH", 0.0)
    monkeypatch.setattr(progress, "LONG", 0.0)
    assert "steps: 7 of 9, about" in command("resume", tiny_run, "trainer.steps=9")[2]


def test_what_a_model_does_many_times_is_shown(glow, rbm):
    shown = []

    def note(steps, what, total=None):
        shown.append((what, total))
        return steps

    for answers in (glow, rbm):
        answers.model.set_progress(note)
        images, _ = answers.model.sample(
            2, **({"method": "gibbs", "sweeps": 4} if answers is rbm else {})
        )
        answers.model.score(images, draws=3)
        answers.model.set_progress(no_progress)
    assert shown == [("draws", 3), ("gibbs", 4)]
