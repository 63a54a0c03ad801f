"""The page's files and its questions, over HTTP: who may ask, how much, and what they get."""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    MethodNotAllowed,
    NotFound,
    UnsupportedMediaType,
)
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from flowgen.serving.session import ModelSession, exit_process
from flowgen.serving.web.api import ENDPOINTS
from flowgen.utils.console import user_message
from flowgen.utils.errors import UserError

STATIC = Path(__file__).parent / "static"
FILES = {
    "/": ("explore.html", "text/html"),
    "/explore.js": ("explore.js", "text/javascript"),
    "/explore.css": ("explore.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
log = logging.getLogger("flowgen")


class LocalhostRequest(Request):
    """What a browser on this machine may send: to this host by name, against DNS rebinding, and not more than it needs."""

    trusted_hosts = ("127.0.0.1", "localhost")  # type: ignore[assignment]
    max_content_length = 8 * 2**20


class ExplorerApp:
    """A WSGI application: GET for the files, which are read once, and POST /ask/NAME with a JSON object for the `QUESTIONS`.

    Only the page itself may ask: another site that the browser has open sends its own Origin. Wrong requests get their status and a
    JSON object with one sentence as its `error`.
    """

    def __init__(self, answers: ModelSession):
        self.answers = answers
        self.files = {
            path: ((STATIC / name).read_bytes(), kind) for path, (name, kind) in FILES.items()
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.respond(LocalhostRequest(environ))(environ, start_response)

    def respond(self, request: LocalhostRequest) -> Response:
        try:
            host = request.host  # raises where it is foreign
            if request.path in self.files:
                if request.method not in ("GET", "HEAD"):
                    raise MethodNotAllowed(["GET", "HEAD"])
                content, kind = self.files[request.path]
                return Response(content, mimetype=kind, headers=HEADERS)
            return _json(self._answer(request, host))
        except HTTPException as error:
            return _json({"error": error.description}, error.code or 500)
        except UserError as error:
            return _json({"error": str(error)}, 400)
        except Exception as error:
            log.error("%s", user_message(error))
            return _json({"error": user_message(error)}, 500)

    def _answer(self, request: LocalhostRequest, host: str) -> dict[str, Any]:
        _, _, name = request.path.partition("/ask/")
        if request.path != f"/ask/{name}" or name not in ENDPOINTS:
            raise NotFound("there is nothing here")
        if request.method != "POST":
            raise MethodNotAllowed(["POST"])
        if request.headers.get("Origin") != f"http://{host}":
            raise Forbidden("only the page itself may ask")
        if request.mimetype != "application/json":
            raise UnsupportedMediaType("a question is JSON")
        try:
            payload = json.loads(request.get_data(cache=False))
        except (ValueError, RecursionError) as error:
            raise BadRequest("the question is no JSON") from error
        if not isinstance(payload, dict):
            raise BadRequest("a question is one JSON object")
        return ENDPOINTS[name](self.answers, payload)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(
        json.dumps(content, allow_nan=False), status, HEADERS, mimetype="application/json"
    )


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
    answers = ModelSession(name, device)
    with open_server(answers, port) as server:
        threading.Thread(target=answers.score_validation_images, daemon=True).start()
        say(f"{answers.name} at http://{HOST}:{server.port}/ until Ctrl-C")
        server.serve_forever()  # which takes an interrupt for its end
    exit_process()


def open_server(answers: ModelSession, port: int) -> BaseWSGIServer:
    """Bound, not yet serving; port 0 is any that is free. Raises FlowgenError where the port is taken."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be had ({error.strerror}): name another, or --port 0 for any that is free"
        ) from error
    listening.listen(WAITING)
    with listening:
        return make_server(
            HOST,
            port,
            ExplorerApp(answers),
            threaded=True,
            request_handler=Handler,
            fd=listening.fileno(),
        )
