"""A run's folder while it is trained: one process has it, and its messages go there."""

import contextlib
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowgen.config.compose import (
    check_overrides,
    conf_folder,
    default_trainer,
    first_line,
    flatten,
    hydra_error,
    override,
    quote_overrides,
    read_config,
    register_resolvers,
    resolve_config,
    resolve_stop_criterion,
    save_config,
    sweep_folder_override,
)
from flowgen.config.instantiate import build, build_model_and_data
from flowgen.config.loading import load_weights
from flowgen.config.runs import find_checkpoint, find_file, find_run
from flowgen.training.checkpoint import eval_weights, read_checkpoint
from flowgen.training.run_dir import Run
from flowgen.training.signals import reraise_signal
from flowgen.utils.console import setup_logging, user_message
from flowgen.utils.errors import UserError, check_choice, check_whole
from flowgen.utils.launcher import is_distributed, is_worker, launch, num_processes_to_launch

log = logging.getLogger("flowgen")


class RunLockedError(UserError):
    """The folder is another run's."""


@contextlib.contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Hold the run's folder, which two processes would spoil for one another. Raises TakenError where another one has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.check_contained()
    with open(run.log, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunLockedError(
                f"{run.folder} is being trained by another process: wait for it, or choose another output_dir="
            ) from error
        try:
            yield
        finally:
            if not run.config.exists():
                run.log.unlink(missing_ok=True)


@contextlib.contextmanager
def log_to_file(run: Run) -> Iterator[None]:
    """Messages go to the screen, above the progress bar, and with the time to `train.log`, where an error leaves its traceback."""
    file = logging.FileHandler(run.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    try:
        yield
    except Exception:
        log.debug("training ended with an error", exc_info=True)
        raise
    finally:
        log.removeHandler(file)
        file.close()


if TYPE_CHECKING:  # training imports torch, which help, completion and mistakes need not wait for
    from flowgen.training.distributed import ProcessGroup
    from flowgen.training.trainer import TrainerConfig


class RunFinishedError(UserError):
    """The run is finished."""


def start(config: dict[str, Any], folder: Path, go_on: bool = False, remark: str = "") -> None:
    """Train what `config` describes in `folder`; `go_on` with the unfinished run of the same configuration that it may hold.

    Raises TakenError where it holds a run that is not to be gone on with, EndedError where that is finished, FlowgenError.
    """
    run = Run(folder)
    with lock_run(run):
        checkpoint = None
        processes = num_processes_to_launch(config["trainer"].get("num_processes"))
        there = run.config.exists() or run.metrics.exists()
        if there:
            if not go_on:
                raise RunLockedError(
                    f"{folder} holds a run already: go on with `flowgen resume {folder}`, or choose another output_dir="
                )
            _check_same(run, config)
            checkpoint = run.latest_valid_checkpoint()
            config = read_config(run.config) if checkpoint is None else checkpoint["config"]
            _check_unfinished(run, config, checkpoint)
        elif processes:
            save_config(config, run.config)  # for them to read
            with log_to_file(run):
                log.info("%s", remark or f"{processes} processes")
        if not processes:
            _run_training(run, config, checkpoint, remark)
    if processes:
        _launch(run, processes, [str(run.folder)], there)


def resume(*, name: str, overrides: list[str]) -> None:
    """Go on from a checkpoint file, or from a run's last good checkpoint, with its own configuration but for `overrides`.

    Raises FlowgenError.
    """
    run, file = find_run(name), find_file(name)
    if (
        file is not None
        and not file.resolve().is_relative_to(run.folder.resolve())
        and run.config.exists()
    ):
        raise UserError(
            f"{run.folder} holds a run already: go on with `flowgen resume {run.folder}`, or move it away"
        )
    with lock_run(run):
        checkpoint = run.latest_valid_checkpoint() if file is None else read_checkpoint(file)
        config = read_config(run.config) if checkpoint is None else checkpoint["config"]
        config = override(config, resolve_stop_criterion(overrides))
        if config["data"].get("root") is not None:
            config["data"]["root"] = absolute_path(config["data"]["root"])
        _check_unfinished(run, config, checkpoint)
        processes = num_processes_to_launch(config["trainer"].get("num_processes"))
        if not processes:
            _run_training(run, config, checkpoint)
    if processes:
        _launch(run, processes, [name, *overrides], True)


def run_worker() -> None:
    """Train with the process that has the run. Raises FlowgenError."""
    _run_training(None, {}, None)


def absolute_path(root: Any) -> str:
    """So that the run can be resumed from anywhere."""
    return str(Path(str(root)).expanduser().resolve())


def _launch(run: Run, processes: int, words: list[str], keep: bool) -> None:
    """`flowgen resume WORDS` in so many processes; where nothing came of it the run's folder is free again, unless it is one to `keep`."""
    log.info("%s: %d processes", run.folder, processes)
    try:
        launch(processes, ["resume", *words], f"go on with `flowgen resume {run.folder}`")
    except SystemExit:
        if not keep and not run.checkpoints():
            run.config.unlink(missing_ok=True)
            run.log.unlink(missing_ok=True)
        raise


def _run_training(
    run: Run | None, config: dict[str, Any], checkpoint: dict[str, Any] | None, remark: str = ""
) -> None:
    """To the end, or to a signal; a process that has no run follows one that has."""
    from flowgen.training.distributed import join

    with join() as team:
        folder, config, checkpoint = team.broadcast_from_main(
            lambda: (run.folder if run else Path(), config, checkpoint)
        )
        run_training_in_group(team, run or Run(folder), config, checkpoint, remark)


def run_training_in_group(
    team: "ProcessGroup",
    run: Run,
    config: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    remark: str,
) -> None:
    import torch

    from flowgen.training.device import Runtime, environment
    from flowgen.training.sanity_checks import warn_test_leakage
    from flowgen.training.trainer import Trainer

    check_whole(0, 2**63 - 1, seed=config["seed"])
    trainer_config = _trainer_config(config)
    # Each of several processes has cores of its own.
    num_threads = trainer_config.num_threads if team.size == 1 else "auto"
    runtime = Runtime(trainer_config.device, num_threads, trainer_config.precision)
    if team.size == 1:
        # A resumed run is exact to the bit with the same number of threads.
        config["trainer"]["num_threads"] = runtime.num_threads
    torch.manual_seed(config["seed"])
    model, data, config = build_model_and_data(config)
    source = config.get("init_from")
    if checkpoint is not None:
        load_weights(model, checkpoint["model"])
    elif source is not None and team.is_main:
        _take_weights(model, config, source)
    if team.is_main:
        save_config(config, run.config)
    with log_to_file(run) if team.is_main else contextlib.nullcontext():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        counts = len(data.train), len(data.validation), len(data.test)
        log.info(
            "%s: %.2f million parameters, %d training, %d validation and %d test images",
            run.folder,
            parameters / 1e6,
            *counts,
        )
        log.info("environment: %s", environment(runtime.device, team.size))
        if remark:
            log.info("%s", remark)
        if team.is_main:
            warn_test_leakage(data)
        if checkpoint is not None:
            log.info("resuming from step %d", checkpoint["step"])
        trainer = Trainer(trainer_config, model, data, run, config, team, runtime)
        stopped = trainer.fit(checkpoint, init_weights=source is not None)
        if stopped is not None:
            log.info(
                "stopped by %s and saved: go on with `flowgen resume %s`",
                signal.Signals(stopped).name,
                run.folder,
            )
            reraise_signal(stopped)
        log.info("finished: %s", run.folder)


def _trainer_config(config: dict[str, Any]) -> "TrainerConfig":
    return build("trainer", config["trainer"])


def _take_weights(model: Any, config: dict[str, Any], source: str) -> None:
    """Those of the run `source`, averaged if it has averaged any. Raises FlowgenError where they are of another kind of model."""
    _, checkpoint = find_checkpoint(source)
    try:
        load_weights(model, eval_weights(checkpoint))
    except UserError as error:
        other = _differences(
            flatten({"model": config["model"]}), flatten(checkpoint["config"])
        ) or ["of another shape"]
        raise UserError(
            f"the weights of init_from={source} do not fit, {', '.join(other)}: train a model of the same settings"
        ) from error


def _check_unfinished(run: Run, config: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    if checkpoint is None:
        return
    step = checkpoint["step"]
    minutes = checkpoint["progress"]["seconds"] / 60
    limits = _trainer_config(config)
    if limits.minutes and minutes >= limits.minutes:
        more = f"trainer.minutes={2 * max(minutes, limits.minutes):.2g}"
    elif limits.steps and step >= limits.steps:
        more = f"trainer.steps={2 * step}"
    elif limits.patience and checkpoint["progress"].get("evals_since_best", 0) >= limits.patience:
        more = f"trainer.patience={2 * limits.patience}"
    else:
        return
    raise RunFinishedError(
        f"{run.folder} has ended, at step {step}: give it more, as in `flowgen resume {run.folder} {more}`"
    )


def _check_same(run: Run, config: dict[str, Any]) -> None:
    """Raises FlowgenError where the run's configuration is another one; it may say more: its images, what auto was."""
    here = {
        key: value
        for key, value in flatten(config).items()
        if key not in ("output_dir", "trainer.num_processes") and value != "auto"
    }
    other = _differences(here, flatten(read_config(run.config)))
    if other:
        cure = f"go on with it as it is by `flowgen resume {run.folder}`, or choose another output_dir="
        raise UserError(
            f"{run.folder} holds a run of another configuration, {', '.join(other)}: {cure}"
        )


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [
        f"{key}={there.get(key, 'nothing')} there and {value} here"
        for key, value in here.items()
        if there.get(key) != value
    ]


SWEEP = {"-m", "--multirun"}
SHOW = {"--help", "--cfg", "-c", "--info", "-i", "--version"}
WHAT, ABOUT = (
    ("job", "hydra", "all"),
    ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath", ""),
)
SHOWS = {"--cfg": WHAT, "-c": WHAT, "--info": ABOUT, "-i": ABOUT}
WITH_A_VALUE = {"--cfg", "-c", "--info", "-i", "--package", "-p"}  # flags of Hydra
SHOWN = 5  # failures of a sweep, at its end
register_resolvers()  # here, since a sweep's jobs may run in processes of their own, which import this file


def train(*, words: list[str]) -> None:
    """Hand `words` to Hydra and train what they describe; several runs where they sweep. Raises FlowgenError."""
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    if is_worker():
        return None if flags else run_worker()
    options, words = _parted([word for word in words if word not in SWEEP])
    check_overrides(words)
    words = resolve_stop_criterion(quote_overrides(words))
    try:
        if flags - SWEEP:
            _show(options, words, flags)
        else:
            with hydra.initialize_config_dir(
                str(conf_folder()), version_base="1.3", job_name="train"
            ):
                if flags and is_distributed():
                    raise UserError(
                        "a sweep is of runs of their own: start it without torchrun, or with trainer.num_processes=N in each"
                    )
                app = GlobalHydra.instance().hydra
                assert app is not None
                _sweep(app, words) if flags else _train(app, words)
    except (HydraException, OmegaConfBaseException) as error:
        raise hydra_error(error) from error


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and all other words."""
    marked = [
        (word.startswith("-") or before in WITH_A_VALUE, word)
        for before, word in pairwise(["", *words])
    ]
    return [word for flag, word in marked if flag], [word for flag, word in marked if not flag]


def _show(options: list[str], words: list[str], flags: set[str]) -> None:
    """Help, or the configuration: Hydra's own command line."""
    if flags & SWEEP and "--help" not in flags:
        raise UserError(
            "what is shown is one configuration: leave -m out, and give each setting one value"
        )
    if not SHOW & flags:
        raise UserError("--resolve and --package say how a configuration is shown: add --cfg job")
    for flag, value in pairwise(
        [piece for word in options for piece in word.split("=", 1 if word.startswith("--") else 0)]
        + [""]
    ):
        if flag in SHOWS:
            check_choice(SHOWS[flag], **{flag: value})
    sys.argv = ["flowgen train", *options, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come up here, where they become one line
    hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")(
        lambda cfg: None
    )()


def _train(app: Any, words: list[str]) -> None:
    error = app.run("train", _job, words).return_value
    if error is not None:
        raise error


def _sweep(app: Any, words: list[str]) -> None:
    """Every run of a sweep, in whichever process the launcher has it. Raises FlowgenError, at the end, where any has failed."""
    try:
        batches = app.multirun("train", _job_of_sweep, [*words, sweep_folder_override(words)])
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # a job that dies takes the launcher's patience with it
        raise UserError(f"the sweep's launcher gave up: {first_line(error)}") from error
    answers = [job.return_value for batch in batches for job in batch]
    failed = [answer for answer in answers if answer is not None]
    if failed:
        more = [f"and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
        raise UserError(
            f"{len(failed)} of {len(answers)} runs of the sweep failed: {'; '.join(failed[:SHOWN] + more)}"
        )


def _job(cfg: DictConfig, go_on: bool = False) -> Exception | SystemExit | None:
    """Train in the folder that Hydra made, and take it away where nothing came of the run; what went wrong is returned.

    A run that is to be gone on with, and has ended, is skipped. A folder that is named by the time, and taken, stands for one beside it.
    """
    folder = first = Path(HydraConfig.get().runtime.output_dir)
    by_time = "${now:" in OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, "output_dir"))
    try:
        cfg.output_dir = str(
            folder
        )  # before it is read: the default refers to Hydra's section, which a job is not given
        config = resolve_config(cfg)
        if config["data"].get("root") is not None:
            config["data"]["root"] = absolute_path(config["data"]["root"])
        if config["init_from"] is not None and Path(str(config["init_from"])).expanduser().exists():
            config["init_from"] = absolute_path(config["init_from"])
        go_on |= bool(config.pop("resume"))
        auto = HydraConfig.get().runtime.choices["trainer"] == "auto"
        remark = f"trainer=auto is trainer={default_trainer()} on this machine" if auto else ""
        for number in count(2):
            try:
                start(config, folder, go_on, remark)
                break
            except RunLockedError:
                if not by_time:
                    raise
                folder = first.with_name(f"{first.name}_{number}")
                config["output_dir"] = str(folder)
    except RunFinishedError as error:
        log.info("skipped: %s", error)
    except (
        Exception,
        SystemExit,
    ) as error:  # that of several processes, one of which has told what is wrong
        with contextlib.suppress(OSError):
            folder.rmdir()
        return error
    return None


def _job_of_sweep(cfg: DictConfig) -> str | None:
    """One run of a sweep: what is there is gone on with. The fault of one that fails is returned."""
    setup_logging()  # the process may be the launcher's
    error = _job(cfg, go_on=True)
    if error is None:
        return None
    if isinstance(error, SystemExit):
        if (
            not isinstance(error.code, int) or error.code > 128
        ):  # a signal, which ends the sweep too
            raise error
        error = UserError("one of its processes has said why")
    fault = f"{Path(HydraConfig.get().runtime.output_dir).name}: {user_message(error)}"
    log.error("%s", fault)
    return fault
