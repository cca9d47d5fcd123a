"""Change a configuration by overrides such as ``training.steps=40``, and describe the overrides that may be given."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from cropi_core.config.faults import fields_at, refuse
from cropi_core.config.loading import apply_override, validated
from data_schemas import Config


def changed_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration with overrides applied; the last one wins.

    Raises:
        ConfigError: An override is malformed, names an unknown setting, or contradicts the configuration.
    """
    data = config.model_dump(mode="json")
    faults = [fault for text in overrides if (fault := apply_override(data, text)) is not None]
    changed, more = validated(data)
    if changed is None or faults:
        refuse("the overrides", faults + more)
    return changed


def override_pattern() -> str:
    """Return a regular expression that matches the overrides of known settings.

    It names every section and the fields of each, so that a server refuses a misspelt name before it schedules a run.
    Values are checked when the run starts.
    """
    return f"^(?:{'|'.join(_names())})="


def section_pattern(sections: Mapping[str, type[BaseModel]]) -> str:
    """Return a regular expression that matches the overrides of some sections' fields: ``scores.metric=dot``.

    Args:
        sections: The sections, by name.
    """
    names = (
        f"{name}\\.(?:{'|'.join(map(re.escape, model.model_fields))})" for name, model in sections.items()
    )
    return f"^(?:{'|'.join(names)})(?:\\.[^=]+)?="


def changed_sections(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return settings with overrides applied, without validation; the last one wins.

    Raises:
        ConfigError: An override is malformed, or changes a field of a value that has none.
    """
    data = copy.deepcopy(dict(settings))
    if faults := [fault for text in overrides if (fault := apply_override(data, text)) is not None]:
        refuse("the overrides", faults)
    return data


def _names() -> Iterator[str]:
    for section in Config.model_fields:
        fields = "|".join(map(re.escape, fields_at(Config, (section,))))
        yield f"{section}(?:\\.(?:{fields})(?:\\.[^=]+)?)?" if fields else f"{section}(?:\\.[^=]+)?"
