"""The WSGI application and the local HTTP server of `flowgen explore`."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.types import WSGIApplication

from werkzeug.exceptions import BadRequest, Forbidden, HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from flowgen.serving.session import ModelSession
from flowgen.serving.web.api import ENDPOINTS
from flowgen.utils.console import log, user_message
from flowgen.utils.errors import UserError
from flowgen.utils.html import STYLESHEET

HOST = "127.0.0.1"
STATIC_FOLDER = Path(__file__).parent / "static"
STATIC_FILES = {  # URL path: file, media type
    "/": (STATIC_FOLDER / "explore.html", "text/html"),
    "/explore.js": (STATIC_FOLDER / "explore.js", "text/javascript"),
    "/explore.css": (STATIC_FOLDER / "explore.css", "text/css"),
    "/page.css": (STYLESHEET, "text/css"),
}
URLS = Map(
    [
        *(Rule(path, endpoint=path, methods=["GET"]) for path in STATIC_FILES),
        *(Rule(f"/api/{name}", endpoint=name, methods=["POST"]) for name in ENDPOINTS),
    ],
    merge_slashes=False,
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LocalhostRequest(Request):
    """A request that must name this machine as its host and has a limited size.

    The check of the host prevents DNS rebinding.
    """

    trusted_hosts = ("127.0.0.1", "localhost")  # type: ignore[assignment]
    max_content_length = 8 * 2**20  # bytes


def make_app(session: ModelSession) -> WSGIApplication:
    """Return the WSGI application that serves the page's files and the JSON endpoints.

    `GET` returns a static file. `POST /api/NAME` with a JSON object calls an endpoint of
    `flowgen.serving.web.api`. Endpoints only accept requests of the page itself: requests of other
    sites in the same browser have another Origin header. A failed request gets an HTTP error status
    and a JSON object with the message as `error`.
    """

    @LocalhostRequest.application
    def respond(request: Request) -> Response:
        try:
            host = request.host  # raises SecurityError for other hosts
            endpoint, _ = URLS.bind_to_environ(request).match()
            if endpoint in STATIC_FILES:
                path, media_type = STATIC_FILES[endpoint]
                return Response(path.read_bytes(), mimetype=media_type, headers=HEADERS)
            if request.headers.get("Origin") != f"http://{host}":
                raise Forbidden("only the page itself may send requests")
            payload = request.get_json()
            if not isinstance(payload, dict):
                raise BadRequest("the request must be a JSON object")
            return _json_response(ENDPOINTS[endpoint](session, payload))
        except HTTPException as error:
            return _json_response({"error": error.description}, error.code or 500)
        except UserError as error:
            return _json_response({"error": str(error)}, 400)
        except RecursionError:
            return _json_response({"error": "the request is nested too deeply"}, 400)
        except Exception as error:
            message = user_message(error)
            log.error("%s", message)
            return _json_response({"error": message}, 500)

    return respond


def _json_response(content: dict[str, Any], status: int = 200) -> Response:
    return Response(
        json.dumps(content, allow_nan=False), status, HEADERS, mimetype="application/json"
    )


class Handler(WSGIRequestHandler):
    """A request handler with a timeout that does not log requests."""

    timeout = 60  # seconds

    def log(self, type: str, message: str, *args: Any) -> None:
        """Log nothing."""


def explore(*, run: str | None, port: int, device: str, echo: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        run: A run, a model file or a Hub name. None means the newest run.
        port: TCP port. 0 means any free port.
        device: "auto", "cpu" or "cuda".
        echo: Prints the address of the page.
    """
    session = ModelSession(run, device)
    with open_server(session, port) as server:
        threading.Thread(target=session.score_validation_images, daemon=True).start()
        echo(f"serving {session.name} at http://{HOST}:{server.port}/ until Ctrl-C")
        server.serve_forever()  # returns on KeyboardInterrupt
    os._exit(0)  # a regular exit aborts the interpreter if torch still computes in another thread


def open_server(session: ModelSession, port: int) -> BaseWSGIServer:
    """Return a server that is bound to the port but does not serve yet.

    Raises:
        UserError: If the port is not available.
    """
    # werkzeug would end the process if the port was taken, so bind the socket here.
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(
            f"port {port} is unavailable ({os.strerror(error.errno or 0)}): choose another port, "
            "or --port 0 for any free port"
        ) from error
    with listener:
        return make_server(
            HOST,
            port,
            make_app(session),
            threaded=True,
            request_handler=Handler,
            fd=listener.fileno(),
        )
