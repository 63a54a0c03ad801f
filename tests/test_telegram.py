"""`flowgen bot`, end to end with a local server that imitates the Bot API of Telegram."""

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
import torch
from conftest import save_image, started
from PIL import Image
from test_cli import assert_error
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

pytest.importorskip("telegram", reason="needs the package python-telegram-bot")
from flowgen.serving.telegram import ChatHandlers, read_token
from flowgen.utils.errors import UserError

TOKEN = "123456:SECRET-of-the-bot_xyz"
REVOKED_TOKEN = "654321:REVOKED-of-the-bot_xyz"

Reply = tuple[int, str, Image.Image | None]  # chat id, text or caption, photo


class FakeTelegram:
    """A server of the Bot API. Tests send messages to the bot with `send` and `ask`."""

    def __init__(self) -> None:
        self.updates: queue.Queue[dict] = queue.Queue()
        self.replies: queue.Queue[Reply] = queue.Queue()
        self.files: dict[str, bytes] = {}
        self.num_messages = 0
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def __call__(self, environ, start_response):
        return self.respond(Request(environ))(environ, start_response)

    def respond(self, request: Request) -> Response:
        name = request.path.rpartition("/")[2]
        if request.path.startswith(f"/file/bot{TOKEN}/"):
            return Response(self.files[name])
        if not request.path.startswith(f"/bot{TOKEN}/"):
            error = {"ok": False, "error_code": 401, "description": "Unauthorized"}
            return Response(json.dumps(error), 401)
        result = self.call(name, request)
        return Response(json.dumps({"ok": True, "result": result}), mimetype="application/json")

    def call(self, method: str, request: Request) -> object:
        """Return the result of a method of the Bot API."""
        chat_id = int(request.form.get("chat_id", 0))
        sent = {"message_id": 1, "date": 0, "chat": {"id": chat_id, "type": "private"}}
        if method == "getMe":
            return {"id": 1, "is_bot": True, "first_name": "flowgen", "username": "flowgen_bot"}
        if method == "getUpdates":
            return self.next_updates()
        if method == "getFile":
            file_id = request.form["file_id"]
            return {"file_id": file_id, "file_unique_id": file_id, "file_path": file_id}
        if method == "sendMessage":
            text = request.form["text"]
            self.replies.put((chat_id, text, None))
            return sent | {"text": text}
        if method == "sendPhoto":
            (file,) = request.files.values()
            photo = Image.open(io.BytesIO(file.read()))
            self.replies.put((chat_id, request.form.get("caption", ""), photo))
            return sent
        return True

    def next_updates(self) -> list[dict]:
        """Wait for at most half a second."""
        updates: list[dict] = []
        end = time.monotonic() + 0.5
        while time.monotonic() < end and not updates:
            while not self.updates.empty():
                updates.append(self.updates.get())
            time.sleep(0.01)
        return updates

    def send(self, *messages: dict, chat_id: int = 7) -> None:
        for message in messages:
            self.num_messages += 1
            header = {
                "message_id": self.num_messages,
                "date": 0,
                "chat": {"id": chat_id, "type": "private"},
                "from": {"id": chat_id, "is_bot": False, "first_name": "A"},
            }
            self.updates.put({"update_id": self.num_messages, "message": header | message})

    def photo(self, file: bytes, size: int | None = None, **fields: str) -> dict:
        """Return a message with a photo. `size` is the size that Telegram reports."""
        file_id = f"file{len(self.files)}"
        self.files[file_id] = file
        photo = {
            "file_id": file_id,
            "file_unique_id": file_id,
            "width": 8,
            "height": 8,
            "file_size": len(file) if size is None else size,
        }
        return {"photo": [photo], **fields}

    def next_reply(self) -> Reply:
        return self.replies.get(timeout=60)

    def ask(self, *messages: dict | str) -> tuple[str, Image.Image | None]:
        """Send messages from one chat and return the next reply."""
        for message in messages:
            self.send({"text": message} if isinstance(message, str) else message)
        _, text, photo = self.next_reply()
        return text, photo


@pytest.fixture(scope="module")
def telegram() -> Iterator[FakeTelegram]:
    fake = FakeTelegram()
    threading.Thread(target=fake.server.serve_forever, daemon=True).start()
    yield fake
    fake.server.shutdown()


def bot_argv(two_runs: Path, api_url: str, token: str = TOKEN) -> list[str]:
    file = two_runs / "token"
    file.touch(0o600)
    file.write_text(token + "\n")
    return ["bot", str(two_runs / "glow"), "--token-file", str(file), "--api-url", api_url]


@pytest.fixture(scope="module")
def bot(telegram: FakeTelegram, two_runs: Path) -> Iterator[FakeTelegram]:
    """Run the bot. At the end it must stop on Ctrl-C, and no output may contain the token."""
    with started(*bot_argv(two_runs, telegram.url)) as process:
        yield telegram
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert "until Ctrl-C" in output
    assert "SECRET" not in output + error
    assert "Traceback" not in error


def test_start_help_and_generate(bot):
    text, _ = bot.ask("/start")
    assert text.startswith("Hello! I draw images")
    assert "/generate 0.678" in text
    assert "/walk and two photos" in bot.ask("/help")[0]
    caption, photo = bot.ask("/generate")
    assert caption.startswith("Temperature 1, seed ")
    assert "bits/dim" in caption
    assert photo.width >= 256
    caption, photo = bot.ask("/generate 0.678")
    assert caption.startswith("Temperature 0.678, seed ")
    assert photo is not None
    for text in (
        "/generate 1.5",
        "/generate -1",
        "/generate 0,5",
        "/generate hot",
        "/generate nan",
        "/generate 0.5 0.6",
    ):
        reply, photo = bot.ask(text)
        assert "a number from 0 to 1 with a decimal point" in reply, text
        assert photo is None, text
    assert bot.ask("/generate@flowgen_bot 0")[1] is not None, "the bot still works"


def test_generate_draws_the_image_of_the_sample_command(bot, two_runs, command, tmp_path):
    caption, photo = bot.ask("/generate 0.7")
    seed = caption.partition("seed ")[2].partition(".")[0]
    path = tmp_path / "a.png"
    options = ["--temperature", 0.7, "--seed", seed, "--count", 1, "--out", path]
    assert command("sample", "--run", two_runs / "glow", *options)[0] == 0
    image = photo.crop((2, 2, 258, 258)).resize((8, 8), Image.Resampling.NEAREST)
    picture = Image.open(path).convert("RGB")
    box = (2, picture.height - 58, 58, picture.height - 2)
    expected = picture.crop(box).resize((8, 8), Image.Resampling.NEAREST)
    assert image.convert("RGB").tobytes() == expected.tobytes()


def test_walk_takes_two_messages_or_an_album(bot, tmp_path):
    photos = [save_image(tmp_path / f"{name}.png", (20, 20, 3)).read_bytes() for name in "ab"]
    assert "two photos" in bot.ask("/walk")[0]
    assert bot.ask(bot.photo(photos[0]))[0] == "Now send the other photo."
    _, from_messages = bot.ask(bot.photo(photos[1]))
    album = [
        bot.photo(photos[0], caption="/walk", media_group_id="5"),
        bot.photo(photos[1], media_group_id="5"),
    ]
    _, from_album = bot.ask(*album)
    assert from_messages.width > 9 * 56
    assert from_messages.tobytes() == from_album.tobytes()


def test_score_takes_a_photo_with_or_after_the_command(bot, tmp_path):
    photo = save_image(tmp_path / "a.png", (20, 20, 3)).read_bytes()
    assert "bits/dim" in bot.ask(bot.photo(photo, caption="/score"))[0]
    assert bot.ask("/score")[0] == "Send me a photo."
    assert "bits/dim" in bot.ask(bot.photo(photo))[0]
    document = {"document": bot.photo(photo)["photo"][0], "caption": "/score"}
    assert "bits/dim" in bot.ask(document)[0]


def test_invalid_messages_get_a_friendly_reply(bot, tmp_path):
    photo = save_image(tmp_path / "a.png", (20, 20, 3)).read_bytes()
    assert "Send /score or /walk first" in bot.ask(bot.photo(photo))[0]
    too_large = bot.photo(photo, size=9 * 2**20, caption="/score")
    assert "at most 8 MiB" in bot.ask(too_large)[0]
    assert "is not an image" in bot.ask(bot.photo(b"words", caption="/score"))[0]
    for text in ("hello", "/frobnicate", "/", "1" * 4000):
        assert bot.ask(text)[0].startswith("I do not understand that.")
    location = {"location": {"longitude": 30.5, "latitude": 50.4}}
    assert bot.ask(location)[0].startswith("I do not understand that.")
    missing = bot.photo(photo, caption="/score")
    del bot.files[missing["photo"][0]["file_id"]]
    assert "Try again" in bot.ask(missing)[0]


def test_each_chat_has_one_request_at_a_time(bot):
    bot.send({"text": "/generate"}, {"text": "/generate"})
    bot.send({"text": "/generate"}, chat_id=8)
    first_words = {7: [], 8: []}
    for _ in range(3):
        chat_id, text, _ = bot.next_reply()
        first_words[chat_id].append(text.split()[0])
    assert sorted(first_words[7]) == ["I", "Temperature"]
    assert first_words[8] == ["Temperature"]
    assert bot.ask("/generate")[1] is not None


def test_last_photo_of_a_busy_chat_is_asked_for_again():
    replies = []

    async def reply(text):
        replies.append(text)

    def refuse():
        raise UserError("no connection")

    def message(file_id, caption=None):
        return SimpleNamespace(
            chat_id=7,
            text=None,
            caption=caption,
            document=None,
            photo=[SimpleNamespace(file_id=file_id, file_size=1)],
            media_group_id="album",
            reply_text=reply,
            get_bot=refuse,
        )

    handlers = ChatHandlers(None)
    handlers.busy.add(7)
    for photo in (message("a", "/walk"), message("b")):
        asyncio.run(handlers.on_message(SimpleNamespace(message=photo), None))
    assert replies == [
        "I am still working on your last request. Send me this photo again after that."
    ]
    handlers.busy.clear()
    request = handlers.pending[7]
    asyncio.run(handlers.on_message(SimpleNamespace(message=message("b")), None))
    assert replies[1:] == ["Sorry: no connection."]
    assert request.photos == ["a", "b"]
    assert not handlers.pending
    assert not handlers.busy


def test_an_image_of_a_model_without_a_likelihood_has_no_score():
    captions = []

    async def reply_photo(picture, caption):
        captions.append(caption)

    message = SimpleNamespace(reply_photo=reply_photo)
    model = SimpleNamespace(likelihood="none", bits=8)
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    handlers = ChatHandlers(SimpleNamespace(model=model, sample=lambda **settings: image))
    asyncio.run(handlers._generate(message, ["1"]))
    (caption,) = captions
    assert caption.startswith("Temperature 1, seed ") and "bits/dim" not in caption


def test_only_allowed_chats_are_answered():
    replies = []

    async def reply(text):
        replies.append(text)

    message = SimpleNamespace(chat_id=7, text="/start", caption=None, reply_text=reply)
    handlers = ChatHandlers(None, allowed_chats=(8,))
    asyncio.run(handlers.on_message(SimpleNamespace(message=message), None))
    assert replies == ["This bot does not answer this chat. Its id is 7."]


def test_token_is_in_no_output_if_telegram_rejects_it_or_is_unreachable(telegram, two_runs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        unreachable = f"http://127.0.0.1:{free.getsockname()[1]}"
    for api_url, expected, options in (
        (telegram.url, "rejects the token", ["--debug"]),
        (unreachable, "is unreachable", []),
    ):
        argv = [sys.executable, "-m", "flowgen", *bot_argv(two_runs, api_url, REVOKED_TOKEN)]
        result = subprocess.run(
            [*argv, *options], capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 1
        assert expected in result.stderr
        assert "REVOKED" not in result.stdout + result.stderr


def test_token_comes_from_a_private_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWGEN_BOT_TOKEN", raising=False)
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f" {TOKEN}\n")
    assert read_token(file) == TOKEN
    monkeypatch.setenv("FLOWGEN_BOT_TOKEN", REVOKED_TOKEN)
    assert read_token(None) == REVOKED_TOKEN
    assert read_token(file) == TOKEN
    for mode in (0o640, 0o604, 0o644):
        file.chmod(mode)
        with pytest.raises(UserError, match="chmod 600") as caught:
            read_token(file)
        assert "SECRET" not in str(caught.value)


def test_invalid_arguments_of_bot_get_one_line(two_runs, command, tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWGEN_BOT_TOKEN", raising=False)
    run = two_runs / "glow"
    assert_error(command("bot", run), "@BotFather")
    assert_error(command("bot", run, "--token-file", tmp_path / "nowhere"), "is not a file")
    assert_error(command("bot", run, "--token-file", tmp_path), "is not a file")
    assert_error(command("bot", run, "--token", TOKEN), "--token", 2)
    assert_error(command("bot", run, "--allow-chat", "me"), "me", 2)
    monkeypatch.setenv("FLOWGEN_BOT_TOKEN", "SECRET")
    result = command("bot", run)
    assert_error(result, "FLOWGEN_BOT_TOKEN does not contain a valid token")
    assert "SECRET" not in result[2]
    monkeypatch.setenv("FLOWGEN_BOT_TOKEN", TOKEN)
    assert_error(command("bot", "nowhere"), "flowgen runs")
    assert_error(command("bot", run, "--device", "tpu"), "choose auto")
    monkeypatch.setattr("flowgen.cli.find_spec", lambda name: None)
    assert_error(command("bot", run), "pip install python-telegram-bot")
