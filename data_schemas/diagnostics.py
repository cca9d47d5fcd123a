"""The section ``diagnostics``: limits on the reliability of a stage's scores, and the resulting actions."""

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.section import ADVANCED, LATER, Section

Action = Literal["refresh", "random"]


class Diagnostics(Section):
    """Limits on score reliability and their actions, for strategies that read gradients. Off by default.

    `refresh` collects the trajectories again, at most once per stage, and scores again. `random` selects at random. The
    run's record lists every exceeded limit, including those without a possible action.
    """

    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="Largest KL(β‖π_θ) a token, mean of the pool's prompts with a gradient.",
    )
    max_kl_action: Annotated[Action, ADVANCED] = Field(
        default="refresh", description="Action if `max_kl` is exceeded."
    )
    min_ess: float | None = Field(
        default=None, ge=0, le=1, description="Least median of ESS / samples over the same prompts."
    )
    min_ess_action: Annotated[Action, ADVANCED] = Field(
        default="refresh", description="Action if the value is below `min_ess`."
    )
    max_dead_share: float | None = Field(
        default=None, ge=0, le=1, description="Largest share of the pool's prompts without a gradient."
    )
    max_dead_share_action: Annotated[Action, ADVANCED] = Field(
        default="refresh", description="Action if `max_dead_share` is exceeded."
    )
    min_target_agreement: Annotated[float | None, ADVANCED] = Field(
        default=None,
        ge=-1,
        le=1,
        description="`influence`: least cosine of the targets of two halves of a validation set, in the worst set.",
    )
    min_target_agreement_action: Annotated[Action, ADVANCED] = Field(
        default="random", description="Action if the value is below `min_target_agreement`."
    )
    min_top_agreement: Annotated[float | None, LATER] = Field(
        default=None,
        ge=0,
        le=1,
        description="`influence`: least share that the best tenths by two halves of a validation set have in common, "
        "in the worst set. By chance it is 0.1.",
    )
    min_top_agreement_action: Annotated[Action, LATER, ADVANCED] = Field(
        default="refresh", description="Action if the value is below `min_top_agreement`."
    )
    min_spot_correlation: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="`influence`: least rank correlation of the spot check.",
    )
    min_spot_correlation_action: Annotated[Action, ADVANCED] = Field(
        default="refresh", description="Action if the value is below `min_spot_correlation`."
    )
    spot_check: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="`influence`: prompts that are sampled from the current policy and scored each stage; 0: none.",
    )
    spot_dead_share: Annotated[float, ADVANCED] = Field(
        default=0.1, ge=0, lt=1, description="Share of these drawn from the prompts without a gradient."
    )
    spot_seed: Annotated[int, ADVANCED] = Field(
        default=500,
        ge=0,
        lt=2**31,
        description="Added to the seed of the stage's trajectories; 0 draws the completions of a fresh pool again.",
    )

    halves: Annotated[int, LATER, ADVANCED] = Field(
        default=128,
        ge=12,
        le=10_000,
        description="`selection.strategy: auto`: most prompts of the pool whose completions are halved at every stage; "
        "their gradients are computed again, half by half.",
    )

    @property
    def refreshes(self) -> bool:
        """Whether any limit has the action `refresh`."""
        actions = [name for name in type(self).model_fields if name.endswith("_action")]
        limits = {name: getattr(self, name.removesuffix("_action")) for name in actions}
        return any(limits[name] is not None and getattr(self, name) == "refresh" for name in actions)
