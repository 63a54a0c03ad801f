"""Runs `flowgen` commands as subprocesses, for the scripts in the subfolders."""

import signal
import subprocess
import sys
from typing import Any


def run_flowgen(
    *args: object, timeout: float | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run `flowgen ARGS` in a subprocess and wait until it ends.

    SIGTERM is passed on to the command. Ctrl-C reaches the command directly.

    Args:
        *args: Arguments of the command.
        timeout: Seconds after which the command is killed.
        **kwargs: Arguments of `subprocess.Popen`, such as `stdout`.

    Raises:
        subprocess.TimeoutExpired: After the timeout.
    """
    argv = [sys.executable, "-m", "flowgen", *map(str, args)]
    process = subprocess.Popen(argv, text=True, **kwargs)
    # This process must not end before the command, which saves its state after Ctrl-C.
    interrupt_handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate_handler = signal.signal(
        signal.SIGTERM, lambda number, frame: process.send_signal(number)
    )
    try:
        output, error = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    finally:
        signal.signal(signal.SIGINT, interrupt_handler)
        signal.signal(signal.SIGTERM, terminate_handler)
    return subprocess.CompletedProcess(argv, process.returncode, output, error)
