"""Python API: train, evaluate and use models. The command line calls these functions.

All functions raise `flowgen.UserError` for invalid input and never exit the process.
"""

import math
import re
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from flowgen.config import compose, instantiate, runs, settings, start
from flowgen.data import DOWNLOADABLE
from flowgen.training.checkpoint import EXPORT_SUFFIX
from flowgen.training.run_dir import Run
from flowgen.utils import console, files, processes
from flowgen.utils.errors import UserError, check, check_whole, log, user_error
from flowgen.utils.metrics import FRECHET, Metrics, MetricValue, nonfinite_to_none

if TYPE_CHECKING:
    from torch import Tensor

    from flowgen.data.dataset import ImageDataset
    from flowgen.evaluation.sample_quality import SampleQuality
    from flowgen.models.base import GenerativeModel

RunName = str | PathLike[str] | Run
BATCH_SIZE = 64  # images that are evaluated or scored at once
# Beginnings of the keys of `SampleQuality.evaluate`
SAMPLE_KEYS = ("sample_", "training_", "test_readable", "classifier_accuracy")
PAPER = re.compile(r"^(.*?)(?: \(([^()]*\d{4}[^()]*)\))?$")  # a description and its source
URL = re.compile(r"https?://[^\s'\"),]+")


class EvalReport(dict[str, MetricValue]):
    """Metrics of a model on the test split, by name.

    `report["bits_per_dim"].value` and `.error` are the mean and its standard error, `print(report)`
    shows everything.

    Args:
        metadata: Run, step and split of the evaluation.
        metrics: The measured values.
    """

    def __init__(self, metadata: dict[str, Any], metrics: Metrics):
        super().__init__(metrics.measured)
        self.metadata = metadata
        self.metrics = metrics

    def row(self) -> dict[str, Any]:
        """Return everything as one flat dictionary that can be written as JSON."""
        return self.metadata | nonfinite_to_none(self.metrics.row())

    def __str__(self) -> str:
        rows = list(self.metadata.items())
        for name, value in self.items():
            error = "" if value.error is None else f" ± {_format(value.error)}"
            rows.append(
                (name, f"{value.sign}{_format(value.value)}{error} {value.metric.unit}".rstrip())
            )
        rows += self.metrics.facts.items()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)

    __repr__ = __str__


class ModelInfo(NamedTuple):
    """A model that can be trained with model=NAME; its likelihood is as in `GenerativeModel`."""

    name: str
    description: str
    paper: str
    likelihood: str


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
        UserError: For unknown settings and for incompatible data or models.

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
    for override in overrides:
        check(isinstance(override, str), f"{override!r} is not a string: use train('model=glow')")
    console.setup_logging()
    if processes.is_worker():
        return start.train_run()
    composed = compose.compose_config(overrides)
    return start.start_run(composed.config, composed.note, composed.numbered)


def resume(run: RunName, *overrides: str) -> Run:
    """Continue a run from its last valid checkpoint, or from a checkpoint file.

    Args:
        run: A run, its folder or name, or a checkpoint file.
        *overrides: KEY=VALUE that change its configuration, such as `trainer.minutes=60`.

    Returns:
        The run.

    Raises:
        UserError: If there is no such run or it has ended.

    Example:
        >>> import tempfile
        >>> run = train(
        ...     "model=nice", "model.width=4", "trainer.steps=1", "trainer.eval_images=16",
        ...     f"output_dir={tempfile.mkdtemp()}/run",
        ... )
        >>> resume(run, "trainer.steps=2").has_ended()
        True
    """
    console.setup_logging()
    if processes.is_worker():
        return start.train_run()
    found = runs.find_run(_name(run))
    file = runs.find_file(_name(run))
    if not found.config.exists() and (file is None or file.suffix == EXPORT_SUFFIX):
        raise UserError(
            f"{_name(run)} is an exported model without the state of its training: "
            f"`flowgen train init_from={_name(run)}` starts from its weights"
        )
    is_elsewhere = file and not file.resolve().is_relative_to(found.folder.resolve())
    if is_elsewhere and found.config.exists():
        raise UserError(
            f"{found.folder} holds a run already: continue it with "
            f"`flowgen resume {found.folder}`, or move it away"
        )
    return start.resume_run(found, overrides, file)


def load(run: RunName, device: str = "auto") -> "GenerativeModel":
    """Load a trained model in evaluation mode, with its EMA weights if it has them.

    Args:
        run: A run, its folder or name under `outputs/`, a checkpoint or safetensors file,
            `zoo/NAME` or `hf:OWNER/NAME`.
        device: Name of the device; "auto" is a GPU if there is one, or else the CPU.

    Raises:
        UserError: If there is no such run or device.

    Example:
        >>> model = load("zoo/glow_mnist", device="cpu")
        >>> images, log_prob = model.sample(4, temperature=0.7)
        >>> images.shape, images.dtype
        (torch.Size([4, 1, 28, 28]), torch.uint8)
    """
    return runs.load_from_checkpoint(runs.find_checkpoint(_name(run))[1], device)


def evaluate(run: RunName | None = None, *overrides: str, device: str = "auto") -> EvalReport:
    """Evaluate a model on the whole test split of its data.

    With `samples=N` it also compares N samples, drawn with the random seed of the run, with the
    test images: see `flowgen.evaluation.SampleQuality.evaluate`.

    The results are stored with the run if they are for its own data, so that later commands know,
    for example, log Z.

    Args:
        run: As in `load`; None: the newest run.
        *overrides: KEY=VALUE of evaluation or run settings, such as `num_importance_samples=8`,
            `samples=1000`, `temperature=1`, or `seed=1` for other samples.
        device: "auto", "cpu" or "cuda".

    Returns:
        A mapping of metric names to values with standard errors.

    Raises:
        UserError: If there is no such run, or its data is missing.

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
    import torch

    from flowgen.training.sanity_checks import warn_implausible_likelihood, warn_test_leakage

    found, checkpoint = runs.find_checkpoint(None if run is None else _name(run))
    trained = checkpoint["config"]
    config = _override_evaluation(trained, overrides)
    check_whole(0, 2**63 - 1, seed=config["seed"])
    eval_config = instantiate.instantiate("evaluation", config["evaluation"])
    data = instantiate.build_data(config)
    model = runs.load_from_checkpoint(checkpoint | {"config": config}, device)
    instantiate.check_fits_data(model, data)
    codec = None
    if eval_config.compress:
        from flowgen.coding.factory import make_codec

        codec = make_codec(model)
    warn_test_leakage(data)
    data.to(model.device)
    quality = _sample_quality(data, eval_config.samples)
    model.set_progress(console.progress_bar)
    batches = console.progress_bar(
        data.batches("test", BATCH_SIZE), "images", math.ceil(len(data.test) / BATCH_SIZE)
    )
    train_batches = data.batches("train", BATCH_SIZE, len(data.test))
    if model.metric == FRECHET and not quality:
        log.info(
            "this model has no likelihood, only samples: samples=1000 also measures their coverage "
            "and how many are readable"
        )
    metrics = model.evaluate(batches, train_batches, eval_config)
    if quality:
        metrics |= _evaluate_samples(model, quality, config)
    metrics = metrics.on("test")
    value = metrics[model.metric.name]
    if codec is not None:
        from flowgen.coding.measure import measure_compression

        images = torch.cat(list(data.batches("test", BATCH_SIZE)))
        proof = measure_compression(codec, images, value, console.progress_bar)
        metrics |= proof.on("test")
    if not math.isfinite(value.value):
        log.warning("%s is not finite: a likelihood is beyond float32", model.metric.name)
    warn_implausible_likelihood(value, data, data.batches("test", BATCH_SIZE))
    metadata = {
        "run": str(found.folder),
        "step": checkpoint["step"],
        "split": "test",
        "likelihood": value.likelihood or model.likelihood,
    }
    if data.bits == 1:
        metadata["binarization"] = config["data"]["binarization"]
    report = EvalReport(metadata, metrics)
    own_data = all(config[section] == trained[section] for section in ("model", "data"))
    if own_data:
        results = merge_evaluations(checkpoint["metrics"], report.row())
        try:
            found.save_evaluation(checkpoint, results)
        except OSError as error:  # a full or read-only disk must not lose the results
            log.warning("the results are not stored: %s", console.user_message(error))
    return report


def _override_evaluation(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of a run with KEY=VALUE changes, such as `samples=1000`.

    Keys of the section `evaluation` do not need its name.
    """
    known = settings.settings_of_file("train")
    full_keys = [
        f"evaluation.{text}" if f"evaluation.{text.partition('=')[0]}" in known else text
        for text in overrides
    ]
    defaults = settings.read_yaml("train")["evaluation"]  # runs can be older than a setting
    evaluation = defaults | config.get("evaluation", {})
    return compose.override(config | {"evaluation": evaluation}, full_keys)


def _sample_quality(data: "ImageDataset", count: int | None) -> "SampleQuality | None":
    """Return the comparison with `count` samples, if any, before anything slow is computed."""
    if count is None:
        return None
    from flowgen.evaluation.sample_quality import SampleQuality, find_fid_weights

    return SampleQuality(data, count, find_fid_weights())


def _evaluate_samples(
    model: "GenerativeModel", quality: "SampleQuality", config: dict[str, Any]
) -> Metrics:
    """Draw samples as `flowgen sample --seed SEED` does, and return their quality."""
    import torch

    from flowgen.models.base import ClassConditional, sample_images

    temperature = config["evaluation"]["temperature"]
    if temperature is None:
        temperature = runs.default_temperature(config, model.image_shape)
    count = len(quality.test)
    samples, _ = sample_images(model, count, temperature, config["seed"])
    classes = None
    if isinstance(model, ClassConditional) and model.num_classes:  # all classes in turn
        classes = torch.arange(count) % model.num_classes
    facts = {"sample_temperature": temperature, "sample_seed": config["seed"]}
    return quality.evaluate(samples, classes) | Metrics.of(**facts)


def score(model: "GenerativeModel", images: "Tensor") -> "Tensor":
    """Return the log-probability of each image.

    Dequantization noise is drawn with a fixed seed, so that the same tensor of images has the same
    scores. An RBM whose log Z is unknown gives log p(x) + log Z; `evaluate` estimates log Z.

    Args:
        model: A model, usually of `load`.
        images: Pixel values (N, channels, height, width), integers from 0 to 2^bits - 1.

    Returns:
        Log-probabilities in nats (N,), on the CPU. For flows and VAEs, each value is one
        draw of a lower bound; for diffusion models it is the mean of several draws, and for
        VQ-VAEs the bound.

    Raises:
        UserError: If the images do not fit the model, or it has no likelihood.

    Example:
        >>> model = load("zoo/glow_mnist", device="cpu")
        >>> images, _ = model.sample(3)
        >>> score(model, images).shape
        torch.Size([3])
    """
    import torch

    from flowgen.models.base import GenerativeModel

    if not isinstance(model, GenerativeModel):
        raise UserError(f"{model!r} is not a model: use load({model!r})")
    if tuple(images.shape[1:]) != tuple(model.image_shape):
        raise UserError(f"images must have the shape (N, {', '.join(map(str, model.image_shape))})")
    if not len(images):
        return torch.empty(0)
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
                model.score(batch.to(model.device, torch.uint8), generator=generator)
                for batch in images.split(BATCH_SIZE)
            ]
            return torch.cat(scores).cpu()
    finally:
        model.train(was_training)


def create_model(
    name: str,
    image_shape: Sequence[int] = (1, 28, 28),
    bits: int | None = None,
    **changes: Any,
) -> "GenerativeModel":
    """Create an untrained model with the defaults of conf/model/NAME.yaml.

    Args:
        name: One of `list_models()`.
        image_shape: Channels, height and width.
        bits: Bits per pixel value; None: 8, or 1 for models of binary images.
        **changes: Settings that differ from the defaults; `flowgen train --help model=NAME` lists
            them. `negative_phase` of an RBM is a name or a dict of its settings.

    Raises:
        UserError: For an unknown model or setting.

    Example:
        >>> import torch
        >>> model = create_model("glow", image_shape=(3, 8, 8), bits=5, width=8)
        >>> images = torch.randint(0, 32, (16, 3, 8, 8), dtype=torch.uint8)
        >>> model.initialize(images)
        >>> loss = model(images)
        >>> loss.shape
        torch.Size([])
    """
    overrides = [f"model={name}"]
    if isinstance(changes.get("negative_phase"), str):
        overrides.append(f"model/negative_phase={changes.pop('negative_phase')}")
    config = compose.compose_config(overrides).config
    section = config["model"]
    for key, value in changes.items():
        if key not in section:
            hint = settings.did_you_mean(key, section)
            raise UserError(f"model={name} has no setting {key}{hint}: see conf/model/{name}.yaml")
        if isinstance(section[key], dict):
            check(isinstance(value, dict), f"{key} must be a dict of its settings, not {value!r}")
            value = section[key] | value
        section[key] = value
    with user_error("image_shape must be (channels, height, width)"):
        channels, height, width = image_shape
    bits = config["data"]["bits"] if bits is None else bits
    return instantiate.build_model(
        instantiate.with_image_shape(config, (channels, height, width), bits)
    )


def list_models() -> list[ModelInfo]:
    """Return the models that can be trained.

    Example:
        >>> [model.paper for model in list_models() if model.name == "glow"]
        ['Kingma and Dhariwal, arXiv 1807.03039']
    """
    models = []
    for name in settings.group_options("model"):
        description, paper = PAPER.findall(settings.description(f"model/{name}"))[0]
        models.append(ModelInfo(name, description, paper, settings.likelihood(name)))
    return models


def list_datasets() -> list[DatasetInfo]:
    """Return the data sets that can be trained on.

    The availability is `present`, `downloadable` (training downloads it) or `missing`.

    Example:
        >>> [data.availability for data in list_datasets() if data.name == "toy"]
        ['present']
    """
    return [
        DatasetInfo(
            name,
            description=settings.description(f"data/{name}"),
            source=next(iter(URL.findall(settings.read_text(f"data/{name}"))), ""),
            availability=_availability(name),
        )
        for name in settings.group_options("data")
    ]


def _availability(name: str) -> str:
    section = settings.read_yaml(f"data/{name}")
    folders = section.get("search_dirs") or []
    if any((files.data_folder() / folder).exists() for folder in folders):
        return "present"
    if section["_target_"].rpartition(".")[2] in DOWNLOADABLE:
        return "downloadable"
    return "missing" if "root" in section else "present"  # generated or part of the package


def _name(run: RunName) -> str:
    check(
        isinstance(run, str | PathLike | Run),
        f"{type(run).__name__} is not a run: use a run of flowgen.train, its folder or its name",
    )
    return str(run.folder if isinstance(run, Run) else run)


def _format(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "unknown"


def merge_evaluations(cached: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge two evaluations of the same weights on the same data.

    Args:
        cached: The stored results.
        new: The new results.

    Returns:
        The results with the smaller error of a reliable log Z, otherwise the new ones, and the
        newest sample quality.
    """
    metrics = min((new, cached), key=_log_z_error) if "images" in cached else new
    sampled = new if "sample_count" in new else cached
    return {key: value for key, value in metrics.items() if not key.startswith(SAMPLE_KEYS)} | {
        key: value for key, value in sampled.items() if key.startswith(SAMPLE_KEYS)
    }


def _log_z_error(results: dict[str, Any]) -> float:
    error = results.get("log_z_error")
    return error if error is not None and results.get("reliable") else math.inf
