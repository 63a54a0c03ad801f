"""One training in its folder: started by `flowgen train`, or gone on with by `flowgen resume`."""

import contextlib
import fcntl
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgen.config import build, build_model_and_data, flat, in_todays_words, load_weights, one_end, override, read_config, save_config
from flowgen.errors import FlowgenError, check_whole
from flowgen.training.checkpoint import read_checkpoint, weights_of
from flowgen.training.find import find_checkpoint, find_run
from flowgen.training.run import Run
from flowgen.training.stop import pass_on

if TYPE_CHECKING:  # training imports torch, which help, completion and mistakes need not wait for
    from flowgen.training.trainer import Trainer

log = logging.getLogger("flowgen")


class EndedError(FlowgenError):
    """The run is finished."""


def start(config: dict[str, Any], folder: Path, go_on: bool = False, remark: str = "") -> None:
    """Train what `config` describes in `folder`; `go_on` with the unfinished run of the same configuration that it may hold.

    Raises FlowgenError where it holds a run that is not to be gone on with, `EndedError` where that is finished.
    """
    run = Run(folder)
    with _sole_trainer_of(run):
        checkpoint = None
        if run.config.exists() or run.metrics.exists():
            if not go_on:
                raise FlowgenError(f"{folder} holds a run already: go on with `flowgen resume {folder}`, or choose another out=")
            _check_same(run, config)
            checkpoint = run.last_good()
            config = in_todays_words(read_config(run.config) if checkpoint is None else checkpoint["config"])
        _train(run, config, checkpoint, remark)


def resume(name: str, overrides: list[str]) -> None:
    """Go on from a checkpoint file, or from a run's last good checkpoint, with its own configuration but for `overrides`.

    Raises FlowgenError.
    """
    run = find_run(name)
    with _sole_trainer_of(run):
        checkpoint = read_checkpoint(Path(name)) if Path(name).is_file() else run.last_good()
        config = in_todays_words(read_config(run.config) if checkpoint is None else checkpoint["config"])
        config = override(config, one_end(overrides))
        if config["data"].get("root") is not None:
            config["data"]["root"] = absolute(config["data"]["root"])
        _train(run, config, checkpoint)


def absolute(root: Any) -> str:
    """So that the run can be resumed from anywhere."""
    return str(Path(str(root)).expanduser().resolve())


def _train(run: Run, config: dict[str, Any], checkpoint: dict[str, Any] | None, remark: str = "") -> None:
    import torch

    from flowgen.training.device import environment
    from flowgen.training.doubts import doubt_split

    check_whole(0, 2**63 - 1, seed=config["seed"])
    trainer: Trainer = build("trainer", {"threads": "auto"} | config["trainer"])
    config["trainer"]["threads"] = trainer.machine.threads  # kept, since a resumed run has the same bits on as many threads alone
    if checkpoint is not None:
        _check_unfinished(run, trainer, checkpoint)
    torch.manual_seed(config["seed"])
    model, data, config = build_model_and_data(config)
    source = config.get("init")
    if checkpoint is not None:
        load_weights(model, checkpoint["model"])
    elif source is not None:
        _take_weights(model, config, source)
    save_config(config, run.config)
    with _logging(run):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        counts = len(data.train), len(data.validation), len(data.test)
        log.info("%s: %.2f million parameters, %d training, %d validation and %d test images", run.folder, parameters / 1e6, *counts)
        log.info("environment: %s", environment(trainer.machine.device))
        if remark:
            log.info("%s", remark)
        doubt_split(data)
        if checkpoint is not None:
            log.info("going on from step %d", checkpoint["step"])
        stopped = trainer.train(model, data, run, config, checkpoint, trained=source is not None)
        if stopped is not None:
            log.info("stopped by %s and saved: go on with `flowgen resume %s`", signal.Signals(stopped).name, run.folder)
            pass_on(stopped)
        log.info("done: %s", run.folder)


def _take_weights(model: Any, config: dict[str, Any], source: str) -> None:
    """Those of the run `source`, averaged if it has averaged any. Raises FlowgenError where they are of another kind of model."""
    _, checkpoint = find_checkpoint(source)
    try:
        load_weights(model, weights_of(checkpoint))
    except FlowgenError as error:
        other = _differences(flat({"model": config["model"]}), flat(checkpoint["config"])) or ["of another shape"]
        raise FlowgenError(f"the weights of init={source} do not fit, {', '.join(other)}: train a model of the same settings") from error


def _check_unfinished(run: Run, trainer: "Trainer", checkpoint: dict[str, Any]) -> None:
    step, minutes, cadence = checkpoint["step"], checkpoint["metrics"]["seconds"] / 60, trainer.cadence
    if cadence.minutes and minutes >= cadence.minutes:
        more = f"trainer.minutes={2 * max(minutes, cadence.minutes):.2g}"
    elif cadence.steps and step >= cadence.steps:
        more = f"trainer.steps={2 * step}"
    else:
        return
    raise EndedError(f"{run.folder} has ended, at step {step}: give it more, as in `flowgen resume {run.folder} {more}`")


def _check_same(run: Run, config: dict[str, Any]) -> None:
    """Raises FlowgenError where the run's configuration is another one; it may say more: its images, what auto was."""
    here = {key: value for key, value in flat(config).items() if key != "out" and value != "auto"}
    other = _differences(here, flat(in_todays_words(read_config(run.config))))
    if other:
        cure = f"go on with it as it is by `flowgen resume {run.folder}`, or choose another out="
        raise FlowgenError(f"{run.folder} holds a run of another configuration, {', '.join(other)}: {cure}")


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [f"{key}={there.get(key, 'nothing')} there and {value} here" for key, value in here.items() if there.get(key) != value]


@contextlib.contextmanager
def _sole_trainer_of(run: Run) -> Iterator[None]:
    """Hold the run's folder, which two processes would spoil for one another. Raises FlowgenError where another one has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.check_place()
    with open(run.log, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FlowgenError(f"{run.folder} is being trained by another process: wait for it, or choose another out=") from error
        try:
            yield
        finally:
            if not run.config.exists():
                run.log.unlink(missing_ok=True)


@contextlib.contextmanager
def _logging(run: Run) -> Iterator[None]:
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
