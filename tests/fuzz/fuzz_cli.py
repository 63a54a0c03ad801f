"""Command lines as tired people and curious ones type them."""

import random
from pathlib import Path

Random = random.Random
NUMBERS = (
    "1" + 30 * "0",
    "9" * 5000,
    "\u0661",
    *[
        "0",
        "1",
        "-1",
        "2",
        "1.5",
        "1e3",
        "1000000",
        "1000000000000",
        "nan",
        "inf",
        "-inf",
        "0x10",
        "true",
        "null",
    ],
)
SIGNS = (
    "x",
    "..",
    ".",
    "~",
    "*",
    "a=b",
    "'",
    '"',
    "(",
    "[1,2]",
    "{a:1}",
    "[",
    "${x}",
    "${model.width}",
    "$HOME",
    "-",
    "--",
    "-h",
    "--help",
    "???",
    "%s",
    "{}",
    "\\",
)
TEXTS = ("", " ", "a\nb", "\x1b[31m", "\u00e9", "\udcff", 5000 * "x", *SIGNS)
COMMANDS = (
    "train",
    "resume",
    "sample",
    "interpolate",
    "complete",
    "chain",
    "evaluate",
    "score",
    "report",
    "runs",
    "export",
    "edit",
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
OLD = (
    "images",
    "images/00.png",
    "images.zip",
    "idx",
    "lists",
    "flow.safetensors",
    "outputs/flow",
    "outputs/rbm/config.yaml",
    "outputs",
)
FILES = ("images/00.png", "images/01.png", "labels.csv", *OLD)
NEW = (
    "nowhere",
    "new.png",
    "new.gif",
    "new.zip",
    "new.html",
    "images/new.png",
    "nowhere/new.png",
    "new.safetensors",
)
PATHS = (*OLD, *NEW, "/dev/null", "/dev/full", "/dev/stdin")
OPTIONS = {
    "sample": (
        "--run",
        "--temperature",
        "--count",
        "--seed",
        "--label",
        "--method",
        "--sweeps",
        "--device",
        "--out",
    ),
    "interpolate": ("--run", "--steps", "--spherical", "--device", "--out"),
    "complete": ("--keep", "--method", "--run", "--sweeps", "--seed", "--device", "--out"),
    "chain": (
        "--method",
        "--run",
        "--count",
        "--frames",
        "--sweeps",
        "--seed",
        "--device",
        "--out",
    ),
    "evaluate": ("--run", "--json", "--device"),
    "score": ("--run", "--against", "--by", "--count", "--csv", "--seed", "--device", "--out"),
    "report": ("--out",),
    "edit": (
        "--attribute",
        "--by",
        "--labels",
        "--method",
        "--run",
        "--count",
        "--device",
        "--out",
    ),
    "train": ("-m", "--cfg", "--resolve", "--info", "--package"),
}
FLAGS = ("--spherical", "--json", "-m", "--resolve")
NAMES = "gibbs tempering mean-field langevin likelihood combined left border random:500 data=mnist_sample data=folder cpu cuda meta job"
METHODS = tuple(NAMES.split())
KNOWN = {  # what mostly goes with an option, so that many a line comes far
    "--run": RUNS,
    "--out": PATHS,
    "--csv": PATHS,
    "--keep": ("left", "random:50", "images/00.png", "border"),
    "--device": ("cpu", "cuda", "meta"),
    "--method": ("gibbs", "tempering", "mean-field", "langevin", "difference"),
    "--by": ("likelihood", "combined", "1"),
    "--attribute": ("smiling", "age", "Male"),
    "--labels": ("labels.csv", *PATHS),
    "--count": ("2", "4", "70"),
    "--sweeps": ("1", "3"),
    "--steps": ("2", "5"),
    "--frames": ("2", "3"),
    "--temperature": ("0", "0.7", "1"),
}
SMALL = (
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
ENDS = ("trainer.steps=2", "trainer.minutes=0.005")


def _value(draw: Random) -> str:
    return draw.choice(draw.choice((NUMBERS, NUMBERS, TEXTS, PATHS, METHODS)))


def _setting(draw: Random, model: str) -> str:
    from flowgen.config.compose import setting_names

    here = {"trainer=cpu", "data=folder", model}
    mine = [name for name, choices in setting_names().items() if not choices or here & set(choices)]
    return f"{draw.choice(mine)}={_value(draw)}"


def _positional(command: str, draw: Random) -> list[str]:
    image = draw.choice(FILES)
    if command in ("complete", "score"):
        return [image]
    if command == "interpolate":
        return [image, "images/02.png"]
    if command == "edit":
        return [image, "--attribute", "smiling", "--labels", "labels.csv"]
    if command in ("resume", "report", "export"):
        return [draw.choice(RUNS), *(["new.safetensors"] if command == "export" else [])]
    return []


def odd_line(draw: Random, folder: Path) -> list[str]:
    """Words for `flowgen`, most of them as they should be; run in `folder`. Trainings among them end by themselves."""
    command = draw.choice(COMMANDS)
    words = [command, *_positional(command, draw)]
    for option in draw.sample(
        OPTIONS.get(command, ()), min(draw.choice((0, 1, 2, 3)), len(OPTIONS.get(command, ())))
    ):
        known = KNOWN.get(option, ("0",))
        words += (
            [option]
            if option in FLAGS
            else [option, draw.choice(known) if draw.random() < 0.5 else _value(draw)]
        )
    if command in ("train", "resume", "evaluate"):
        model = draw.choice(MODELS)
        words += [
            *((*SMALL, *model) if command == "train" else []),
            *(_setting(draw, model[0]) for _ in range(draw.choice((0, 1, 1, 2)))),
        ]
        words += [] if command == "evaluate" else [ENDS[0], ENDS[1]]
        words += (
            [f"output_dir=new{draw.randrange(10**6)}"]
            if command == "train" and draw.random() < 0.8
            else []
        )
    if draw.random() < 0.2:
        words.insert(draw.randrange(len(words) + 1), _value(draw))
    return [word.replace("\0", "") for word in words]
