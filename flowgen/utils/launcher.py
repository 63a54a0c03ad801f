"""How several processes of one training are started, and how each knows that it is one of them; nothing here imports torch at once.

Launchers set RANK and WORLD_SIZE: torchrun, Kubernetes, Ray.
"""

import logging
import os
import sys

from flowgen.utils.errors import UserError, check_whole

OURS = "FLOWGEN_LAUNCHED"  # set for processes that `launch` has started
LOST = 75  # exit status of one that has lost another; EX_TEMPFAIL of sysexits.h


def is_distributed() -> bool:
    """Whether a launcher has started this process with others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def is_worker() -> bool:
    """Whether another process composes the configuration and holds the folder."""
    return is_distributed() and int(os.environ["RANK"]) > 0


def num_processes_to_launch(devices: object) -> int:
    """How many processes this one is to start in its place; 0 where it is one of several already, or is to work alone."""
    if devices is None:
        return 0
    check_whole(devices=devices)
    return 0 if is_distributed() or devices == 1 else int(str(devices))


def launch(processes: int, words: list[str], cure: str) -> None:
    """Run `flowgen WORDS` in so many processes of this machine that train together, to their end.

    Raises FlowgenError with `cure` where one of them dies, SystemExit where one has told what is wrong, or was told to stop.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # what it says of a failure is said below
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // processes)), OURS: "1"}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flowgen", *words)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from error
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode < 0 or failure.exitcode == LOST:
            raise UserError(f"one of the {processes} processes has died: {cure}") from error
        raise SystemExit(failure.exitcode) from error
    finally:
        for name in added:  # a sweep's next run may be of one process
            del os.environ[name]
