"""A local verification server that hangs, fails, lies, floods and redirects."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cropi_core.rewards import http as http_verifier
from cropi_core.rewards.cache import GradeCache
from cropi_core.rewards.verifier import Verifier
from data_schemas.grading import HttpVerifier

PROMPT = [{"role": "user", "content": "What?"}]


class Judge(BaseHTTPRequestHandler):
    """Behave as the completion requests."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen, what = self.server.seen, body["completion"]
        with self.server.lock:
            seen.append({"body": body, "headers": dict(self.headers), "path": self.path})
            attempt = sum(one["body"] == body for one in seen)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client closed the connection
            self.answer(what, body, attempt)

    def answer(self, what, body, attempt):
        if what == "hang":
            self.server.release.wait(30)
        elif what == "drip":
            self.send_response(200)
            self.end_headers()
            while not self.server.release.wait(0.05):
                self.wfile.write(b" ")
        elif what == "flood":
            self.send_response(200)
            self.end_headers()
            for _ in range(1 << 12):
                self.wfile.write(b" " * (1 << 14))
        elif what == "slow":
            with self.server.lock:
                self.server.now += 1
                self.server.most = max(self.server.most, self.server.now)
            time.sleep(0.2)
            with self.server.lock:
                self.server.now -= 1  # before the answer, after which the client sends the next request
            self.say(200, {"reward": 1})
        elif what == "redirect":
            self.send_response(307)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        elif what == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"rew')
        elif what == "zipped":
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(b"\x1f\x8b")
        elif what.startswith("busy"):
            self.say(200, {"reward": 0.75}) if attempt == 3 else self.say(503, {"error": "busy"})
        elif what.startswith("status"):
            self.say(int(what.split()[1]), {"reward": 1})
        elif what.startswith("raw"):
            self.say(200, what.removeprefix("raw ").encode())
        else:
            self.say(200, {"reward": float(what == body["answer"])})

    def say(self, status, body):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(monkeypatch):
    """Serve the judge, and let its clients try again after short pauses."""
    monkeypatch.setattr(http_verifier, "FIRST_PAUSE_S", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.daemon_threads = True
        server.seen, server.lock, server.release = [], threading.Lock(), threading.Event()
        server.now = server.most = 0
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def verifier(server, **changes):
    url = f"http://127.0.0.1:{server.server_address[1]}/grade"
    settings = {"url": url, "timeout_s": 1.0, "retries": 2, **changes}
    return Verifier(http={"judge": HttpVerifier.model_validate(settings)}, cache=GradeCache())
