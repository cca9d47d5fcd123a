"""Access control of a server that cropi starts: pages of its origin, and programs that know its password.

Prefect checks the password of every request to its API. This module adds the checks that Prefect lacks. A request must
name the server by its own address (`Host`), which prevents DNS rebinding. A request that a browser sends for a page
(`Origin`) must come from the server's own pages. No page may show the UI in a frame.

The UI reads the password from the browser's storage, which is separate for each origin, including the port. A cookie
would be sent to every port of 127.0.0.1, including servers of other users. :data:`ENTRANCE` is a page that stores the
password there. The password follows the `#` of the link, a part that browsers never send.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from flows.serving.reports import PATH, Read, report_response

PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"  # noqa: S105 - the name of a variable
CLIENT_PASSWORD = "PREFECT_API_AUTH_STRING"  # noqa: S105 - the name of a variable
ENTRANCE = "/enter"
PAGE = b"""<!doctype html><meta charset="utf-8"><title>cropi</title><script>
localStorage.setItem("prefect-password", btoa(decodeURIComponent(location.hash.slice(1))));
location.replace("/");
</script>"""
HEADERS = [(b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer")]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def server_password() -> str:
    """Return the password for a new server: the one in the environment, or a random one."""
    return os.environ.get(PASSWORD) or f"cropi:{secrets.token_urlsafe(24)}"


def entrance_link(url: str, password: str) -> str:
    """Return the link that opens the UI of the server at API address ``url``, with its password."""
    return f"{url.removesuffix('/api')}{ENTRANCE}#{password}"


def own_origins(port: int) -> list[str]:
    """Return the origins of the pages that a server on this port serves."""
    return [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost")]


def refusal(headers: list[tuple[bytes, bytes]], port: int) -> str | None:
    """Return the reason to refuse a request, or None to accept it."""
    origins = own_origins(port)
    hosts = {origin.removeprefix("http://") for origin in origins}
    if port == 80:  # browsers omit port 80
        hosts |= {"127.0.0.1", "localhost"}
        origins += ["http://127.0.0.1", "http://localhost"]
    named = [value.decode("latin-1").lower() for name, value in headers if name == b"host"]
    if len(named) != 1 or named[0] not in hosts:
        return "this server answers to its own address only"
    pages = [value.decode("latin-1").lower() for name, value in headers if name == b"origin"]
    if any(page not in origins for page in pages):
        return "this server answers to its own pages only"
    return None


def protected(app: Application, port: int, reports: Read | None = None) -> Application:
    """Return the application wrapped in the checks of this module.

    Args:
        app: Prefect's application.
        port: Port of the server.
        reports: Reads the report of a run; None serves no reports.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await app(scope, receive, send)
            return
        reason = refusal(scope["headers"], port)
        if reason is not None and scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        elif reason is not None:
            await _answer(send, 403, b"text/plain", reason.encode())
        elif scope["type"] == "websocket":
            await app(scope, receive, send)
        elif scope["path"] == ENTRANCE:
            await _answer(send, 200, b"text/html; charset=utf-8", PAGE)
        elif reports is not None and scope["path"].startswith(PATH) and scope["method"] in ("GET", "HEAD"):
            response = await report_response(scope["path"], scope["headers"], os.environ[PASSWORD], reports)
            await _answer(send, *response)
        else:
            await app(scope, receive, _unframed(send))

    return checked


def _unframed(send: Send) -> Send:
    async def framed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return framed


async def _answer(
    send: Send, status: int, kind: bytes, body: bytes, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    headers = [(b"content-type", kind), (b"cache-control", b"no-store"), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
