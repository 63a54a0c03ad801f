"""Python API: train, evaluate and use models. The command line calls these functions.

All functions raise `flowgen.UserError` for invalid input and never exit the process.
"""

import contextlib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from itertools import count
from os import PathLike
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from flowgen.config.compose import (
    absolute_path,
    compose_config,
    override,
    read_config,
    resolve_stop_criterion,
    save_config,
)
from flowgen.config.instantiate import (
    build_data,
    build_model,
    build_model_and_data,
    check_fits_data,
    instantiate,
    with_image_shape,
)
from flowgen.config.runs import (
    find_checkpoint,
    find_file,
    find_run,
    load_from_checkpoint,
    load_weights,
)
from flowgen.config.settings import (
    description,
    did_you_mean,
    flatten,
    group_options,
    read_text,
    read_yaml,
    settings_of_file,
)
from flowgen.training.checkpoint import eval_weights, read_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.console import progress_bar, setup_logging
from flowgen.utils.errors import UserError, check_whole
from flowgen.utils.files import data_folder
from flowgen.utils.launcher import is_worker, launch, num_processes_to_launch
from flowgen.utils.metrics import Metrics, MetricValue, finite

if TYPE_CHECKING:
    from torch import Tensor

    from flowgen.models.base import GenerativeModel
    from flowgen.training.distributed import ProcessGroup

RunName = str | PathLike[str] | Run
BATCH_SIZE = 64  # images that are evaluated or scored at once
LOCK_FILE = ".lock"  # in the folder of a run, held by the process that trains it
LOG_Z_KEYS = ("log_z", "log_z_error", "reliable", "verdict")
PAPER = re.compile(r"^(.*?)(?: \(([^()]*\d{4}[^()]*)\))?$")  # a description and its source
URL = re.compile(r"https?://[^\s'\"),]+")
log = logging.getLogger("flowgen")


class RunLockedError(UserError):
    """The folder belongs to another run or is in use by another process."""


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


class EvalReport(dict[str, MetricValue]):
    """Metrics of a model on the test split, by name.

    `report["bits_per_dim"].value` and `.error` are the mean and its standard error, `print(report)`
    shows everything.

    Args:
        conditions: run, step and split of the evaluation.
        metrics: the measured values.
    """

    def __init__(self, conditions: dict[str, Any], metrics: Metrics):
        super().__init__(metrics.measured)
        self.conditions = conditions
        self.metrics = metrics

    def row(self) -> dict[str, Any]:
        """Return everything as one flat dictionary that can be written as JSON."""
        return self.conditions | finite(self.metrics.row())

    def __str__(self) -> str:
        lines = [f"{name:32} {value}" for name, value in self.conditions.items()]
        for name, value in self.items():
            error = "" if value.error is None else f" ± {_format(value.error)}"
            lines.append(f"{name:32} {_format(value.value)}{error} {value.metric.unit}".rstrip())
        lines += [f"{name:32} {value}" for name, value in self.metrics.facts.items()]
        return "\n".join(lines)

    __repr__ = __str__


class ModelInfo(NamedTuple):
    """A model that can be trained with model=NAME."""

    name: str
    description: str
    paper: str


class DatasetInfo(NamedTuple):
    """A data set that can be used with data=NAME; see `list_datasets` for the availability."""

    name: str
    description: str
    source: str
    availability: str


def train(*overrides: str) -> Run:
    """Train a model, as `flowgen train OVERRIDE...` does.

    Ctrl-C saves the run and raises KeyboardInterrupt. Messages go to the logger `flowgen`.

    Args:
        *overrides: GROUP=NAME and KEY=VALUE; `flowgen train --help` lists them.

    Returns:
        The run, a folder with checkpoints, metrics and samples.

    Raises:
        UserError: for unknown settings and for incompatible data or models.

    Example:
        >>> import tempfile
        >>> run = train(
        ...     "model=glow", "model.levels=1", "model.steps_per_level=1", "model.width=4",
        ...     "trainer.steps=2", "trainer.init_images=16", "trainer.eval_images=16",
        ...     f"output_dir={tempfile.mkdtemp()}/run",
        ... )
        >>> run.last.exists()
        True
    """
    setup_logging()
    if is_worker():
        return fit_run()
    return train_config(*compose_config(overrides))


def resume(run: RunName, *overrides: str) -> Run:
    """Continue a run from its last valid checkpoint, or from a checkpoint file.

    Args:
        run: a run, its folder or name, or a checkpoint file.
        *overrides: KEY=VALUE that change its configuration, such as `trainer.minutes=60`.

    Returns:
        The run.

    Raises:
        UserError: if there is no such run or it has ended.
    """
    setup_logging()
    if is_worker():
        return fit_run()
    name = _name(run)
    found = find_run(name)
    file = find_file(name)
    in_run = file is None or file.resolve().is_relative_to(found.folder.resolve())
    if not in_run and found.config.exists():
        raise UserError(
            f"{found.folder} holds a run already: continue it with "
            f"`flowgen resume {found.folder}`, or move it away"
        )
    with lock_run(found):
        checkpoint = found.latest_valid_checkpoint() if file is None else read_checkpoint(file)
        config = read_config(found.config) if checkpoint is None else checkpoint["config"]
        config = override(config, resolve_stop_criterion(overrides))
        _make_paths_absolute(config)
        _check_unfinished(found, config, checkpoint)
        num_processes = num_processes_to_launch(config["trainer"].get("num_processes"))
        if not num_processes:
            return fit_run(found, config, checkpoint)
    return _launch(found, num_processes, [name, *overrides], keep=True)


def load(run: RunName, device: str = "auto") -> "GenerativeModel":
    """Load a trained model in evaluation mode, with its EMA weights if it has them.

    Args:
        run: a run, its folder or name under `outputs/`, a checkpoint or safetensors file,
            `zoo/NAME` or `hf:OWNER/NAME`.
        device: auto (a GPU if there is one), cpu or cuda.

    Raises:
        UserError: if there is no such run or device.

    Example:
        >>> model = load("zoo/glow_mnist", device="cpu")
        >>> images, log_prob = model.sample(4, temperature=0.7)
        >>> images.shape, images.dtype
        (torch.Size([4, 1, 28, 28]), torch.uint8)
    """
    return load_from_checkpoint(find_checkpoint(_name(run))[1], device)


def evaluate(run: RunName | None = None, *overrides: str, device: str = "auto") -> EvalReport:
    """Evaluate a model on the whole test split of its data.

    The results are stored with the run if they are for its own data, so that later commands know,
    for example, log Z.

    Args:
        run: as in `load`; None: the newest run.
        *overrides: KEY=VALUE of evaluation or run settings, such as `num_importance_samples=8`.
        device: auto, cpu or cuda.

    Returns:
        A mapping of metric names to values with standard errors.

    Raises:
        UserError: if there is no such run, or its data is missing.

    Example:
        >>> import tempfile
        >>> run = train(
        ...     "model.levels=1", "model.steps_per_level=1", "model.width=4", "trainer.steps=2",
        ...     "trainer.init_images=16", "trainer.eval_images=16",
        ...     f"output_dir={tempfile.mkdtemp()}/run",
        ... )
        >>> report = evaluate(run)
        >>> report["bits_per_dim"].error > 0
        True
    """
    from flowgen.training.sanity_checks import warn_implausible_likelihood, warn_test_leakage

    found, checkpoint = find_checkpoint(None if run is None else _name(run))
    trained = checkpoint["config"]
    known = settings_of_file("train")
    full_keys = [
        f"evaluation.{text}" if f"evaluation.{text.partition('=')[0]}" in known else text
        for text in overrides
    ]
    config = override(trained, full_keys)
    eval_config = instantiate("evaluation", config["evaluation"])
    data = build_data(config)
    model = load_from_checkpoint(checkpoint | {"config": config}, device)
    check_fits_data(model, data)
    warn_test_leakage(data)
    data.to(model.device)
    model.set_progress(progress_bar)
    batches = progress_bar(
        data.batches("test", BATCH_SIZE), "images", math.ceil(len(data.test) / BATCH_SIZE)
    )
    reference = data.batches("train", BATCH_SIZE, len(data.test))
    metrics = model.evaluate(batches, reference, eval_config).on("test")
    value = metrics[model.metric.name]
    if not math.isfinite(value.value):
        log.warning("%s is not finite: a likelihood is beyond float32", model.metric.name)
    warn_implausible_likelihood(value, data, data.batches("test", BATCH_SIZE))
    conditions = {"run": str(found.folder), "step": checkpoint["step"], "split": "test"}
    if data.bits == 1:
        conditions["binarization"] = config["data"]["binarization"]
    report = EvalReport(conditions, metrics)
    own_data = all(config[section] == trained[section] for section in ("model", "data"))
    if results := merge_evaluations(checkpoint["metrics"], report.row(), own_data):
        found.save_evaluation(checkpoint, results)
    return report


def score(model: "GenerativeModel", images: "Tensor") -> "Tensor":
    """Return the log-probability of each image.

    Dequantization noise is drawn with a fixed seed, so that the same images have the same scores.
    An RBM whose log Z is unknown gives log p(x) + log Z; `evaluate` estimates log Z.

    Args:
        model: a model, usually of `load`.
        images: pixel values (N, channels, height, width), integers from 0 to 2^bits - 1.

    Returns:
        Log-probabilities in nats (N,), on the CPU. For flows they are lower bounds.

    Raises:
        UserError: if the images do not fit the model.

    Example:
        >>> model = load("zoo/glow_mnist", device="cpu")
        >>> images, _ = model.sample(3)
        >>> score(model, images).shape
        torch.Size([3])
    """
    import torch

    if tuple(images.shape[1:]) != tuple(model.image_shape):
        raise UserError(f"images must have the shape (N, {', '.join(map(str, model.image_shape))})")
    max_value = 2**model.bits - 1
    is_integer = not images.is_floating_point() and not images.is_complex()
    if not is_integer or not ((images >= 0) & (images <= max_value)).all():
        raise UserError(f"images must have integer pixel values from 0 to {max_value}")
    was_training = model.training
    model.eval()
    generator = torch.Generator(model.device).manual_seed(0)
    try:
        with torch.no_grad():
            scores = [
                model.score(batch.to(model.device, torch.uint8), generator=generator).cpu()
                for batch in images.split(BATCH_SIZE)
            ]
    finally:
        model.train(was_training)
    return torch.cat(scores)


def create_model(
    name: str,
    image_shape: Sequence[int] = (1, 28, 28),
    bits: int | None = None,
    **changes: Any,
) -> "GenerativeModel":
    """Create an untrained model with the defaults of conf/model/NAME.yaml.

    Args:
        name: one of `list_models()`.
        image_shape: channels, height and width.
        bits: bits per pixel value; None: 8, or 1 for models of binary images.
        **changes: settings that differ from the defaults; `flowgen train --help model=NAME` lists
            them. `negative_phase` of an RBM is a name or a dict of its settings.

    Raises:
        UserError: for an unknown model or setting.

    Example:
        >>> model = create_model("glow", image_shape=(3, 32, 32), bits=5, width=8)
        >>> sum(parameter.numel() for parameter in model.parameters()) > 10_000
        True
    """
    overrides = [f"model={name}"]
    if isinstance(changes.get("negative_phase"), str):
        overrides.append(f"model/negative_phase={changes.pop('negative_phase')}")
    config, _, _ = compose_config(overrides)
    section = config["model"]
    for key, value in changes.items():
        if key not in section:
            hint = did_you_mean(key, section)
            raise UserError(f"model={name} has no setting {key}{hint}: see conf/model/{name}.yaml")
        section[key] = section[key] | value if isinstance(section[key], dict) else value
    channels, height, width = image_shape
    bits = config["data"]["bits"] if bits is None else bits
    return build_model(with_image_shape(config, (channels, height, width), bits))


def list_models() -> list[ModelInfo]:
    """Return the models that can be trained.

    Example:
        >>> [model.paper for model in list_models() if model.name == "glow"]
        ['Kingma and Dhariwal, arXiv 1807.03039']
    """
    texts = {name: description(f"model/{name}") for name in group_options("model")}
    return [ModelInfo(name, *PAPER.findall(text)[0]) for name, text in texts.items()]


def list_datasets() -> list[DatasetInfo]:
    """Return the data sets that can be trained on.

    The availability is `present`, `downloadable` (training downloads it) or `missing`.

    Example:
        >>> [data.availability for data in list_datasets() if data.name == "toy"]
        ['present']
    """
    datasets = []
    for name in group_options("data"):
        url = URL.search(read_text(f"data/{name}"))
        source = url[0] if url else ""
        datasets.append(DatasetInfo(name, description(f"data/{name}"), source, _availability(name)))
    return datasets


def _availability(name: str) -> str:
    section = read_yaml(f"data/{name}")
    folders = section.get("search_dirs") or []
    if "root" not in section or any((data_folder() / folder).exists() for folder in folders):
        return "present"  # without root, it is generated or part of the package
    root = settings_of_file(f"data/{name}")["data.root"]
    return "downloadable" if "download" in root.meaning else "missing"


def _name(run: RunName) -> str:
    return str(run.folder if isinstance(run, Run) else run)


def _format(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "unknown"


def merge_evaluations(
    cached: dict[str, Any], new: dict[str, Any], own_data: bool
) -> dict[str, Any]:
    """Merge two evaluations of the same weights.

    Args:
        cached: the stored results.
        new: the new results.
        own_data: whether the new results are for the data of the run.

    Returns:
        Metrics of the run's own data only, and the reliable log Z with the smaller error.
    """
    best = min((new, cached), key=_log_z_error)
    use_new = own_data and (best is new or "images" not in cached)
    metrics = new if use_new else cached
    return metrics | {key: best[key] for key in LOG_Z_KEYS if key in best}


def _log_z_error(results: dict[str, Any]) -> float:
    error = results.get("log_z_error")
    return error if error is not None and results.get("reliable") else math.inf


def train_config(config: dict[str, Any], note: str = "", numbered: bool = False) -> Run:
    """Train a composed configuration in its `output_dir`.

    A finished run is skipped if the configuration says `resume: true`.

    Args:
        config: the configuration of `compose_config`.
        note: a line for the log.
        numbered: whether to append a number to the name of a folder that holds a run already.
    """
    _make_paths_absolute(config)
    resume_run = config.pop("resume")
    folder = Path(config["output_dir"])
    for number in count(2):
        run = Run(Path(config["output_dir"]))
        try:
            return _start(run, config, resume_run, note)
        except RunFinishedError as error:
            log.info("skipped: %s", error)
            return run
        except RunLockedError:
            if not numbered:
                raise
            config["output_dir"] = str(folder.with_name(f"{folder.name}_{number}"))
    raise AssertionError("unreachable")


def _start(run: Run, config: dict[str, Any], resume_run: bool, note: str) -> Run:
    """Start a run in its folder, or continue the unfinished run that it holds."""
    with lock_run(run):
        checkpoint = None
        num_processes = num_processes_to_launch(config["trainer"].get("num_processes"))
        exists = run.config.exists() or run.metrics.exists()
        if exists:
            if not resume_run:
                raise RunLockedError(
                    f"{run.folder} holds a run already: continue it with "
                    f"`flowgen resume {run.folder}`, or choose another output_dir="
                )
            _check_same_settings(run, config)
            checkpoint = run.latest_valid_checkpoint()
            config = read_config(run.config) if checkpoint is None else checkpoint["config"]
            _check_unfinished(run, config, checkpoint)
        elif num_processes:
            save_config(config, run.config)  # the processes read it
            with log_to_file(run):
                log.info("%s", note or f"{num_processes} processes")
        if not num_processes:
            return fit_run(run, config, checkpoint, note)
    return _launch(run, num_processes, [str(run.folder)], keep=exists)


def _launch(run: Run, num_processes: int, arguments: list[str], keep: bool) -> Run:
    """Run `flowgen resume ARGUMENTS` in several processes.

    If they fail before the first checkpoint, the folder of a new run is deleted.
    """
    log.info("%s: %d processes", run.folder, num_processes)
    try:
        hint = f"continue with `flowgen resume {run.folder}`"
        launch(num_processes, ["resume", *arguments], hint)
    except SystemExit as error:
        if not keep and not run.checkpoints():
            run.config.unlink(missing_ok=True)
            _remove_without_run(run)
        status = error.code if isinstance(error.code, int) else 1
        if status > 128:  # a signal
            raise TrainingInterrupted(run, status - 128) from error
        raise WorkerFailedError(status) from error
    return run


def fit_run(
    run: Run | None = None,
    config: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    note: str = "",
) -> Run:
    """Train in this process, or in the group of processes that a launcher started.

    The main process has the run and its configuration, and sends them to the others.
    """
    from flowgen.training.distributed import join

    with join() as group:
        shared: Any = group.broadcast_from_main(lambda: (run, config, checkpoint, note))
        run_training_in_group(group, *shared)
    return shared[0]


def run_training_in_group(
    group: "ProcessGroup",
    run: Run,
    config: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    note: str = "",
) -> None:
    """Build the model and the data of a configuration and train.

    Args:
        group: this process and those that train with it.
        run: the folder of the run.
        config: its configuration.
        checkpoint: where to continue, or None for a new run.
        note: a line for the log.

    Raises:
        TrainingInterrupted: if a signal stopped training; the run is saved.
    """
    import torch

    from flowgen.training.device import Runtime, environment
    from flowgen.training.sanity_checks import warn_test_leakage
    from flowgen.training.trainer import Trainer

    check_whole(0, 2**63 - 1, seed=config["seed"])
    trainer_config = instantiate("trainer", config["trainer"])
    # With several processes, each chooses its own number of threads.
    num_threads = trainer_config.num_threads if group.size == 1 else "auto"
    runtime = Runtime(trainer_config.device, num_threads, trainer_config.precision)
    if group.size == 1:
        # A resumed run needs the same number of threads for the same bits.
        config["trainer"]["num_threads"] = runtime.num_threads
    torch.manual_seed(config["seed"])
    model, data, config = build_model_and_data(config)
    init_from = config.get("init_from")
    if checkpoint is not None:
        load_weights(model, checkpoint["model"])
    elif init_from is not None and group.is_main:
        _load_init_weights(model, config, init_from)
    if group.is_main:
        save_config(config, run.config)
    with log_to_file(run) if group.is_main else contextlib.nullcontext():
        log.info(
            "%s: %.2f million parameters, %d training, %d validation and %d test images",
            run.folder,
            sum(parameter.numel() for parameter in model.parameters()) / 1e6,
            len(data.train),
            len(data.validation),
            len(data.test),
        )
        log.info("environment: %s", environment(runtime.device, group.size))
        if note:
            log.info("%s", note)
        if group.is_main:
            warn_test_leakage(data)
        if checkpoint is not None:
            log.info("resuming from step %d", checkpoint["step"])
        trainer = Trainer(trainer_config, model, data, run, config, group, runtime)
        stop_signal = trainer.fit(checkpoint, init_weights=init_from is not None)
        if stop_signal is not None:
            name = Signals(stop_signal).name
            log.info("stopped by %s and saved: continue with `flowgen resume %s`", name, run.folder)
            raise TrainingInterrupted(run, stop_signal)
        log.info("finished: %s", run.folder)


def _make_paths_absolute(config: dict[str, Any]) -> None:
    """Make the run independent of the working directory."""
    if config["data"].get("root") is not None:
        config["data"]["root"] = absolute_path(config["data"]["root"])
    init_from = config.get("init_from")
    if init_from is not None and Path(str(init_from)).expanduser().exists():
        config["init_from"] = absolute_path(init_from)


def _load_init_weights(model: "GenerativeModel", config: dict[str, Any], source: str) -> None:
    """Load the weights of the run that `init_from` names."""
    _, checkpoint = find_checkpoint(source)
    try:
        load_weights(model, eval_weights(checkpoint))
    except UserError as error:
        section = flatten({"model": config["model"]})
        differences = _differences(section, checkpoint["config"]) or ["different tensor shapes"]
        raise UserError(
            f"the weights of init_from={source} do not fit, {', '.join(differences)}: "
            "train a model with the same settings"
        ) from error


def _check_unfinished(run: Run, config: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
    """Raise RunFinishedError if the checkpoint is at the end of the run."""
    if checkpoint is None:
        return
    limits = instantiate("trainer", config["trainer"])
    step = checkpoint["step"]
    values = {
        "minutes": checkpoint["progress"]["seconds"] / 60,
        "steps": step,
        "patience": checkpoint["progress"].get("evals_since_best", 0),
    }
    for name, value in values.items():
        limit = getattr(limits, name)
        if limit and value >= limit:
            raise RunFinishedError(
                f"{run.folder} has ended at step {step}: to train longer, "
                f"`flowgen resume {run.folder} trainer.{name}={math.ceil(2 * value)}`"
            )


def _check_same_settings(run: Run, config: dict[str, Any]) -> None:
    """Raise UserError if a setting differs from that of the run; missing settings are ignored."""
    wanted = flatten(config)
    for key in ("output_dir", "trainer.num_processes"):
        wanted.pop(key, None)
    if differences := _differences(wanted, read_config(run.config)):
        raise UserError(
            f"{run.folder} holds a run with other settings, {', '.join(differences)}: continue it "
            f"as it is with `flowgen resume {run.folder}`, or choose another output_dir="
        )


def _differences(here: dict[str, Any], config: dict[str, Any]) -> list[str]:
    there = flatten(config)
    return [
        f"{key}={there.get(key, 'nothing')} there and {value} here"
        for key, value in here.items()
        if value not in (there.get(key), "auto")
    ]


@contextlib.contextmanager
def lock_run(run: Run) -> Iterator[None]:
    """Lock the folder of a run for this process. A folder without a run is removed at the end.

    Raises:
        RunLockedError: if another process holds the lock.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    run.check_contained()
    lock = FileLock(run.folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunLockedError(
            f"another process is training {run.folder}: wait for it, or choose another output_dir="
        ) from error
    try:
        yield
    finally:
        lock.release()
        if not run.config.exists():
            _remove_without_run(run)


def _remove_without_run(run: Run) -> None:
    for path in (run.log, run.folder / LOCK_FILE):
        path.unlink(missing_ok=True)
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
