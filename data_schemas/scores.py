"""The section `scores`: influence scores on the validation sets, and their fusion into one ranking."""

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.section import ADVANCED, LATER, Section

Target = Literal["mean", "normalized_mean", "nearest"]


Fusion = Literal["rrf", "max", "mean", "quota"]


class Scores(Section):
    """Influence scores on the validation sets, and their fusion into one ranking."""

    metric: Literal["cosine", "dot"] = Field(
        default="cosine", description="Similarity of two gradient features."
    )
    target: Target = Field(
        default="nearest",
        description="What a prompt is compared with: the validation prompts one by one, of which the `nearest` count; "
        "or one direction, the mean of their gradients (as the paper) or of the gradients' directions.",
    )
    nearest: Annotated[int, LATER] = Field(
        default=5, ge=1, description="How many validation prompts of a set count, the most alike."
    )
    neighbours: Annotated[int, LATER] = Field(
        default=0,
        ge=0,
        description="A prompt without a gradient takes the mean score of this many scored prompts whose texts are most "
        "alike; 0: it has no score. 8 is a good start for a pool with few samples a prompt.",
    )
    fusion: Fusion = Field(
        default="rrf",
        description="How the orders of several validation sets become one: reciprocal ranks, the largest score, "
        "the mean of standardised scores, or sets that pick in turn (`quota`).",
    )
    rrf_k0: Annotated[float, ADVANCED] = Field(
        default=60.0, ge=0, description="`rrf`: a set adds 1 / (this + rank)."
    )
    rrf_top: Annotated[int | None, ADVANCED] = Field(
        default=None, ge=1, description="Only the best n of a set vote."
    )
    pool_features: Annotated[Literal["computed", "training"], LATER, ADVANCED] = Field(
        default="computed",
        description="Features of the pool at later stages. `computed`: under the current policy. `training`: those of "
        "the stage before, and for the prompts that it trained on those of `training.features`; only the gradients of "
        "the validation sets are computed.",
    )
    memory: Annotated[float, LATER, ADVANCED] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="From stage 2 on, a set's scores are standardised, and this times those of the stage before are "
        "added: the noise of one stage's target then decides less.",
    )
