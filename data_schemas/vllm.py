"""The section ``runtime.vllm``: vLLM servers that sample completions, and contradictions between their settings."""

from typing import Annotated

from pydantic import Field, model_validator

from data_schemas.section import ADVANCED, Section

RESERVED = (
    "--model",
    "--served-model-name",
    "--dtype",
    "--host",
    "--port",
    "--uds",
    "--api-key",
    "--logprobs-mode",
    "--generation-config",
    "--load-format",
    "--trust-remote-code",
)
"""Arguments that are set for every started server; users cannot set them."""


class Vllm(Section):
    """vLLM servers for `rollouts.engine` and `evaluation.engine`; not part of artifact keys."""

    base_urls: list[Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$")]] = Field(
        default_factory=list,
        description="Servers that run, `http://host:8000/v1`; empty: they are started for the time of a step.",
    )
    model: Annotated[str | None, ADVANCED] = Field(
        default=None, description="`base_urls`: name of the served model; empty: the only one."
    )
    python: str | None = Field(
        default=None,
        description="Interpreter with vLLM; empty: `CROPI_VLLM_PYTHON`, else `.venv-vllm` of the checkout.",
    )
    servers: int = Field(default=1, ge=1, le=256, description="Servers to start.")
    gpus: list[str] = Field(
        default_factory=list,
        description="`CUDA_VISIBLE_DEVICES` of each server; empty: that of this process.",
    )
    arguments: list[str] = Field(
        default_factory=list, description="More arguments of each server, such as `--max-num-seqs=512`."
    )
    environment: Annotated[dict[str, str], ADVANCED] = Field(
        default_factory=dict, description="More environment variables of each server; no secrets."
    )
    start_timeout_s: Annotated[float, ADVANCED] = Field(
        default=900.0, gt=0, description="A server must answer within this."
    )
    request_timeout_s: Annotated[float, ADVANCED] = Field(
        default=600.0, gt=0, description="A request must be answered within."
    )
    recovery_s: Annotated[float, ADVANCED] = Field(
        default=30.0, ge=0, description="A server that fails is taken out when it is not healthy within this."
    )
    retries: Annotated[int, ADVANCED] = Field(
        default=4, ge=0, le=100, description="Of one request, on any server."
    )
    concurrency: Annotated[int, ADVANCED] = Field(
        default=64, ge=1, le=4096, description="Requests in flight a server; each is a prompt, all samples."
    )
    parity_completions: Annotated[int, ADVANCED] = Field(
        default=8, ge=1, description="Completions a shard that are compared with cropi's own forward pass."
    )
    parity_device: Annotated[str, ADVANCED] = Field(
        default="cpu", description="Where that forward runs; the GPUs are the servers'."
    )
    max_mean_difference: Annotated[float | None, ADVANCED] = Field(
        default=None,
        gt=0,
        description="Largest mean |Δ log-probability| of a shard, beyond it the step stops; "
        "empty: 0.001 in float32, 0.1 in bfloat16.",
    )
    max_difference: Annotated[float | None, ADVANCED] = Field(
        default=None,
        gt=0,
        description="Largest |Δ log-probability| of a token, beyond it the run notes a warning; "
        "empty: 0.02 in float32, 1.0 in bfloat16.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Vllm":
        if faults := self._contradictions():
            raise ValueError("; ".join(faults))
        return self

    def _contradictions(self) -> list[str]:
        """List contradictory settings, each with the values and what to change."""
        faults = []
        reserved = [a for a in self.arguments if a.partition("=")[0].replace("_", "-") in RESERVED]
        if reserved:
            faults.append(
                f"arguments holds {', '.join(reserved)}: cropi gives these itself, from the policy and the "
                "sampling; drop them"
            )
        if self.gpus and len(self.gpus) != self.servers:
            faults.append(
                f"gpus names {len(self.gpus)} sets of GPUs for servers={self.servers}; give one a server"
            )
        if len(set(self.base_urls)) != len(self.base_urls):
            faults.append(f"base_urls names a server twice: {self.base_urls}")
        if self.base_urls:
            starting = ("python", "servers", "gpus", "arguments", "environment")
            fields = type(self).model_fields
            changed = [
                n for n in starting if getattr(self, n) != fields[n].get_default(call_default_factory=True)
            ]
            if changed:
                faults.append(
                    f"{changed[0]} is for servers that are started; with base_urls they run "
                    "already: drop one of the two"
                )
        elif self.model is not None:
            faults.append(
                f"model={self.model} is for base_urls; a server that is started serves the step's policy"
            )
        return faults
