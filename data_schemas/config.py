"""The configuration of a curriculum.

A YAML file in ``configs/`` is one :class:`Config`. It is frozen and validated as a whole. Every field that changes a
result is part of the keys of the artifacts that it changes. Fields that change only speed or placement are in
``runtime`` and are not part of any key. Unknown fields and contradictory settings are errors
(:mod:`data_schemas.consistency`).
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_schemas import consistency
from data_schemas.data import Data
from data_schemas.diagnostics import Diagnostics
from data_schemas.evaluation import Evaluation
from data_schemas.gradients import Gradients, Objective, Projection
from data_schemas.grading import Grading
from data_schemas.policy import PolicySource
from data_schemas.rollouts import Rollouts
from data_schemas.runtime import Runtime
from data_schemas.scores import Scores
from data_schemas.section import ADVANCED, LATER, Name, Section
from data_schemas.selection import Selection
from data_schemas.training import Training


class Config(Section):
    """A curriculum."""

    name: Name = Field(default="curriculum", description="Name of the curriculum; run ids begin with it.")
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of sampling, of random draws and of training."
    )
    stages: int = Field(default=2, ge=1, le=1000, description="Number of stages.")
    rescore: Annotated[Literal["each_stage", "once"], ADVANCED] = Field(
        default="each_stage",
        description="Score the pool at every stage, under its policy, or use the first stage's scores in all.",
    )
    ends_with: Annotated[Literal["training", "selection"], LATER, ADVANCED] = Field(
        default="training",
        description="`selection`: the last stage ends with its selection, for another trainer, and no policy is "
        "evaluated; `cropi select` sets it.",
    )
    policy: PolicySource = PolicySource()
    data: Data
    rollouts: Rollouts = Rollouts()
    grading: Grading = Grading()
    objective: Objective = Objective()
    projection: Projection = Projection()
    gradients: Gradients = Gradients()
    scores: Scores = Scores()
    diagnostics: Diagnostics = Diagnostics()
    selection: Selection = Selection()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    runtime: Runtime = Runtime()
    pin: dict[str, str] = Field(
        default_factory=dict, description="Slot to artifact key, tag or RUN:slot: used, not computed."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if faults := self.contradictions():
            raise ValueError("; ".join(faults))
        return self

    def contradictions(self) -> list[str]:
        """List contradictions between settings, each with the values and what to change."""
        return [
            *consistency.block_rows(self.gradients),
            *consistency.group_size(self.rollouts, self.objective, needs_rollouts=self.needs_rollouts),
            *consistency.sampling_passes(self.rollouts, needs_rollouts=self.needs_rollouts),
            *consistency.pool_share(self.rollouts, self.scores, self.selection),
            *consistency.full_ratio(self.selection),
            *consistency.scored_once(self.rescore, self.rollouts, self.scores),
            *consistency.exact_projection(self.projection),
            *consistency.preconditioner(self.projection, self.training, needs_gradients=self.needs_gradients),
            *consistency.training_features(
                self.training, self.scores, self.projection, self.runtime.launch, self.rollouts, self.rescore
            ),
            *consistency.spot_check_size(self.diagnostics),
            *consistency.training_stage(self.training),
            *consistency.loss_parameters(self.objective, self.training.trl),
            *consistency.training_processes(self.training, self.runtime.launch, self.runtime.trl),
            *consistency.pins(self.pin, self.policy, self.data),
            *consistency.set_names(self.data),
            *consistency.ray(self.runtime),
            *consistency.running_vllm_servers(
                self.runtime.vllm.base_urls, self.evaluation.engine, self._later_vllm_samples()
            ),
            *consistency.verifier_names(self.data, self.grading),
        ]

    def _later_vllm_samples(self) -> list[str]:
        """List the settings that make vLLM sample from the policies of later stages."""
        if self.rollouts.engine != "vllm" or self.stages == 1 or not self.needs_rollouts:
            return []
        later = {
            f"rollouts.refresh={self.rollouts.refresh}": self.rollouts.refresh != "never",
            f"diagnostics.spot_check={self.diagnostics.spot_check}": self.needs_spot_check,
            "a limit of diagnostics that refreshes": self.may_refresh,
        }
        return [name for name, holds in later.items() if holds]

    @property
    def needs_rollouts(self) -> bool:
        """Whether a stage's strategy reads trajectories."""
        return self.selection.reads_rollouts or self.selection.at(2).reads_rollouts

    @property
    def needs_gradients(self) -> bool:
        """Whether the strategy reads gradients."""
        return self.selection.reads_gradients

    @property
    def needs_spot_check(self) -> bool:
        """Whether a stage's scores are compared with scores of fresh trajectories."""
        return self.selection.strategy in ("influence", "auto") and self.diagnostics.spot_check > 0

    @property
    def may_refresh(self) -> bool:
        """Whether a stage after the first may collect trajectories."""
        if self.rollouts.refresh != "never":
            return True
        return self.needs_gradients and self.diagnostics.refreshes and self.rescore == "each_stage"

    def scores_at(self, stage: int) -> bool:
        """Whether a stage, counted from 1, scores the pool."""
        reads = self.selection.at(stage).reads_gradients
        return reads and (stage == 1 or self.rescore == "each_stage")
