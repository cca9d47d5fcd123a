"""Servers of vLLM that hang, answer garbage, die while they answer, or serve another model.

A case has one to four HTTP servers that behave well until a random request, and from then on in one of the ways of
:data:`WAYS`. In four of five cases one of them behaves well to the end; then every job must be delivered once, with the
completions that belong to its prompt and seed. Otherwise the run must end with one error that names a server. A case
must end in time.

    python -m tests.campaigns.servers --count 300 --root /data/servers
"""

import contextlib
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from cropi_core.errors import CropiError
from cropi_core.rollouts.vllm.client import Job, Vocabulary
from cropi_core.rollouts.vllm.fleet import Endpoint, Fleet
from data_schemas import Sampling, Vllm
from tests.campaigns.ledger import Case, main
from tests.support.http_peer import Answering, serving

SAMPLING = Sampling(samples=2, max_new_tokens=3)
VOCABULARY = Vocabulary(100, 100, (2,))
SETTINGS = Vllm(recovery_s=0.2, request_timeout_s=2.0, retries=6, concurrency=4)
JOBS = 24
LONGEST = 90.0
"""Seconds of a case, at most: pauses between retries double up to 8 s."""
UNHEALTHY = ("dies", "dies while it answers", "is unhealthy")
WAYS = (
    "hangs", "drips", "answers bytes", "answers other JSON", "answers for another prompt", "answers too few",
    "answers NaN", "answers logits", "answers without end", "cuts its answer", "serves another model", "wants a key",
    "redirects", "gives up requests", "fails", "answers unknown tokens", *UNHEALTHY,
)  # fmt: skip


def choice(index: int, job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the completion of a sample: its tokens follow from prompt and seed."""
    ids = [3 + (job["seed"] + index) % 50, 3 + sum(job["prompt"]) % 50, 2]
    told = {"token_logprobs": [-0.5, -1.0, -0.25]}
    whole = {"index": index, "prompt_token_ids": job["prompt"], "token_ids": ids, "logprobs": told}
    return whole | {"finish_reason": "stop"} | changes


def wrong(way: str, body: dict[str, Any], draw: random.Random) -> tuple[int, bytes]:
    """Return status and content of an answer that must not be used."""
    match way:
        case "serves another model":
            return 404, b'{"error": {"message": "The model does not exist"}}'
        case "wants a key":
            return 401, b'{"error": "Unauthorized"}'
        case "fails":
            return 500, b'{"error": {"message": "out of memory"}}'
        case "answers bytes":
            return 200, draw.randbytes(draw.randrange(200))
        case "answers other JSON":
            return 200, draw.choice(
                [b"{}", b"[]", b"null", b'{"choices": []}', b'{"choices": [1, 2]}', b"[" * 5000]
            )
    changes: dict[str, dict[str, Any]] = {
        "answers for another prompt": {"prompt_token_ids": [*body["prompt"], 9]},
        "answers NaN": {"logprobs": {"token_logprobs": [-0.5, float("nan"), -1.0]}},
        "answers logits": {"logprobs": {"token_logprobs": [-0.5, 7.25, -1.0]}},
        "gives up requests": {"finish_reason": "abort"},
        "answers unknown tokens": {"token_ids": [3, 1000, 2]},
    }
    choices = [choice(0, body), choice(1, body, **changes.get(way, {}))]
    return 200, json.dumps({"choices": choices[: 1 if way == "answers too few" else 2]}).encode()


class Peer:
    """A server that behaves in a way from a request on; ``way`` None for one that behaves well."""

    def __init__(self, way: str | None, since: int, seed: str) -> None:
        self.way, self.since, self.draw, self.asked = way, since, random.Random(seed), 0
        self.lock, self.release = threading.Lock(), threading.Event()
        peer = self

        class Handler(Answering, BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with peer.lock:
                    peer.asked += 1
                    way = peer.way if peer.asked > peer.since else None
                with contextlib.suppress(OSError):
                    self.behave(way, body)

            def do_GET(self):
                bad = peer.way in UNHEALTHY and peer.asked > peer.since
                if bad and peer.way != "is unhealthy":
                    self.close_connection = True
                    return self.connection.close()
                return self.say(503 if bad else 200, b"")

            def behave(self, way, body):
                if way is None:
                    self.say(200, json.dumps({"choices": [choice(1, body), choice(0, body)]}).encode())
                elif way == "hangs":
                    peer.release.wait(30)
                elif way in ("drips", "answers without end"):
                    self.send_response(200)
                    self.end_headers()
                    piece, pause = (b" ", 0.1) if way == "drips" else (b"[" * (1 << 18), 0.0)
                    while not peer.release.wait(pause):
                        self.wfile.write(piece)
                elif way in ("cuts its answer", "dies while it answers"):
                    self.send_response(200)
                    self.send_header("content-length", "4000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [{"index": 0, "token_ids": [')
                elif way == "dies":
                    self.connection.close()
                elif way == "redirects":
                    self.send_response(307)
                    self.send_header("location", "/elsewhere")
                    self.send_header("content-length", "0")
                    self.end_headers()
                elif way == "is unhealthy":
                    self.say(503, b"")
                else:
                    self.say(*wrong(way, body, peer.draw))

        self.server = serving(Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def server_case(number: int) -> dict[str, Any]:
    """Sample by servers of which some misbehave."""
    draw = random.Random(f"servers-{number}")
    ways: list[str | None] = [draw.choice(WAYS) for _ in range(draw.randint(1, 3))]
    ways += [] if number % 5 == 4 else [None]
    draw.shuffle(ways)
    peers = [Peer(way, draw.randrange(8), f"{number}-{i}") for i, way in enumerate(ways)]
    jobs = [Job(i, f"p{i}", [1, 5 + i], 1000 * number + i) for i in range(JOBS)]
    seen: dict[int, list[Any]] = {}
    faults, error, begin = [], "", time.monotonic()
    try:
        with Fleet([Endpoint(p.url, "policy") for p in peers], SETTINGS, SAMPLING, VOCABULARY) as fleet:
            for job, completions, _ in fleet.run(jobs):
                faults += [f"job {job.index} came twice"] if job.index in seen else []
                seen[job.index] = completions
    except CropiError as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        for peer in peers:
            peer.stop()
    seconds = time.monotonic() - begin
    for job in jobs:
        body = {"seed": job.seed, "prompt": job.prompt}
        right = [choice(i, body)["token_ids"] for i in range(2)]
        if job.index in seen and [one.ids for one in seen[job.index]] != right:
            faults.append(f"job {job.index} has {seen[job.index]}")
    faults += [f"it took {seconds:.0f} s"] if seconds > LONGEST else []
    complete = len(seen) == JOBS
    if None in ways and not complete:
        faults.append(f"{len(seen)} of {JOBS} jobs although one server behaved well")
    if not complete and not any(peer.url in error for peer in peers):
        faults.append("no error names a server")
    found = "complete" if complete else "an error names it"
    return {"ok": not faults, "found": found, "ways": ways, "faults": faults[:5], "error": error[:400]}


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases."""
    for number in range(count):
        yield f"servers:{number}", lambda n=number: server_case(n)


if __name__ == "__main__":
    sys.exit(main("misbehaving vLLM servers", 300, campaign))
