"""A GRPO stage: its settings, its adapter, its processes, and what of these cannot hold together."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from data_schemas.sources import LATER, Section
from data_schemas.trl import TrlTraining, set_fields

if TYPE_CHECKING:
    from data_schemas.config import Config

Schedule = Literal[
    "constant", "linear", "cosine", "cosine_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]


class Sampling(Section):
    """A sampling distribution; the behaviour log-probabilities are those of exactly this distribution."""

    samples: int = Field(default=8, ge=1, le=1024, description="Completions a prompt.")
    temperature: float = Field(default=1.0, gt=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=16, ge=1, le=131072)


class Lora(Section):
    """Low-rank adapters (Hu et al., arXiv 2106.09685), through PEFT: the stage trains these and nothing else."""

    r: int = Field(default=16, ge=1, le=4096, description="Rank.")
    alpha: float = Field(default=32, gt=0, description="Updates are scaled by alpha / r.")
    targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="Layers with an adapter: all but the head, or their names."
    )
    rslora: bool = Field(default=False, description="Scale by alpha / √r instead (arXiv 2312.03732).")
    carry: Literal["merged", "adapter"] = Field(
        default="merged",
        description="What the next stage starts from: the merged weights with a new adapter, or the base with this "
        "adapter, trained on. The checkpoint has merged weights in any case.",
    )


class Launch(Section):
    """Training processes through ``accelerate launch``."""

    processes: int = Field(default=1, ge=1, le=4096, description="On this machine: one a GPU.")
    config: str | None = Field(
        default=None, description="A file of `accelerate config` (FSDP, DeepSpeed); empty: data parallel."
    )


class Training(Section):
    """A GRPO stage. What a stage starts from and what it carries over is said here, nowhere else."""

    steps: int = Field(default=20, ge=1, description="Optimizer steps a stage.")
    prompts_per_step: int = Field(default=32, ge=1)
    sampling: Sampling = Sampling()
    engine: Annotated[Literal["transformers", "vllm"], LATER] = Field(
        default="transformers",
        description="What samples: transformers, each completion a function of the seed, or vLLM inside TRL "
        "(`runtime.trl.vllm_mode`), faster and not the same twice.",
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Schedule = Field(default="constant", description="Of the stage.")
    warmup_steps: int = Field(default=0, ge=0)
    optimizer: Literal["adamw"] = "adamw"
    optimizer_state: Literal["fresh", "carried"] = Field(
        default="fresh",
        description="`fresh`: AdamW's moments start at zero every stage. `carried`: a stage goes on with those of the "
        "stage before, which are kept with the policy.",
    )
    second_moments: bool = Field(
        default=False,
        description="Keep Adam's second moments with the policy; `projection.preconditioner: adam` needs them.",
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.0, ge=0, description="Weight of the KL to the reference.")
    reference: Literal["stage_start", "base"] = Field(
        default="stage_start", description="KL reference policy."
    )
    start: Literal["previous", "base"] = Field(default="previous", description="Weights a stage starts from.")
    iterations: int = Field(default=1, ge=1, description="Optimizer passes over a generation batch.")
    lora: Annotated[Lora | None, LATER] = Field(
        default=None, description="Train adapters; empty: all weights."
    )
    trl: Annotated[TrlTraining, LATER] = Field(
        default=TrlTraining(), description="Further fields of TRL's GRPOConfig."
    )

    @property
    def keeps_moments(self) -> list[str]:
        """Name the fields that have Adam's moments kept with the policy, as they are set."""
        carried = ["optimizer_state=carried"] if self.optimizer_state == "carried" else []
        return (["second_moments"] if self.second_moments else []) + carried

    @property
    def moment_bytes(self) -> int:
        """Bytes of moments a parameter that a trained policy has beside its weights."""
        return 2 * self.second_moments + 8 * (self.optimizer_state == "carried")


def contradictions(config: "Config") -> list[str]:
    """List what of a stage's settings cannot hold together, each with its values and what to change."""
    training, faults = config.training, []
    if training.sampling.samples < 2:
        faults.append("training.sampling.samples=1: a group of one has no advantage; take 2 or more")
    if training.reference == "base" and training.beta == 0:
        faults.append("training.reference=base has no effect with training.beta=0; set beta or drop it")
    if training.warmup_steps > training.steps:
        faults.append(
            f"training.warmup_steps={training.warmup_steps} exceeds training.steps={training.steps}"
        )
    if training.trl.sync_ref_model and (training.beta == 0 or training.lora):
        faults.append("training.trl.sync_ref_model needs training.beta above 0, and no training.lora")
    idle = [name for name, on in [("lora", training.lora), ("trl.optim", training.trl.optim)] if on]
    faults += [
        f"training.{kept} reads AdamW's moments of all weights: drop training.{n}"
        for kept in training.keeps_moments
        for n in idle
    ]
    if training.optimizer_state == "carried" and training.start == "base":
        faults.append(
            "training.optimizer_state=carried with training.start=base: no stage goes on from the one before; take "
            "training.start=previous or training.optimizer_state=fresh"
        )
    return faults + _adapter(training) + _loss(config) + _several(config)


def _adapter(training: Training) -> list[str]:
    """List what an adapter cannot be trained with."""
    lora, faults = training.lora, []
    if lora is None:
        return faults
    if lora.carry == "adapter" and training.start == "base":
        faults.append("training.lora.carry=adapter has no effect with training.start=base; take merged")
    if training.beta > 0 and training.reference != "stage_start":
        faults.append(
            f"training.reference={training.reference} with training.lora: TRL's KL reference is the policy as the "
            "stage began, by a copy of its adapter; set training.reference=stage_start"
        )
    return faults


def _loss(config: "Config") -> list[str]:
    """List parameters of losses that nobody would read, or that a loss needs."""
    trl, loss, faults = config.training.trl, config.objective.loss_type, []
    for name in ("sapo", "vespo"):
        if loss != name and (named := set_fields(trl, f"{name}_")):
            faults.append(f"training.trl: {named} with objective.loss_type={loss}, which has no such thing")
    if loss == "cispo" and trl.epsilon_high is None:
        faults.append(
            f"objective.loss_type=cispo caps ratios at training.trl.epsilon_high, which TRL takes from clip_epsilon="
            f"{config.objective.clip_epsilon} where it is empty: every token would count that little; set it (5)"
        )
    if loss == "luspo" and trl.importance_sampling_level != "sequence":
        faults.append(
            "objective.loss_type=luspo is of sequences: set training.trl.importance_sampling_level=sequence"
        )
    if loss == "vespo" and trl.importance_sampling_level == "sequence":
        faults.append("objective.loss_type=vespo takes training.trl.importance_sampling_level=token")
    return faults


def _several(config: "Config") -> list[str]:
    """List what several training processes cannot share."""
    training, launch, faults = config.training, config.runtime.launch, []
    if training.engine == "transformers" and (idle := set_fields(config.runtime.trl, "vllm_")):
        faults.append(f"runtime.trl: {idle} with training.engine=transformers; set training.engine=vllm")
    if launch is None:
        return faults
    if training.prompts_per_step % launch.processes:
        faults.append(
            f"training.prompts_per_step={training.prompts_per_step} is no multiple of "
            f"runtime.launch.processes={launch.processes}: a group would be cut in two"
        )
    if launch.config:
        faults += [
            f"training.{kept} with runtime.launch.config: moments in shards are not read"
            for kept in training.keeps_moments
        ]
    return faults
