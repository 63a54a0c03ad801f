"""Random command lines of `flowgen`, valid and invalid."""

import random
from pathlib import Path

NUMBERS = (
    *("0", "1", "-1", "2", "1.5", "1e3", "1000000", "1000000000000", "nan", "inf", "-inf"),
    *("0x10", "true", "null", "1" + 30 * "0", "9" * 5000, "\u0661"),
)
SYMBOLS = (
    *("x", "..", ".", "~", "*", "a=b", "'", '"', "(", "[1,2]", "{a:1}", "[", "${x}"),
    *("${model.width}", "$HOME", "-", "--", "-h", "--help", "???", "%s", "{}", "\\"),
)
TEXTS = ("", " ", "a\nb", "\x1b[31m", "\u00e9", "\udcff", 5000 * "x", *SYMBOLS)
COMMANDS = (
    *("train", "resume", "sample", "interpolate", "complete", "chain", "evaluate", "score"),
    *("report", "runs", "export", "edit", "compress", "decompress"),
)
RUNS = (
    "flow",
    "rbm",
    "outputs/rbm",
    "outputs/flow/checkpoints/last.pt",
    "flow.safetensors",
    "images",
    "nowhere",
    "images/00.png",
)
EXISTING_PATHS = (
    "images",
    "images/00.png",
    "images.zip",
    "idx",
    "lists",
    "flow.safetensors",
    "images.flow",
    "outputs/flow",
    "outputs/rbm/config.yaml",
    "outputs",
)
NEW_PATHS = (
    "nowhere",
    "new.png",
    "new.gif",
    "new.zip",
    "new.html",
    "images/new.png",
    "nowhere/new.png",
    "new.safetensors",
)
IMAGES = ("images/00.png", "images/01.png", "labels.csv", *EXISTING_PATHS)
PATHS = (*EXISTING_PATHS, *NEW_PATHS, "/dev/null", "/dev/full", "/dev/stdin")
WORDS = (
    *("gibbs", "tempering", "mean-field", "hmc", "likelihood", "combined", "left", "border"),
    *("random:500", "data=mnist_sample", "data=folder", "cpu", "cuda", "meta", "job"),
)
OPTIONS = {
    "sample": (
        *("--run", "--temperature", "--count", "--seed", "--label", "--sampler", "--steps"),
        *("--device", "--out"),
    ),
    "interpolate": ("--run", "--steps", "--spherical", "--device", "--out"),
    "complete": ("--known", "--sampler", "--run", "--steps", "--seed", "--device", "--out"),
    "chain": (
        *("--sampler", "--run", "--count", "--frames", "--steps", "--seed", "--device", "--out"),
    ),
    "evaluate": ("--run", "--json", "--device"),
    "score": ("--run", "--ood", "--score", "--count", "--csv", "--seed", "--device", "--out"),
    "report": ("--out",),
    "edit": (
        *("--attribute", "--amount", "--labels", "--direction", "--run", "--count", "--device"),
        "--out",
    ),
    "compress": (
        *("--run", "--split", "--count", "--prepared", "--no-verify", "--annealing-steps"),
        *("--overwrite", "--json", "--out"),
    ),
    "decompress": ("--run", "--overwrite", "--out"),
    "train": ("-m", "--cfg", "--resolve", "--info", "--package"),
}
FLAGS = (
    *("--spherical", "--json", "--prepared", "--no-verify", "--overwrite"),
    *("-m", "--resolve"),
)
VALID_VALUES = {  # half of the values are valid, so that many commands get far
    "--run": RUNS,
    "--out": PATHS,
    "--csv": PATHS,
    "--known": ("left", "random:50", "images/00.png", "border", "grayscale", "downsample:2"),
    "--device": ("cpu", "cuda", "meta"),
    "--sampler": ("gibbs", "tempering", "mean-field", "hmc"),
    "--direction": ("ridge", "difference"),
    "--amount": ("1", "-0.5"),
    "--score": ("likelihood", "combined"),
    "--ood": ("data=mnist_sample", "flow"),
    "--attribute": ("smiling", "age", "Male"),
    "--labels": ("labels.csv", *PATHS),
    "--count": ("2", "4", "70"),
    "--steps": ("1", "3", "5"),
    "--annealing-steps": ("1", "3"),
    "--split": ("test", "train"),
    "--frames": ("2", "3"),
    "--temperature": ("0", "0.7", "1"),
}
TRAIN = (
    "trainer=cpu",
    "data=folder",
    "data.root=images",
    "data.size=4",
    "trainer.batch_size=4",
    "trainer.init_images=8",
)
FLOW = ("data.bits=5", "model.width=4")
MODELS = (
    ("model=nice", *FLOW),
    ("model=glow", "model.steps_per_level=1", *FLOW),
    ("model=realnvp", "model.levels=1", *FLOW),
    ("model=maf", "model.num_transforms=1", *FLOW),
    ("model=rbm", "model.hidden=4"),
)
LIMITS = ("trainer.steps=2", "trainer.minutes=0.005")


def _random_value(rng: random.Random) -> str:
    return rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, PATHS, WORDS)))


def _random_override(rng: random.Random, model: str) -> str:
    from flowgen.config.settings import setting_names

    chosen = {"trainer=cpu", "data=folder", model}
    keys = [key for key, options in setting_names().items() if not options or chosen & set(options)]
    return f"{rng.choice(keys)}={_random_value(rng)}"


def _random_arguments(command: str, rng: random.Random) -> list[str]:
    image = rng.choice(IMAGES)
    if command in ("complete", "score", "compress"):
        return [image]
    if command == "decompress":
        return [rng.choice(("images.flow", image))]
    if command == "interpolate":
        return [image, "images/02.png"]
    if command == "edit":
        return [image, "--attribute", "smiling", "--labels", "labels.csv"]
    if command in ("resume", "report"):
        return [rng.choice(RUNS)]
    if command == "export":
        return [rng.choice(RUNS), "new.safetensors"]
    return []


def _random_options(command: str, rng: random.Random) -> list[str]:
    options = OPTIONS.get(command, ())
    args = []
    for option in rng.sample(options, min(rng.choice((0, 1, 2, 3)), len(options))):
        args.append(option)
        if option not in FLAGS:
            values = VALID_VALUES.get(option, ("0",))
            args.append(rng.choice(values) if rng.random() < 0.5 else _random_value(rng))
    return args


def random_command_line(rng: random.Random, folder: Path) -> list[str]:
    """Return arguments for `flowgen` in a folder of `fuzz_files.make_folder`.

    Most of them are valid. Training ends after a short time.
    """
    command = rng.choice(COMMANDS)
    args = [command, *_random_arguments(command, rng), *_random_options(command, rng)]
    if command in ("train", "resume", "evaluate"):
        model = rng.choice(MODELS)
        if command == "train":
            args += [*TRAIN, *model]
        args += [_random_override(rng, model[0]) for _ in range(rng.choice((0, 1, 1, 2)))]
        if command != "evaluate":
            args += LIMITS
        if command == "train" and rng.random() < 0.8:
            args.append(f"output_dir=new{rng.randrange(10**6)}")
    if rng.random() < 0.2:
        args.insert(rng.randrange(len(args) + 1), _random_value(rng))
    return [arg.replace("\0", "") for arg in args]
