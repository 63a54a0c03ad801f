"""The page's files and its questions, over HTTP: who may ask, how much, and what they get."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, MethodNotAllowed, NotFound, UnsupportedMediaType
from werkzeug.wrappers import Request, Response

from flowgen.answers import Answers
from flowgen.errors import FlowgenError
from flowgen.messages import one_sentence
from flowgen.page.questions import QUESTIONS

STATIC = Path(__file__).parent / "static"
FILES = {"/": ("explore.html", "text/html"), "/explore.js": ("explore.js", "text/javascript"), "/explore.css": ("explore.css", "text/css")}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
log = logging.getLogger("flowgen")


class Local(Request):
    """What a browser on this machine may send: to this host by name, against DNS rebinding, and not more than it needs."""

    trusted_hosts = ("127.0.0.1", "localhost")  # type: ignore[assignment]
    max_content_length = 8 * 2**20


class Page:
    """A WSGI application: GET for the files, which are read once, and POST /ask/NAME with a JSON object for the `QUESTIONS`.

    Only the page itself may ask: another site that the browser has open sends its own Origin. Wrong requests get their status and a
    JSON object with one sentence as its `error`.
    """

    def __init__(self, answers: Answers):
        self.answers = answers
        self.files = {path: ((STATIC / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.respond(Local(environ))(environ, start_response)

    def respond(self, request: Local) -> Response:
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
        except FlowgenError as error:
            return _json({"error": str(error)}, 400)
        except Exception as error:
            log.error("%s", one_sentence(error))
            return _json({"error": one_sentence(error)}, 500)

    def _answer(self, request: Local, host: str) -> dict[str, Any]:
        _, _, name = request.path.partition("/ask/")
        if request.path != f"/ask/{name}" or name not in QUESTIONS:
            raise NotFound("there is nothing here")
        if request.method != "POST":
            raise MethodNotAllowed(["POST"])
        if request.headers.get("Origin") != f"http://{host}":
            raise Forbidden("only the page itself may ask")
        if request.mimetype != "application/json":
            raise UnsupportedMediaType("a question is JSON")
        try:
            asked = json.loads(request.get_data(cache=False))
        except (ValueError, RecursionError) as error:
            raise BadRequest("the question is no JSON") from error
        if not isinstance(asked, dict):
            raise BadRequest("a question is one JSON object")
        return QUESTIONS[name](self.answers, asked)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, HEADERS, mimetype="application/json")
