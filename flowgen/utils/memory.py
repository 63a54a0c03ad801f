"""What is asked for against what there is."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from flowgen.utils.errors import UserError

LIMITS = {
    "VmSize": resource.RLIMIT_AS,
    "VmData": resource.RLIMIT_DATA,
}  # by what Linux counts towards them
GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of main memory that this process can still take, by Linux's own estimate and its limits; elsewhere all that there is."""
    try:
        return max(
            0, min([_kib("/proc/meminfo", "MemAvailable"), *_left_by_limits(), *_left_by_groups()])
        )
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_limits() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave; files that are mapped to be read count towards the first alone."""
    for name, limit in LIMITS.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - _kib("/proc/self/status", name)


def _left_by_groups() -> Iterator[int]:
    """What the container or the job that this process belongs to has left, and those around it: control groups, version 2."""
    groups = [
        line[3:]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    ]
    for group in (
        place
        for mine in groups
        for place in (GROUPS / mine.lstrip("/"), *(GROUPS / mine.lstrip("/")).parents)
    ):
        most, used, files = (
            group / name for name in ("memory.max", "memory.current", "memory.stat")
        )
        if most.is_file() and (words := most.read_text().strip()) != "max":
            cached = [
                int(line.split()[1])
                for line in files.read_text().splitlines()
                if line.startswith("file ")
            ]
            yield (
                int(words) - int(used.read_text()) + sum(cached)
            )  # pages of files, which are given back when others need them


def _kib(path: str, name: str) -> int:
    """The bytes that a line `NAME: KIBIBYTES kB` of a file says. Raises OSError where there is none."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{path} says nothing of {name}")


def check_memory(name: str, count: int, each: int, cure: str = "", free: int | None = None) -> None:
    """Raise `FlowgenError`, with the largest number that fits, where `count` times `each` bytes are more than is free, of main memory."""
    free = free_memory() if free is None else free
    if count * each > free:
        needed = f"{name}={count} needs {count * each / 2**30:,.0f} GiB of memory at the least, and {free / 2**30:,.1f} GiB are free"
        raise UserError(f"{needed}: at most {free // each} fit{cure}")
