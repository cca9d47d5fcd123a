"""The section `policy`: the initial checkpoint of a curriculum and its chat template."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from data_schemas.section import LATER, Section


class Chat(Section):
    """The chat template, which is written into the tokenizer of the run's policies."""

    template: str | None = Field(
        default=None,
        description="`plain`, for base models; a file; or the text of a Jinja template. Empty: the checkpoint's own.",
    )
    arguments: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], JsonValue] = Field(
        default_factory=dict,
        description="What the template reads in addition to the messages: `enable_thinking: false`.",
    )

    @model_validator(mode="after")
    def _check_settings(self) -> "Chat":
        if self.template is None and not self.arguments:
            raise ValueError("needs a template, arguments, or both")
        if taken := {"messages", "add_generation_prompt"} & set(self.arguments):
            raise ValueError(f"arguments may not set {sorted(taken)}, which the run sets itself")
        return self


class PolicySource(Section):
    """The initial checkpoint of the curriculum."""

    path: str = Field(
        default="embedded",
        description="`embedded`, a checkpoint directory, or a hub id. `embedded-ladder` is an embedded policy whose "
        "accuracy on `reverse` falls with the length of the word.",
    )
    revision: str | None = Field(default=None, description="Hub revision; a commit hash pins it.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the forward passes; training keeps and saves float32 weights.",
    )
    chat: Annotated[Chat | None, LATER] = Field(
        default=None, description="Chat template and its arguments; empty: the checkpoint's template."
    )
