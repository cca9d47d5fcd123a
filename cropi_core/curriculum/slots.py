"""Slots of a run: their names, the pins that match them, and the settings of a source of prompts.

``prompts/pool``, ``prompts/<set>``, ``policy@0`` (the base), ``rollouts/pool@1``, ``rollouts/<set>@1``,
``gradients/pool@m``, ``gradients/<set>@m``, ``scores@m``, ``selection@m``, ``policy@m`` (after stage m),
``evaluation@m``. ``<set>`` is the name of a validation or test set. The spot check of a stage fills ``prompts/spot@m``,
``rollouts/spot@m``, ``gradients/spot@m``, ``scores/spot@m`` and ``diagnostics@m``. The part of the pool that is sampled
(`rollouts.pool_share`) is at ``prompts/pilot@m``. Prompts that a later stage samples
again (`rollouts.refresh: waking`) are at ``prompts/waking@m``, their completions at ``rollouts/waking@m``. Artifacts
that a stage computed from stored trajectories before it sampled new ones are kept at ``<slot>/stored@m``.
"""

import hashlib
from pathlib import Path
from typing import Any

from cropi_core.artifacts import file_sha256, table_files
from data_schemas import (
    Config,
    MixSource,
    PromptsSettings,
    ReasoningGymSource,
    Source,
    TableSource,
    canonical_json,
)


def slot_names(config: Config) -> list[str]:
    """List the slots that a run of ``config`` may fill, in order."""
    validation, test = list(config.data.validation), list(config.data.test)
    names = [f"prompts/{name}" for name in ["pool", *validation, *test]] + ["policy@0"]
    evaluated = config.ends_with == "training"
    names += ["evaluation@0"] if evaluated else []
    for stage in range(1, config.stages + 1):
        if config.needs_rollouts:
            measured = ["pool", *(validation if config.needs_gradients else [])]
            if stage == 1 or config.may_refresh or pins_rollouts(config, stage):
                names += [f"prompts/pilot@{stage}"] if config.rollouts.pool_share < 1 else []
                names += [f"rollouts/{name}@{stage}" for name in measured]
            if stage > 1 and config.rollouts.refresh == "waking":
                names += [f"{kind}/waking@{stage}" for kind in ("prompts", "rollouts")]
            if config.scores_at(stage):
                names += [f"gradients/{name}@{stage}" for name in measured] + [f"scores@{stage}"]
            if config.scores_at(stage) and config.selection.strategy == "auto":
                names += [f"{kind}/halves@{stage}" for kind in ("rollouts", "gradients")]
            if config.needs_spot_check and config.scores_at(stage):
                spot = ("prompts", "rollouts", "gradients", "scores")
                names += [*[f"{kind}/spot@{stage}" for kind in spot], f"diagnostics@{stage}"]
        names.append(f"selection@{stage}")
        names += [f"policy@{stage}"] if evaluated or stage < config.stages else []
        names += [f"evaluation@{stage}"] if evaluated else []
    return names


def pins_rollouts(config: Config, stage: int) -> bool:
    """Whether the configuration pins the rollouts of the pool at exactly this stage."""
    return f"rollouts/pool@{stage}" in config.pin


def pin_for(pins: dict[str, str], slot: str) -> str | None:
    """Find the pin of a slot: by the slot itself, by the slot without its stage, or by kind alone for the pool.

    ``rollouts/pool@1`` is pinned by ``rollouts/pool@1``, ``rollouts/pool`` or ``rollouts``; ``policy`` alone pins the
    base, never a trained policy.
    """
    name, _, stage = slot.partition("@")
    names = [slot] if name == "policy" and stage != "0" else [slot, name]
    if name.endswith("/pool"):
        names.append(name.removesuffix("/pool"))
    return next((pins[n] for n in names if n in pins), None)


def source_settings(source: Source, split: str) -> tuple[PromptsSettings, dict[str, str]]:
    """Split a source into the settings of its step and its location. A file is identified by its content."""
    settings, location = _source_parts(source, split)
    return PromptsSettings.model_validate(settings), location


def _source_parts(source: Source, split: str) -> tuple[dict[str, Any], dict[str, str]]:
    if isinstance(source, MixSource):
        parts = [_source_parts(one, split) for one in source.sources]
        versions = {
            k: v for settings, _ in parts for k, v in settings.items() if k not in ("source", "split")
        }
        mixed = {"kind": "mix", "sources": [settings["source"] for settings, _ in parts]}
        places = {f"path.{i}": at["path"] for i, (_, at) in enumerate(parts) if "path" in at}
        return {"source": mixed, "split": split, **versions}, places
    settings = source.for_key()
    if isinstance(source, ReasoningGymSource):
        from cropi_core.prompts import package_version  # late: imports the tables

        return {"source": settings, "split": split, "reasoning_gym": package_version()}, {}
    if not isinstance(source, TableSource):
        return {"source": settings, "split": split}, {}
    settings.pop("preset", None)  # the fields that it filled in are part of the settings
    if source.kind == "hub":
        return {"source": settings, "split": split}, {}
    path = Path(source.path).expanduser()
    files = table_files(path)
    digests = [(file.name, file_sha256(file)) for file in files]
    if len(files) > 1 or files[0] != path:
        digests = [("", hashlib.sha256(canonical_json(digests).encode()).hexdigest())]
    settings["path"] = "sha256:" + digests[0][1]
    return {"source": settings, "split": split}, {"path": str(path)}
