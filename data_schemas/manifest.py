"""What describes an artifact, a step and a run. JSON, versioned, written last."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
Kind = Literal["prompts", "policy", "rollouts", "gradients", "scores", "selection", "evaluation"]
KINDS: tuple[Kind, ...] = ("prompts", "policy", "rollouts", "gradients", "scores", "selection", "evaluation")
StepName = Literal[
    "prompts", "policy", "rollouts", "gradients", "scores", "selection", "training", "evaluation"
]
Key = Annotated[str, Field(pattern=r"^[a-z]+-v[0-9]+-[0-9a-f]{16}$")]


class Record(BaseModel):
    """Frozen JSON record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(Record):
    """Name of one artifact: where it is filed (key) and what it contains (digest)."""

    kind: Kind
    key: Key
    digest: str = Field(description="sha256 over the names, sizes and sha256 of its files.")


class FileEntry(Record):
    """One file of an artifact."""

    path: str = Field(description="Relative, with forward slashes.")
    size: int
    sha256: str


class Manifest(Record):
    """Everything known about an artifact; ``manifest.json`` in its directory."""

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
        """The artifact's name."""
        return ArtifactRef(kind=self.kind, key=self.key, digest=self.digest)


class StepSpec(Record):
    """One step to run: all that its result depends on, plus where and how fast."""

    step: StepName
    slot: str = Field(description="Its place in the run, such as `gradients/pool@2`.")
    settings: dict[str, Any] = Field(description="What changes the result; part of the key.")
    inputs: dict[str, ArtifactRef] = Field(default_factory=dict)
    location: dict[str, str] = Field(default_factory=dict, description="Paths; part of no key.")
    runtime: dict[str, Any] = Field(default_factory=dict, description="A `Runtime`; part of no key.")


class SlotRecord(Record):
    """What one run used at one place, and how it came by it."""

    ref: ArtifactRef
    origin: Literal["computed", "cached", "pinned"]
    seconds: float = 0.0


class RunRecord(Record):
    """A run: the artifacts it names by slot. What no run and no tag names may be collected."""

    schema_version: int = SCHEMA_VERSION
    run: str
    config: dict[str, Any]
    slots: dict[str, SlotRecord] = Field(default_factory=dict)
    notes: list[str] = Field(
        default_factory=list, description="Decisions taken on the way, such as a refresh."
    )
    status: Literal["running", "done", "failed"] = "running"
    error: str | None = None
    started: str
    finished: str | None = None
