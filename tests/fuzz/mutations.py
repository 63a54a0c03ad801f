"""Files as a stranger, a bad disk or a bug could have left them."""

import json
import math
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Random = random.Random
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**63,
        2**70,
        10**30,
        1.5,
        -0.0,
        math.nan,
        math.inf,
        -math.inf,
        1e308,
    ),
    *(
        "",
        " ",
        "x",
        "nan",
        "../../x",
        "/dev/zero",
        "${oc.env:HOME}",
        "${seed}",
        "???",
        "<script>alert(1)</script>",
        "\x1b[31m",
        "\ud800",
        9999 * "a",
    ),
    *(
        [],
        {},
        [1, 2, 3],
        [[]],
        {"_target_": "os.system"},
        {"_target_": "flowgen.models.flows.glow.Glow"},
        "flowgen.models.rbm.rbm.RBM",
        "flowgen.data.mnist.MNIST",
    ),
    *(
        torch.zeros(0),
        torch.tensor(math.nan),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(2, 2, dtype=torch.int8),
    ),
)
PLAIN = tuple(value for value in VALUES if not isinstance(value, torch.Tensor))


def spoil_bytes(path: Path, draw: Random) -> str:
    """Bytes flipped, cut, doubled, put in or blanked."""
    data = bytearray(path.read_bytes())
    place, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 100, 5000))
    kind = draw.choice(("flip", "cut", "double", "put in", "blank", "empty"))
    if kind == "put in" or not data:
        data[place:place] = draw.randbytes(length)
    elif kind == "flip":
        for _ in range(draw.choice((1, 1, 10, 100))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "double":
        data[place:place] = data[place : place + length]
    elif kind == "blank":
        data[place : place + length] = bytes(length)
    else:
        data.clear()
    path.write_bytes(data)
    return kind


def spoil_tree(tree: Any, draw: Random, values: tuple[Any, ...]) -> Any:
    """One value of a nested dict or list replaced, left out, or put beside the others."""
    if isinstance(tree, dict | list) and tree and draw.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key, way = draw.choice(keys), draw.random()
        if way < 0.1:
            del tree[key]
        elif way < 0.15 and isinstance(tree, dict):
            tree[draw.choice((1, "more", None, "_target_"))] = draw.choice(values)
        else:
            tree[key] = spoil_tree(tree[key], draw, values)
        return tree
    return draw.choice(values)


def spoil_checkpoint(path: Path, draw: Random) -> str:
    torch.save(spoil_tree(torch.load(path, weights_only=True), draw, VALUES), path)
    return "values"


def spoil_config(path: Path, draw: Random) -> str:
    import yaml

    text = yaml.dump(
        spoil_tree(yaml.safe_load(path.read_text()), draw, PLAIN), allow_unicode=draw.random() < 0.5
    )
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return "values"


def spoil_rows(path: Path, draw: Random) -> str:
    lines = path.read_text().splitlines()
    place = draw.randrange(len(lines))
    lines[place] = json.dumps(spoil_tree(json.loads(lines[place]), draw, PLAIN))
    path.write_text("\n".join(lines) + "\n")
    return "values"


def spoil_portable(path: Path, draw: Random) -> str:
    """A safetensors file whose description says something else."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    about = spoil_tree(json.loads(header["__metadata__"]["flowgen"]), draw, PLAIN)
    header["__metadata__"]["flowgen"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    return "values"


def spoil_zip(path: Path, draw: Random) -> str:
    """A zip with an entry more, of an odd name."""
    name = draw.choice(
        (
            "../../outside.png",
            "/tmp/outside.png",
            "a/../../b.png",
            "\x1b[31m.png",
            300 * "x" + ".png",
            "list_eval_partition.txt",
        )
    )
    with zipfile.ZipFile(
        path, "a", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        archive.writestr(name, draw.choice((b"", b"words", bytes(10**6), draw.randbytes(100))))
    return "entry"


OTHERWISE: dict[str, Callable[[Path, Random], str]] = {
    ".pt": spoil_checkpoint,
    ".yaml": spoil_config,
    ".jsonl": spoil_rows,
    ".safetensors": spoil_portable,
    ".zip": spoil_zip,
}


def spoil(path: Path, draw: Random) -> str:
    """Make the file another one; how, in a word."""
    other = OTHERWISE.get(path.suffix)
    return spoil_bytes(path, draw) if other is None or draw.random() < 0.4 else other(path, draw)
