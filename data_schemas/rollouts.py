"""The section `rollouts`: sampling of trajectories."""

from typing import Annotated, Literal

from pydantic import Field

from data_schemas.section import ADVANCED, LATER, Section

Engine = Literal["transformers", "vllm"]
Samples = Annotated[int, Field(ge=1, le=1024)]


class Sampling(Section):
    """A sampling distribution; behavior log-probabilities are computed under exactly this distribution."""

    samples: int = Field(default=8, ge=1, le=1024, description="Completions a prompt.")
    temperature: float = Field(default=1.0, gt=0, le=10, description="Divides the logits.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Sample from the most probable tokens with this total probability.",
    )
    max_new_tokens: int = Field(default=16, ge=1, le=131072, description="Most tokens of a completion.")


class Passes(Section):
    """Sampling of the pool in passes: a few completions of every prompt, more only while its rewards are equal."""

    first: int = Field(default=2, ge=1, le=1024, description="Completions that every prompt gets.")
    min_chance: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="A prompt whose rewards are equal so far is sampled again, its completions doubled up to "
        "`pool.samples`, if its rewards will then differ with at least this probability.",
    )


class Waking(Section):
    """Which prompts of the pool `refresh: waking` samples again at a later stage, and how many."""

    tokens: int = Field(
        default=10_000, ge=1, description="Budget: about so many tokens of completions of the pool a stage."
    )
    samples: int | None = Field(
        default=None, ge=1, le=1024, description="Completions of such a prompt; empty: `pool.samples`."
    )
    neighbours: int = Field(
        default=8,
        ge=1,
        description="How many of the validation prompts that read most like a prompt say whether it is sampled again.",
    )
    keep_stored: Annotated[bool, LATER] = Field(
        default=True,
        description="Score the stored completions of the other prompts too. `false`: a later stage chooses among the "
        "prompts that it samples again; gradients of other prompts are not computed.",
    )


class Rollouts(Section):
    """Collection of trajectories."""

    engine: Engine = Field(
        default="transformers",
        description="What samples: transformers in this process, or servers of vLLM (`runtime.vllm`).",
    )
    pool: Sampling = Field(default=Sampling(), description="Sampling of the pool.")
    validation: Sampling = Field(default=Sampling(samples=16), description="Sampling of the validation sets.")
    pool_share: Annotated[float, LATER] = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the pool that is sampled, drawn at random. Below 1, the other prompts are scored like "
        "the sampled ones that read most alike (`scores.neighbours`).",
    )
    samples_by_source: Annotated[dict[str, Samples], LATER] = Field(
        default_factory=dict,
        description="Completions of the pool's prompts of a source, such as `{algebra: 16}`; other sources get "
        "`pool.samples`.",
    )
    passes: Annotated[Passes | None, LATER] = Field(
        default=None,
        description="Sample the pool in passes; `pool.samples` is then the most that a prompt gets. Empty: all prompts "
        "get that many.",
    )
    refresh: Literal["never", "always", "waking"] = Field(
        default="never",
        description="Collect once, or before every stage; `diagnostics` collects again where it must be. `waking`: at "
        "later stages the validation sets, and prompts that read like validation prompts whose rewards differ now.",
    )
    waking: Annotated[Waking, LATER] = Field(
        default=Waking(), description="`refresh: waking`: the budget and the rule."
    )
    shard_prompts: Annotated[int, ADVANCED] = Field(
        default=64, ge=1, description="Prompts a shard: what a stop can cost at most."
    )
