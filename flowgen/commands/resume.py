"""One training in its folder: started by `flowgen train`, or gone on with by `flowgen resume`."""

import contextlib
import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgen.commands.holding import TakenError, logging_to, sole_trainer_of
from flowgen.config import build, build_model_and_data, flat, load_weights, one_end, override, read_config, save_config
from flowgen.errors import FlowgenError, check_whole
from flowgen.launcher import launch, to_launch
from flowgen.training.checkpoint import read_checkpoint, weights_of
from flowgen.training.find import find_checkpoint, find_file, find_run
from flowgen.training.run import NoRun, Run
from flowgen.training.stop import pass_on

if TYPE_CHECKING:  # training imports torch, which help, completion and mistakes need not wait for
    from flowgen.training.team import Team
    from flowgen.training.trainer import Trainer

log = logging.getLogger("flowgen")


class EndedError(FlowgenError):
    """The run is finished."""


def start(config: dict[str, Any], folder: Path, go_on: bool = False, remark: str = "") -> None:
    """Train what `config` describes in `folder`; `go_on` with the unfinished run of the same configuration that it may hold.

    Raises TakenError where it holds a run that is not to be gone on with, EndedError where that is finished, FlowgenError.
    """
    run = Run(folder)
    with sole_trainer_of(run):
        checkpoint = None
        processes = to_launch(config["trainer"].get("devices"))
        there = run.config.exists() or run.metrics.exists()
        if there:
            if not go_on:
                raise TakenError(f"{folder} holds a run already: go on with `flowgen resume {folder}`, or choose another out=")
            _check_same(run, config)
            checkpoint = run.last_good()
            config = read_config(run.config) if checkpoint is None else checkpoint["config"]
            _check_unfinished(run, config, checkpoint)
        elif processes:
            save_config(config, run.config)  # for them to read
            with logging_to(run):
                log.info("%s", remark or f"{processes} processes")
        if not processes:
            _train(run, config, checkpoint, remark)
    if processes:
        _launch(run, processes, [str(run.folder)], there)


def resume(*, name: str, overrides: list[str]) -> None:
    """Go on from a checkpoint file, or from a run's last good checkpoint, with its own configuration but for `overrides`.

    Raises FlowgenError.
    """
    run, file = find_run(name), find_file(name)
    if file is not None and not file.resolve().is_relative_to(run.folder.resolve()) and run.config.exists():
        raise FlowgenError(f"{run.folder} holds a run already: go on with `flowgen resume {run.folder}`, or move it away")
    with sole_trainer_of(run):
        checkpoint = run.last_good() if file is None else read_checkpoint(file)
        config = read_config(run.config) if checkpoint is None else checkpoint["config"]
        config = override(config, one_end(overrides))
        if config["data"].get("root") is not None:
            config["data"]["root"] = absolute(config["data"]["root"])
        _check_unfinished(run, config, checkpoint)
        processes = to_launch(config["trainer"].get("devices"))
        if not processes:
            _train(run, config, checkpoint)
    if processes:
        _launch(run, processes, [name, *overrides], True)


def follow() -> None:
    """Train with the process that has the run. Raises FlowgenError."""
    _train(None, {}, None)


def absolute(root: Any) -> str:
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


def _train(run: Run | None, config: dict[str, Any], checkpoint: dict[str, Any] | None, remark: str = "") -> None:
    """To the end, or to a signal; a process that has no run follows one that has."""
    from flowgen.training.team import join

    with join() as team:
        folder, config, checkpoint = team.ask(lambda: (run.folder if run else Path(), config, checkpoint))
        train_in(team, run or NoRun(folder), config, checkpoint, remark)


def train_in(team: "Team", run: Run, config: dict[str, Any], checkpoint: dict[str, Any] | None, remark: str) -> None:
    import torch

    from flowgen.training.device import environment
    from flowgen.training.doubts import doubt_split

    check_whole(0, 2**63 - 1, seed=config["seed"])
    trainer = _trainer(config["trainer"] | ({"threads": "auto"} if team.size > 1 else {}))  # each process has cores of its own
    if team.size == 1:
        config["trainer"]["threads"] = trainer.machine.threads  # kept, since a resumed run has the same bits on as many threads alone
    torch.manual_seed(config["seed"])
    model, data, config = build_model_and_data(config)
    source = config.get("init")
    if checkpoint is not None:
        load_weights(model, checkpoint["model"])
    elif source is not None and team.leads:
        _take_weights(model, config, source)
    if team.leads:
        save_config(config, run.config)
    with logging_to(run) if team.leads else contextlib.nullcontext():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        counts = len(data.train), len(data.validation), len(data.test)
        log.info("%s: %.2f million parameters, %d training, %d validation and %d test images", run.folder, parameters / 1e6, *counts)
        log.info("environment: %s", environment(trainer.machine.device, team.size))
        if remark:
            log.info("%s", remark)
        if team.leads:
            doubt_split(data)
        if checkpoint is not None:
            log.info("going on from step %d", checkpoint["step"])
        stopped = trainer.train(model, data, run, config, checkpoint, trained=source is not None, team=team)
        if stopped is not None:
            log.info("stopped by %s and saved: go on with `flowgen resume %s`", signal.Signals(stopped).name, run.folder)
            pass_on(stopped)
        log.info("done: %s", run.folder)


def _trainer(settings: dict[str, Any]) -> "Trainer":
    return build("trainer", {key: value for key, value in settings.items() if key != "devices"})


def _take_weights(model: Any, config: dict[str, Any], source: str) -> None:
    """Those of the run `source`, averaged if it has averaged any. Raises FlowgenError where they are of another kind of model."""
    _, checkpoint = find_checkpoint(source)
    try:
        load_weights(model, weights_of(checkpoint))
    except FlowgenError as error:
        other = _differences(flat({"model": config["model"]}), flat(checkpoint["config"])) or ["of another shape"]
        raise FlowgenError(f"the weights of init={source} do not fit, {', '.join(other)}: train a model of the same settings") from error


def _check_unfinished(run: Run, config: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    if checkpoint is None:
        return
    step, minutes, cadence = checkpoint["step"], checkpoint["metrics"]["seconds"] / 60, _trainer(config["trainer"]).cadence
    if cadence.minutes and minutes >= cadence.minutes:
        more = f"trainer.minutes={2 * max(minutes, cadence.minutes):.2g}"
    elif cadence.steps and step >= cadence.steps:
        more = f"trainer.steps={2 * step}"
    elif cadence.patience and checkpoint["metrics"].get("without_gain", 0) >= cadence.patience:
        more = f"trainer.patience={2 * cadence.patience}"
    else:
        return
    raise EndedError(f"{run.folder} has ended, at step {step}: give it more, as in `flowgen resume {run.folder} {more}`")


def _check_same(run: Run, config: dict[str, Any]) -> None:
    """Raises FlowgenError where the run's configuration is another one; it may say more: its images, what auto was."""
    here = {key: value for key, value in flat(config).items() if key not in ("out", "trainer.devices") and value != "auto"}
    other = _differences(here, flat(read_config(run.config)))
    if other:
        cure = f"go on with it as it is by `flowgen resume {run.folder}`, or choose another out="
        raise FlowgenError(f"{run.folder} holds a run of another configuration, {', '.join(other)}: {cure}")


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [f"{key}={there.get(key, 'nothing')} there and {value} here" for key, value in here.items() if there.get(key) != value]
