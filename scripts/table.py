"""The table of flows at equal cost: a row for every model and data set, each trained for as many minutes of processor time.

    python scripts/table.py --data mnist --models glow tarflow jet --minutes 15 [WORD...]

WORDs go to every `flowgen train`, as data.root=FOLDER. A row is kept in outputs/table/DATA_MODEL_MINUTES/row.json as it comes about; the
same command goes on where it was stopped, leaves out what is there, prints all rows, and shows samples of all models of a data set in one
picture. How many steps the minutes allow is found by two short trainings: the clock of a machine that does other work would not be fair.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flowgen
from flowgen.config.compose import read_config
from flowgen.training.run_dir import Run
from flowgen.utils.files import atomic_write
from flowgen.utils import rendering

FOLDER = Path("outputs/table")
SHORT, LONG = 10, 60  # steps of the trainings that find what one costs
DRAWS = (1, 16)
TEMPERATURE = 0.7
HEAD = (
    "| data | model | "
    + " | ".join(f"test bits/dim, {draws} draw{'s' * (draws > 1)}" for draws in DRAWS)
    + (" | parameters, millions | training images seen | CPU minutes | GFLOPs an image |")
)


class Row:
    """What is known of one model on one data set, kept in a file from the first figure on."""

    def __init__(self, data: str, model: str, minutes: float, words: list[str]):
        self.folder = FOLDER / f"{data}_{model}_{minutes:g}"
        self.run, self.file, self.minutes = (
            Run(self.folder / "run"),
            self.folder / "row.json",
            minutes,
        )
        self.words = [
            f"model={model}",
            f"data={data}",
            "trainer.minutes=null",
            "trainer.num_threads=1",
            *words,
        ]
        self.found: dict[str, Any] = {
            "data": data,
            "model": model,
            "minutes": minutes,
            "words": words,
        }
        if self.file.exists():
            kept = json.loads(self.file.read_text())
            if kept["words"] != words:
                sys.exit(
                    f"{self.file} is of other words, {kept['words']}: give those, or move it away"
                )
            self.found = kept

    def know(self, key: str, find: Callable[[], Any]) -> Any:
        """What `find` says, or has said before."""
        if key not in self.found:
            self.keep(key, find())
        return self.found[key]

    def keep(self, key: str, value: Any) -> None:
        self.found[key] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.file) as temporary:
            temporary.write_text(json.dumps(self.found, indent=1) + "\n")

    def fill(self) -> None:
        steps = self.know("steps", lambda: max(1, round(60 * self.minutes / self.cost())))
        if not self.run.has_ended():
            every = max(1, steps // 5)
            words = [
                f"trainer.steps={steps}",
                f"trainer.eval_every={every}",
                f"trainer.sample_every={steps}",
                "resume=true",
            ]
            _, seconds = called(
                "train", *self.words, *words, f"output_dir={self.run.folder}", last=self.spend
            )
            self.spend(seconds)
        self.know(
            "images_seen", lambda: steps * read_config(self.run.config)["trainer"]["batch_size"]
        )
        for key, find in {"parameters": parameters, "flops": flops}.items():
            self.know(key, lambda find=find: find(str(self.run.folder)))
        for draws in DRAWS:
            self.know(f"draws_{draws}", lambda draws=draws: self.evaluated(draws))
        samples = self.folder / "samples.png"
        self.know(
            "samples",
            lambda: called(
                *f"sample --run {self.run.folder} --count 16 --temperature {TEMPERATURE} --out {samples}".split()
            )[0].strip(),
        )

    def samples(self) -> tuple[str, Image.Image]:
        """Under the model's name; their temperature stands in the picture."""
        return self.found["model"], Image.open(self.found["samples"])

    def spend(self, seconds: float) -> None:
        self.keep("cpu_seconds", self.found.get("cpu_seconds", 0.0) + seconds)

    def cost(self) -> float:
        """Seconds of processor time a step."""
        spent = []
        for steps in (SHORT, LONG):
            out = self.folder / "short"
            shutil.rmtree(out, ignore_errors=True)
            spent.append(
                called(
                    "train",
                    *self.words,
                    f"trainer.steps={steps}",
                    "trainer.eval_images=1",
                    f"output_dir={out}",
                )[1]
            )
            shutil.rmtree(out)
        return max(1e-4, (spent[1] - spent[0]) / (LONG - SHORT))

    def evaluated(self, draws: int) -> dict[str, float]:
        said, _ = called("evaluate", "--run", str(self.run.folder), "--json", f"draws={draws}")
        return {
            key: value for key, value in json.loads(said).items() if key not in ("run", "split")
        }

    def line(self) -> str:
        """As the table has it."""
        names = [self.found["data"], f"`{self.found['model']}`"]
        figures = [self.found.get(f"draws_{draws}") for draws in DRAWS]
        bits = [
            f"{each['bits_per_dim']:.3f} ± {each['bits_per_dim_error']:.3f}" if each else ""
            for each in figures
        ]
        numbers = {
            "parameters": (1e6, ".2f"),
            "images_seen": (1, ",.0f"),
            "cpu_seconds": (60, ".1f"),
            "flops": (1e9, ".3f"),
        }
        rest = [
            format(self.found[key] / unit, how) if key in self.found else ""
            for key, (unit, how) in numbers.items()
        ]
        return f"| {' | '.join([*names, *bits, *rest])} |"


def called(*words: str, last: Callable[[float], None] | None = None) -> tuple[str, float]:
    """What `flowgen WORDS` prints, and the seconds of processor time that it took, told to `last` before a failure ends all."""
    print("$ flowgen", *words, file=sys.stderr, flush=True)
    before = spent()
    status = None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "flowgen", *words], stdout=subprocess.PIPE, text=True
        )
        status, seconds = done.returncode, spent() - before
    finally:
        if status != 0 and last is not None:
            last(spent() - before)
    if status:
        sys.exit(f"stopped with status {status}, see above: the same command goes on from here")
    return done.stdout, seconds


def spent() -> float:
    """Seconds of processor time of all ended children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def parameters(name: str) -> int:
    return sum(parameter.numel() for parameter in flowgen.load(name).parameters())


def flops(name: str) -> float:
    """Of convolutions and matrix products in a training step, attention's too, for each image."""
    model = flowgen.load(name)
    images = torch.zeros(2, *model.image_shape, dtype=torch.uint8)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # it counts no other kernel of attention on a CPU
        model(
            images, None if model.num_classes is None else torch.zeros(2, dtype=torch.long)
        ).backward()
    return counter.get_total_flops() / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="*", default=["mnist"])
    parser.add_argument(
        "--models", nargs="*", default=["glow", "realnvp", "nice", "maf", "tarflow", "jet"]
    )
    parser.add_argument("--minutes", type=float, default=15.0)
    given, words = parser.parse_known_args()
    rows = [Row(data, model, given.minutes, words) for data in given.data for model in given.models]
    for row in rows:
        row.fill()
    for data in given.data:
        picture = FOLDER / f"{data}_{given.minutes:g}.png"
        rendering.stack([row.samples() for row in rows if row.found["data"] == data]).save(picture)
    print(
        HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |", *(row.line() for row in rows), sep="\n"
    )


if __name__ == "__main__":
    main()
