"""vLLM servers that a step starts and ends: in the interpreter of vLLM, on a loopback port.

    with started(policy, settings, dtype="float32", max_model_len=256, logs=folder) as servers:
        servers[0].url, servers[0].key

The command is vLLM's server module with the arguments that the log-probabilities require. The server listens on the
loopback interface only and requires a random key. Its output is written to a log file that is kept; errors contain the
end of this log.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from cropi_core.errors import ServerError
from cropi_core.rollouts.vllm.interpreter import find_interpreter, is_cpu_build
from cropi_core.system import GRACE_S, free_port, guarded_command, kill_group
from data_schemas import Vllm

SERVED = "policy"
"""Name of the model on servers that are started here."""
MODULE = "vllm.entrypoints.openai.api_server"
CPU_CACHE_GB = "2"
LINE = 400
ERROR_LINES = 4
TAIL_LINES = 8
LOG_BYTES = 1 << 20
ERROR = re.compile(r"\b\w*(Error|Exception): |\berror: ")
STOP_S = GRACE_S + 10.0


class LocalServer:
    """A server process; :meth:`wait` until it answers, :meth:`stop` at the end.

    Attributes:
        url: Address, without ``/v1``.
        key: Bearer token that the server requires.
        log: File with the server's output.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], port: int, log: Path, key: str | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.key = key or secrets.token_urlsafe(24)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                guarded_command([*command, "--host", "127.0.0.1", "--port", str(port)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                # In the environment, because every user of the machine can read the arguments.
                env=environment | {"VLLM_API_KEY": self.key},
                start_new_session=True,
            )
        assert self.process.stdout is not None
        self.group = int(self.process.stdout.readline() or b"0")

    @property
    def exit_status(self) -> int | None:
        """The exit status; None while the server runs."""
        return self.process.poll()

    def wait(self, deadline: float) -> None:
        """Wait until the server answers.

        Args:
            deadline: Time of the monotonic clock.

        Raises:
            ServerError: The server ended or did not answer in time; the message contains the end of its log.
        """
        while (status := self.exit_status) is None:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"vLLM's server did not answer at {self.url} in time. Raise runtime.vllm.start_timeout_s, or look "
                    f"for the cause in its log: {self.tail()}"
                )
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise ServerError(f"vLLM's server ended while it started (exit {status}): {self.tail()}")

    def stop(self) -> None:
        """End the server and all its child processes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.group:  # in case the guard was killed before it ended the group
            kill_group(self.group, signal.SIGKILL)

    def tail(self) -> str:
        """Quote the log: the last errors, and the last lines, which are often consequences of an error."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - LOG_BYTES))
            text = stream.read().decode(errors="replace")
        lines = [line.rstrip()[:LINE] for line in text.splitlines() if line.strip()]
        errors = [line for line in lines[:-TAIL_LINES] if ERROR.search(line)]
        shown = [*list(dict.fromkeys(errors))[-ERROR_LINES:], *lines[-TAIL_LINES:]]
        return f"{self.log} ends with:\n  " + "\n  ".join(shown or ["(empty)"])


def command_line(
    python: str, policy: Path, settings: Vllm, dtype: str, max_model_len: int, *, cpu: bool = False
) -> list[str]:
    """Return the command of a server without host and port; ``cpu`` for the CPU build of vLLM."""
    arguments = {
        "--model": str(policy),
        "--served-model-name": SERVED,
        "--dtype": dtype,
        "--logprobs-mode": "processed_logprobs",  # those after temperature and top-p
        "--generation-config": "vllm",  # ignores penalties and filters of the checkpoint
        "--load-format": "safetensors",  # never a pickle
    }
    configured = {argument.partition("=")[0].replace("_", "-") for argument in settings.arguments}
    if "--max-model-len" not in configured:
        arguments["--max-model-len"] = str(max_model_len)
    command = [python, "-m", MODULE, *[part for pair in arguments.items() for part in pair]]
    if cpu and not configured & {"--enable-chunked-prefill", "--no-enable-chunked-prefill"}:
        # vLLM 0.32 on a CPU ends with "CPU Generator does not use offset" if it reads the prompt of a request with a
        # seed in two steps (_bookkeeping_sync in v1/worker/gpu_model_runner.py).
        command.append("--no-enable-chunked-prefill")
    return [*command, *settings.arguments]


def environment_of(settings: Vllm, index: int, *, cpu: bool = False) -> dict[str, str]:
    """Return a server's environment: that of this process without network and telemetry, its GPUs, user settings."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment["PYTHONSAFEPATH"] = "1"  # does not import a vllm.py of the working directory
    if cpu:
        # By default, vLLM 0.32 requires 92 % of the machine's memory for its cache.
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GB)
        if "--enforce-eager" in settings.arguments:
            # The option does not apply to functions of the sampler; compiling them takes 20 s of every start.
            environment.setdefault("TORCH_COMPILE_DISABLE", "1")
    if settings.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = settings.gpus[index]
    return environment | settings.environment


@contextlib.contextmanager
def started(
    policy: Path, settings: Vllm, *, dtype: str, max_model_len: int, logs: Path
) -> Iterator[list[LocalServer]]:
    """Start ``settings.servers`` servers of a checkpoint; end them with the context.

    Args:
        policy: Checkpoint directory.
        settings: Interpreter, arguments and deadline.
        dtype: Type of the weights.
        max_model_len: Tokens of the longest prompt with its completion.
        logs: Directory of ``server-N.log``; logs of an earlier start are overwritten.

    Raises:
        ConfigError: There is no interpreter with vLLM.
        ServerError: A server ended or did not answer in time.
    """
    python = find_interpreter(settings.python)
    cpu = is_cpu_build(python)
    command = command_line(str(python), policy, settings, dtype, max_model_len, cpu=cpu)
    servers: list[LocalServer] = []
    try:
        deadline = time.monotonic() + settings.start_timeout_s
        for index in range(settings.servers):
            log = logs / f"server-{index}.log"
            servers.append(LocalServer(command, environment_of(settings, index, cpu=cpu), free_port(), log))
        for server in servers:
            server.wait(deadline)
        yield servers
    finally:
        for server in servers:
            with contextlib.suppress(BrokenPipeError):
                server.stop()
