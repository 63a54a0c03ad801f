"""Checks that a computation fits into the free memory."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from flowgen.utils.errors import UserError

CGROUPS = Path("/sys/fs/cgroup")
CGROUP_LIST = Path("/proc/self/cgroup")  # on Linux only


def free_memory() -> int:
    """Return the bytes of main memory that this process can still allocate.

    The least of the system's own estimate, the limits of the process (`ulimit`), and the limits of
    its control groups (a container or a batch job), where these exist.
    """
    free = [psutil.virtual_memory().available, *_free_in_limits(), *_free_in_cgroups()]
    return max(0, min(free))


def _free_in_limits() -> Iterator[int]:
    """Yield what `ulimit -v` and `ulimit -d` leave. Mapped files count only towards the first."""
    if not hasattr(psutil, "RLIMIT_AS"):  # Windows and macOS
        return
    process = psutil.Process()
    used = process.memory_info()
    for limit, size in ((psutil.RLIMIT_AS, used.vms), (psutil.RLIMIT_DATA, used.data)):
        soft_limit, _ = process.rlimit(limit)
        if soft_limit != psutil.RLIM_INFINITY:
            yield soft_limit - size


def _free_in_cgroups() -> Iterator[int]:
    """Yield what each control group of this process and its parents have left (version 2)."""
    for folder in cgroup_folders():
        limit_file = folder / "memory.max"
        limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
        if limit != "max":
            used = int((folder / "memory.current").read_text())
            stats = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            yield int(limit) - used + int(stats.get("file", 0))  # cached pages are freed on demand


def cgroup_folders(controller: str = "") -> set[Path]:
    """Return the folders of this process's control groups and of their parents.

    Args:
        controller: Controller of version 1 such as "cpu", which has its own hierarchy of groups.
            Default: the hierarchy of version 2.
    """
    lines = CGROUP_LIST.read_text().splitlines() if CGROUP_LIST.is_file() else []
    groups = [CGROUPS / controller / line.split(":", 2)[2].lstrip("/") for line in lines]
    return {folder for group in groups for folder in (group, *group.parents)}


def check_memory(
    name: str, count: int, bytes_each: int, hint: str = "", free: int | None = None
) -> None:
    """Raise `UserError`, with the largest count that fits, if `count` items do not fit.

    Args:
        name: Name of the setting that chooses the count.
        count: Number of items.
        bytes_each: Memory of one item, in bytes.
        hint: Text after the message.
        free: Free memory in bytes. Default: `free_memory()`.
    """
    free = free_memory() if free is None else free
    if count * bytes_each > free:
        raise UserError(
            f"{name}={count} needs at least {count * bytes_each / 2**30:,.0f} GiB of memory, and "
            f"{free / 2**30:,.1f} GiB are free: at most {free // bytes_each} fit{hint}"
        )
