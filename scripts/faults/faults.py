"""`make faults`: kills, full disks, signals, foreign files and odd command lines by the thousand, and a table of how they ended."""

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import disks
import foreign
import kills
import ranks
import zygote
from kills import Ground, Result

PARTS = ("kills", "ranks", "disks", "files", "lines")
MEMORY = Path("/dev/shm")  # where a thousand trainings spare the disk


def make_quick() -> None:
    """A small curves.png in place of matplotlib's, which would take nine tenths of the time; fewer batches for statistics, fewer sweeps."""
    from PIL import Image

    from flowgen.models.rbm.rbm import RBM
    from flowgen.training import trainer
    from flowgen.utils import plots

    plots.curves = lambda rows, metric, path: Image.new("L", (64, 64)).save(path)
    trainer.BN_UPDATE_BATCHES = 2
    RBM.sample = partialmethod(RBM.sample, sweeps=9)  # type: ignore[assignment]


def results(ground: Ground, seed: int, count: int, parts: list[str]) -> Iterator[Result]:
    """Of all parts at the same pace, so that each has come as far as the others whenever this is stopped."""
    few, many, of_ranks = max(1, count // 5), 2 * count, max(1, count // 50)
    folder = (
        foreign.Folder(ground, ground.folder / "whole" / "folder")
        if {"files", "lines"} & set(parts)
        else None
    )
    each: dict[str, tuple[int, Iterator[Result]]] = {
        "kills": (count, kills.kills(ground, seed, count)),
        "ranks": (of_ranks, ranks.kills_of_ranks(ground, seed, of_ranks)),
        "disks": (2 * few, disks.others(ground, seed, few)),
    }
    if folder:
        each |= {
            "files": (many, foreign.foreign_files(folder, seed, many)),
            "lines": (many, foreign.odd_lines(folder, seed, many)),
        }
    done = dict.fromkeys(parts, 0.0)
    while done:
        part = min(done, key=lambda name: done[name])
        wanted, coming = each[part]
        ground.share_cache()  # which some of them leave for one of their own
        if (result := next(coming, None)) is None:
            del done[part]
        else:
            done[part] += (result.hits if part in ("kills", "ranks") else 1) / wanted
            yield result


def keep(seed: int, result: Result, path: Path) -> None:
    """A line of JSON more, so that what is stopped counts as far as it has come."""
    with path.open("a") as file:
        file.write(json.dumps({"seed": seed, **result._asdict()}) + "\n")


def kept(path: Path) -> list[tuple[int, Result]]:
    """All that runs of any seed have left there."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line.pop("seed"), Result(**line)) for line in lines]


def table(found: list[tuple[int, Result]]) -> str:
    """A row for each kind: of which seeds, how many runs, how many of them were hit how often, and how many were at fault."""
    rows = ["| what | seeds | runs | hits | at fault |", "| --- | --- | --- | --- | --- |"]
    for kind in dict.fromkeys(result.kind for _, result in found):
        mine = [result for _, result in found if result.kind == kind]
        seeds = ", ".join(map(str, sorted({seed for seed, result in found if result.kind == kind})))
        hits, faults = (
            sum(result.hits for result in mine),
            sum(bool(result.fault) for result in mine),
        )
        rows.append(f"| {kind} | {seeds} | {len(mine)} | {hits} | {faults} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count",
        type=int,
        default=20,
        help="kills; a fiftieth of it of ranks, a fifth of it full disks, twice as many files and lines",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--at",
        type=Path,
        help="an empty folder to work in, which is kept; by default one in memory that is deleted",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="a file of JSON lines, one for each result; the table is of all that it holds",
    )
    options = parser.parse_args()
    zygote.warm()
    make_quick()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(
        prefix="faults-", dir=MEMORY if MEMORY.is_dir() else None
    ) as temporary:
        at, path = (
            options.at or Path(temporary) / "ground",
            options.results or Path(temporary) / "results",
        )
        path.touch()
        with contextlib.suppress(KeyboardInterrupt):
            for result in results(
                Ground(at, disks.can_mount(at)), options.seed, options.count, list(options.parts)
            ):
                keep(options.seed, result, path)
                if result.fault:
                    print(f"AT FAULT: {result.kind}, {result.what}: {result.fault}", flush=True)
        found = kept(path)
    print(
        f"\n{options.count} kills asked for, {(time.monotonic() - began) / 60:.0f} min\n\n{table(found)}"
    )
    sys.exit(any(result.fault for _, result in found))


if __name__ == "__main__":
    main()
