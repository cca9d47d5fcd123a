"""The section `selection`: how a stage selects its prompts."""

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_schemas.section import LATER, Section

Strategy = Literal[
    "influence", "auto", "random", "full", "learnability", "pass_rate", "grad_norm", "text_similarity"
]


class Selection(Section):
    """Selection of the prompts that a stage trains on."""

    strategy: Strategy = Field(
        default="influence",
        description="What orders the pool: influence, chance, nothing (`full` takes all prompts), variance of the "
        "rewards, distance to `pass_rate_target`, the norm of the gradient, or the similarity of the text to the "
        "validation prompts (`text_similarity`), which needs no rollouts: the baseline that influence must beat. "
        "`auto`: influence while it is reliable, shrunk to clusters of gradients where it is weak, pass rates or "
        "chance where it is noise.",
    )
    ratio: float = Field(default=0.1, gt=0, le=1, description="Share of the pool.")
    later: Annotated[Literal["pass_rate", "learnability", "random"] | None, LATER] = Field(
        default=None,
        description="Strategy of all stages after the first, which then compute no scores; empty: `strategy`.",
    )
    pass_rate_target: float = Field(
        default=0.5, ge=0, le=1, description="`pass_rate`: the preferred pass rate."
    )
    shares: Annotated[dict[str, Annotated[float, Field(gt=0, le=1)]], LATER] = Field(
        default_factory=dict,
        description="Fixed share of the selection by source of the prompts, such as `{algebra: 0.5}`; other sources "
        "share the rest.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Selection":
        if (total := sum(Fraction(str(share)) for share in self.shares.values())) > 1:
            raise ValueError(f"selection.shares add up to {float(total):g}, more than 1: lower some of them")
        return self

    def at(self, stage: int) -> "Selection":
        """Return the settings of one stage, counted from 1."""
        strategy = self.later if self.later and stage > 1 else self.strategy
        return self.model_copy(update={"strategy": strategy, "later": None})

    @property
    def reads_gradients(self) -> bool:
        """Whether the strategy reads gradients."""
        return self.strategy in ("influence", "auto", "grad_norm")

    @property
    def reads_rollouts(self) -> bool:
        """Whether the strategy reads rollouts, or gradients of them."""
        return self.strategy not in ("random", "full", "text_similarity")

    @property
    def reads_targets(self) -> bool:
        """Whether the strategy reads the prompts of the validation sets."""
        return self.strategy == "text_similarity"
