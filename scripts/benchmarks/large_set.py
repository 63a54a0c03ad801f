"""A set of images larger than the memory that its training may have, beside the same set in memory: python scripts/large_set.py [GIB]

Random images in the published format of ImageNet-64, 3 GiB of them unless GIB says otherwise, under /tmp or TMPDIR, which takes twice that
for a while. Trainings in turn, three of each: one may have 1 GiB of memory of its own (RLIMIT_DATA, which pages of files that are only read
do not count towards) and finds none of the images in the system's cache of files, so that it reads every one from the disk; one has no
limit and finds all of them there. Then one with the limit stops half way and goes on, and must end with the bits of one that has none.
"""

import importlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from numpy.lib.format import write_array_header_1_0

from flowgen import cli

SHAPE, CHUNK, TESTS = (3, 64, 64), 4096, 64
LIMIT, ROUNDS, STEPS, BATCH = 2**30, 3, 40, 16
MODEL = ["model=glow", "model.levels=2", "model.steps_per_level=2", "model.width=16"]
TRAINER = [
    "trainer=cpu",
    "trainer.minutes=null",
    f"trainer.batch_size={BATCH}",
    "trainer.init_images=64",
    "trainer.warmdown_ratio=0",
]
QUIET = [
    "trainer.eval_images=16",
    "trainer.eval_every=1000000",
    "trainer.sample_every=1000000",
    f"trainer.log_every={STEPS // 2}",
]


def write_npz(path: Path, count: int) -> None:
    """So many images, each another one, and a class for each."""
    width, pixels = (
        torch.Size(SHAPE).numel(),
        torch.randint(256, (CHUNK, torch.Size(SHAPE).numel()), dtype=torch.uint8),
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape, dtype in (("data", (count, width), "|u1"), ("labels", (count,), "<i8")):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                write_array_header_1_0(
                    file, {"descr": dtype, "fortran_order": False, "shape": shape}
                )
                if name == "labels":
                    file.write(torch.ones(count, dtype=torch.long).numpy().tobytes())
                for number in range(0, count if name == "data" else 0, CHUNK):
                    file.write(pixels.add_(number // CHUNK + 1)[: count - number].numpy().tobytes())


def in_the_systems_cache(folder: Path, wanted: bool) -> None:
    """Have the system keep all pages of the prepared images in memory, or none."""
    for path in folder.glob("*.bin"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while wanted and file.read(2**24):
                pass


def command(folder: Path, *words: object, limited: bool) -> None:
    """A command in a process of its own; one that is limited has no more than `LIMIT` bytes of memory of its own."""
    in_the_systems_cache(folder / "cache", not limited)
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(["flowgen", *map(str, words)], folder / "said", limited)
    )
    process.start()
    process.join()
    if process.exitcode:
        sys.exit((folder / "said").read_text())


def _run(words: list[str], said: Path, limited: bool) -> None:
    if limited:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = words
    cli.main()


def train(folder: Path, name: str, steps: int, limited: bool) -> float:
    """Images a second over the second half."""
    out, data = (
        folder / name,
        [f"data.root={folder / 'images'}", "data=imagenet64", f"trainer.steps={steps}"],
    )
    command(folder, "train", *data, *MODEL, *TRAINER, *QUIET, f"output_dir={out}", limited=limited)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["images_per_second"] for row in rows if row["split"] == "train"][-1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]


def main(gib: float) -> None:
    count = int(gib * 2**30) // torch.Size(SHAPE).numel()
    torch.set_num_threads(1)
    for module in ("flowgen.commands.train", "flowgen.training.trainer"):  # once for all processes
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(prefix="large-set-") as name:
        folder = Path(name)
        os.environ |= {"FLOWGEN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        (folder / "images").mkdir()
        write_npz(folder / "images" / "train_data_batch_1.npz", count)
        write_npz(folder / "images" / "val_data.npz", TESTS)
        train(folder, "first", STEPS // 2, limited=True)  # which prepares the images
        print(
            f"{count} images, {sum(path.stat().st_size for path in (folder / 'cache').glob('*.bin')) / 2**30:.2f} GiB",
            flush=True,
        )
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(ROUNDS):
            for limited, found in speeds.items():
                found.append(train(folder, f"{number}-{limited}", STEPS, limited))
                where = f"{LIMIT >> 20} MiB, from the disk" if limited else "no limit, in memory"
                print(f"{where}: {found[-1]:.1f} images/s", flush=True)
        concat_condition = statistics.median(speeds[True]) / statistics.median(speeds[False])
        print(f"medians: {100 * concat_condition:.0f} % of the speed in memory", flush=True)
        command(folder, "resume", folder / "first", f"trainer.steps={STEPS}", limited=True)
        one, other = weights(folder / "first"), weights(folder / "0-False")
        same = all(torch.equal(value, other[key]) for key, value in one.items())
        print(
            f"stopped, and gone on with, within the limit: {'the same bits' if same else 'OTHER BITS'} as without"
        )
        sys.exit(not same)


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 3.0)
