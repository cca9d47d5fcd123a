"""The section ``grading``: verifiers, and the limits of one grading call."""

from typing import Annotated

from pydantic import Field, model_validator

from data_schemas.section import ADVANCED, LATER, Name, Section

VERIFIERS = ("exact", "numeric", "math", "choice", "reasoning_gym")
"""Built-in verifiers: equality of stripped strings, the last number, math-verify, a choice letter,
reasoning-gym's scorers. docs/guides/rewards.md describes which answer each extracts from a completion.
"""

ALTERNATIVE = "\x1e"
"""Separator of a prompt's alternative correct answers (`casts.answer: any_of`): the ASCII record separator."""

FunctionPath = Annotated[str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_][A-Za-z0-9_]*$")]
Url = Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$")]
"""A URL without user, query or fragment, because those can contain secrets."""
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class HttpVerifier(Section):
    """A server that grades completions: JSON request, JSON response (docs/guides/rewards.md)."""

    url: Url = Field(description="Where completions are posted to; redirects are not followed.")
    version: str | None = Field(
        default=None,
        description="Names what the server computes, in the keys of what it graded; empty: its URL does.",
    )
    timeout_s: float = Field(default=30.0, gt=0, le=3600, description="Of one request, all in all.")
    retries: Annotated[int, ADVANCED] = Field(
        default=3, ge=0, le=100, description="Of one request that found no server, or a busy one."
    )
    concurrency: Annotated[int, ADVANCED] = Field(
        default=16, ge=1, le=1024, description="Requests in flight."
    )
    headers_from_env: dict[HeaderName, VariableName] = Field(
        default_factory=dict,
        description="Header to the environment variable that holds its value, such as `Authorization: JUDGE_TOKEN`.",
    )


class Grading(Section):
    """Additional verifiers, and limits of the verifier process; a completion that exceeds a limit is not gradable."""

    timeout_s: float = Field(default=5.0, gt=0, description="Most seconds for one completion.")
    memory_mb: int = Field(default=1024, ge=256, description="Most memory of the verifier process.")
    functions: Annotated[dict[Name, FunctionPath], LATER] = Field(
        default_factory=dict,
        description="Your own: name to `package.module:function` or `path/to/file.py:function`.",
    )
    http: Annotated[dict[Name, HttpVerifier], LATER] = Field(
        default_factory=dict, description="Servers that grade, by name."
    )
    sums: Annotated[dict[Name, dict[Name, float]], LATER] = Field(
        default_factory=dict,
        description="Weighted sums of verifiers, by name, such as `{correct: {math: 1, brief: 0.2}}`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Grading":
        faults = [
            f"{section} names {sorted(duplicates)}, which {reason}: take other names"
            for section, duplicates, reason in (
                ("functions", set(self.functions) & set(VERIFIERS), "are built in"),
                ("http", set(self.http) & set(VERIFIERS), "are built in"),
                ("http", set(self.http) & set(self.functions), "functions names too"),
                ("sums", set(self.sums) & set(self.single), "are verifiers already"),
            )
            if duplicates
        ]
        for name, terms in self.sums.items():
            if unknown := sorted(set(terms) - set(self.single)):
                faults.append(
                    f"sums.{name} has the term {unknown[0]!r}, which is not a verifier; there are "
                    f"{', '.join(self.single)}"
                )
            if not any(terms.values()):
                faults.append(f"sums.{name} has no term with a weight other than 0")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def verifiers(self) -> tuple[str, ...]:
        """Names of all configured verifiers, built-in ones and sums included."""
        return (*self.single, *self.sums)

    @property
    def single(self) -> tuple[str, ...]:
        """Names of the verifiers that are not sums of others."""
        return (*VERIFIERS, *self.functions, *self.http)

    def terms(self, verifier: str) -> tuple[str, ...]:
        """Return the verifiers that a verifier adds up: its terms, or itself."""
        return tuple(sorted(self.sums[verifier])) if verifier in self.sums else (verifier,)
