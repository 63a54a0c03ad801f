"""Number of CPU threads on a machine that is shared with other work.

OpenMP threads meet at the end of each of thousands of small operations per step, and spin until
the last one arrives. If another process occupies one of their cores, they spin for its whole time
slice: training on two cores of which one is busy can be twenty times slower than on one.
"""

import contextlib
import math
import os
import time
from functools import cache
from typing import NamedTuple

import psutil

from flowgen.utils.errors import check, log
from flowgen.utils.memory import cgroup_folders

# Spins before a thread sleeps, about a tenth of a millisecond. The default of libgomp, 300,000,
# is a few percent faster on an idle machine.
SPIN_COUNT = "10000"
MIN_INTERVAL_SECONDS = 0.5  # between two measurements of CPU times
MAX_AGE_SECONDS = 60.0  # of a measurement
MIN_FREE_SHARE = 0.6  # share of a core that must be free for one more thread
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # set by the user for all programs


class CpuTimes(NamedTuple):
    """Seconds since some start: of the clock, of idle cores in total, of this process's work."""

    clock: float
    idle: float
    own: float


_last_times: list[CpuTimes] = []  # at most one measurement, which the next is compared with


def prepare_threads() -> None:
    """Limit the spinning, unless the user has set it, and start to measure the machine's load.

    Call this before torch is imported, whose OpenMP reads the variable then.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if not _last_times:
        _last_times.append(cpu_times())


def use_threads(num_threads: int | str = "auto") -> int:
    """Set the number of torch's CPU threads and return it.

    Args:
        num_threads: Number; or "auto" for one thread per core that other processes have left
            idle since `prepare_threads`. With OMP_NUM_THREADS or MKL_NUM_THREADS set, "auto" is
            that number.

    Raises:
        UserError: For anything else.
    """
    import torch

    check(
        num_threads == "auto" or (type(num_threads) is int and num_threads >= 1),
        f"num_threads must be auto or a whole number of at least 1, not {num_threads!r}",
    )
    max_threads = _default_threads()
    limit: float = max_threads
    if not any(name in os.environ for name in THREAD_VARIABLES):
        limit = min(limit, free_cores() + 1 - MIN_FREE_SHARE, cpu_quota())
    free_threads = max(1, int(limit))
    number = free_threads if num_threads == "auto" else int(num_threads)
    if number > free_threads:
        log.warning(
            "%d threads are slow while other work leaves room for %d: "
            "trainer.num_threads=auto selects their number again",
            number,
            free_threads,
        )
    elif num_threads == "auto" and number < max_threads:
        log.info(
            "using %d of %d threads, because other work keeps the other cores busy",
            number,
            max_threads,
        )
    torch.set_num_threads(number)
    return number


@cache
def _default_threads() -> int:
    """Return torch's default: the physical cores that this process may use."""
    import torch

    return torch.get_num_threads()


def free_cores() -> float:
    """Return how many cores other processes leave idle, on average since the last measurement.

    A measurement older than a minute is repeated.
    """
    now = cpu_times()
    before = _last_times.pop() if _last_times else now
    if now.clock - before.clock > MAX_AGE_SECONDS:
        before = now
    time.sleep(max(0.0, before.clock + MIN_INTERVAL_SECONDS - now.clock))
    now = cpu_times()
    _last_times.append(now)
    return (now.idle - before.idle + now.own - before.own) / (now.clock - before.clock)


def cpu_times() -> CpuTimes:
    """Measure the clock, the idle time of all cores and the CPU time of this process."""
    own = psutil.Process().cpu_times()
    return CpuTimes(time.monotonic(), _idle_seconds(), own.user + own.system)


def _idle_seconds() -> float:
    """Return the idle time summed over the cores that this process may use.

    If the system does not report it, all cores count as idle.
    """
    try:
        cores = psutil.cpu_times(percpu=True)
        process = psutil.Process()
        allowed = process.cpu_affinity() if hasattr(process, "cpu_affinity") else None
        cores = [cores[index] for index in allowed or range(len(cores))]
    except (OSError, IndexError, psutil.Error):
        return time.monotonic() * (os.cpu_count() or 1)
    return sum(core.idle + getattr(core, "iowait", 0.0) for core in cores)


def cpu_quota() -> float:
    """Return how many cores' worth of time the control groups allow; infinity without a limit.

    psutil does not read control groups; version 1 and version 2 differ in their files.
    """
    limits = [math.inf]
    for controller, names in (
        ("", ("cpu.max",)),
        ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
    ):
        for folder in cgroup_folders(controller):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
                text = " ".join((folder / name).read_text() for name in names)
                quota, period = map(int, text.split())
                if quota > 0:
                    limits.append(quota / period)
    return max(1.0, min(limits))
