"""What a training step of a Glow costs by its parts: python scripts/step.py [OVERRIDE...], as `flowgen train` takes them.

Shares of the time by torch.profiler: first the phases of a step, one after the other, then the kinds of operations in all of them.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile, record_function

from flowgen import cli
from flowgen.data.dataset import ImageDataset
from flowgen.training import trainer as trainer_module
from flowgen.training.trainer import Trainer

WARM, MEASURED = 3, 5  # steps
SETTINGS = [
    "model=glow",
    "data=mnist_sample",
    "trainer=cpu",
    "trainer.minutes=null",
    f"trainer.steps={WARM + MEASURED}",
]
QUIET = [
    "trainer.eval_images=16",
    *(f"trainer.{name}=1000000" for name in ("eval_every", "sample_every", "save_every")),
]
PHASES = ("the batch", "forward", "backward", "norm and clipping", "optimiser and average")
KINDS = {
    "convolution_backward": "convolutions, backward",
    "convolution": "convolutions, forward",
    "_fused_adam": "optimiser",
}
KINDS |= {
    "copy": "copies",
    "cat": "copies",
    "clone": "copies",
    "mm": "matrices",
    "linalg": "matrices",
}


def phase(owner: Any, name: str, label: str) -> None:
    """Have the profiler show the calls of a function under this label."""
    call = getattr(owner, name)

    def shown(*arguments: Any, **named: Any) -> Any:
        with record_function(label):
            return call(*arguments, **named)

    setattr(owner, name, shown)


def kind(operation: str) -> str:
    found = [label for part, label in KINDS.items() if part in operation]
    return (
        found[0]
        if found
        else "other operations, number by number"
        if operation.startswith("aten::")
        else "Python and the rest"
    )


def main(words: list[str]) -> None:
    phase(ImageDataset, "next", "the batch")
    phase(torch.Tensor, "backward", "backward")
    phase(trainer_module, "gradient_norm", "norm and clipping")
    phase(torch.nn.utils, "clip_grads_with_norm_", "norm and clipping")
    phase(torch.optim.AdamW, "step", "optimiser and average")
    phase(AveragedModel, "update_parameters", "optimiser and average")
    step, done = Trainer.training_step, [0]
    profiler = profile(activities=[ProfilerActivity.CPU])

    def watched(trainer: Trainer) -> dict[str, float]:
        if done[0] == WARM:
            phase(trainer.model, "forward", "forward")
            profiler.start()
        with record_function("step"):
            row = step(trainer)
        done[0] += 1
        if done[0] == WARM + MEASURED:
            profiler.stop()
        return row

    Trainer.training_step = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        sys.argv = [
            "flowgen",
            "train",
            *SETTINGS,
            *QUIET,
            f"output_dir={Path(name) / 'run'}",
            *words,
        ]
        cli.main()
    table(profiler)


def table(profiler: profile) -> None:
    events = profiler.key_averages()
    whole = {event.key: event.cpu_time_total for event in events if event.key in (*PHASES, "step")}
    print(
        f"a step takes {whole['step'] / MEASURED / 1000:.0f} ms\n\n| phase | share of a step |\n| --- | ---: |"
    )
    for name in PHASES:
        print(f"| {name} | {whole[name] / whole['step']:.0%} |")
    print(
        f"| the rest | {1 - sum(whole[name] for name in PHASES) / whole['step']:.0%} |\n\n| operations | share of a step |\n| --- | ---: |"
    )
    kinds: Counter[str] = Counter()
    for event in events:
        kinds[kind(event.key)] += event.self_cpu_time_total
    for name, time in kinds.most_common():
        print(f"| {name} | {time / kinds.total():.0%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
