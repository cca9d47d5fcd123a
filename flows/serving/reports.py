"""Reports of runs as pages of `cropi serve`: ``http://127.0.0.1:PORT/reports/RUN``, read only.

A report may come from another person's root, and pages of this origin can read the server's password from the browser's
storage. So the report is never a page of this origin: a fixed page fetches it as text, with the password, and shows it
in a frame without an origin and without scripts. Without the password there is nothing to read.
"""

import asyncio
import base64
import hashlib
import re
import secrets
from collections.abc import Callable

from cropi_core.errors import CropiError

PATH = "/reports/"
CONTENT = "/content"
"""Ending of the address that answers with a report's text."""
SCRIPT = """
const say = text => { document.querySelector("p").textContent = text; };
fetch(location.pathname + "/content", {
  headers: {authorization: "Basic " + (localStorage.getItem("prefect-password") ?? "")}, cache: "no-store",
}).then(async answer => {
  const text = await answer.text();
  if (!answer.ok) return say(text);
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-downloads");
  frame.src = URL.createObjectURL(new Blob([text], {type: "text/html"}));
  document.body.replaceChildren(frame);
}, error => say(String(error)));
"""
PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>cropi report</title>
<style>html, body, iframe {{ margin: 0; border: 0; width: 100%; height: 100%; display: block }}</style></head>
<body><p>Loading the report.</p><script>{SCRIPT}</script></body></html>""".encode()
"""The page around a report; it is the same for every run."""
_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# A document of a `blob:` address has the policy of the page that made it, so styles and pictures are allowed here.
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-src blob:; base-uri 'none'; form-action 'none'"
)
RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}")
Headers = list[tuple[bytes, bytes]]
Read = Callable[[str], str | None]
"""Returns the text of a run's report, None if it has none."""


async def report_response(
    path: str, headers: Headers, password: str, read: Read
) -> tuple[int, bytes, bytes, Headers]:
    """Answer a request below :data:`PATH`: status, content type, body, further headers.

    Args:
        path: Path of the request.
        headers: Headers of the request.
        password: Password of the server, `user:password`.
        read: Reads a report.
    """
    name = path.removeprefix(PATH)
    run = name.removesuffix(CONTENT)
    if not RUN.fullmatch(run):
        return 404, b"text/plain", b"not the address of a report", []
    if run == name:
        return 200, b"text/html; charset=utf-8", PAGE, [(b"content-security-policy", POLICY.encode())]
    kind = b"text/plain; charset=utf-8"
    plain: Headers = [(b"x-content-type-options", b"nosniff"), (b"content-security-policy", b"sandbox")]
    if not has_password(headers, password):
        return (
            401,
            kind,
            b"Open the UI by the link that `cropi serve` prints, then open this page again.",
            plain,
        )
    try:
        text = await asyncio.to_thread(read, run)
    except (CropiError, OSError) as error:
        return 500, kind, f"the report of {run} cannot be read: {error}".encode(), plain
    if text is None:
        return 404, kind, f"{run} has no report; write it with: cropi report {run}".encode(), plain
    return 200, kind, text.encode(), plain


def has_password(headers: Headers, password: str) -> bool:
    """Return whether the request has the server's password."""
    given = [value for name, value in headers if name == b"authorization"]
    wanted = b"Basic " + base64.b64encode(password.encode())
    return len(given) == 1 and secrets.compare_digest(given[0], wanted)
