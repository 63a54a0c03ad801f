"""`flowgen train` and `flowgen resume`."""

import contextlib
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowgen.config import (
    build,
    build_model_and_data,
    check_words,
    conf_folder,
    in_grammar,
    in_todays_words,
    load_weights,
    one_end,
    one_line,
    override,
    plain,
    plain_error,
    read_config,
    save_config,
)
from flowgen.errors import FlowgenError, check_whole
from flowgen.training.checkpoint import read_checkpoint
from flowgen.training.find import find_run
from flowgen.training.run import Run

if TYPE_CHECKING:  # training imports torch, which help, completion and mistakes need not wait for
    from flowgen.training.trainer import Trainer

WITH_A_VALUE = {"--cfg", "-c", "--info", "-i", "--package", "-p"}  # flags of Hydra
log = logging.getLogger("flowgen")


def train(words: list[str]) -> None:
    """Hand `words` to Hydra and train what they describe; several runs where they sweep. Raises FlowgenError."""
    sweep = [word for word in words if word in ("-m", "--multirun")]
    check_words([word for before, word in pairwise(["", *words]) if not word.startswith("-") and before not in WITH_A_VALUE])
    rest = one_end(in_grammar([word for word in words if word not in sweep]))
    sys.argv = ["flowgen train", *sweep[:1], *rest]  # Hydra wants its flag in front
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come up here, where they become one line
    failures: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            _start(cfg, folder)
        except Exception as error:
            failures.append(error)
            if sweep:
                log.error("%s: %s", folder, one_line(error))
            with contextlib.suppress(OSError):
                folder.rmdir()  # Hydra makes it; where nothing came of the run it goes again

    try:
        hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise plain_error(error) from error
    if failures and sweep:
        raise FlowgenError(f"{len(failures)} runs of the sweep failed, the first: {one_line(failures[0])}") from failures[0]
    if failures:
        raise failures[0]


def _start(cfg: DictConfig, folder: Path) -> None:
    if not OmegaConf.is_missing(cfg.data, "root") and cfg.data.get("root") is not None:
        cfg.data.root = _absolute(cfg.data.root)
    config = plain(cfg) | {"out": str(folder)}
    run = Run(folder)
    with _sole_trainer_of(run):
        if run.config.exists() or run.metrics.exists():
            raise FlowgenError(f"{folder} holds a run already: go on with `flowgen resume {folder}`, or choose another out=")
        trainer, model, data, config = _build(config)
        save_config(config, run.config)
        _train(run, config, trainer, model, data, None)


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
            config["data"]["root"] = _absolute(config["data"]["root"])
        trainer, model, data, config = _build(config)
        if checkpoint is not None:
            load_weights(model, checkpoint["model"])
            _check_unfinished(run, trainer, checkpoint)
        save_config(config, run.config)
        _train(run, config, trainer, model, data, checkpoint)


def _check_unfinished(run: Run, trainer: "Trainer", checkpoint: dict[str, Any]) -> None:
    step, minutes = checkpoint["step"], checkpoint["metrics"]["seconds"] / 60
    if trainer.minutes and minutes >= trainer.minutes:
        more = f"trainer.minutes={2 * max(minutes, trainer.minutes):.2g}"
    elif trainer.steps and step >= trainer.steps:
        more = f"trainer.steps={2 * step}"
    else:
        return
    raise FlowgenError(f"{run.folder} has ended, at step {step}: give it more, as in `flowgen resume {run.folder} {more}`")


def _absolute(root: Any) -> str:
    """So that the run can be resumed from anywhere."""
    return str(Path(str(root)).expanduser().resolve())


def _build(config: dict[str, Any]) -> tuple["Trainer", Any, Any, dict[str, Any]]:
    import torch

    check_whole(0, seed=config["seed"])
    torch.manual_seed(config["seed"])
    trainer = build("trainer", {"threads": "auto"} | config["trainer"])
    config["trainer"]["threads"] = trainer.threads  # kept, since a resumed run has the same bits on as many threads alone
    return (trainer, *build_model_and_data(config))


def _train(run: Run, config: dict[str, Any], trainer: "Trainer", model: Any, data: Any, checkpoint: dict[str, Any] | None) -> None:
    import torch

    from flowgen.training.device import environment

    with _logging(run):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        counts = len(data.train), len(data.validation), len(data.test)
        log.info("%s: %.2f million parameters, %d training, %d validation and %d test images", run.folder, parameters / 1e6, *counts)
        log.info("environment: %s", environment(trainer.device))
        if trainer.device.type == "cpu" and torch.cuda.is_available():
            log.warning("this machine has a GPU: trainer=gpu uses it")
        if checkpoint is not None:
            log.info("going on from step %d", checkpoint["step"])
        stopped = trainer.train(model, data, run, config, config["seed"], checkpoint)
        if stopped is not None:
            log.info("stopped by %s and saved: go on with `flowgen resume %s`", signal.Signals(stopped).name, run.folder)
            raise SystemExit(128 + stopped)
        log.info("done: %s", run.folder)


@contextlib.contextmanager
def _sole_trainer_of(run: Run) -> Iterator[None]:
    """Hold the run's folder, which two processes would spoil for one another. Raises FlowgenError where another one has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
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
