"""Run all fuzzers and print a table of their results: `make faults`.

They kill training runs, fill disks, send signals, damage files and run random command lines.
"""

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

import disk_faults
import forkserver
import fuzz_files
import kill_ranks
import kills
from kills import Result, Workspace

PARTS = ("kills", "ranks", "disks", "files", "lines")
MEMORY_DISK = Path("/dev/shm")  # a thousand training runs would wear out a disk


def speed_up() -> None:
    """Replace slow parts of training: the plot, batch statistics and samples of an RBM."""
    from PIL import Image

    from flowgen.models.rbm.rbm import RBM
    from flowgen.training import trainer
    from flowgen.utils import plots

    plots.curves = lambda rows, metric, path: Image.new("L", (64, 64)).save(path, "PNG")
    trainer.BN_UPDATE_BATCHES = 2
    RBM.sample = partialmethod(RBM.sample, steps=9)  # type: ignore[assignment]


def run_parts(
    workspace: Workspace, seed: int, count: int, parts: list[str], pattern: str
) -> Iterator[Result]:
    """Yield the results of the parts. All parts make progress at the same pace."""
    num_ranks = max(1, count // 50)
    num_disks = max(1, count // 5)
    num_files = 2 * count
    results: dict[str, tuple[int, Iterator[Result]]] = {
        "kills": (count, kills.kill_training_runs(workspace, seed, count)),
        "ranks": (num_ranks, kill_ranks.kill_ranks(workspace, seed, num_ranks)),
        "disks": (2 * num_disks, disk_faults.disk_faults(workspace, seed, num_disks)),
    }
    if {"files", "lines"} & set(parts):
        folder = fuzz_files.Folder(workspace, workspace.folder / "original" / "folder")
        results["files"] = (num_files, fuzz_files.fuzz_files(folder, seed, num_files, pattern))
        results["lines"] = (num_files, fuzz_files.fuzz_command_lines(folder, seed, num_files))
    progress = dict.fromkeys(parts, 0.0)
    while progress:
        part = min(progress, key=lambda name: progress[name])
        total, part_results = results[part]
        workspace.use_shared_cache()  # some test cases use their own cache
        result = next(part_results, None)
        if result is None:
            del progress[part]
        else:
            progress[part] += (result.hits if part in ("kills", "ranks") else 1) / total
            yield result


def save_result(seed: int, result: Result, path: Path) -> None:
    """Append a result to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps({"seed": seed, **result._asdict()}) + "\n")


def load_results(path: Path) -> list[tuple[int, Result]]:
    """Return seeds and results of a file of JSON lines."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row.pop("seed"), Result(**row)) for row in rows]


def table(results: list[tuple[int, Result]]) -> str:
    """Return a Markdown table with one row for each kind of result."""
    rows = ["| kind | seeds | runs | hits | faults |", "| --- | --- | --- | --- | --- |"]
    for kind in dict.fromkeys(result.kind for _, result in results):
        seeds = sorted({seed for seed, result in results if result.kind == kind})
        of_kind = [result for _, result in results if result.kind == kind]
        hits = sum(result.hits for result in of_kind)
        faults = sum(bool(result.fault) for result in of_kind)
        names = ", ".join(map(str, seeds))
        rows.append(f"| {kind} | {names} | {len(of_kind)} | {hits} | {faults} |")
    return "\n".join(rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--count",
        type=int,
        default=20,
        help="number of kills; the numbers of other faults are proportional: a fiftieth for "
        "processes, a fifth for full disks, twice as many for files and command lines",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--pattern",
        default="*",
        help="the part `files` damages only files with such a name, such as '*.flow'",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="an empty folder for all files, which is kept; by default a temporary one in memory",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="a file of JSON lines to which the results are appended; the table shows all of them",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    forkserver.preload()
    speed_up()
    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    memory_disk = MEMORY_DISK if MEMORY_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_disk) as temporary:
        folder = args.folder or Path(temporary) / "workspace"
        path = args.results or Path(temporary) / "results"
        path.touch()
        with contextlib.suppress(KeyboardInterrupt):
            workspace = Workspace(folder, disk_faults.can_mount(folder))
            results = run_parts(workspace, args.seed, args.count, list(args.parts), args.pattern)
            for result in results:
                save_result(args.seed, result, path)
                if result.fault:
                    print(f"FAULT: {result.kind}, {result.name}: {result.fault}", flush=True)
        saved = load_results(path)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{args.count} kills requested, {minutes:.0f} min\n\n{table(saved)}")
    sys.exit(any(result.fault for _, result in saved))


if __name__ == "__main__":
    main()
