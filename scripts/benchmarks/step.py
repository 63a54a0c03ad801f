"""Profile the training step of a Glow with torch.profiler.

Usage: python scripts/benchmarks/step.py [OVERRIDE...], with overrides of `flowgen train`.

The script prints two tables: the shares of the phases of a step, and the shares of the kinds of
operations over all phases.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile, record_function

from flowgen import cli
from flowgen.data.dataset import ImageDataset
from flowgen.training.trainer import Trainer

WARMUP_STEPS = 3
MEASURED_STEPS = 5
OVERRIDES = [
    "model=glow",
    "data=mnist_sample",
    "trainer=cpu",
    "trainer.minutes=null",
    f"trainer.steps={WARMUP_STEPS + MEASURED_STEPS}",
    "trainer.eval_images=16",
    "trainer.eval_every=1000000",
    "trainer.sample_every=1000000",
    "trainer.save_every=1000000",
]
PHASES: dict[str, list[tuple[Any, str]]] = {  # owner and name of the functions of a phase
    "batch": [(ImageDataset, "train_batch")],
    "forward": [(Trainer, "compute_loss")],
    "backward": [(torch.Tensor, "backward")],
    "norm and clipping": [
        (torch.nn.utils, "get_total_norm"),
        (torch.nn.utils, "clip_grads_with_norm_"),
    ],
    "optimizer and EMA": [(torch.optim.Adam, "step"), (AveragedModel, "update_parameters")],
}
OPERATIONS = {  # part of an operation's name: its kind; the first match counts
    "convolution_backward": "convolutions, backward",
    "convolution": "convolutions, forward",
    "_fused_adam": "optimizer",
    "copy": "copies",
    "cat": "copies",
    "clone": "copies",
    "mm": "matrix products",
    "linalg": "matrix products",
}


def label_calls(owner: Any, name: str, label: str) -> None:
    """Replace a function by one whose calls have a label in the profile."""
    call = getattr(owner, name)

    def labeled(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return call(*args, **kwargs)

    setattr(owner, name, labeled)


def kind_of(operation: str) -> str:
    """Return the kind of an operation of the profile."""
    for part, kind in OPERATIONS.items():
        if part in operation:
            return kind
    return "elementwise and other" if operation.startswith("aten::") else "Python and other"


def profiled(step: Callable[[Trainer], Any], profiler: profile) -> Callable[[Trainer], Any]:
    """Return a training step that starts and stops the profiler."""
    num_steps = 0

    def profiled_step(self: Trainer) -> Any:
        nonlocal num_steps
        if num_steps == WARMUP_STEPS:
            profiler.start()
        with record_function("step"):
            row = step(self)
        num_steps += 1
        if num_steps == WARMUP_STEPS + MEASURED_STEPS:
            profiler.stop()
        return row

    return profiled_step


def print_tables(profiler: profile) -> None:
    """Print the shares of phases and of operations."""
    events = profiler.key_averages()
    times = {event.key: event.cpu_time_total for event in events}
    step_time = times["step"]
    print(f"a step takes {step_time / MEASURED_STEPS / 1000:.0f} ms\n")
    print("| phase | share of a step |\n| --- | ---: |")
    for label in PHASES:
        print(f"| {label} | {times.get(label, 0) / step_time:.0%} |")
    rest = step_time - sum(times.get(label, 0) for label in PHASES)
    print(f"| other | {rest / step_time:.0%} |\n")
    print("| operations | share of a step |\n| --- | ---: |")
    kinds: Counter[str] = Counter()
    for event in events:
        kinds[kind_of(event.key)] += event.self_cpu_time_total
    for kind, time in kinds.most_common():
        print(f"| {kind} | {time / kinds.total():.0%} |")


def main(overrides: list[str]) -> None:
    for label, functions in PHASES.items():
        for owner, name in functions:
            label_calls(owner, name, label)
    profiler = profile(activities=[ProfilerActivity.CPU])
    Trainer.training_step = profiled(Trainer.training_step, profiler)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sys.argv = ["flowgen", "train", *OVERRIDES, f"output_dir={run}", *overrides]
        cli.main()
    print_tables(profiler)


if __name__ == "__main__":
    main(sys.argv[1:])
