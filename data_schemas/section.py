"""The base class of all sections of the configuration."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]


LATER = "later"
"""Marks a field that was added after artifacts existed: ``Annotated[int | None, LATER]``."""

ADVANCED = "advanced"
"""Marks a field that few runs change: ``Annotated[int, ADVANCED]``. Reference and forms show it after the others."""


def is_advanced(field: FieldInfo) -> bool:
    """Check whether a field is marked with :data:`ADVANCED`."""
    return ADVANCED in field.metadata


def _advanced_last(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Move the advanced fields of a JSON schema to its end, and mark them there; forms show fields in this order."""
    properties = schema.get("properties", {})
    for name, field in model.model_fields.items():
        if is_advanced(field) and name in properties:
            properties[name] = properties.pop(name) | {"advanced": True}


class Section(BaseModel):
    """A frozen section. Unknown fields are errors, and so are numbers that JSON, and thus a key, cannot represent."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_advanced_last
    )

    def for_key(self) -> dict[str, Any]:
        """Return the settings as used in artifact keys and run ids.

        A field marked with :data:`LATER` is omitted while it has its default value, so that existing artifact keys do
        not change.
        """
        settings = self.model_dump()
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if LATER in field.metadata and value == field.get_default(call_default_factory=True):
                del settings[name]
            elif isinstance(value, Section):
                settings[name] = value.for_key()
            elif isinstance(value, tuple) and all(isinstance(one, Section) for one in value):
                settings[name] = [one.for_key() for one in value]
            elif isinstance(value, dict):
                settings[name] |= {
                    key: one.for_key() for key, one in value.items() if isinstance(one, Section)
                }
        return settings
