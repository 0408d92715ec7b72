"""The page of a review and what it asks for, on 127.0.0.1 alone.

Who may ask: whoever has the token, which stands in the address behind `#` and so is never sent, logged or told to another page.
Requests carry it in a header. The Origin of each must be this very address, so that no other page of the browser can write; a
Host that is no loopback name is refused, so that no other name can lead here.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlm.data.augment.text import needed
from fastlm.data.errors import InputError
from fastlm.data.review.store import LONGEST, NAME, Conflict, Judgement, Store

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
TOKEN = "X-Fastlm-Token"
FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
         "/page.js": ("page.js", "text/javascript")}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
BATCH = 20  # the most items that a window holds at once


def app(store: Store) -> Any:
    """The WSGI application (Flask)."""
    flask = needed("flask", "the page of a review", "review")
    made = flask.Flask(__name__, static_folder=None)
    made.config["MAX_CONTENT_LENGTH"] = 8 * LONGEST
    token = store.meta("token")
    place = Path(__file__).parent

    @made.before_request
    def allowed() -> Any:
        request = flask.request
        if request.host.rpartition(":")[0] not in NAMES and request.host not in NAMES:
            return {"error": "this page is served to this machine alone"}, 403
        if request.path not in FILES:
            if request.headers.get("Origin") != f"http://{request.host}":
                return {"error": "another page may not ask here"}, 403
            if not hmac.compare_digest(request.headers.get(TOKEN, "").encode(), token.encode()):
                return {
                    "error": "the address lacks the token, or has an old one: open the one that the terminal shows"
                }, 403
        return None

    @made.after_request
    def guarded(response: Any) -> Any:
        response.headers.update(HEADERS)
        return response

    @made.errorhandler(InputError)
    def refused(error: InputError) -> Any:
        return {"error": str(error)}, 507 if isinstance(error.__cause__, Exception) else 400

    @made.errorhandler(Conflict)
    def twice(error: Conflict) -> Any:
        return {"error": str(error)}, 409

    for path, (name, kind) in FILES.items():
        content = (place / name).read_text(encoding="utf-8")
        made.add_url_rule(path, kind, lambda c=content, k=kind: flask.Response(c, mimetype=k))

    def asked() -> tuple[dict[str, Any], str, str]:
        """The request's body, the reviewer and the window."""
        body = flask.request.get_json(silent=True)
        if not isinstance(body, dict):
            raise InputError("a request is an object in JSON")
        return body, _name(body), _text(body, "window")

    @made.post("/api/next")
    def following() -> Any:
        body, who, window = asked()
        have = body.get("have", [])
        if not isinstance(have, list) or not all(isinstance(one, int) for one in have):
            raise InputError("have must be a list of numbers")
        count = min(max(_whole(body, "count"), 0), BATCH)
        found = store.next(who, window, have, count)
        about = {"id": store.meta("id"), "title": store.meta("source"), "labels": store.labels}
        return {"items": found, "about": about, "progress": store.progress(who)}

    @made.post("/api/judge")
    def judging() -> Any:
        body, who, _ = asked()
        label, better = (None if body.get(name) is None else _text(body, name) for name in ("label", "better"))
        store.judge(who, _text(body, "request"), _whole(body, "item"), Judgement(label, _whole(body, "thumb"), better))
        return {"progress": store.progress(who)}

    @made.post("/api/undo")
    def undoing() -> Any:
        body, who, window = asked()
        item = None if body.get("item") is None else _whole(body, "item")
        found = store.undo(who, window, _text(body, "request"), item)
        return {"item": found, "progress": store.progress(who)}

    return made


def _name(body: dict[str, Any]) -> str:
    who = " ".join(_text(body, "reviewer").split())
    if not who or len(who) > NAME or not who.isprintable():
        raise InputError(f"a name has 1 to {NAME} characters")
    return who


def _text(body: dict[str, Any], key: str) -> str:
    found = body.get(key)
    if not isinstance(found, str):
        raise InputError(f"{key} must be a text")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise InputError(f"{key} holds half of a pair of surrogates, which is no text") from None
    return found


def _whole(body: dict[str, Any], key: str) -> int:
    found = body.get(key, 0)
    if isinstance(found, bool) or not isinstance(found, int) or abs(found) >= 2**63:
        raise InputError(f"{key} must be a whole number")
    return found


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket on 127.0.0.1 at the port (0: one that is free). Raises InputError where another program has it."""
    own = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # again at once after a kill
        try:
            own.bind((HOST, port))
            own.listen(64)
        except OSError as error:
            raise InputError(
                f"--port {port} cannot be had on this machine ({error.strerror}): another review may run there; give another"
            ) from None
        yield own
    finally:
        own.close()


def serve(store: Store, own: socket.socket) -> None:
    """Answer until the process is interrupted (Ctrl-C), then return. A request has a thread of its own."""
    serving = needed("werkzeug.serving", "the page of a review", "review")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = serving.make_server(HOST, own.getsockname()[1], app(store), threaded=True, fd=own.fileno())
    server.daemon_threads = True  # one that waits for a browser holds nothing up at the end
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
