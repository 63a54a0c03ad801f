"""Start of training: new and resumed runs, in this process or in several."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from flowgen.config import compose, instantiate, runs, settings
from flowgen.training.checkpoint import eval_weights, read_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError, check_choice, check_whole, log
from flowgen.utils.processes import launch, num_processes_to_launch

if TYPE_CHECKING:
    from flowgen.models.base import GenerativeModel
    from flowgen.training.distributed import WorkerGroup

LOCK_FILE = ".lock"  # in the folder of a run, held by the process that trains it


class RunFinishedError(UserError):
    """The run has reached its end."""


class WorkerFailedError(UserError):
    """A worker process failed and has already printed the reason."""

    def __init__(self, status: int):
        super().__init__("one of the processes failed: see its message above")
        self.status = status  # exit status of the process


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped training, and the run is saved: `flowgen.resume(run)` continues it."""

    def __init__(self, run: Run, signal: int):
        super().__init__(f"stopped by signal {signal}; {run.folder} is saved")
        self.run = run
        self.signal = signal


def start_run(config: dict[str, Any], note: str = "", numbered: bool = False) -> Run:
    """Train a composed configuration in its `output_dir`.

    If the configuration says `resume: true`, a run in this folder is continued, or skipped if it
    has finished.

    Args:
        config: Configuration of `compose_config`.
        note: Line for the log.
        numbered: Append _2, _3, ... to the name of the folder if it exists.

    Raises:
        UserError: If the folder holds a run that may not be continued.
    """
    _make_paths_absolute(config)
    trainer_processes = config["trainer"].get("num_processes")
    num_processes = num_processes_to_launch(trainer_processes)
    may_resume = config.pop("resume")
    check_choice((True, False), resume=may_resume)
    if numbered:
        config["output_dir"] = str(_create_numbered(Path(config["output_dir"])))
    run = Run(Path(config["output_dir"]))
    if may_resume and _holds_run(run):
        _check_same_settings(run, config)
        try:
            return resume_run(run, [f"trainer.num_processes={trainer_processes or 'null'}"])
        except RunFinishedError as error:
            log.info("skipped: %s", error)
            return run
    with lock_run(run):
        if _holds_run(run):
            raise UserError(
                f"{run.folder} holds a run already: continue it with "
                f"`flowgen resume {run.folder}`, or choose another output_dir="
            )
        if run.checkpoints():
            raise UserError(
                f"{run.folder} holds checkpoints that are not from a run of flowgen: "
                "choose another output_dir="
            )
        if not num_processes:
            try:
                return train_run(run, config, note=note)
            except UserError:
                if not run.checkpoints():  # corrected settings can use the folder
                    run.config.unlink(missing_ok=True)
                raise
        compose.save_config(config, run.config)  # the processes read it
        with log_to_file(run):
            log.info("%s", note or f"{num_processes} processes")
    return _start_processes(run, num_processes, [str(run.folder)], is_new=True)


def resume_run(run: Run, overrides: Sequence[str], file: Path | None = None) -> Run:
    """Continue a run.

    Args:
        run: Folder of the run.
        overrides: KEY=VALUE that change its configuration.
        file: Checkpoint to continue from; None: the latest valid one of the run.

    Raises:
        RunFinishedError: If the run has ended.
    """
    if any(text.partition("=")[0] == "output_dir" for text in overrides):
        raise UserError(f"a run stays in its folder {run.folder}: omit output_dir=")
    with lock_run(run):
        checkpoint = run.latest_valid_checkpoint() if file is None else read_checkpoint(file)
        config = compose.read_config(run.config) if checkpoint is None else checkpoint["config"]
        config = compose.override(config, compose.unset_other_limit(overrides))
        _make_paths_absolute(config)
        _check_unfinished(run, config, checkpoint)
        num_processes = num_processes_to_launch(config["trainer"].get("num_processes"))
        if not num_processes:
            return train_run(run, config, checkpoint)
    return _start_processes(run, num_processes, [str(file or run.folder), *overrides])


def _start_processes(
    run: Run, num_processes: int, arguments: list[str], is_new: bool = False
) -> Run:
    """Run `flowgen resume ARGUMENTS` in several processes.

    If they fail before the first checkpoint, the folder of a new run is deleted.
    """
    log.info("%s: %d processes", run.folder, num_processes)
    try:
        launch(
            num_processes, ["resume", *arguments], f"continue with `flowgen resume {run.folder}`"
        )
    except SystemExit as error:
        if is_new and not run.checkpoints():
            run.config.unlink(missing_ok=True)
            _remove_without_run(run, is_new=True, had_log=False)
        status = int(str(error.code))
        if status > 128:  # a signal
            raise TrainingInterrupted(run, status - 128) from error
        raise WorkerFailedError(status) from error
    return run


def train_run(
    run: Run | None = None,
    config: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    note: str = "",
) -> Run:
    """Train in this process, or in the group of processes that a launcher started.

    The main process has the arguments of `train_in_group`, and sends them to the others.
    """
    from flowgen.training.distributed import join

    with join() as group:
        shared: Any = group.broadcast_from_main(lambda: (run, config, checkpoint, note))
        train_in_group(group, *shared)
    return shared[0]


def train_in_group(
    group: "WorkerGroup",
    run: Run,
    config: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    note: str = "",
) -> None:
    """Build the model and the data of a configuration and train.

    Args:
        group: This process and those that train with it.
        run: Folder of the run.
        config: Configuration of the run.
        checkpoint: Checkpoint to continue from, or None for a new run.
        note: Line for the log.

    Raises:
        TrainingInterrupted: If a signal stopped training; the run is saved.
    """
    import torch

    from flowgen.training import device, sanity_checks, trainer

    check_whole(0, 2**63 - 1, seed=config["seed"])
    if "evaluation" in config:  # before training, although only later commands need it
        instantiate.instantiate("evaluation", config["evaluation"])
    trainer_config = instantiate.instantiate("trainer", config["trainer"])
    # With several processes, each chooses its own number of threads.
    num_threads = trainer_config.num_threads if group.size == 1 else "auto"
    runtime = device.Runtime(trainer_config.device, num_threads, trainer_config.precision)
    if group.size == 1:
        # A resumed run needs the same number of threads for the same bits.
        config["trainer"]["num_threads"] = runtime.num_threads
    torch.manual_seed(config["seed"])
    model, data, config = instantiate.build_model_and_data(config)
    init_from = config.get("init_from")
    if checkpoint is not None:
        runs.load_weights(model, checkpoint["model"])
    elif init_from is not None and group.is_main:
        _load_init_weights(model, config, init_from)
    if group.is_main and checkpoint is None:
        compose.save_config(config, run.config)
    with log_to_file(run) if group.is_main else contextlib.nullcontext():
        log.info(
            "%s: %.2f million parameters, %d training, %d validation and %d test images",
            run.folder,
            sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            len(data.train),
            len(data.validation),
            len(data.test),
        )
        log.info("environment: %s", device.environment(runtime.device, group.size))
        if note:
            log.info("%s", note)
        if group.is_main:
            sanity_checks.warn_test_leakage(data)
        if checkpoint is not None:
            log.info("resuming from step %d", checkpoint["step"])
        training = trainer.Trainer(trainer_config, model, data, run, config, group, runtime)
        training.prepare(checkpoint, init_weights=init_from is not None)
        if group.is_main and checkpoint is not None:  # after all checks of the new settings
            compose.save_config(config, run.config)
        stop_signal = training.fit()
        if stop_signal is not None:
            log.info(
                "stopped by %s and saved: continue with `flowgen resume %s`",
                Signals(stop_signal).name,
                run.folder,
            )
            raise TrainingInterrupted(run, stop_signal)
        log.info("finished: %s", run.folder)


def _make_paths_absolute(config: dict[str, Any]) -> None:
    """Make the run independent of the working directory."""
    if config["data"].get("root") is not None:
        config["data"]["root"] = compose.absolute_path(config["data"]["root"])
    init_from = config.get("init_from")
    if init_from is not None:
        name = str(init_from)
        is_path = Path(name).expanduser().exists()
        config["init_from"] = compose.absolute_path(name) if is_path else name


def _load_init_weights(model: "GenerativeModel", config: dict[str, Any], source: str) -> None:
    """Load the weights of the run that `init_from` names."""
    _, checkpoint = runs.find_checkpoint(source)
    try:
        runs.load_weights(model, eval_weights(checkpoint))
    except UserError as error:
        section = settings.flatten({"model": config["model"]})
        stored = settings.flatten(checkpoint["config"])
        differences = _differences(section, stored) or ["different tensor shapes"]
        raise UserError(
            f"the weights of init_from={source} do not fit, {', '.join(differences)}: "
            "train a model with the same settings"
        ) from error


def _check_unfinished(run: Run, config: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Raise RunFinishedError if the checkpoint is at the end of the run."""
    if checkpoint is None:
        return
    limits = instantiate.instantiate("trainer", config["trainer"])
    values = {
        "minutes": checkpoint["progress"]["seconds"] / 60,
        "steps": checkpoint["step"],
        "patience": checkpoint["progress"].get("evals_since_best", 0),
    }
    for name, value in values.items():
        limit = getattr(limits, name)
        if limit and value >= limit:
            raise RunFinishedError(
                f"{run.folder} has ended at step {checkpoint['step']}: to train longer, "
                f"`flowgen resume {run.folder} trainer.{name}={math.ceil(2 * value)}`"
            )


def _check_same_settings(run: Run, config: dict[str, Any]) -> None:
    """Raise UserError if a setting differs from that of the run; missing settings are ignored."""
    run.check_contained()
    ignored = ("output_dir", "trainer.num_processes")
    given = {key: value for key, value in settings.flatten(config).items() if key not in ignored}
    stored = compose.read_config(run.config)
    if differences := _differences(given, _default_values(stored) | settings.flatten(stored)):
        raise UserError(
            f"{run.folder} holds a run with other settings, {', '.join(differences)}: continue it "
            f"as it is with `flowgen resume {run.folder}`, or choose another output_dir="
        )


def _default_values(config: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of all settings, which a run has for those that are newer than it."""
    defaults = settings.settings_of_file("train")
    for section in settings.SECTIONS:
        option = Path(settings.yaml_file(section, config[section]["_target_"])).stem
        if option in settings.group_options(section):
            defaults = defaults | settings.settings_of_option(section, option)
    return {key: setting.default for key, setting in defaults.items()}


def _differences(command: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """Return phrases for settings of a command that differ from those of a run.

    A run stores the value that it chose for `auto`, so `auto` differs from no value.
    """
    return [
        f"{key} is {stored.get(key, 'not set')} in the run but {value} in this command"
        for key, value in command.items()
        if value not in (stored.get(key), "auto")
    ]


def _create_numbered(folder: Path) -> Path:
    """Create a folder, with the first free number at the end of its name if it exists already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder
    numbers = count(2)
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            path = folder.with_name(f"{folder.name}_{next(numbers)}")


def _holds_run(run: Run) -> bool:
    return run.config.exists() or run.metrics.exists()


@contextlib.contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Lock the folder of a run for this process. On exit, remove it if no run was created in it.

    Files that were there before stay.

    Raises:
        UserError: If another process holds the lock.
    """
    is_new = not run.folder.exists() or not any(run.folder.iterdir())
    had_log = run.log.exists()
    run.folder.mkdir(parents=True, exist_ok=True)
    run.check_contained()
    lock = FileLock(run.folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another process is training {run.folder}: wait for it, or choose another output_dir="
        ) from error
    try:
        yield
    finally:
        lock.release()
        if not run.config.exists():
            _remove_without_run(run, is_new, had_log)


def _remove_without_run(run: Run, is_new: bool, had_log: bool) -> None:
    (run.folder / LOCK_FILE).unlink(missing_ok=True)
    if not had_log:
        run.log.unlink(missing_ok=True)
    if is_new:
        with contextlib.suppress(OSError):  # other files stay
            run.folder.rmdir()


@contextlib.contextmanager
def log_to_file(run: Run) -> Iterator[None]:
    """Copy log messages with their time to `train.log`, and the traceback of an error."""
    handler = logging.FileHandler(run.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception:
        log.debug("training ended with an error", exc_info=True)
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
