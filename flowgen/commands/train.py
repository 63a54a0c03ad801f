"""`flowgen train`: words, composed by Hydra into one run or into the runs of a sweep."""

import contextlib
import logging
import os
import sys
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowgen.commands.holding import TakenError
from flowgen.commands.resume import EndedError, absolute, follow, start
from flowgen.config import (
    check_words,
    conf_folder,
    in_grammar,
    name_folders,
    one_end,
    one_line,
    plain,
    plain_error,
    register_resolvers,
    trainer_here,
)
from flowgen.errors import FlowgenError, check_choice
from flowgen.launcher import follows, started_together
from flowgen.messages import one_sentence, show_messages

SWEEP = {"-m", "--multirun"}
SHOW = {"--help", "--cfg", "-c", "--info", "-i", "--version"}
WHAT, ABOUT = ("job", "hydra", "all"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath", "")
SHOWS = {"--cfg": WHAT, "-c": WHAT, "--info": ABOUT, "-i": ABOUT}
WITH_A_VALUE = {"--cfg", "-c", "--info", "-i", "--package", "-p"}  # flags of Hydra
SHOWN = 5  # failures of a sweep, at its end
log = logging.getLogger("flowgen")
register_resolvers()  # here, since a sweep's jobs may run in processes of their own, which import this file


def train(*, words: list[str]) -> None:
    """Hand `words` to Hydra and train what they describe; several runs where they sweep. Raises FlowgenError."""
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    if follows():
        return None if flags else follow()
    options, words = _parted([word for word in words if word not in SWEEP])
    check_words(words)
    words = one_end(in_grammar(words))
    try:
        if flags - SWEEP:
            _show(options, words, flags)
        else:
            with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="train"):
                if flags and started_together():
                    raise FlowgenError("a sweep is of runs of their own: start it without torchrun, or with trainer.devices=N in each")
                app = GlobalHydra.instance().hydra
                assert app is not None
                _sweep(app, words) if flags else _train(app, words)
    except (HydraException, OmegaConfBaseException) as error:
        raise plain_error(error) from error


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and all other words."""
    marked = [(word.startswith("-") or before in WITH_A_VALUE, word) for before, word in pairwise(["", *words])]
    return [word for flag, word in marked if flag], [word for flag, word in marked if not flag]


def _show(options: list[str], words: list[str], flags: set[str]) -> None:
    """Help, or the configuration: Hydra's own command line."""
    if flags & SWEEP and "--help" not in flags:
        raise FlowgenError("what is shown is one configuration: leave -m out, and give each setting one value")
    if not SHOW & flags:
        raise FlowgenError("--resolve and --package say how a configuration is shown: add --cfg job")
    for flag, value in pairwise([piece for word in options for piece in word.split("=", 1 if word.startswith("--") else 0)] + [""]):
        if flag in SHOWS:
            check_choice(SHOWS[flag], **{flag: value})
    sys.argv = ["flowgen train", *options, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come up here, where they become one line
    hydra.main(config_path=str(conf_folder()), config_name="train", version_base="1.3")(lambda cfg: None)()


def _train(app: Any, words: list[str]) -> None:
    error = app.run("train", _job, words).return_value
    if error is not None:
        raise error


def _sweep(app: Any, words: list[str]) -> None:
    """Every run of a sweep, in whichever process the launcher has it. Raises FlowgenError, at the end, where any has failed."""
    try:
        batches = app.multirun("train", _job_of_sweep, [*words, name_folders(words)])
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # a job that dies takes the launcher's patience with it
        raise FlowgenError(f"the sweep's launcher gave up: {one_line(error)}") from error
    answers = [job.return_value for batch in batches for job in batch]
    failed = [answer for answer in answers if answer is not None]
    if failed:
        more = [f"and {len(failed) - SHOWN} more"] * (len(failed) > SHOWN)
        raise FlowgenError(f"{len(failed)} of {len(answers)} runs of the sweep failed: {'; '.join(failed[:SHOWN] + more)}")


def _job(cfg: DictConfig, go_on: bool = False) -> Exception | SystemExit | None:
    """Train in the folder that Hydra made, and take it away where nothing came of the run; what went wrong is returned.

    A run that is to be gone on with, and has ended, is skipped. A folder that is named by the time, and taken, stands for one beside it.
    """
    folder = first = Path(HydraConfig.get().runtime.output_dir)
    by_time = "${now:" in OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, "out"))
    try:
        cfg.out = str(folder)  # before it is read: the default refers to Hydra's section, which a job is not given
        config = plain(cfg)
        if config["data"].get("root") is not None:
            config["data"]["root"] = absolute(config["data"]["root"])
        if config["init"] is not None and Path(str(config["init"])).expanduser().exists():
            config["init"] = absolute(config["init"])
        go_on |= bool(config.pop("resume"))
        auto = HydraConfig.get().runtime.choices["trainer"] == "auto"
        remark = f"trainer=auto is trainer={trainer_here()} on this machine" if auto else ""
        for number in count(2):
            try:
                start(config, folder, go_on, remark)
                break
            except TakenError:
                if not by_time:
                    raise
                folder = first.with_name(f"{first.name}_{number}")
                config["out"] = str(folder)
    except EndedError as error:
        log.info("skipped: %s", error)
    except (Exception, SystemExit) as error:  # that of several processes, one of which has told what is wrong
        with contextlib.suppress(OSError):
            folder.rmdir()
        return error
    return None


def _job_of_sweep(cfg: DictConfig) -> str | None:
    """One run of a sweep: what is there is gone on with. The fault of one that fails is returned."""
    show_messages()  # the process may be the launcher's
    error = _job(cfg, go_on=True)
    if error is None:
        return None
    if isinstance(error, SystemExit):
        if not isinstance(error.code, int) or error.code > 128:  # a signal, which ends the sweep too
            raise error
        error = FlowgenError("one of its processes has said why")
    fault = f"{Path(HydraConfig.get().runtime.output_dir).name}: {one_sentence(error)}"
    log.error("%s", fault)
    return fault
