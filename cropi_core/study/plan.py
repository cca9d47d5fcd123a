"""Expand a study file into its curricula: a validated configuration for every arm, world and seed.

study = load_study("demo")
for cell in cells(study, ["runtime.threads=1"]):
    print(cell.label, cell.config.selection.strategy)
"""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cropi_core.config import Fault, describe, find_config, load_config, read_yaml, refuse
from cropi_core.errors import ConfigError
from data_schemas import Arm, Config, Study, World, WorldSource

FOLDER = "studies"
"""Folder of the studies in ``configs/``."""


@dataclass(frozen=True)
class Cell:
    """A curriculum of a study."""

    world: str
    arm: str
    seed: int
    config: Config

    @property
    def label(self) -> str:
        """Display name of the curriculum."""
        return f"{self.world} {self.arm} seed {self.seed}"


def load_study(path_or_preset: str) -> Study:
    """Read a study file, or a preset from ``configs/studies``.

    Raises:
        ConfigError: The file does not exist or is not YAML, or settings are unknown, invalid or contradictory; the
            error lists all faults.
    """
    path = find_config(path_or_preset, FOLDER)
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        refuse(str(path), [_fault(dict(item)) for item in error.errors()])


def _fault(item: dict[str, Any]) -> Fault:
    return describe(Study, item) if item["loc"] else ("", item["msg"].removeprefix("Value error, "))


def cells(study: Study, overrides: list[str] | None = None) -> list[Cell]:
    """Build every curriculum, seed by seed with the reference first, so that an interrupted study has complete seeds.

    Args:
        study: The study.
        overrides: ``section.field=value``, applied to all curricula.

    Raises:
        ConfigError: Settings of a world or an arm are invalid; the error lists all of them with their locations.
    """
    arms = sorted(study.arms, key=lambda name: name != study.reference)
    first, faults = study.seeds[0], []
    for world in study.worlds:
        for arm in arms:
            try:
                config = _config(study, world, arm, first, overrides or [])
            except ConfigError as error:
                faults.append((f"world {world}, arm {arm}", "\n    ".join(str(error).splitlines())))
                continue
            faults += [(f"world {world}", text) for text in _wrong_targets(study.worlds[world], config)]
            faults += [(f"world {world}, arm {arm}", text) for text in _unmeasured(config)]
    if faults:
        refuse(f"study {study.name}", faults)
    return [
        Cell(world, arm, seed, _config(study, world, arm, seed, overrides or []))
        for seed in study.seeds
        for world in study.worlds
        for arm in arms
    ]


def _unmeasured(config: Config) -> list[str]:
    """List what keeps a curriculum from being evaluated, and thus from being compared."""
    if config.ends_with == "training":
        return []
    return [
        f"ends_with={config.ends_with}: such a curriculum evaluates no policy, and a study compares the accuracies of "
        "policies. Remove the field, or compare selections with `cropi compare`."
    ]


def _config(study: Study, world: str, arm: str, seed: int, overrides: list[str]) -> Config:
    """Apply the overrides of study, world, arm and seed to the base configuration."""
    name = f"{study.name}_{arm}"[:40]
    layers = [
        study.settings,
        study.worlds[world].settings,
        study.arms[arm].settings,
        {"seed": seed, "name": name},
    ]
    texts = [f"{key}={json.dumps(value)}" for layer in layers for key, value in layer.items()]
    config = load_config(study.base, texts + overrides)
    return restricted(config) if _restricts(study.arms[arm]) else config


def _restricts(arm: Arm) -> bool:
    return arm.pool == "targets"


def restricted(config: Config) -> Config:
    """Restrict the pool to the families of the validation sets, which is what an oracle would train on.

    The remaining prompts are identical to those of the whole pool.

    Raises:
        ConfigError: Pool or validation sets are not from the embedded world, or have no family in common.
    """
    sources = [config.data.pool, *config.data.validation.values()]
    if not all(isinstance(source, WorldSource) for source in sources):
        raise ConfigError(
            "pool: targets is for the embedded world, whose prompts say what family they are of"
        )
    wanted = {name for source in sources[1:] if isinstance(source, WorldSource) for name in source.families}
    pool = config.data.pool
    assert isinstance(pool, WorldSource)
    families = {name: count for name, count in pool.families.items() if name in wanted}
    if not families:
        raise ConfigError(
            f"pool: targets leaves nothing: the pool has {', '.join(pool.families)}, the validation sets "
            f"{', '.join(sorted(wanted))}"
        )
    data = config.data.model_copy(update={"pool": pool.model_copy(update={"families": families})})
    return config.model_copy(update={"data": data})


def _wrong_targets(world: World, config: Config) -> list[str]:
    """List targets that are not test sets."""
    test_sets = list(config.data.test)
    return [
        f"targets: {name} is not one of its test sets; there are {', '.join(test_sets) or 'none'}"
        + (
            " (a validation set chooses the data, and may not judge it)"
            if name in config.data.validation
            else ""
        )
        for name in world.targets
        if name not in test_sets
    ]
