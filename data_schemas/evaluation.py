"""The section `evaluation`: measurement of accuracy."""

from typing import Annotated

from pydantic import Field, model_validator

from data_schemas.rollouts import Engine, Samples, Sampling
from data_schemas.section import ADVANCED, LATER, Section


class Evaluation(Section):
    """Accuracy on validation and test sets, before the first stage and after each."""

    engine: Annotated[Engine, LATER] = Field(
        default="transformers", description="What samples; as `rollouts.engine`."
    )
    sampling: Sampling = Field(default=Sampling(samples=4), description="Sampling of the evaluation.")
    samples_by_source: Annotated[dict[str, Samples], LATER] = Field(
        default_factory=dict,
        description="Completions of the prompts of a source, such as `{aime: 32}`; other sources get "
        "`sampling.samples`.",
    )
    pass_at: Annotated[tuple[Annotated[int, Field(ge=1)], ...], LATER] = Field(
        default=(),
        description="Values of k for which pass@k is estimated, such as `[1, 4]`; at most the completions of a prompt.",
    )
    seed: Annotated[int, ADVANCED] = Field(default=1234, description="Not the rollouts' seed.")

    @model_validator(mode="after")
    def _consistent(self) -> "Evaluation":
        most, samples = (
            max(self.pass_at, default=0),
            [self.sampling.samples, *self.samples_by_source.values()],
        )
        if most > max(samples):
            raise ValueError(
                f"evaluation.pass_at={most} needs {most} completions of a prompt, and evaluation.sampling.samples="
                f"{max(samples)}: raise it, or drop the value"
            )
        if len(set(self.pass_at)) < len(self.pass_at):
            raise ValueError(f"evaluation.pass_at={list(self.pass_at)} names a value twice")
        return self
