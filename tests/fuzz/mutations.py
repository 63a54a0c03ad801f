"""Random changes of files, like those by attackers, failing disks or bugs."""

import json
import math
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from flowgen.coding.archive import LENGTH_BYTES, MAGIC

PLAIN_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**70, 10**30, 1.5, -0.0),
    *(math.nan, math.inf, -math.inf, 1e308),
    *("", " ", "x", "nan", "../../x", "/dev/zero", "${oc.env:HOME}", "${seed}", "???"),
    *("<script>alert(1)</script>", "\x1b[31m", "\ud800", 9999 * "a"),
    *([], {}, [1, 2, 3], [[]], {"_target_": "os.system"}),
    *({"_target_": "flowgen.models.flows.glow.Glow"}, "flowgen.models.rbm.rbm.RBM"),
    "flowgen.data.mnist.MNIST",
)
TENSORS = (
    torch.zeros(0),
    torch.tensor(math.nan),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(2, 2, dtype=torch.int8),
)
ZIP_NAMES = (
    "../../outside.png",
    "/tmp/outside.png",
    "a/../../b.png",
    "\x1b[31m.png",
    300 * "x" + ".png",
    "list_eval_partition.txt",
)


def mutate(path: Path, rng: random.Random) -> str:
    """Change a file in place and return a short description of the change."""
    mutate_format = MUTATIONS.get(path.suffix)
    if mutate_format is None or rng.random() < 0.4:
        return mutate_bytes(path, rng)
    return mutate_format(path, rng)


def mutate_bytes(path: Path, rng: random.Random) -> str:
    """Flip, truncate, duplicate, insert, blank or delete bytes."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 8, 100, 5000))
    kind = rng.choice(("flip", "truncate", "duplicate", "insert", "blank", "empty"))
    if kind == "insert" or not data:
        data[start:start] = rng.randbytes(length)
    elif kind == "flip":
        for _ in range(rng.choice((1, 1, 10, 100))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[start:]
    elif kind == "duplicate":
        data[start:start] = data[start : start + length]
    elif kind == "blank":
        data[start : start + length] = bytes(length)
    else:
        data.clear()
    path.write_bytes(data)
    return kind


def mutate_tree(tree: Any, rng: random.Random, values: tuple[Any, ...]) -> Any:
    """Replace, delete or add one value of nested dicts and lists."""
    if not isinstance(tree, dict | list) or not tree or rng.random() >= 0.85:
        return rng.choice(values)
    key = rng.choice(list(tree) if isinstance(tree, dict) else list(range(len(tree))))
    choice = rng.random()
    if choice < 0.1:
        del tree[key]
    elif choice < 0.15 and isinstance(tree, dict):
        tree[rng.choice((1, "more", None, "_target_"))] = rng.choice(values)
    else:
        tree[key] = mutate_tree(tree[key], rng, values)
    return tree


def mutate_checkpoint(path: Path, rng: random.Random) -> str:
    """Change a value of a PyTorch checkpoint."""
    tree = torch.load(path, weights_only=True)
    torch.save(mutate_tree(tree, rng, (*PLAIN_VALUES, *TENSORS)), path)
    return "values"


def mutate_config(path: Path, rng: random.Random) -> str:
    """Change a value of a YAML file."""
    tree = mutate_tree(yaml.safe_load(path.read_text()), rng, PLAIN_VALUES)
    text = yaml.dump(tree, allow_unicode=rng.random() < 0.5)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return "values"


def mutate_metrics(path: Path, rng: random.Random) -> str:
    """Change a value in a line of a JSON lines file."""
    lines = path.read_text().splitlines()
    index = rng.randrange(len(lines))
    lines[index] = json.dumps(mutate_tree(json.loads(lines[index]), rng, PLAIN_VALUES))
    path.write_text("\n".join(lines) + "\n")
    return "values"


def mutate_safetensors(path: Path, rng: random.Random) -> str:
    """Change a value of the metadata of a safetensors file."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    metadata = mutate_tree(json.loads(header["__metadata__"]["flowgen"]), rng, PLAIN_VALUES)
    header["__metadata__"]["flowgen"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    return "values"


def mutate_compressed(path: Path, rng: random.Random) -> str:
    """Change a value of the header of a file of `flowgen compress`, or one of its words.

    The checksum of the words stays right, as in a file of an attacker.
    """
    data = path.read_bytes()
    start = len(MAGIC) + LENGTH_BYTES
    end = start + int.from_bytes(data[len(MAGIC) : start], "little")
    header = json.loads(zlib.decompress(data[start:end]))
    words = bytearray(data[end:])
    changes_words = rng.random() < 0.2
    if changes_words:
        words[rng.randrange(len(words))] ^= 1 << rng.randrange(8)
        header["words"] = zlib.crc32(words)
    else:
        header = mutate_tree(header, rng, PLAIN_VALUES)
    text = zlib.compress(json.dumps(header).encode())
    path.write_bytes(MAGIC + len(text).to_bytes(LENGTH_BYTES, "little") + text + words)
    return "words" if changes_words else "values"


def mutate_zip(path: Path, rng: random.Random) -> str:
    """Add an entry with an unusual name to a zip archive."""
    name = rng.choice(ZIP_NAMES)
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    content = rng.choice((b"", b"words", bytes(10**6), rng.randbytes(100)))
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr(name, content)
    return "entry"


MUTATIONS: dict[str, Callable[[Path, random.Random], str]] = {
    ".pt": mutate_checkpoint,
    ".yaml": mutate_config,
    ".jsonl": mutate_metrics,
    ".safetensors": mutate_safetensors,
    ".flow": mutate_compressed,
    ".zip": mutate_zip,
}
