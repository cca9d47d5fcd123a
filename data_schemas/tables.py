"""Arrow schemas of the Parquet tables that users read and write. Column names are a stable interface."""

from collections.abc import Collection

import pyarrow as pa

MESSAGE = pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])

PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("source", pa.string(), False),
        pa.field("messages", pa.list_(MESSAGE), False),
        pa.field("answer", pa.string(), False),
        pa.field("verifier", pa.string(), False),
        pa.field("level", pa.string()),
        pa.field("tags", pa.list_(pa.string()), False),
    ]
)
"""One row per prompt. ``prompt_id`` is unique and stable; ``source`` is the prompt's family or dataset."""

ROLLOUTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("sample", pa.int32(), False),
        pa.field("prompt_ids", pa.list_(pa.int32()), False),
        pa.field("completion_ids", pa.list_(pa.int32()), False),
        pa.field("behavior_logprobs", pa.list_(pa.float32()), False),
        pa.field("text", pa.string(), False),
        pa.field("reward", pa.float32()),
        pa.field("finish_reason", pa.string(), False),
    ]
)
"""One row per completion, a prompt's rows adjacent. ``reward`` null: not gradable. ``finish_reason``: stop, length."""

TERM = pa.struct([pa.field("verifier", pa.string(), False), pa.field("reward", pa.float32())])

ROLLOUTS_OPTIONAL = pa.schema(
    [pa.field("reward_terms", pa.list_(TERM)), pa.field("completion_mask", pa.list_(pa.bool_()))]
)
"""Columns that rollouts may have. ``reward_terms``: of a reward that is a weighted sum, what each verifier gave, before
its weight; null if the term is not gradable. ``completion_mask``: of a conversation, true for the tokens of
``completion_ids`` that the policy sampled; null if these are all.
"""


def rollouts_schema(names: Collection[str]) -> pa.Schema:
    """Return the schema of rollouts with those of the optional columns that ``names`` has."""
    return pa.schema([*ROLLOUTS, *(field for field in ROLLOUTS_OPTIONAL if field.name in names)])


STATUSES = ("ok", "zero_variance", "not_finite", "too_few_gradable")
"""Names of the gradient store's ``status`` values 0 to 3."""

SCORE_FIXED = ("prompt_id", "status", "score", "rank", "mean_reward", "grad_norm")
"""Columns of a scores table that are not validation sets."""


def scores_schema(validation_sets: list[str]) -> pa.Schema:
    """Build the schema of a scores table: a float32 column per validation set, null where a prompt has no gradient."""
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), False),
            pa.field("status", pa.string(), False),
            *[pa.field(name, pa.float32()) for name in validation_sets],
            pa.field("score", pa.float32()),
            pa.field("rank", pa.int32()),
            pa.field("mean_reward", pa.float32()),
            pa.field("grad_norm", pa.float32()),
        ]
    )


SELECTION = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("selected", pa.bool_(), False),
        pa.field("rank", pa.int32()),
        pa.field("score", pa.float32()),
        pa.field("status", pa.string(), False),
        pa.field("reason", pa.string(), False),
    ]
)
"""One row per prompt of the pool; ``selected`` marks the subset, ``reason`` names the sets that voted and their votes.
"""

BELIEF = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("pass_rate", pa.float32(), False),
        pa.field("mixed", pa.float32(), False),
        pa.field("cells", pa.list_(pa.float64(), 32), False),
    ]
)
"""One row per prompt of the pool, at the end of a stage: the expected pass rate, the probability that a training group
has more than one reward, and the probabilities of 32 cells of arcsin √p between 0 and π/2.
"""

GROUPS = pa.schema(
    [
        pa.field("batch", pa.int32(), False),
        pa.field("prompt_id", pa.string(), False),
        pa.field("graded", pa.int32(), False),
        pa.field("passed", pa.float64(), False),
        pa.field("mixed", pa.bool_(), False),
        pa.field("expected", pa.float64(), False),
        pa.field("trained", pa.bool_(), False),
    ]
)
"""One row per group that a stage sampled: generation batch (from 0), graded completions, sum of their rewards, whether
they differ, the probability of that which was expected, and whether the stage trained on the group.
"""

TRAINED = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        pa.field("step", pa.int32(), False),
        pa.field("policy_step", pa.int32(), False),
        pa.field("status", pa.string(), False),
        pa.field("norm", pa.float32()),
        pa.field("mean_reward", pa.float32()),
        pa.field("tokens", pa.int32(), False),
        pa.field("cosine", pa.float32()),
    ]
)
"""One row per group whose feature a stage collected: the optimizer step that trained on it, the steps that the policy
of the feature had taken, status and norm of the feature, and its cosine to the feature of the prompt's group before.
"""

EVALUATION = pa.schema(
    [
        pa.field("set", pa.string(), False),
        pa.field("prompt_id", pa.string(), False),
        pa.field("sample", pa.int32(), False),
        pa.field("text", pa.string(), False),
        pa.field("reward", pa.float32()),
        pa.field("finish_reason", pa.string(), False),
        pa.field("tokens", pa.int32(), False),
    ]
)
"""One row per completion of an evaluation."""
