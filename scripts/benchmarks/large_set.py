"""Compare the training speed on images from the disk and on images in memory.

Usage: python scripts/benchmarks/large_set.py [GIB]

The script writes random images in the format of ImageNet-64, by default 3 GiB, to a temporary
folder, which needs twice that space. Then it trains three times under each of two conditions:

- from the disk: The memory of the process is limited to 1 GiB (RLIMIT_DATA, which does not count
  the pages of files that are only read), and the page cache of the system has no images.
- in memory: There is no limit, and the page cache has all images.

Finally, it resumes the run that it stopped first, with the limit. The weights must equal those of a
run without the limit bit by bit.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from numpy.lib.format import write_array_header_1_0

sys.path.append(str(Path(__file__).parents[1]))
from run_flowgen import run_flowgen

IMAGE_SHAPE = (3, 64, 64)
IMAGE_BYTES = torch.Size(IMAGE_SHAPE).numel()
IMAGES_PER_CHUNK = 4096
NUM_TEST_IMAGES = 64
MEMORY_LIMIT_BYTES = 2**30
ROUNDS = 3  # runs under each condition
STEPS = 40
OVERRIDES = [
    "data=imagenet64",
    "model=glow",
    "model.levels=2",
    "model.steps_per_level=2",
    "model.width=16",
    "trainer=cpu",
    "trainer.minutes=null",
    "trainer.batch_size=16",
    "trainer.init_images=64",
    "trainer.warmdown_ratio=0",
    "trainer.eval_images=16",
    "trainer.eval_every=1000000",
    "trainer.sample_every=1000000",
    f"trainer.log_every={STEPS // 2}",
]


def write_npz(path: Path, count: int) -> None:
    """Write `count` different images of one class."""
    pixels = torch.randint(256, (IMAGES_PER_CHUNK, IMAGE_BYTES), dtype=torch.uint8)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("data.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, IMAGE_BYTES)}
            write_array_header_1_0(file, header)
            for start in range(0, count, IMAGES_PER_CHUNK):
                pixels.add_(start // IMAGES_PER_CHUNK + 1)
                file.write(pixels[: count - start].numpy().tobytes())
        with archive.open("labels.npy", "w", force_zip64=True) as file:
            header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
            write_array_header_1_0(file, header)
            file.write(torch.ones(count, dtype=torch.long).numpy().tobytes())


def set_page_cache(folder: Path, filled: bool) -> None:
    """Load the images into the page cache of the system, or remove them from it."""
    for path in folder.glob("*.bin"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while filled and file.read(2**24):
                pass


def limit_memory() -> None:
    """Limit the memory of this process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def run_command(folder: Path, *args: object, limited: bool) -> None:
    """Run a command with limited memory and an empty page cache, or without a limit."""
    set_page_cache(folder / "cache", filled=not limited)
    result = run_flowgen(
        *args,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=limit_memory if limited else None,
    )
    if result.returncode:
        sys.exit(result.stdout)


def train(folder: Path, name: str, steps: int, limited: bool) -> float:
    """Train and return the images per second of the second half of the steps."""
    run = folder / name
    args = [*OVERRIDES, f"data.root={folder / 'images'}", f"trainer.steps={steps}"]
    run_command(folder, "train", *args, f"output_dir={run}", limited=limited)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["images_per_second"] for row in rows if row["split"] == "train"][-1]


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the last checkpoint."""
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]


def main(gib: float) -> None:
    count = int(gib * 2**30) // IMAGE_BYTES
    with tempfile.TemporaryDirectory(prefix="large-set-") as name:
        folder = Path(name)
        os.environ |= {"FLOWGEN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        (folder / "images").mkdir()
        write_npz(folder / "images" / "train_data_batch_1.npz", count)
        write_npz(folder / "images" / "val_data.npz", NUM_TEST_IMAGES)
        train(folder, "first", STEPS // 2, limited=True)  # fills flowgen's cache
        cache_bytes = sum(path.stat().st_size for path in (folder / "cache").glob("*.bin"))
        print(f"{count} images, {cache_bytes / 2**30:.2f} GiB", flush=True)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for index in range(ROUNDS):
            for limited, values in speeds.items():
                values.append(train(folder, f"{index}-{limited}", STEPS, limited))
                kind = "no limit, in memory"
                if limited:
                    kind = f"limit of {MEMORY_LIMIT_BYTES >> 20} MiB, from the disk"
                print(f"{kind}: {values[-1]:.1f} images/s", flush=True)
        ratio = statistics.median(speeds[True]) / statistics.median(speeds[False])
        print(f"ratio of the medians: {100 * ratio:.0f} % of the speed in memory", flush=True)
        run_command(folder, "resume", folder / "first", f"trainer.steps={STEPS}", limited=True)
        resumed = load_weights(folder / "first")
        reference = load_weights(folder / "0-False")
        same = all(torch.equal(value, reference[key]) for key, value in resumed.items())
        result = "equal" if same else "DIFFERENT"
        print(f"weights of the run that was resumed with the limit: {result}")
        sys.exit(not same)


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 3.0)
