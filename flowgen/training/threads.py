"""How many of the machine's cores a command computes on, and how its threads wait for one another beside other work.

OpenMP's threads meet at the end of each of thousands of small operations a step, and spin there until the last one has come. Where
another process keeps one of their cores, they spin for its whole turn: training on two cores of which one is busy can be twenty times
slower than on one.
"""

import contextlib
import logging
import math
import os
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from flowgen.utils.errors import UserError

SPINS = "10000"  # tenths of a millisecond; the 300,000 that libgomp takes by itself gain a few percent on an idle machine
SHORTEST = 0.5  # seconds of looking at the machine
LONGEST = 60.0  # seconds after which a reading is out of date
ENOUGH = 0.6  # of a core that is free: a thread there does not hold the others up
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by the user, for all programs
CGROUPS = Path("/sys/fs/cgroup")
log = logging.getLogger("flowgen")


class Reading(NamedTuple):
    """Seconds that have passed, that this process's cores were idle, and that it has computed; each since some beginning."""

    clock: float
    idle: float
    own: float


_readings: list[Reading] = []  # the last one, which the next is compared with


def prepare_threads() -> None:
    """Bound the spinning, unless the user has, and begin to watch the machine; to be called before torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if not _readings:
        _readings.append(read_clocks())


def use_threads(threads: int | str = "auto") -> int:
    """Compute on so many threads from here on, and say how many; `auto`: one for each core that is free and allowed.

    Free is what other processes have left idle since `prepare_threads`: loading torch takes long enough to find out. A number in
    OMP_NUM_THREADS or MKL_NUM_THREADS is obeyed. Raises FlowgenError for what is neither `auto` nor a number.
    """
    import torch

    if threads != "auto" and (type(threads) is not int or threads < 1):
        raise UserError(f"threads must be auto or a whole number of at least 1, not {threads!r}")
    most = _all_threads()
    chosen = any(name in os.environ for name in CHOSEN)
    room = most if chosen else max(1, int(min(most, free_cores() + 1 - ENOUGH, quota())))
    number = room if threads == "auto" else int(threads)
    if number > room:
        log.warning(
            "%d threads, which is slow where other work leaves %d: trainer.num_threads=auto chooses anew",
            number,
            room,
        )
    elif threads == "auto" and number < most:
        log.info(
            "%d of %d threads, so as not to wait for the cores that other work keeps busy",
            number,
            most,
        )
    torch.set_num_threads(number)
    return number


@cache
def _all_threads() -> int:
    """What torch takes by itself: the physical cores that this process may use."""
    import torch

    return torch.get_num_threads()


def free_cores() -> float:
    """How many cores other processes leave to this one, on average since the last reading, if that was within a minute."""
    now = read_clocks()
    if not _readings or now.clock - _readings[0].clock > LONGEST:
        _readings[:] = [now]
    time.sleep(max(0.0, _readings[0].clock + SHORTEST - now.clock))
    before, now = _readings[0], read_clocks()
    _readings[:] = [now]
    return (now.idle - before.idle + now.own - before.own) / (now.clock - before.clock)


def read_clocks() -> Reading:
    own = os.times()
    return Reading(time.monotonic(), _idle_seconds(), own.user + own.system)


def _idle_seconds() -> float:
    """Summed over the cores that this process may use, of which all count as idle where no one tells."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        times = {words[0]: words[1:] for words in map(str.split, lines)}
        of_cores = [times[f"cpu{core}"] for core in os.sched_getaffinity(0)]
    except (OSError, KeyError, AttributeError):
        return time.monotonic() * (os.cpu_count() or 1)
    return sum(int(idle) + int(waiting) for _, _, _, idle, waiting, *_ in of_cores) / os.sysconf(
        "SC_CLK_TCK"
    )


def quota() -> float:
    """Cores' worth of time that the control groups of this process allow it, of version 1 or 2; infinite where none bounds it."""
    allowed = [math.inf]
    for root in (CGROUPS, CGROUPS / "cpu"):
        for folder in {
            above for group in of_process() for above in (root / group, *(root / group).parents)
        }:
            for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no bound
                    time_allowed, period = map(
                        int, " ".join((folder / name).read_text() for name in names).split()
                    )
                    allowed += [time_allowed / period] * (time_allowed > 0)
    return max(1.0, min(allowed))


def of_process() -> list[str]:
    """The control groups of this process, as paths below the root of each hierarchy."""
    with contextlib.suppress(OSError):
        return [
            "",
            *(
                line.split(":", 2)[2].lstrip("/")
                for line in Path("/proc/self/cgroup").read_text().splitlines()
            ),
        ]
    return [""]
