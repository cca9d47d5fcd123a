"""Servers with vLLM's protocol that sample from real policies with cropi's sampler, and may change their weights."""

import json
import threading
from http.server import BaseHTTPRequestHandler

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cropi_core.rollouts.sampling import sample_completions
from data_schemas import Sampling
from tests.support.http_peer import Answering, serving

ONE = threading.Lock()
"""Torch samples for one request at a time."""


class PolicyPeer:
    """A server of a policy; from request ``since`` on, of another one.

    Args:
        policy: The policy that it serves.
        tokenizer: The tokenizer of both.
        other: The weights that it serves later, without a word about it.
        since: Number of requests before it does.
        fails: Whether it answers one request with an error in between, as while it is started again.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        other: PreTrainedModel | None = None,
        since: int = 0,
        *,
        fails: bool = False,
    ) -> None:
        self.policy, self.tokenizer, self.other = policy, tokenizer, other
        self.since, self.fails = since, fails
        self.asked, self.sampled = 0, 0
        peer = self

        class Handler(Answering, BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with ONE:
                    peer.asked += 1
                    if peer.fails and peer.asked == peer.since + 1:
                        self.say(503, b"{}")
                    else:
                        self.say(200, json.dumps(peer.answer(body)).encode())

            def do_GET(self):
                self.say(200, b"{}")

        self.server = serving(Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def changed(self) -> bool:
        """Whether it serves the other weights now."""
        return self.other is not None and self.asked > self.since

    def answer(self, body: dict) -> dict:
        model = self.other if self.other is not None and self.changed else self.policy
        self.sampled += self.changed
        sampling = Sampling(
            samples=body["n"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            max_new_tokens=body["max_tokens"],
        )
        [group] = sample_completions(
            model, self.tokenizer, [("p", body["prompt"])], sampling, seed=body["seed"], rows=64
        )
        return {
            "choices": [
                {
                    "index": index,
                    "prompt_token_ids": body["prompt"],
                    "token_ids": one.ids,
                    "logprobs": {"token_logprobs": one.logprobs},
                    "finish_reason": one.finish_reason,
                }
                for index, one in enumerate(group)
            ]
        }

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
