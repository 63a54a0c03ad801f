"""Start of several training processes, and their environment; importing this needs no torch.

Launchers (torchrun, Kubernetes, Ray) set RANK and WORLD_SIZE.
"""

import logging
import os
import sys

from flowgen.utils.errors import UserError, check_whole

LAUNCHED_ENV = "FLOWGEN_LAUNCHED"  # environment variable of processes that `launch` started
EXIT_WORKER_DIED = 75  # exit status after another process died: EX_TEMPFAIL of sysexits.h


def is_distributed() -> bool:
    """Return whether a launcher started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def is_worker() -> bool:
    """Return whether another process is the main process, which composes the configuration."""
    return is_distributed() and int(os.environ["RANK"]) > 0


def num_processes_to_launch(num_processes: object) -> int:
    """Return how many processes this one must start; 0 if it trains itself."""
    if num_processes is None:
        return 0
    check_whole(num_processes=num_processes)
    return 0 if is_distributed() or num_processes == 1 else int(str(num_processes))


def launch(num_processes: int, argv: list[str], hint: str) -> None:
    """Run `flowgen ARGV` in several processes of this machine that train together.

    Args:
        num_processes: Number of processes.
        argv: Arguments of `flowgen`.
        hint: End of the error message if a process dies: what to do.

    Raises:
        UserError: If a process dies.
        SystemExit: If a process reported its error already, or was interrupted.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # reported below
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, num_cores // num_processes)), LAUNCHED_ENV: "1"}
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flowgen", *argv)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0 or failure.exitcode == EXIT_WORKER_DIED:
            raise UserError(f"one of the {num_processes} processes has died: {hint}") from error
        raise SystemExit(failure.exitcode) from error
    finally:
        for name in added:  # the next run of a sweep may use one process
            del os.environ[name]
