"""What is asked for against what there is."""

import os
from pathlib import Path

from flowgen.errors import FlowgenError


def free_memory() -> int:
    """Bytes of main memory that can still be taken: Linux's own estimate, elsewhere all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(name: str, count: int, each: int, cure: str = "", free: int | None = None) -> None:
    """Raise `FlowgenError`, with the largest number that fits, where `count` times `each` bytes are more than is free, of main memory."""
    free = free_memory() if free is None else free
    if count * each > free:
        needed = f"{name}={count} needs {count * each / 2**30:,.0f} GiB of memory at the least, and {free / 2**30:,.1f} GiB are free"
        raise FlowgenError(f"{needed}: at most {free // each} fit{cure}")
