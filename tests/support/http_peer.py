"""What the HTTP servers of tests share: a handler that answers with bytes and is silent, and a server in a thread."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answering(BaseHTTPRequestHandler):
    """A handler that answers with a status and bytes, and writes no log."""

    def say(self, status: int, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A server whose errors are those of clients that have left."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def serving(handler: type[BaseHTTPRequestHandler]) -> Server:
    """Start a server on a free port of the loopback."""
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server
