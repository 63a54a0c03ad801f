"""Sharing on the Hugging Face Hub, against a fake server on localhost, and licenses."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from test_cli import assert_error

from flowgen.commands.export import FAMILIES, LICENSES, license_id, license_key
from flowgen.config.compose import data_section
from flowgen.config.runs import HUB_FILE, find_checkpoint
from flowgen.config.settings import group_options, read_yaml
from flowgen.training.checkpoint import export_safetensors, read_checkpoint, write_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

TOKEN = "hf_secret"


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that small models need: repositories with the files of one commit."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    requests: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(self.path)
        host = f"http://{self.headers['Host']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            options = json.loads(body)
            name = f"me/{options['name']}"
            self.repositories[name] = {}
            # Older versions of huggingface_hub send a Boolean.
            self.private[name] = options.get("visibility", options.get("private")) in (
                "private",
                True,
            )
            self.answer(200, {"url": f"{host}/{name}", "id": name, "name": name})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            commit = 40 * "1"
            self.answer(200, {"commitUrl": f"{host}/{name}/commit/{commit}", "commitOid": commit})
        else:  # validation of the front matter
            self.answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.requests.append(self.path)
        name, _, file = self.path.partition("?")[0].strip("/").partition("/resolve/main/")
        data = self.repositories.get(name, {}).get(file)
        if data is None:
            code = "EntryNotFound" if name in self.repositories else "RepoNotFound"
            self.answer(404, {"error": code}, {"X-Error-Code": code})
        else:
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, {"ETag": etag, "X-Repo-Commit": 40 * "1"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    pytest.importorskip("huggingface_hub")
    handler = type("EmptyHub", (Hub,), {"repositories": {}, "private": {}, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: ThreadingHTTPServer, *arguments: object, token: str = TOKEN) -> tuple[int, str, str]:
    """Run `flowgen` in a subprocess, because huggingface_hub reads its address when imported."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(Path("hf").absolute()),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "flowgen", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert TOKEN not in result.stdout + result.stderr
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("name", group_options("model"))
def test_a_model_that_is_not_a_flow_has_the_tag_of_its_family(name):
    section = read_yaml(f"model/{name}")
    target = section.get("model", section)["_target_"]
    assert ".flows." in target or target.rpartition(".")[2] in FAMILIES


def test_a_pushed_model_has_a_card_and_samples_like_the_run(hub, tiny_run, elsewhere):
    name = "hf:me/faces-of-mine"
    push = ["push", tiny_run, "me/faces-of-mine", "--license", "cc-by-4.0", "--private"]
    status, output, error = run(hub, *push)
    assert status == 0, error
    assert output.splitlines() == [
        f"http://127.0.0.1:{hub.server_port}/me/faces-of-mine",
        f"flowgen sample --run {name}",
    ]
    assert hub.RequestHandlerClass.private["me/faces-of-mine"]
    files = hub.RequestHandlerClass.repositories["me/faces-of-mine"]
    assert set(files) == {HUB_FILE, "README.md", "model.png"}
    assert files["model.png"].startswith(b"\x89PNG")
    _, front_matter, text = files["README.md"].decode().split("---\n", 2)
    facts = yaml.safe_load(front_matter)
    assert facts["license"] == "cc-by-4.0"
    assert facts["library_name"] == "flowgen"
    assert "normalizing-flow" in facts["tags"]
    assert f"flowgen sample --run {name}" in text
    assert "model of a folder of images" in text
    assert f"flowgen evaluate --run {name} --json data.root=FOLDER" in text, "it has no path"
    assert "model.png" in text
    assert str(tiny_run) not in text
    for source, picture in ((name, "pulled.png"), (tiny_run, "own.png")):
        sample = ["sample", "--run", source, "--count", 4, "--out", picture]
        status, _, error = run(hub, *sample)
        assert status == 0, error
    assert Path("pulled.png").read_bytes() == Path("own.png").read_bytes()
    assert (elsewhere / "outputs" / "hf" / "me" / "faces-of-mine").is_dir()


def test_errors_of_the_hub_are_one_line(hub, tiny_run):
    hub.RequestHandlerClass.repositories |= {
        "me/other": {"config.json": b"{}"},
        "me/broken": {HUB_FILE: b"not a model"},
    }
    for name, message in (
        ("me/nothing", "me/nothing is not on the Hub"),
        ("me/other", "me/other on the Hub is not a model of flowgen"),
        ("me/broken", "not a model of flowgen"),
    ):
        assert_error(run(hub, "sample", "--run", f"hf:{name}"), message)
    push = ["push", tiny_run, "me/faces", "--license", "mit"]
    assert_error(run(hub, *push, token="hf_wrong"), "log in with HF_TOKEN")


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:me", "hf:me/../../x", "hf:me/a/b", "hf:/x", "hf:me/.x", "hf:me/x y", "hf:me/x\n"],
)
def test_invalid_names_are_refused_before_any_request(command, name):
    assert_error(command("sample", "--run", name), "is not the name of a model on the Hub")


def test_push_needs_a_name_a_run_and_a_license(tiny_run, command):
    assert_error(command("push", tiny_run, "faces"), "is not the name of a model on the Hub")
    assert_error(command("push", "nowhere", "me/faces"), "flowgen runs")
    assert_error(command("push", tiny_run, "me/faces"), "pass --license NAME")


def test_without_huggingface_hub_the_error_says_how_to_install_it(tiny_run, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    install = "pip install huggingface_hub"
    assert_error(command("sample", "--run", "hf:me/faces"), install)
    assert_error(command("push", tiny_run, "me/faces", "--license", "mit"), install)


@pytest.mark.parametrize(
    "overrides",
    [["data=celeba"], ["data=celeba_hq"], ["data=folder", "data.root=/home/me/FFHQ64"]],
)
def test_models_of_research_faces_are_not_pushed(overrides):
    with pytest.raises(UserError, match="this model must not be published"):
        license_id(data_section(overrides), "mit")


def test_faces_are_refused_before_anything_is_sent(tiny_run, command, tmp_path):
    checkpoint = find_checkpoint(str(tiny_run))[1]
    checkpoint["config"]["data"]["search_dirs"] = ["celeba"]
    path = tmp_path / "faces.safetensors"
    export_safetensors(checkpoint, {}, "flowgen train", path)
    push = ["push", path, "me/faces", "--license", "mit"]
    assert_error(command(*push), "non-commercial research only")


def test_the_license_of_a_folder_of_faces_is_exported_with_the_model(tiny_run, command, tmp_path):
    path = Run(tiny_run).last
    checkpoint = read_checkpoint(path)
    checkpoint["config"]["data"]["root"] = "/home/me/FFHQ64"
    write_checkpoint(checkpoint, path)
    for source, target in ((tiny_run, "faces"), (tmp_path / "faces.safetensors", "again")):
        exported = tmp_path / f"{target}.safetensors"
        assert command("export", source, exported)[0] == 0
        push = ["push", exported, "me/faces", "--license", "mit"]
        assert_error(command(*push), "this model must not be published")
        assert "FFHQ (NVIDIA) is licensed under" in exported.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("overrides", "license_name", "expected"),
    [
        (["data=mnist"], None, "cc-by-sa-3.0"),
        (["data=fashion_mnist"], "mit", "mit"),
        (["data=mnist_sample"], None, "cc-by-sa-3.0"),
        (["data=toy"], None, "mit"),
        (["data=energy"], None, "mit"),
        (["data=folder", "data.root=birds"], "cc0-1.0", "cc0-1.0"),
    ],
)
def test_a_model_has_the_license_of_its_images(overrides, license_name, expected):
    assert license_id(data_section(overrides), license_name) == expected


# Their owners state no license for models of the images: `flowgen push` asks for one.
WITHOUT_LICENSE = {"cifar10", "folder", "hub", "imagenet32", "imagenet64", "lsun", "svhn"}


@pytest.mark.parametrize("name", group_options("data"))
def test_the_license_of_every_data_set_is_known_or_its_lack_is(name):
    section = read_yaml(f"data/{name}")
    assert (license_key(section) in LICENSES) == (name not in WITHOUT_LICENSE), (
        f"add {license_key(section)} to LICENSES in flowgen/commands/export.py, "
        f"or {name} to WITHOUT_LICENSE here"
    )


def test_another_license_than_that_of_the_images_is_an_error():
    with pytest.raises(UserError, match="The license of the model is therefore mit"):
        license_id(data_section(["data=fashion_mnist"]), "cc0-1.0")
