"""Data sets on the Hugging Face Hub, against a fake server on localhost."""

import io
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_cli import assert_error
from test_hub import TOKEN, Hub

from flowgen.commands.export import license_key
from flowgen.config.compose import data_section
from flowgen.data.hub import BUCKETS, HubDataset, choose_columns, choose_parts, group_by_split
from flowgen.utils.errors import UserError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
COMMIT = 40 * "1"
FILES = {"data/train-0.parquet": 30, "data/train-1.parquet": 20, "data/test-0.parquet": 10}


class DataHub(Hub):
    """The part of the Hub that data sets need: their card, their files, and gates.

    Attributes:
        card: Metadata of the data set me/faces.
        gated: Whether its files need a token.
        broken: Paths that are not delivered.
        cut: Paths that are cut short once.
        converted: Whether the files are in the branch refs/convert/parquet.
    """

    card: dict
    gated: bool
    broken: set
    cut: set
    converted: bool

    def do_GET(self) -> None:  # noqa: N802
        path = unquote(self.path.partition("?")[0])
        self.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        files = self.repositories["me/faces"]
        if path.startswith("/api/datasets/me/faces"):
            shown = files if path.endswith("parquet") == self.converted else {"README.md": b""}
            siblings = [{"rfilename": name} for name in shown]
            info = {"id": "me/faces", "sha": COMMIT, "siblings": siblings, "cardData": self.card}
            return self.answer(200, info)
        data = files.get(path.removeprefix(f"/datasets/me/faces/resolve/{COMMIT}/"))
        if data is None:
            return self.answer(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
        if self.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if any(path.endswith(name) for name in self.broken):
            return self.answer(400, {"error": "out of order"})
        return self.send_file(path, data)

    do_HEAD = do_GET  # noqa: N815

    def send_file(self, path: str, data: bytes) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{len(data)}-{path[-5:]}-{hash(path)}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET" and any(path.endswith(name) for name in self.cut):
            self.cut.clear()
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], headers)


def table(count: int, start: int = 0) -> bytes:
    """Return a Parquet file of 8x8 images whose brightness, label and attribute are the row."""
    rows = []
    for row in range(start, start + count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (row, row, row)).save(file, "PNG")
        image = {"bytes": file.getvalue(), "path": f"{row}.png"}
        rows.append({"image": image, "label": row % 3, "Smiling": row % 2 == 0, "age": "old"})
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=8)
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    constants = pytest.importorskip("huggingface_hub.constants")
    files = {}
    for path, count in FILES.items():
        files[path] = table(count, sum(map(FILES.get, files)))
    handler = type(
        "FacesHub",
        (DataHub,),
        {
            "repositories": {"me/faces": files},
            "requests": [],
            "card": {"license": "cc-by-nc-4.0"},
            "gated": False,
            "broken": set(),
            "cut": set(),
            "converted": False,
        },
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield handler
        server.shutdown()


def faces(**changes: object) -> HubDataset:
    return HubDataset(**{"name": "me/faces", "size": 8, "bits": 8, "random_flip": False} | changes)


def rows(split: torch.Tensor) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_images_labels_and_attributes_are_read_once(hub):
    data = faces()
    assert data.image_shape == (3, 8, 8)
    assert data.num_classes == 3
    assert data.attributes == ("Smiling",)
    assert rows(data.test) == list(range(50, 60))
    assert sorted(rows(data.train) + rows(data.validation)) == list(range(50))
    for split in data.splits.values():
        values = split.images[:, 0, 0, 0].long()
        assert torch.equal(split.labels, values % 3)
        assert torch.equal(split.attributes[:, 0], values % 2 == 0)
        assert split.images.flatten(1).eq(values[:, None]).all()
    hub.requests.clear()
    again = faces()
    assert not hub.requests, "later runs need no network"
    assert torch.equal(again.train.images, data.train.images)
    assert faces(size=[4, 8]).image_shape == (3, 4, 8)
    assert not any(line.startswith("GET /datasets") for line in hub.requests)


def test_an_interrupted_download_continues(hub):
    hub.broken.add("train-1.parquet")
    with pytest.raises(UserError, match=r"me/faces .*: try again later"):
        faces()
    hub.broken.clear()
    hub.cut.add("train-1.parquet")  # the connection breaks once
    hub.requests.clear()
    assert sorted(rows(faces().train))[-1] > 40
    fetched = [line for line in hub.requests if line.startswith("GET /datasets")]
    assert not any("train-0" in line for line in fetched), "complete files are not fetched again"
    assert sum("train-1" in line for line in fetched) == 2


def test_gated_sets_need_a_token(hub, monkeypatch):
    hub.gated = True
    with pytest.raises(UserError, match=r"me/faces is gated: accept its terms .* HF_TOKEN"):
        faces()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(faces().test) == 10


def test_files_that_the_hub_converted_are_read(hub):
    hub.converted = True
    assert len(faces().test) == 10


def test_columns_and_splits_can_be_chosen(hub):
    data = faces(image_column="image", label_column="Smiling", train_split="test")
    assert data.num_classes == 2
    assert sorted(rows(data.train) + rows(data.validation)) == list(range(50, 60))
    with pytest.raises(UserError, match="label_column=age is not a column of integers"):
        faces(label_column="age")
    with pytest.raises(UserError, match="image_column=age is not a column of images"):
        faces(image_column="age")
    with pytest.raises(UserError, match=r"train_split=all does not exist: choose one of test, tra"):
        faces(train_split="all")


def test_images_that_cannot_be_decoded_are_skipped(hub):
    files = hub.repositories["me/faces"]
    image = {"bytes": b"no image", "path": "x"}
    bad = pa.Table.from_pylist([{"image": image, "label": 0, "Smiling": True, "age": ""}])
    good = parquet.read_table(io.BytesIO(files["data/test-0.parquet"]))
    file = io.BytesIO()
    parquet.write_table(pa.concat_tables([bad, good]), file)
    files["data/test-0.parquet"] = file.getvalue()
    assert rows(faces().test) == list(range(50, 60))


def test_damaged_files_and_missing_sets_are_one_sentence(hub):
    with pytest.raises(UserError, match="me/nobody is not on the Hub or is private"):
        faces(name="me/nobody")
    with pytest.raises(UserError, match="is not the name of a data set on the Hub"):
        faces(name="../x")
    hub.repositories["me/faces"]["data/test-0.parquet"] = b"not parquet"
    with pytest.raises(UserError, match="is damaged: delete it"):
        faces()
    hub.repositories["me/faces"].clear()
    with pytest.raises(UserError, match="me/faces has no Parquet files on the Hub"):
        faces(revision="other")


def test_a_run_trains_on_the_hub_and_resumes(hub, command, tmp_path):
    overrides = [word for word in SMALL if word != "data=folder"]
    overrides += ["data=hub", "data.name=me/faces", f"output_dir={tmp_path / 'run'}"]
    status, _, error = command("train", *overrides, "trainer.steps=2")
    assert status == 0, error
    assert "me/faces: license cc-by-nc-4.0, see http" in error
    assert command("resume", tmp_path / "run", "trainer.steps=3")[0] == 0
    assert_error(command("train", "data=hub", "trainer.steps=1"), "data.name is not set")


def test_missing_packages_are_named(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs the package pyarrow: pip install"):
        faces()


def test_splits_are_found_by_the_card_or_by_the_paths():
    paths = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert group_by_split([*paths, "data/val-0.parquet"], [], None) == {
        "train": paths,
        "validation": ["data/val-0.parquet"],
    }
    nested = ["a/train/0000.parquet", "a/test/0000.parquet", "b/train/0000.parquet"]
    assert group_by_split(nested, [], "a") == {"train": nested[:1], "test": nested[1:2]}
    with pytest.raises(UserError, match=r"data\.subset=null: choose one of a, b"):
        group_by_split(nested, [], None)
    card = [
        {
            "config_name": "default",
            "data_files": [
                {"split": "all", "path": "data/*.parquet"},
                {"split": "none", "path": ["x/*"]},
            ],
        }
    ]
    assert group_by_split(paths, card, None) == {"all": paths}
    short = [{"config_name": "default", "data_files": ["data/*.parquet"]}]
    assert group_by_split(paths, short, None) == {"train": paths}
    with pytest.raises(UserError, match=r"data\.subset=big: choose one of default"):
        group_by_split(paths, card, "big")
    assert group_by_split(["images.parquet"], [], None) == {"train": ["images.parquet"]}


def test_missing_splits_are_made_from_the_training_images():
    names = ("train", "validation", "test")
    for splits in (["train"], ["train", "test"], ["train", "validation"], list(names)):
        parts = choose_parts(splits, names)
        buckets = [bucket for split, part in parts if split == "train" for bucket in part]
        assert sorted(buckets) == list(range(BUCKETS))
        assert len(parts) == 3


def test_columns_must_be_unambiguous():
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    two = pa.schema([("a", image), ("b", image)])
    with pytest.raises(
        UserError, match=r"2 columns have images: set data.image_column to one of a"
    ):
        choose_columns(two, None, None)
    assert choose_columns(two, "b", None) == {"image": "b", "label": None, "attributes": []}


def test_research_faces_on_the_hub_keep_their_license():
    assert license_key(data_section(["data=hub", "data.name=flwrlabs/celeba"])) == "celeb"
    assert license_key(data_section(["data=hub", "data.name=me/cats"])) == "me/cats"
