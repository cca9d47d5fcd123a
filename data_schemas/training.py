"""The section `training`: a GRPO stage and its adapters."""

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.data import PromptFormat
from data_schemas.rollouts import Sampling
from data_schemas.section import ADVANCED, LATER, Section
from data_schemas.trl import TrlTraining

Schedule = Literal[
    "constant", "linear", "cosine", "cosine_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]


class Lora(Section):
    """Low-rank adapters (Hu et al., arXiv 2106.09685), through PEFT: the stage trains only the adapters."""

    r: int = Field(default=16, ge=1, le=4096, description="Rank.")
    alpha: float = Field(default=32, gt=0, description="Updates are scaled by alpha / r.")
    targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="Layers with an adapter: all but the head, or their names."
    )
    rslora: Annotated[bool, ADVANCED] = Field(
        default=False, description="Scale by alpha / √r instead (arXiv 2312.03732)."
    )
    carry: Annotated[Literal["merged", "adapter"], ADVANCED] = Field(
        default="merged",
        description="What the next stage starts from: the merged weights with a new adapter, or the base with this "
        "adapter, trained on. The checkpoint has merged weights in any case.",
    )


Method = Literal["uniform", "belief", "thompson"]


class Draw(Section):
    """Which of the selected prompts a generation batch trains on."""

    method: Method = Field(
        default="uniform",
        description="`uniform`: all prompts in turn. `belief`: by influence times the believed probability that the "
        "group has more than one reward. `thompson`: the same with pass rates drawn from the belief.",
    )
    oversampling: float = Field(
        default=1.0,
        ge=1,
        le=20,
        description="Most groups sampled for one that is trained on: groups with one reward are replaced by others "
        "until the batch is full or the limit is reached (DAPO). 1 replaces none.",
    )
    first_samples: Annotated[int | None, LATER] = Field(
        default=None,
        ge=2,
        le=512,
        description="With `oversampling`: completions sampled first of every group. A group whose first rewards are "
        "equal is replaced without its other completions. null: all completions come first.",
    )
    drift: Annotated[float, ADVANCED] = Field(
        default=0.1,
        ge=0,
        le=1,
        description="How far arcsin √(pass rate) may move in an optimizer step, as a standard deviation; the "
        "larger, the less older rewards count.",
    )
    influence: Annotated[float, ADVANCED] = Field(
        default=1.0,
        ge=0,
        le=10,
        description="`belief`, `thompson`: power of the weight by rank, from 1 for the first selected prompt to "
        "almost 0 for the last one; 0 draws by the pass rate alone.",
    )
    sharpness: Annotated[float, ADVANCED] = Field(
        default=1.0,
        ge=0,
        le=20,
        description="`belief`: power of the probability of more than one reward.",
    )

    @property
    def learns(self) -> bool:
        """Whether a stage keeps a belief about pass rates."""
        return self.method != "uniform" or self.oversampling > 1


class StageEnd(Section):
    """When a stage ends before its last step: too few of its groups have more than one reward."""

    mixed_below: float = Field(
        gt=0,
        le=1,
        description="Least share of sampled groups with more than one reward, over `window` batches.",
    )
    window: int = Field(default=5, ge=1, description="Generation batches that are averaged.")
    min_steps: int = Field(default=5, ge=1, description="Steps that every stage takes.")


class TrainingCommand(Section):
    """Another trainer as the training step: a command that leaves a checkpoint (docs/guides/other-trainers.md)."""

    run: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1,
        description="Program and arguments; no shell. `{policy}`, `{prompts}`, `{out}`, `{work}`, `{seed}` and "
        "`{steps}` are replaced, and are in the environment as `CROPI_POLICY` and so on.",
    )
    version: str = Field(
        min_length=1,
        description="Names what the command does, in the keys of what it trained: change it when the result changes.",
    )
    format: PromptFormat = Field(default="trl", description="Format of the selected prompts.")


class Training(Section):
    """A GRPO stage, including its initial policy and the state that it carries over."""

    steps: int = Field(default=20, ge=1, description="Optimizer steps a stage.")
    prompts_per_step: int = Field(default=32, ge=1, description="Prompts in one optimizer step.")
    sampling: Sampling = Field(default=Sampling(), description="Sampling during training.")
    engine: Annotated[Literal["transformers", "vllm", "command"], LATER] = Field(
        default="transformers",
        description="What samples: transformers, each completion a function of the seed, or vLLM inside TRL "
        "(`runtime.trl.vllm_mode`), faster and not the same twice. `command`: another trainer trains the stage.",
    )
    command: Annotated[TrainingCommand | None, LATER, ADVANCED] = Field(
        default=None, description="`engine: command`: what trains."
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    schedule: Schedule = Field(default="constant", description="Of the stage.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up at the start of a stage.")
    optimizer: Annotated[Literal["adamw"], ADVANCED] = Field(
        default="adamw", description="AdamW; other optimizers by `trl.optim`."
    )
    optimizer_state: Literal["fresh", "carried"] = Field(
        default="fresh",
        description="`fresh`: AdamW's moments start at zero every stage. `carried`: a stage continues those of the "
        "stage before, which are kept with the policy.",
    )
    second_moments: Annotated[bool, ADVANCED] = Field(
        default=False,
        description="Keep Adam's second moments with the policy; `projection.preconditioner: adam` needs them.",
    )
    weight_decay: Annotated[float, ADVANCED] = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: Annotated[float, ADVANCED] = Field(
        default=1.0, gt=0, description="Gradients are clipped to this norm."
    )
    beta: float = Field(default=0.0, ge=0, description="Weight of the KL to the reference.")
    reference: Annotated[Literal["stage_start", "base"], ADVANCED] = Field(
        default="stage_start", description="KL reference policy."
    )
    start: Annotated[Literal["previous", "base"], ADVANCED] = Field(
        default="previous", description="Weights a stage starts from."
    )
    iterations: Annotated[int, ADVANCED] = Field(
        default=1, ge=1, description="Optimizer passes over a generation batch."
    )
    draw: Annotated[Draw, LATER] = Field(
        default=Draw(), description="Which of the selected prompts a generation batch trains on."
    )
    end: Annotated[StageEnd | None, LATER] = Field(
        default=None, description="When a stage ends before `steps`; empty: never."
    )
    features: Annotated[bool, LATER] = Field(
        default=False,
        description="Keep a gradient feature of every trained group, from the passes of the training itself; "
        "`scores.pool_features: training` uses them.",
    )
    lora: Annotated[Lora | None, LATER] = Field(
        default=None, description="Train adapters; empty: all weights."
    )
    trl: Annotated[TrlTraining, LATER, ADVANCED] = Field(
        default=TrlTraining(), description="Further fields of TRL's GRPOConfig."
    )

    @property
    def keeps_moments(self) -> list[str]:
        """List the settings that store Adam's moments with the policy."""
        carried = ["optimizer_state=carried"] if self.optimizer_state == "carried" else []
        return (["second_moments"] if self.second_moments else []) + carried

    @property
    def moment_bytes(self) -> int:
        """Bytes of moments per parameter that a trained policy stores besides its weights."""
        return 2 * self.second_moments + 8 * (self.optimizer_state == "carried")
