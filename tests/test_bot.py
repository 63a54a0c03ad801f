"""`flowgen bot`, end to end against a server of the Bot API on loopback."""

import asyncio
import io
import json
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import save_image, started
from PIL import Image
from test_cli import assert_plain
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from flowgen.serving.telegram import read_token
from flowgen.utils.errors import UserError

pytest.importorskip("telegram", reason="needs python-telegram-bot: pip install 'flowgen[bot]'")
from flowgen.serving.telegram import Chat

TOKEN = "123456:SECRET-of-the-bot_xyz"
OTHER = "654321:REVOKED-of-the-bot_xyz"


class Telegram:
    """A Bot API: `tell` sends messages to the bot, `heard` are its own: the chat, and the text or the picture with its caption."""

    def __init__(self) -> None:
        self.told: queue.Queue[dict] = queue.Queue()
        self.heard: queue.Queue[tuple[int, str, Image.Image | None]] = queue.Queue()
        self.files: dict[str, bytes] = {}
        self.count = 0
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, environ, start_response):
        return self.respond(Request(environ))(environ, start_response)

    def respond(self, request: Request) -> Response:
        if request.path.startswith(f"/file/bot{TOKEN}/"):
            return Response(self.files[request.path.rpartition("/")[2]])
        if not request.path.startswith(f"/bot{TOKEN}/"):
            return Response('{"ok": false, "error_code": 401, "description": "Unauthorized"}', 401)
        result = self.result(request.path.rpartition("/")[2], request)
        return Response(json.dumps({"ok": True, "result": result}), mimetype="application/json")

    def result(self, method: str, request: Request) -> object:
        chat = int(request.form.get("chat_id", 0))
        sent = {"message_id": 1, "date": 0, "chat": {"id": chat, "type": "private"}}
        if method == "getMe":
            return {"id": 1, "is_bot": True, "first_name": "flowgen", "username": "flowgen_bot"}
        if method == "getUpdates":
            return self.updates(int(request.form.get("offset", 0)))
        if method == "getFile":
            name = request.form["file_id"]
            return {"file_id": name, "file_unique_id": name, "file_path": name}
        if method == "sendMessage":
            self.heard.put((chat, request.form["text"], None))
            return sent | {"text": request.form["text"]}
        if method == "sendPhoto":
            (file,) = request.files.values()
            self.heard.put(
                (chat, request.form.get("caption", ""), Image.open(io.BytesIO(file.read())))
            )
            return sent
        return True

    def updates(self, offset: int) -> list[dict]:
        found: list[dict] = []
        until = time.monotonic() + 0.5
        while time.monotonic() < until and not found:
            while not self.told.empty():
                found.append(self.told.get())
            time.sleep(0.01)
        return found

    def tell(self, *messages: dict, chat: int = 7) -> None:
        """All at once."""
        for message in messages:
            self.count += 1
            who = {
                "chat": {"id": chat, "type": "private"},
                "from": {"id": chat, "is_bot": False, "first_name": "A"},
            }
            self.told.put(
                {
                    "update_id": self.count,
                    "message": {"message_id": self.count, "date": 0} | who | message,
                }
            )

    def photo(self, file: bytes, size: int | None = None, **more: str) -> dict:
        name = f"file{len(self.files)}"
        self.files[name] = file
        copy = {
            "file_id": name,
            "file_unique_id": name,
            "width": 8,
            "height": 8,
            "file_size": len(file) if size is None else size,
        }
        return {"photo": [copy], **more}

    def hear(self) -> tuple[int, str, Image.Image | None]:
        return self.heard.get(timeout=60)

    def ask(self, *messages: dict | str) -> tuple[str, Image.Image | None]:
        """The bot's next words after these messages, which one chat sends."""
        self.tell(
            *({"text": message} if isinstance(message, str) else message for message in messages)
        )
        _, text, picture = self.hear()
        return text, picture


@pytest.fixture(scope="module")
def telegram() -> Iterator[Telegram]:
    served = Telegram()
    threading.Thread(target=served.server.serve_forever, daemon=True).start()
    yield served
    served.server.shutdown()


def words_of(telegram: Telegram, two_runs: Path, token: str = TOKEN) -> list[str]:
    file = two_runs / "token"
    file.touch(0o600)
    file.write_text(token + "\n")
    return ["bot", str(two_runs / "glow"), "--token-file", str(file), "--api", telegram.url]


@pytest.fixture(scope="module")
def bot(telegram: Telegram, two_runs: Path) -> Iterator[Telegram]:
    """At work; in the end it stops when it is interrupted, and the token was in nothing that it said."""
    with started(*words_of(telegram, two_runs)) as process:
        yield telegram
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=30)
    assert process.returncode == 0 and "chats until Ctrl-C" in output, error
    assert "SECRET" not in output + error and "Traceback" not in error


def test_the_session_of_the_thesis(bot):
    text, _ = bot.ask("/start")
    assert text.startswith("Hello! I draw pictures") and "/generate 0.678" in text
    assert "/walk and two photos" in bot.ask("/help")[0]
    caption, picture = bot.ask("/generate")
    assert (
        caption.startswith("Temperature 1, seed ")
        and "bits/dim" in caption
        and picture.width >= 256
    )
    caption, picture = bot.ask("/generate 0.678")
    assert caption.startswith("Temperature 0.678, seed ") and picture is not None
    for words in (
        "/generate 1.5",
        "/generate -1",
        "/generate 0,5",
        "/generate hot",
        "/generate nan",
        "/generate 0.5 0.6",
    ):
        text, picture = bot.ask(words)
        assert "a number from 0 to 1 with a point" in text and picture is None, words
    assert bot.ask("/generate@flowgen_bot 0")[1] is not None, "the bot goes on"


def test_a_generated_picture_is_the_commands(bot, two_runs, command, tmp_path):
    caption, picture = bot.ask("/generate 0.7")
    seed = caption.partition("seed ")[2].partition(".")[0]
    words = [
        "--run",
        two_runs / "glow",
        "--temperature",
        0.7,
        "--seed",
        seed,
        "--count",
        1,
        "--out",
        tmp_path / "a.png",
    ]
    assert command("sample", *words)[0] == 0
    small = picture.crop((2, 2, 258, 258)).resize((8, 8), Image.Resampling.NEAREST)
    made = Image.open(tmp_path / "a.png").convert("RGB")
    made = made.crop((2, made.height - 58, 58, made.height - 2)).resize(
        (8, 8), Image.Resampling.NEAREST
    )
    assert small.convert("RGB").tobytes() == made.tobytes()


def test_a_walk_takes_two_photos_in_a_row_or_in_an_album(bot, tmp_path):
    photos = [save_image(tmp_path / f"{name}.png", (20, 20, 3)).read_bytes() for name in "ab"]
    assert "two photos" in bot.ask("/walk")[0]
    assert bot.ask(bot.photo(photos[0]))[0] == "And the other one?"
    _, one = bot.ask(bot.photo(photos[1]))
    first, second = (
        bot.photo(photos[0], caption="/walk", media_group_id="5"),
        bot.photo(photos[1], media_group_id="5"),
    )
    _, other = bot.ask(first, second)
    assert one.width > 9 * 56 and one.tobytes() == other.tobytes()


def test_a_photo_is_scored(bot, tmp_path):
    photo = save_image(tmp_path / "a.png", (20, 20, 3)).read_bytes()
    assert "bits/dim" in bot.ask(bot.photo(photo, caption="/score"))[0]
    assert bot.ask("/score")[0] == "Send me a photo."
    assert "bits/dim" in bot.ask(bot.photo(photo))[0]
    document = {"document": bot.photo(photo)["photo"][0], "caption": "/score"}
    assert "bits/dim" in bot.ask(document)[0]


def test_what_cannot_be_answered_gets_a_friendly_sentence(bot, tmp_path):
    photo = save_image(tmp_path / "a.png", (20, 20, 3)).read_bytes()
    assert "Say /score or /walk first" in bot.ask(bot.photo(photo))[0]
    assert "8 MiB at most" in bot.ask(bot.photo(photo, size=9 * 2**20, caption="/score"))[0]
    assert "is not an image" in bot.ask(bot.photo(b"words", caption="/score"))[0]
    for words in ("hello", "/frobnicate", "/", "1" * 4000):
        assert bot.ask(words)[0].startswith("I do not understand that.")
    assert bot.ask({"location": {"longitude": 30.5, "latitude": 50.4}})[0].startswith(
        "I do not understand that."
    )
    lost = bot.photo(photo, caption="/score")
    del bot.files[lost["photo"][0]["file_id"]]
    assert "Try again" in bot.ask(lost)[0]


def test_a_chat_has_one_request_at_a_time_and_others_do_not_wait_for_it(bot):
    bot.tell({"text": "/generate"}, {"text": "/generate"})
    bot.tell({"text": "/generate"}, chat=8)
    heard = [bot.hear() for _ in range(3)]
    of = {chat: sorted(text.split()[0] for who, text, _ in heard if who == chat) for chat in (7, 8)}
    assert of == {7: ["One", "Temperature"], 8: ["Temperature"]}
    assert bot.ask("/generate")[1] is not None


def test_a_photo_that_comes_too_early_leaves_what_was_asked():
    chat, said = Chat(None), []

    async def reply(text):
        said.append(text)

    def message(name, caption=None):
        photo = [SimpleNamespace(file_id=name, file_size=1)]
        return SimpleNamespace(
            chat_id=7,
            text=None,
            caption=caption,
            document=None,
            photo=photo,
            media_group_id="album",
            reply_text=reply,
        )

    chat.busy.add(7)
    for each in (message("a", "/walk"), message("b")):
        asyncio.run(chat.hear(SimpleNamespace(message=each), None))
    assert said == [
        "One thing at a time: I am still at your last request. Send me this photo again after that."
    ]
    chat.busy.clear()
    request = chat.requests[7]
    assert (
        callable(chat._answer(message("b"))) and request.photos == ["a", "b"] and not chat.requests
    )


def test_the_token_is_in_no_output_when_telegram_refuses_it_or_is_not_there(telegram, two_runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    for address, answer, words in (
        (telegram.url, "refuses the token", ["--debug"]),
        (nowhere, "cannot be reached", []),
    ):
        line = [
            sys.executable,
            "-m",
            "flowgen",
            *words_of(telegram, two_runs, OTHER)[:-1],
            address,
            *words,
        ]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        assert (
            done.returncode == 1
            and answer in done.stderr
            and "REVOKED" not in done.stdout + done.stderr
        )


def test_a_token_comes_from_a_file_of_ones_own_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWGEN_BOT_TOKEN", raising=False)
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f" {TOKEN}\n")
    assert read_token(file) == TOKEN
    monkeypatch.setenv("FLOWGEN_BOT_TOKEN", OTHER)
    assert read_token(None) == OTHER and read_token(file) == TOKEN
    for mode in (0o640, 0o604, 0o644):
        file.chmod(mode)
        with pytest.raises(UserError, match="chmod 600") as caught:
            read_token(file)
        assert "SECRET" not in str(caught.value)


def test_wrong_words_of_bot_get_one_line(two_runs, command, tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWGEN_BOT_TOKEN", raising=False)
    run = two_runs / "glow"
    assert_plain(command("bot", run), "@BotFather")
    assert_plain(command("bot", run, "--token-file", tmp_path / "nowhere"), "is no file")
    assert_plain(command("bot", run, "--token-file", tmp_path), "is no file")
    assert_plain(command("bot", run, "--token", TOKEN), "--token", 2)
    assert_plain(command("bot", run, "--allow", "me"), "me", 2)
    monkeypatch.setenv("FLOWGEN_BOT_TOKEN", "SECRET")
    result = command("bot", run)
    assert_plain(result, "FLOWGEN_BOT_TOKEN holds is no token")
    assert "SECRET" not in result[2]
    monkeypatch.setenv("FLOWGEN_BOT_TOKEN", TOKEN)
    assert_plain(command("bot", "nowhere"), "flowgen runs")
    assert_plain(command("bot", run, "--device", "tpu"), "choose auto")
    monkeypatch.setattr("flowgen.cli.find_spec", lambda name: None)
    assert_plain(command("bot", run), "flowgen[bot]")
