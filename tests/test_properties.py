"""Properties of whatever is read: of any words, images, archives, rows and checkpoints, they are used, or refused in one sentence."""

import io
import json
import os
import zipfile
from pathlib import Path

import torch
from conftest import CHECKPOINT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flowgen.config.compose import check_overrides, override, read_config
from flowgen.data.image_folder import ImageFolder
from flowgen.data.mnist import _read
from flowgen.data.preprocess import preprocess
from flowgen.training.checkpoint import (
    NUMERIC_METRICS,
    REQUIRED_KEYS,
    read_checkpoint,
    read_safetensors,
)
from flowgen.training.run_dir import read_rows
from flowgen.utils.errors import UserError

FOLDER = {
    "search_dirs": [],
    "download_hint": "",
    "image_shape": (3, 4, 4),
    "bits": 5,
    "random_flip": False,
    "crop": None,
}
CONFIG = {
    "model": {"_target_": "flowgen.models.flows.nice.NICE", "width": 4},
    "data": {"root": None, "size": 4},
    "trainer": {"steps": 1},
    "seed": 0,
}
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
kinds = st.sampled_from(("PNG", "GIF", "JPEG", "BMP", "TIFF", "WEBP", "PPM"))
portable = st.fixed_dictionaries(
    dict.fromkeys(("config", "step", "images_seen", "metrics", "command"), trees)
)
MANY = int(
    os.environ.get("FLOWGEN_EXAMPLES", "0")
)  # at random, as `make faults` asks; else the same on every machine
often = settings(
    max_examples=MANY or 60,
    derandomize=not MANY,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def in_one_sentence(error: UserError) -> None:
    assert str(error).strip() and "Traceback" not in str(error)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The same with a piece of it replaced by other bytes."""

    def replaced(start: int, end: int, more: bytes) -> bytes:
        return data[: min(start, end)] + more + data[max(start, end) :]

    place = st.integers(0, len(data))
    return st.builds(replaced, place, place, st.binary(max_size=20)) | st.builds(
        lambda at: data[:at], place
    )


def a_picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (6, 5), bytes(range(90))).save(file, kind)
    return file.getvalue()


def a_checkpoint(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def an_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.png", a_picture("PNG"))
        archive.writestr("list_eval_partition.txt", "0.png 0\n1.png 1\n2.png 2\n3.png 0\n")
    return file.getvalue()


@often
@given(key=keys, value=st.text(max_size=40))
@example("model.width", "9" * 5000)
@example("model.width", "${model.width}")
@example("data.root", "\udcff")
@example("-", "")
def test_words(key, value):
    words = [f"{key}={value}"]
    try:
        check_overrides(words)
        assert override(CONFIG, words).keys() == CONFIG.keys()
    except UserError as error:
        in_one_sentence(error)


@often
@given(file=st.binary(max_size=200) | kinds.flatmap(lambda kind: damaged(a_picture(kind))))
def test_images(file):
    try:
        image = preprocess(file, 4, 3, None)
        assert image.shape == (3, 4, 4) and image.dtype == torch.uint8
    except UserError as error:
        in_one_sentence(error)


@often
@given(data=damaged(an_archive()))
def test_archives(tmp_path, data):
    (tmp_path / "images.zip").write_bytes(data)
    try:
        found = ImageFolder(root=str(tmp_path / "images.zip"), **FOLDER)
        assert len(found.train) and len(found.validation) and len(found.test)
    except UserError as error:
        in_one_sentence(error)


@often
@given(data=damaged(b"\0\0\x08\x03" + b"\0\0\0\2" + b"\0\0\0\3" * 2 + bytes(18)))
def test_idx_files(tmp_path, data):
    (tmp_path / "images").write_bytes(data)
    try:
        assert min(_read(tmp_path / "images", 3).shape) > 0
    except UserError as error:
        in_one_sentence(error)


@often
@given(data=damaged(a_checkpoint(CHECKPOINT | {"model": {"weight": torch.zeros(3)}})))
def test_damaged_checkpoints(tmp_path, data):
    (tmp_path / "last.pt").write_bytes(data)
    try:
        assert read_checkpoint(tmp_path / "last.pt").keys() >= REQUIRED_KEYS
    except UserError as error:
        in_one_sentence(error)


@often
@given(part=st.sampled_from(sorted(CHECKPOINT)), value=trees)
def test_checkpoints_of_other_things(tmp_path, part, value):
    torch.save(CHECKPOINT | {part: value}, tmp_path / "last.pt")
    try:
        state = read_checkpoint(tmp_path / "last.pt")
        assert (
            state["step"] >= 0
            and state["images_seen"] >= 0
            and isinstance(state["config"]["model"], dict)
        )
    except UserError as error:
        in_one_sentence(error)


@often
@given(about=trees | portable, data=st.binary(max_size=20))
def test_models_to_pass_on(tmp_path, about, data):
    header = json.dumps({"__metadata__": {"flowgen": json.dumps(about)}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    try:
        assert read_safetensors(tmp_path / "x.safetensors")["model"] == {}
    except UserError as error:
        in_one_sentence(error)


@often
@given(lines=st.lists(lines, max_size=5))
def test_rows(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    for row in read_rows(tmp_path / "metrics.jsonl"):
        assert row["step"] >= 0 and isinstance(row["split"], str)
        assert all(
            isinstance(row[name], int | float)
            for name in NUMERIC_METRICS & row.keys()
            if row[name] is not None
        )


@often
@given(
    text=st.text(max_size=80)
    | (trees | trees.map(lambda tree: CONFIG | {"model": {"x": tree}})).map(json.dumps)
)
def test_configurations(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert read_config(Path(tmp_path) / "config.yaml").keys() >= {
            "model",
            "data",
            "trainer",
            "seed",
        }
    except UserError as error:
        in_one_sentence(error)
