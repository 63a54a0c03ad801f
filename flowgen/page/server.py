"""The page's server, for one user on this machine."""

import socket
import threading
from collections.abc import Callable
from typing import Any

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from flowgen.answers import Answers, leave
from flowgen.errors import FlowgenError
from flowgen.page.app import Page

HOST = "127.0.0.1"
WAITING = 128  # connections


class Handler(WSGIRequestHandler):
    """Says nothing of requests that went well, and waits no longer than this for a browser's next words."""

    timeout = 60  # seconds

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def explore(*, name: str | None, port: int, device: str, say: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `say` is told where it is. Raises FlowgenError."""
    answers = Answers(name, device)
    with open_server(answers, port) as server:
        threading.Thread(target=answers.judge_validation_images, daemon=True).start()
        say(f"{answers.name} at http://{HOST}:{server.port}/ until Ctrl-C")
        server.serve_forever()  # which takes an interrupt for its end
    leave()


def open_server(answers: Answers, port: int) -> BaseWSGIServer:
    """Bound, not yet serving; port 0 is any that is free. Raises FlowgenError where the port is taken."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        raise FlowgenError(f"port {port} cannot be had ({error.strerror}): name another, or --port 0 for any that is free") from error
    listening.listen(WAITING)
    with listening:
        return make_server(HOST, port, Page(answers), threaded=True, request_handler=Handler, fd=listening.fileno())
