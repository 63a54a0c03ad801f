"""What trains where: one grammar of overrides for every command."""

import pytest

from flowgen.config import in_grammar, override
from flowgen.errors import FlowgenError

RUN = {"trainer": {"steps": 5, "lr": 0.1, "keep_at": []}, "data": {"root": None}, "seed": 0}


@pytest.mark.parametrize(
    ("word", "value"),
    [("trainer.steps=null", None), ("trainer.lr=1e-3", 1e-3), ("trainer.keep_at=[1,2]", [1, 2]), ("trainer.steps='1 epoch'", "1 epoch")],
)
def test_resume_reads_values_as_train_does(word, value):
    key = word.partition("=")[0].partition(".")[2]
    assert override(RUN, [word])["trainer"] == RUN["trainer"] | {key: value}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.stepz=3", "did you mean trainer.steps?"),
        ("trainer=gpu", "one by one"),
        ("trainer.steps=1,2", "sweep with `flowgen train -m`"),
        ("trainer.keep_at=[1", "close its brackets"),
        ("trainer.lr", "write KEY=VALUE"),
    ],
)
def test_words_that_resume_cannot_follow_are_said_plainly(word, said):
    with pytest.raises(FlowgenError, match=said.replace("?", "[?]")):
        override(RUN, [word])


def test_folders_may_have_any_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/jürgen")
    for typed, meant in {"~/x": "/home/jürgen/x", "/a=(b)/it's": "/a=(b)/it's", "/plain": "/plain"}.items():
        assert override(RUN, [f"data.root={typed}"])["data"]["root"] == meant
    assert in_grammar(["--cfg", "job", "out=/plain", "trainer.warmup=1 epoch"]) == [
        "--cfg",
        "job",
        "out=/plain",
        "trainer.warmup=1 epoch",
    ]
