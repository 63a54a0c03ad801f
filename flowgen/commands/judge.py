"""A model with what is usual among its validation images, by which other images are judged."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgen.commands.kept import kept
from flowgen.config import build_data, find_model
from flowgen.data import Images
from flowgen.judging import Outliers, complexity
from flowgen.measures import BITS_PER_DIM, Metric
from flowgen.models import GenerativeModel
from flowgen.progress import Progress, bar
from flowgen.training.run import Run

BATCH = 50


@dataclass(frozen=True)
class Judge:
    """A model, its configuration and data, where its pictures go, and the outliers among its images."""

    model: GenerativeModel
    config: dict[str, Any]
    data: Images
    folder: Path
    outliers: Outliers

    @property
    def figure(self) -> str:
        """The name of the column that says how likely images are: bits/dim, or nats."""
        return likelihood_of(self.model).name

    def figures(self, levels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The likelihood in the model's unit, its percentile, and every score with its p-value: (batch,) each."""
        found = statistics_of(self.model, levels, generator)
        scores = self.outliers.scores(found)
        named = {self.figure: in_unit(self.model, found["log_prob"]), "percentile": self.outliers.percentile(found["log_prob"])}
        for name, p in self.outliers.p_values(scores).items():
            named |= {name: scores[name], f"{name}_p": p}
        return named


def likelihood_of(model: GenerativeModel) -> Metric:
    """What `in_unit` is."""
    return model.metric if model.metric == BITS_PER_DIM else model.score_metric


def in_unit(model: GenerativeModel, log_prob: Tensor) -> Tensor:
    """A log-probability in nats as bits/dim, where the model is compared by these."""
    return log_prob / (-math.log(2) * math.prod(model.shape)) if model.metric == BITS_PER_DIM else log_prob


def judge_of(name: str | None, count: int, seed: int, device: str) -> Judge:
    """The run's model, with `count` of its validation images judged beforehand. Raises FlowgenError."""
    return judge_by(*find_model(name, device, GenerativeModel), count, seed)


def judge_by(run: Run, checkpoint: dict[str, Any], model: GenerativeModel, count: int, seed: int, progress: Progress = bar) -> Judge:
    """The same of what `find_model` gives; `progress` is handed the validation images, a batch at a time."""
    config = checkpoint["config"]
    data = build_data(config)
    data.to(model.device)

    def judged() -> dict[str, Tensor]:
        held_out = min(count, len(data.validation))
        return statistics_of_all(model, data.batches("validation", BATCH, held_out), held_out, seed, progress)

    settings = sorted(config["data"].items(), key=str), checkpoint["figures"].get("log_z"), count, seed
    return Judge(model, config, data, run.folder, Outliers(kept(run, checkpoint, "validation", settings, judged)))


def statistics_of_all(
    model: GenerativeModel, batches: Iterable[Tensor], count: int, seed: int, progress: Progress = bar
) -> dict[str, Tensor]:
    """See `statistics_of`, of `count` images in batches: (count,) each."""
    generator = torch.Generator(model.device).manual_seed(seed)
    found = [statistics_of(model, levels, generator) for levels in progress(batches, "held-out images", -(-count // BATCH))]
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


@torch.no_grad()
def statistics_of(model: GenerativeModel, levels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What the model says of images and how complex they are, (batch,) each, on the CPU; in float32, as `flowgen evaluate`."""
    found = model.statistics(levels.to(model.device), generator)
    return {name: values.cpu() for name, values in found.items()} | {"complexity": complexity(levels.cpu())}
