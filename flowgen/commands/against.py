"""How well the scores of a model tell other data from its own: `flowgen score --against`."""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from flowgen.commands.judge import BATCH, Judge, judge_of, statistics_of_all
from flowgen.commands.runs import readable_runs
from flowgen.config import build_data, data_section, in_shape, of_the_same_images, read_config
from flowgen.data import Images
from flowgen.errors import FlowgenError
from flowgen.judging import AUROC, auroc
from flowgen.measures import Metric
from flowgen.targets import class_of
from flowgen.training.find import find_checkpoint
from flowgen.training.portable import about_portable, zoo, zoo_file

RATES = (0.01, 0.05, 0.1)  # of false alarms
log = logging.getLogger("flowgen")


class Way(NamedTuple):
    """From the test images of a run to others: AUROC by score, and the false alarms by score at each of `RATES`.

    The error of the latter is that of `images`, the harmonic sum of the test images and of those that calibrate.
    """

    title: str
    found: dict[str, AUROC]
    alarms: dict[str, list[float]]
    images: float


def compare(judge: Judge, words: list[str], count: int, seed: int, device: str) -> Iterator[str]:
    """AUROC of every score, `count` test images of the run against as many of other data, and back; and the p-values' false alarms.

    `words` are a data set as for training, or the run of a model of it. Without a run the way back is that of the newest model of those
    images. Raises FlowgenError for a data set or a run that there is not.
    """
    if any(word.startswith("data=") for word in words):
        section = data_section(words)
        name = _model_of(section, judge.model.metric)
    else:
        if len(words) > 1:
            raise FlowgenError("--against names several runs: name one, or compare one after the other")
        name = words[0]
        section = find_checkpoint(name)[1]["config"]["data"]
    ways = [(judge, section, images_for(judge, section))]
    if name is None:
        log.warning("the way back needs a model of %s: train one, or name its run by --against RUN", _title(section))
    else:
        back = judge_of(name, count, seed, device)
        ways.append((back, judge.config["data"], images_for(back, judge.config["data"])))
    yield from _table([one_way(*way, count, seed) for way in ways])


def images_for(judge: Judge, section: dict[str, Any]) -> Images:
    """The images of another data section, made into those that the run's model takes. Raises FlowgenError where these do not fit."""
    other = build_data({"data": in_shape(section, judge.config["data"], judge.model.shape, judge.model.bits)})
    if (other.shape, other.bits) != (judge.model.shape, judge.model.bits):
        raise FlowgenError(f"images of {other.shape} do not fit a model of {judge.model.shape}: compare data of the same shape")
    return other


def one_way(judge: Judge, section: dict[str, Any], other: Images, count: int, seed: int) -> Way:
    """From the run's test images to the `other` ones of a data section, at most `count` of each."""
    other.to(judge.model.device)
    sides = []
    for data in (judge.data, other):
        batches = data.batches("test", BATCH, count)
        sides.append(judge.outliers.scores(statistics_of_all(judge.model, batches, min(count, len(data.test)), seed)))
    own, others = sides
    p_values = judge.outliers.p_values(own)
    alarms = {name: [(p <= rate).double().mean().item() for rate in RATES] for name, p in p_values.items()}
    title = f"{_title(judge.config['data'])} -> {_title(section)}"
    independent = 1 / (1 / len(own["likelihood"]) + 1 / len(judge.outliers.calibration["log_prob"]))
    return Way(title, {name: auroc(own[name], others[name]) for name in own}, alarms, independent)


def _table(ways: list[Way]) -> Iterator[str]:
    width = max(len(way.title) for way in ways)
    yield f"{'AUROC':18} " + "  ".join(f"{way.title:>{width}}" for way in ways)
    for name in dict.fromkeys(name for way in ways for name in way.found):
        yield f"{name:18} " + "  ".join(f"{way.found.get(name, '')!s:>{width}}" for way in ways)
    for way in ways:
        yield f"\n{'false alarms, %':18} " + "  ".join(
            f"at {100 * rate:2.0f} ± {100 * math.sqrt(rate * (1 - rate) / way.images):.1f}" for rate in RATES
        )
        for name, rates in way.alarms.items():
            yield f"{name:18} " + "  ".join(f"{100 * rate:11.1f}" for rate in rates)


def _model_of(section: dict[str, Any], metric: Metric) -> str | None:
    """The newest run, else the model of the zoo, that was trained on these images and is compared by this metric."""
    configs = [(str(run.folder), read_config(run.config)) for run in readable_runs() if run.checkpoints()]
    configs += [(name, about_portable(zoo_file(name))["config"]) for name in zoo()]
    of_it = [(name, config) for name, config in configs if of_the_same_images(config["data"], section)]
    return next((name for name, config in of_it if getattr(class_of("model", config["model"]), "metric", None) == metric), None)


def _title(section: dict[str, Any]) -> str:
    return str(section.get("name") or (section.get("names") or [section.get("root") or "mnist_sample"])[0])
