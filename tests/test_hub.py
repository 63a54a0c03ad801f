"""Sharing: `flowgen push` and `--run hf:OWNER/NAME` against a server of the Hub's kind on loopback, and what terms forbid."""

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
from test_cli import assert_plain

from flowgen.commands.export import license_id
from flowgen.config.loading import data_section
from flowgen.config.runs import FILE, find_checkpoint
from flowgen.training.checkpoint import export_safetensors, read_checkpoint, write_checkpoint
from flowgen.training.run_dir import Run
from flowgen.utils.errors import UserError

TOKEN = "hf_told_to_nobody"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a model of a few files needs: repositories by name, with the files of their one commit."""

    repositories: dict[str, dict[str, bytes]]
    payload: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.payload.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            name = f"me/{json.loads(body)['name']}"
            self.repositories[name] = {}
            self.answer(
                200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name}
            )
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            files = [
                line["value"]
                for line in map(json.loads, body.splitlines())
                if line["key"] == "file"
            ]
            self.repositories[name] |= {
                file["path"]: base64.b64decode(file["content"]) for file in files
            }
            self.answer(
                200,
                {
                    "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{40 * '1'}",
                    "commitOid": 40 * "1",
                },
            )
        else:
            self.answer(200, {"errors": [], "warnings": []})  # of the card's first lines

    def do_GET(self) -> None:
        self.payload.append(self.path)
        name, _, file = self.path.partition("?")[0].strip("/").partition("/resolve/main/")
        data = self.repositories.get(name, {}).get(file)
        if data is None:
            code = "EntryNotFound" if name in self.repositories else "RepoNotFound"
            self.answer(404, {"error": code}, {"X-Error-Code": code})
        else:
            self.answer(
                200,
                data,
                {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": 40 * "1"},
            )

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    pytest.importorskip("huggingface_hub")
    handler = type("Fresh", (Hub,), {"repositories": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: ThreadingHTTPServer, *words: object, token: str = TOKEN) -> tuple[int, str, str]:
    """`flowgen WORDS` in a process of its own, since the package reads where the Hub is when it is imported."""
    where = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(Path("hf").absolute()),
        "HF_TOKEN": token,
    }
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "flowgen", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | where | quiet,
        check=False,
    )
    assert TOKEN not in found.stdout + found.stderr
    return found.returncode, found.stdout, found.stderr


def test_a_model_is_pushed_with_its_card_and_read_from_the_hub(hub, tiny_run, elsewhere):
    status, output, error = run(hub, "push", tiny_run, "me/faces-of-mine", "--licence", "cc-by-4.0")
    assert status == 0, error
    assert output.splitlines() == [
        f"http://127.0.0.1:{hub.server_port}/me/faces-of-mine",
        "flowgen sample --run hf:me/faces-of-mine",
    ]
    files = hub.RequestHandlerClass.repositories["me/faces-of-mine"]
    assert set(files) == {FILE, "README.md", "model.png"} and files["model.png"].startswith(
        b"\x89PNG"
    )
    _, matter, text = files["README.md"].decode().split("---\n", 2)
    facts = yaml.safe_load(matter)
    assert (
        facts["license"] == "cc-by-4.0"
        and facts["library_name"] == "flowgen"
        and "normalizing-flow" in facts["tags"]
    )
    assert (
        "flowgen sample --run hf:me/faces-of-mine" in text
        and "model.png" in text
        and str(tiny_run) not in text
    )
    for name, out in (("hf:me/faces-of-mine", "pulled.png"), (tiny_run, "own.png")):
        status, _, error = run(hub, "sample", "--run", name, "--count", 4, "--out", out)
        assert status == 0, error
    assert Path("pulled.png").read_bytes() == Path("own.png").read_bytes()
    assert (elsewhere / "outputs" / "hf" / "me" / "faces-of-mine").is_dir()


def test_what_the_hub_does_not_have_or_do_gets_one_line(hub, tiny_run):
    assert_plain(run(hub, "sample", "--run", "hf:me/nothing"), "me/nothing is not on the Hub")
    hub.RequestHandlerClass.repositories |= {
        "me/other": {"config.json": b"{}"},
        "me/broken": {FILE: b"words"},
    }
    assert_plain(
        run(hub, "sample", "--run", "hf:me/other"), "me/other on the Hub is no model of flowgen"
    )
    assert_plain(run(hub, "sample", "--run", "hf:me/broken"), "no model of flowgen")
    assert_plain(
        run(hub, "push", tiny_run, "me/faces", "--licence", "mit", token="hf_wrong"),
        "log in with HF_TOKEN",
    )


def test_names_that_are_none_ask_no_server(tiny_run, command):
    for name in (
        "hf:",
        "hf:me",
        "hf:me/../../x",
        "hf:me/a/b",
        "hf:/x",
        "hf:me/.x",
        "hf:me/x y",
        "hf:me/x\n",
    ):
        assert_plain(command("sample", "--run", name), "is no name of a model on the Hub")
    assert_plain(command("push", tiny_run, "faces"), "is no name of a model on the Hub")
    assert_plain(command("push", "nowhere", "me/faces"), "flowgen runs")
    assert_plain(command("push", tiny_run, "me/faces"), "say by --licence")


def test_without_the_package_the_cure_is_named(tiny_run, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_plain(command("sample", "--run", "hf:me/faces"), "pip install 'flowgen[hub]'")
    assert_plain(
        command("push", tiny_run, "me/faces", "--licence", "mit"), "pip install 'flowgen[hub]'"
    )


@pytest.mark.parametrize(
    "words", [["data=celeba"], ["data=celeba_hq"], ["data=folder", "data.root=/home/me/FFHQ64"]]
)
def test_models_of_faces_that_are_for_research_are_not_pushed(words):
    with pytest.raises(UserError, match="this model is not for everybody"):
        license_id(data_section(words), "mit")


def test_faces_are_refused_before_anything_is_sent(tiny_run, command, tmp_path):
    checkpoint = find_checkpoint(str(tiny_run))[1]
    data = checkpoint["config"]["data"] | {"search_dirs": ["celeba"]}
    export_safetensors(
        checkpoint | {"config": checkpoint["config"] | {"data": data}},
        {},
        "flowgen train",
        tmp_path / "faces.safetensors",
    )
    assert_plain(
        command("push", tmp_path / "faces.safetensors", "me/faces", "--licence", "mit"),
        "non-commercial research alone",
    )


def test_terms_that_a_folders_name_tells_go_with_the_exported_model(tiny_run, command, tmp_path):
    path = Run(tiny_run).last
    state = read_checkpoint(path)
    state["config"]["data"]["root"] = "/home/me/FFHQ64"
    write_checkpoint(state, path)
    for source, target in ((tiny_run, "faces"), (tmp_path / "faces.safetensors", "again")):
        assert command("export", source, tmp_path / f"{target}.safetensors")[0] == 0
        assert_plain(
            command("push", tmp_path / f"{target}.safetensors", "me/faces", "--licence", "mit"),
            "this model is not for everybody",
        )
        assert "FFHQ (NVIDIA) is under" in (tmp_path / f"{target}.md").read_text()


def test_licences_are_those_of_the_images():
    assert license_id(data_section(["data=mnist"]), None) == "cc-by-sa-3.0"
    assert license_id(data_section(["data=fashion_mnist"]), "mit") == "mit"
    assert license_id(data_section(["data=mnist_sample"]), None) == "cc-by-sa-3.0"
    assert license_id(data_section(["data=folder", "data.root=birds"]), "cc0-1.0") == "cc0-1.0"
    with pytest.raises(UserError, match="So --licence is mit"):
        license_id(data_section(["data=fashion_mnist"]), "cc0-1.0")
