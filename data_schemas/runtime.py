"""The section `runtime`: execution settings, which change speed and placement, not results."""

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.section import ADVANCED, Section
from data_schemas.trl import TrlRuntime
from data_schemas.vllm import Vllm


class Ray(Section):
    """Gradient shards on a Ray cluster, through Prefect; not part of artifact keys."""

    address: str | None = Field(
        default=None,
        pattern=r"^ray://[^\s/:]+:\d{1,5}$",
        description="`ray://host:10001` of a cluster; empty: one on this machine, for the time of the step.",
    )
    workers: int = Field(default=2, ge=1, description="Shards at once; as many as the cluster has room for.")
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="Empty: one where the cluster has any and `device` is not `cpu`."
    )


class Launch(Section):
    """Training processes started with ``accelerate launch``."""

    processes: int = Field(default=1, ge=1, le=4096, description="On all machines together: one a GPU.")
    machines: Annotated[tuple[str, ...], ADVANCED] = Field(
        default=(),
        description="Further machines: for each, the command that runs its arguments there, such as `ssh node2`.",
    )
    address: Annotated[str | None, ADVANCED] = Field(
        default=None,
        pattern=r"^[A-Za-z0-9.:_-]+$",
        description="`machines`: name or address of this machine, which the others reach.",
    )
    config: str | None = Field(
        default=None,
        description="A file of `accelerate config` (FSDP, DeepSpeed); empty: data parallel, or `sharded`.",
    )
    sharded: bool = Field(
        default=False,
        description="Weights, gradients and moments in shards over the processes (FSDP 2); needs no `config`.",
    )


class Runtime(Section):
    """Execution settings, not part of artifact keys: they change speed and placement, not results beyond rounding."""

    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, …")
    attention: Annotated[Literal["sdpa", "eager", "flash_attention_2"], ADVANCED] = Field(
        default="sdpa",
        description="Attention of transformers in sampling and training; gradients use their own. "
        "`flash_attention_2` needs the package flash-attn and `policy.dtype: bfloat16`.",
    )
    tf32: Annotated[bool, ADVANCED] = Field(
        default=False,
        description="Float32 products on the GPU with operands of 10 bits: faster, with a relative error of 1e-4.",
    )
    expandable_segments: Annotated[bool, ADVANCED] = Field(
        default=False,
        description="GPU memory in segments that grow: less is lost to fragments where lengths vary.",
    )
    threads: Annotated[int | None, ADVANCED] = Field(
        default=None, ge=1, description="Torch threads; default: as torch chooses."
    )
    mode: Annotated[Literal["in_process", "subprocess"], ADVANCED] = Field(
        default="in_process",
        description="Compute steps in the process of the run, or each in a separate process.",
    )
    python: Annotated[dict[str, str], ADVANCED] = Field(
        default_factory=dict, description="`subprocess`: interpreter by step."
    )
    deadline_s: Annotated[float | None, ADVANCED] = Field(
        default=None, gt=0, description="`subprocess`: a step is stopped after this."
    )
    generation_rows: int = Field(default=256, ge=1, description="Sequences generated together.")
    token_budget: int = Field(
        default=8192,
        ge=1,
        description="Tokens of one gradient pass; halved when memory runs out, until some passes have succeeded. A "
        "longer completion is read alone, and its activations are computed twice instead of kept.",
    )
    workers: int = Field(
        default=1, ge=1, description="Processes computing gradient shards; each takes one GPU."
    )
    ray: Ray | None = Field(default=None, description="Gradient shards on a Ray cluster instead.")
    vllm: Vllm = Field(default=Vllm(), description="Servers of vLLM.")
    train_micro_batch: int = Field(
        default=64, ge=1, description="Completions in one training forward, of each process."
    )
    gradient_checkpointing: Annotated[bool | None, ADVANCED] = Field(
        default=None,
        description="Recompute activations in the backward; empty: from 50 million parameters on.",
    )
    trl: Annotated[TrlRuntime, ADVANCED] = Field(
        default=TrlRuntime(), description="Further fields of TRL's GRPOConfig."
    )
    launch: Launch | None = Field(
        default=None, description="Several training processes, by `accelerate launch`."
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="Trackers that a training stage reports to."
    )
    save_steps: Annotated[int, ADVANCED] = Field(
        default=5, ge=1, description="Training steps between checkpoints inside a stage."
    )
