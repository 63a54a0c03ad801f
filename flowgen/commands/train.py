"""`flowgen train` and `flowgen resume`: single runs and sweeps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowgen import api
from flowgen.config import compose, settings, start
from flowgen.training.signals import reraise_signal
from flowgen.utils import console, processes
from flowgen.utils.errors import UserError, log

MAX_SHOWN_FAILURES = 5
compose.register_resolvers()  # at import, because a launcher may run jobs in other processes


@contextlib.contextmanager
def exit_like_training() -> Iterator[None]:
    """Exit with the status of a stopped training run, or of a process that reported its error."""
    try:
        yield
    except start.TrainingInterrupted as error:
        reraise_signal(error.signal)
    except start.WorkerFailedError as error:
        raise SystemExit(error.status) from error


@exit_like_training()
def train(*, overrides: list[str], multirun: bool = False) -> None:
    """Train one run, or with `multirun` all runs of a sweep."""
    if multirun:
        sweep(overrides)
    else:
        api.train(*overrides)


@exit_like_training()
def resume(*, run: str, overrides: list[str]) -> None:
    """Continue a run."""
    api.resume(run, *overrides)


def config_text(*, overrides: list[str]) -> str:
    """Return the configuration that `flowgen train OVERRIDE...` would train, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(compose.compose_config(overrides).config))


def sweep(overrides: list[str]) -> None:
    """Train all runs of a sweep with Hydra's launcher.

    Raises:
        UserError: If a run failed, after all others are done.
    """
    if processes.is_worker():
        return
    if processes.is_distributed():
        raise UserError(
            "a sweep trains separate runs: start it without torchrun, "
            "or set trainer.num_processes=N for each run"
        )
    lines = compose.sweep_overrides(overrides)
    try:
        with (
            compose.hydra_errors(),
            hydra.initialize_config_dir(
                str(settings.conf_folder()), version_base="1.3", job_name="train"
            ),
        ):
            app: Any = GlobalHydra.instance().hydra
            batches = app.multirun("train", sweep_job, lines)
    except UserError:
        raise
    except Exception as error:  # a job that is killed may break its launcher
        raise UserError(f"the launcher of the sweep failed: {compose.first_line(error)}") from error
    results = [job.return_value for batch in batches for job in batch]
    failures = [result for result in results if result is not None]
    if failures:
        num_hidden = len(failures) - MAX_SHOWN_FAILURES
        more = f"; and {num_hidden} more" if num_hidden > 0 else ""
        raise UserError(
            f"{len(failures)} of {len(results)} runs of the sweep failed: "
            f"{'; '.join(failures[:MAX_SHOWN_FAILURES])}{more}"
        )


@exit_like_training()  # a signal ends the sweep
def sweep_job(cfg: DictConfig) -> str | None:
    """Train one run of a sweep, or continue it; return the message of an error."""
    console.setup_logging()  # this may be another process
    runtime = HydraConfig.get().runtime
    folder = Path(runtime.output_dir)
    cfg.output_dir = str(folder)  # the default refers to Hydra's section, which jobs do not have
    cfg.resume = True
    try:
        start.start_run(compose.resolve_config(cfg), compose.trainer_note(runtime.choices))
    except Exception as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        message = f"{folder.name}: {console.user_message(error)}"
        log.error("%s", message)
        return message
    return None
