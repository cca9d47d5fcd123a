"""Grading settings in artifact keys, and the settings that a step receives outside its key.

A key contains a user's function as its name and source digest, and a server as its name and its version or URL. File
locations, request timeouts and the variables that hold secrets are passed to the step separately, and do not change
keys.
"""

from collections.abc import Iterable
from typing import Any

from cropi_core.errors import ConfigError
from cropi_core.rewards.functions import source_digest
from data_schemas import Grading, StepSpec

LOCATION = "grading"
"""Name under which the whole section is stored in :attr:`~data_schemas.records.StepSpec.location`."""


VERIFIER_VERSIONS = {"numeric": 4, "math": 4, "choice": 4}
"""Incremented by hand when a built-in verifier gives another reward for the same text; others have version 1."""


def key_settings(grading: Grading, verifiers: Iterable[str] = ()) -> dict[str, Any]:
    """Return the grading settings for a key: the section itself if it defines no verifiers.

    Args:
        grading: The section.
        verifiers: Names of the verifiers that the prompts use; built-in ones with a version other than 1 are added.

    Raises:
        ConfigError: A function's source cannot be read.
    """
    settings = {name: value for name, value in grading.for_key().items() if name not in ("functions", "http")}
    if grading.functions:
        settings["functions"] = {
            name: f"{source_digest(path)}:{path.rpartition(':')[2]}"
            for name, path in grading.functions.items()
        }
    if grading.http:
        settings["http"] = {name: one.version or one.url for name, one in grading.http.items()}
    used = {term for name in verifiers for term in grading.terms(name)}
    if versions := {name: VERIFIER_VERSIONS[name] for name in sorted(VERIFIER_VERSIONS.keys() & used)}:
        settings["verifiers"] = versions
    return settings


def grading_location(grading: Grading) -> dict[str, str]:
    """Return the grading settings that a step needs but its key lacks; empty if the key has all of them."""
    return {LOCATION: grading.model_dump_json()} if grading.functions or grading.http else {}


def grading_of(spec: StepSpec) -> Grading:
    """Read a step's section back.

    Raises:
        ConfigError: A function's source differs from the one in the step's key, or cannot be found.
    """
    stored = spec.settings["grading"]
    if LOCATION not in spec.location and not {"functions", "http"} & set(stored):
        return Grading.model_validate({name: value for name, value in stored.items() if name != "verifiers"})
    grading = Grading.model_validate_json(spec.location.get(LOCATION, "{}"))
    now = key_settings(grading)
    for section in ("functions", "http"):
        before, after = stored.get(section, {}), now.get(section, {})
        if changed := sorted(name for name in {*before, *after} if before.get(name) != after.get(name)):
            raise ConfigError(
                f"{spec.slot}: {', '.join(f'grading.{section}.{name}' for name in changed)} is not what this step was "
                "to be graded with: its source, version or URL has changed since. Run the curriculum again"
            )
    return grading
