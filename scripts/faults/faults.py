"""`make faults`: kills, full disks, signals, foreign files and odd command lines by the thousand, and a table of how they ended."""

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import disks
import foreign
import kills
import zygote
from kills import Ground, Result

PARTS = ("kills", "disks", "files", "lines")


def make_quick() -> None:
    """A small curves.png in place of matplotlib's, which would take nine tenths of the time, and statistics over fewer batches."""
    from PIL import Image

    from flowgen import plots
    from flowgen.training import loop

    plots.curves = lambda rows, metric, path: Image.new("L", (64, 64)).save(path)
    loop.STATISTICS = 2


def results(ground: Ground, seed: int, count: int, parts: list[str]) -> Iterator[Result]:
    if "kills" in parts:
        yield from kills.kills(ground, seed, count)
    if "disks" in parts:
        yield from disks.others(ground, seed, count=max(4, count // 10), disks=max(2, count // 5))
    if {"files", "lines"} & set(parts):
        folder = ground.folder / "whole" / "folder"
        folder.mkdir(parents=True)
        prepared = foreign.Folder(ground, folder)
        if "files" in parts:
            yield from foreign.foreign_files(prepared, seed, 2 * count)
        if "lines" in parts:
            yield from foreign.odd_lines(prepared, seed, 2 * count)


def table(found: list[Result]) -> str:
    """A row for each kind: how many runs, how many of them were hit how often, and how many were at fault."""
    rows = ["| what | runs | hits | at fault |", "| --- | --- | --- | --- |"]
    for kind in dict.fromkeys(result.kind for result in found):
        mine = [result for result in found if result.kind == kind]
        rows.append(f"| {kind} | {len(mine)} | {sum(result.hits for result in mine)} | {sum(bool(result.fault) for result in mine)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="kills; a fifth as many full disks, twice as many files and lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--at", type=Path, help="an empty folder to work in, which is kept; by default one under /tmp that is deleted")
    options = parser.parse_args()
    zygote.warm()
    make_quick()
    found, began = [], time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, contextlib.suppress(KeyboardInterrupt):
        at = options.at or Path(temporary)
        ground = Ground(at, disks.can_mount(at))
        for result in results(ground, options.seed, options.count, list(options.parts)):
            found.append(result)
            if result.fault:
                print(f"AT FAULT: {result.kind}, {result.what}: {result.fault}", flush=True)
            if len(found) % 100 == 0:
                print(f"{len(found)} after {(time.monotonic() - began) / 60:.0f} min", flush=True)
    print(f"\nseed {options.seed}, {options.count} kills asked for, {(time.monotonic() - began) / 60:.0f} min\n\n{table(found)}")
    sys.exit(any(result.fault for result in found))


if __name__ == "__main__":
    main()
