"""`flowgen train` and `flowgen resume`."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowgen.config import build, build_data, build_model, conf_folder, one_line, override, plain, read_config, save_config
from flowgen.errors import FlowgenError
from flowgen.training.find import find_run
from flowgen.training.run import Run

log = logging.getLogger("flowgen")


def train(words: list[str]) -> None:
    """Hand `words` to Hydra and train what they describe; several runs where they sweep. Raises FlowgenError."""
    sweep = [word for word in words if word in ("-m", "--multirun")]
    sys.argv = ["flowgen train", *sweep[:1], *(word for word in words if word not in sweep)]  # Hydra wants its flag in front
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come up here, where they become one line
    failures: list[FlowgenError] = []

    def job(cfg: DictConfig) -> None:
        try:
            _start(cfg, Path(HydraConfig.get().runtime.output_dir))
        except (FlowgenError, OmegaConfBaseException) as error:
            failures.append(FlowgenError(one_line(error)))
            with contextlib.suppress(OSError):
                Path(HydraConfig.get().runtime.output_dir).rmdir()  # Hydra makes it; where nothing came of the run it goes again
            if sweep:
                log.error("%s: %s", HydraConfig.get().runtime.output_dir, failures[-1])

    try:
        hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise FlowgenError(one_line(error)) from error
    if failures:
        raise FlowgenError(f"{len(failures)} runs of the sweep failed, the first: {failures[0]}" if sweep else str(failures[0]))


def _start(cfg: DictConfig, folder: Path) -> None:
    if not OmegaConf.is_missing(cfg.data, "root") and cfg.data.get("root") is not None:
        cfg.data.root = str(Path(cfg.data.root).resolve())  # so that the run can be resumed from anywhere
    config = plain(cfg) | {"out": str(folder)}
    run = Run(folder)
    if run.config.exists() or run.metrics.exists():
        raise FlowgenError(f"{folder} holds a run already: go on with `flowgen resume {folder}`, or choose another out=")
    trainer, data, model = _build(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, run.config)
    _train(run, config, trainer, data, model, None)


def resume(name: str, overrides: list[str]) -> None:
    """Go on from a run's last good checkpoint, with its own configuration but for `overrides`. Raises FlowgenError."""
    run = find_run(name)
    checkpoint = run.last_good()
    config = override(read_config(run.config) if checkpoint is None else checkpoint["config"], overrides)
    trainer, data, model = _build(config)
    if checkpoint is not None:
        step, seconds = checkpoint["step"], checkpoint["metrics"]["seconds"]
        if (trainer.steps and step >= trainer.steps) or (trainer.minutes and seconds >= 60 * trainer.minutes):
            end = f"trainer.steps={2 * trainer.steps}" if trainer.steps else f"trainer.minutes={2 * trainer.minutes:g}"
            raise FlowgenError(f"{run.folder} has ended, at step {step}: give it more, as in `flowgen resume {run.folder} {end}`")
    save_config(config, run.config)
    _train(run, config, trainer, data, model, checkpoint)


def _build(config: dict[str, Any]) -> tuple[Any, Any, Any]:
    torch.manual_seed(config["seed"])
    return build("trainer", config["trainer"]), build_data(config), build_model(config)


def _train(run: Run, config: dict[str, Any], trainer: Any, data: Any, model: Any, checkpoint: dict[str, Any] | None) -> None:
    with _logging(run):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        log.info(
            "%s: %.2f million parameters, %d training and %d test images", run.folder, parameters / 1e6, len(data.train), len(data.test)
        )
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
def _logging(run: Run) -> Iterator[None]:
    """Messages go to the screen, above the progress bar, and with the time to `train.log`."""
    file = logging.FileHandler(run.log)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    try:
        yield
    finally:
        log.removeHandler(file)
        file.close()
