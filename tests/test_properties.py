"""Damaged and arbitrary input is either used or refused with a one-line message."""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import CHECKPOINT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flowgen.config.compose import override, read_config
from flowgen.data.image_folder import ImageFolder
from flowgen.data.mnist import read_idx
from flowgen.data.preprocess import preprocess
from flowgen.training.checkpoint import read_checkpoint, read_safetensors
from flowgen.training.run_dir import Run
from flowgen.training.untrusted import NUMERIC_METRICS, REQUIRED
from flowgen.utils.errors import UserError

CONFIG = {
    "model": {"_target_": "flowgen.models.flows.nice.NICE", "width": 4},
    "data": {"root": None, "size": 4},
    "trainer": {"steps": 1},
    "seed": 0,
}
SECTIONS = {"model", "data", "trainer", "seed"}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
rows = st.dictionaries(st.sampled_from(sorted(NUMERIC_METRICS)) | names, scalars, max_size=4)
lines = st.binary(max_size=30) | rows.map(
    lambda row: json.dumps({"step": 1, "split": "test"} | row).encode()
)
keys = st.sampled_from(("model.width", "data.root", "trainer.steps", "seed", "model", "x")) | names
image_formats = st.sampled_from(("PNG", "GIF", "JPEG", "BMP", "TIFF", "WEBP", "PPM"))
safetensors_headers = st.fixed_dictionaries(
    dict.fromkeys(("config", "step", "images_seen", "metrics", "command"), trees)
)
# `make faults` sets the number of random examples; otherwise they are the same on every machine
NUM_EXAMPLES = int(os.environ.get("FLOWGEN_EXAMPLES", "0"))
often = settings(
    max_examples=NUM_EXAMPLES or 60,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def accepted_or_refused() -> Iterator[None]:
    """Let the block run, or raise a `UserError` with a message."""
    try:
        yield
    except UserError as error:
        assert str(error).strip()
        assert "Traceback" not in str(error)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The data cut off, or with a piece replaced by other bytes."""

    def replaced(start: int, end: int, piece: bytes) -> bytes:
        return data[: min(start, end)] + piece + data[max(start, end) :]

    index = st.integers(0, len(data))
    cut = st.builds(lambda end: data[:end], index)
    return st.builds(replaced, index, index, st.binary(max_size=20)) | cut


def picture(image_format: str) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (6, 5), bytes(range(90))).save(file, image_format)
    return file.getvalue()


def checkpoint_bytes(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def zip_of_images() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.png", picture("PNG"))
        archive.writestr("list_eval_partition.txt", "0.png 0\n1.png 1\n2.png 2\n3.png 0\n")
    return file.getvalue()


@often
@given(key=keys, value=st.text(max_size=40))
@example("model.width", "9" * 5000)
@example("model.width", "${model.width}")
@example("data.root", "\udcff")
@example("-", "")
def test_overrides(key, value):
    overrides = [f"{key}={value}"]
    with accepted_or_refused():
        assert override(CONFIG, overrides).keys() == CONFIG.keys()


@often
@given(
    file=st.binary(max_size=200)
    | image_formats.flatmap(lambda image_format: damaged(picture(image_format)))
)
def test_images(file):
    with accepted_or_refused():
        image = preprocess(file, 4, 3, None)
        assert image.shape == (3, 4, 4)
        assert image.dtype == torch.uint8


@often
@given(data=damaged(zip_of_images()))
def test_zips(tmp_path, data):
    (tmp_path / "images.zip").write_bytes(data)
    with accepted_or_refused():
        dataset = ImageFolder(root=str(tmp_path / "images.zip"), size=4)
        assert len(dataset.train)
        assert len(dataset.validation)
        assert len(dataset.test)


@often
@given(data=damaged(b"\0\0\x08\x03" + b"\0\0\0\2" + b"\0\0\0\3" * 2 + bytes(18)))
def test_idx_files(tmp_path, data):
    (tmp_path / "images").write_bytes(data)
    with accepted_or_refused():
        assert min(read_idx(tmp_path / "images", 3).shape) > 0


@often
@given(data=damaged(checkpoint_bytes(CHECKPOINT | {"model": {"weight": torch.zeros(3)}})))
def test_damaged_checkpoints(tmp_path, data):
    (tmp_path / "last.pt").write_bytes(data)
    with accepted_or_refused():
        assert read_checkpoint(tmp_path / "last.pt").keys() >= REQUIRED.keys()


@often
@given(part=st.sampled_from(sorted(CHECKPOINT)), value=trees)
def test_checkpoints_with_arbitrary_values(tmp_path, part, value):
    torch.save(CHECKPOINT | {part: value}, tmp_path / "last.pt")
    with accepted_or_refused():
        state = read_checkpoint(tmp_path / "last.pt")
        assert state["step"] >= 0
        assert state["images_seen"] >= 0
        assert isinstance(state["config"]["model"], dict)


@often
@given(header=trees | safetensors_headers, data=st.binary(max_size=20))
def test_safetensors_files(tmp_path, header, data):
    content = json.dumps({"__metadata__": {"flowgen": json.dumps(header)}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + data)
    with accepted_or_refused():
        assert read_safetensors(tmp_path / "x.safetensors")["model"] == {}


@often
@given(lines=st.lists(lines, max_size=5))
def test_metrics(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    for row in Run(tmp_path).read_metrics():
        assert row["step"] >= 0
        assert isinstance(row["split"], str)
        for name in NUMERIC_METRICS & row.keys():
            assert row[name] is None or isinstance(row[name], int | float)


@often
@given(
    text=st.text(max_size=80)
    | (trees | trees.map(lambda tree: CONFIG | {"model": {"x": tree}})).map(json.dumps)
)
def test_configurations(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with accepted_or_refused():
        assert read_config(Path(tmp_path) / "config.yaml").keys() >= SECTIONS
