"""Records of artifacts and runs: versioned JSON files, written after the data that they describe."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


Kind = Literal[
    "prompts", "policy", "rollouts", "gradients", "scores", "diagnostics", "selection", "evaluation"
]


KINDS: tuple[Kind, ...] = get_args(Kind)
StepName = Literal[
    "prompts",
    "policy",
    "rollouts",
    "gradients",
    "scores",
    "diagnostics",
    "selection",
    "training",
    "evaluation",
]


STEP_NAMES: tuple[StepName, ...] = get_args(StepName)
Key = Annotated[str, Field(pattern=r"^[a-z]+-v[0-9]+-[0-9a-f]{16}$")]


class Record(BaseModel):
    """A frozen JSON record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(Record):
    """A reference to an artifact: its key and the digest of its content."""

    kind: Kind
    key: Key
    digest: str = Field(description="sha256 over the names, sizes and sha256 of its files.")


class FileEntry(Record):
    """A file of an artifact."""

    path: str = Field(description="Relative, with forward slashes.")
    size: int = Field(ge=0, lt=2**63)
    sha256: str


class Manifest(Record):
    """The metadata of an artifact: ``manifest.json`` in its directory."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    key: Key
    digest: str
    step: StepName | Literal["import"]
    inputs: dict[str, ArtifactRef]
    settings: dict[str, Any]
    files: list[FileEntry]
    summary: dict[str, Any] = Field(description="Counts, shapes, rates: what a person or the UI is shown.")
    versions: dict[str, str]
    git_revision: str | None
    host: str
    device: str
    created: str = Field(description="UTC, ISO 8601.")
    seconds: float
    resumed: bool = Field(default=False, description="Whether the work went on from an earlier stop.")
    peak_memory_bytes: int
    checksum: str = Field("", description="sha256 over the rest of this file, as canonical JSON.")

    @property
    def ref(self) -> ArtifactRef:
        """The reference to the artifact."""
        return ArtifactRef(kind=self.kind, key=self.key, digest=self.digest)


class SlotRecord(Record):
    """The artifact that a run used at one slot, and how the run obtained it."""

    ref: ArtifactRef
    origin: Literal["computed", "cached", "pinned"]
    seconds: float = 0.0


class Finding(Record):
    """A metric of score reliability and its limit."""

    figure: str = Field(
        description="Name of the figure; `cropi_core.diagnostics.limits.FIGURES` says what it is."
    )
    value: float | None = Field(description="None: it could not be measured, or has not been.")
    rule: str | None = Field(default=None, description="Field of the section `diagnostics`, if it is set.")
    limit: float | None = None
    action: Literal["refresh", "random"] | None = Field(default=None, description="What the rule asks for.")
    passed: bool = Field(default=False, description="Whether the value lies beyond the limit.")


class Verdict(Record):
    """How reliable the scores of a stage are, and what followed."""

    grade: Literal["reliable", "weak", "noise", "unknown"]
    figure: float | None = Field(
        description="Rank correlation with scores from other completions and other validation prompts."
    )
    basis: str = Field(description="What was halved to measure it.")
    follows: str = Field(description="What the stage did.")


class StageCheck(Record):
    """The reliability metrics of a stage's scores, and the resulting decision."""

    stage: int
    trajectories: Literal["own", "pinned", "stored"] = Field(
        description="Of the policy that is trained next; pinned by the configuration; of an earlier policy."
    )
    findings: list[Finding]
    action: Literal["none", "refresh", "random"]
    verdict: Verdict | None = None


class RunRecord(Record):
    """A run: its artifacts by slot. Artifacts that no run and no tag refers to may be collected."""

    schema_version: int = SCHEMA_VERSION
    run: str
    config: dict[str, Any]
    slots: dict[str, SlotRecord] = Field(default_factory=dict)
    notes: list[str] = Field(
        default_factory=list, description="Decisions taken on the way, such as a refresh."
    )
    checks: list[StageCheck] = Field(
        default_factory=list, description="By stage; two of a stage that refreshed its trajectories."
    )
    approved: dict[str, float] = Field(
        default_factory=dict,
        description="Ratio that a person approved, by the key of the selection they were first shown.",
    )
    status: Literal["running", "waiting", "done", "failed", "cancelled", "crashed"] = "running"
    error: str | None = None
    started: str
    finished: str | None = None
