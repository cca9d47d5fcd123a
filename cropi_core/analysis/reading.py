"""Read a run's selections: metrics by stage, changes between stages, and which of the paper's findings hold.

A failed or running run can be read too: missing data becomes a note, not an error.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from cropi_core.analysis import columns
from cropi_core.analysis.contrast import (
    Change,
    Contrast,
    chance_jaccard,
    change,
    contrast,
    contrast_json,
    level_numbers,
)
from cropi_core.analysis.findings import Verdict, later_is_harder, over_stages
from cropi_core.analysis.likeness import redundancy
from cropi_core.analysis.selection_diff import SelectionDiff, compare_selections
from cropi_core.analysis.sentences import Embed, load_embedder
from cropi_core.artifacts import SELECTION_FILE, Store
from cropi_core.errors import ArtifactError, ConfigError, SelectionError
from cropi_core.runs import Artifacts, Pool, load_run, read_pool
from data_schemas import SELECTION

DIFFICULTIES = {"level": "human level", "difficulty": "1 − pass rate of the base"}
"""Measures of a prompt's difficulty."""


@dataclass(frozen=True)
class StageChosen:
    """The selection of one stage.

    Attributes:
        stage: Counted from 1.
        pool: Number of prompts in the pool.
        selected: Number of selected prompts.
        figures: Metrics by name: ``entropy`` (nats per token, of prompts with a gradient, under the policy that
            selected), ``pass_rate`` and ``length`` (tokens) of the trajectories that the stage selected by, ``level``
            (human), ``difficulty`` (1 − pass rate of the base policy), ``similarity`` (mean cosine of texts with the
            validation sets, averaged over these), ``similarity:SET`` and ``nearest:SET`` (cosine with its nearest
            prompt), ``alike`` and ``alike_nearest`` (cosines of gradient features among the selected). Unknown metrics
            are absent.
        moved: Comparison with the previous stage: Jaccard index, rank correlation, prompts added and removed; None for
            the first stage.
        chance_jaccard: Expected Jaccard index of two random subsets of these sizes.
        harder: Change of each measure of difficulty since the previous stage.
    """

    stage: int
    pool: int
    selected: int
    figures: dict[str, Contrast]
    moved: SelectionDiff | None = None
    chance_jaccard: float | None = None
    harder: dict[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class RunChosen:
    """The selections of a run by stage, and the resulting tests of the paper's findings."""

    run: str
    stages: list[StageChosen]
    verdicts: list[Verdict]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        fields = asdict(self)
        for stage, raw in zip(self.stages, fields["stages"], strict=True):
            raw["figures"] = {name: contrast_json(one) for name, one in stage.figures.items()}
            raw["moved"] = stage.moved and stage.moved.as_json()
        return fields


def read_chosen(store: Store, run: str, embed: Embed | None = None) -> RunChosen:
    """Read the selections of a run.

    Args:
        store: Store that contains the run.
        run: Id of the run.
        embed: Function from texts to vectors, for the similarity to the validation sets; default: the one of
            :func:`cropi_core.analysis.sentences.load_embedder`, or a note if it is not installed.

    Raises:
        ArtifactError: The run does not exist, or its record cannot be read.
    """
    artifacts = Artifacts(store, load_run(store, run))
    result = chosen_of(artifacts, artifacts.stages("selection"), embed, fetch=True)
    return RunChosen(result.run, result.stages, result.verdicts, [*result.notes, *artifacts.problems])


def chosen_of(
    artifacts: Artifacts, stages: Sequence[int], embed: Embed | None = None, *, fetch: bool = False
) -> RunChosen:
    """Read the selections of given stages from opened artifacts.

    Args:
        artifacts: Artifacts of the run; what cannot be read is added to their problems.
        stages: Stages, ascending; those without a selection are skipped.
        embed: As for :func:`read_chosen`.
        fetch: Download gradients that exist only in an object store.
    """
    pool = read_pool(artifacts)
    tables = {m: artifacts.table(f"selection@{m}", SELECTION_FILE, SELECTION.names) for m in stages}
    chosen = {m: table for m, table in tables.items() if table is not None}
    if pool is None or not chosen:
        return RunChosen(artifacts.record.run, [], [], [])
    reader = Reader(artifacts, pool, embed, fetch)
    selections: list[StageChosen] = []
    masks = {m: columns.selected_of(artifacts, table, pool.ids) for m, table in chosen.items()}
    for stage in chosen:
        before = selections[-1].stage if selections else None
        selections.append(_stage(reader, stage, before, chosen, masks))
    first, last = masks[selections[0].stage], masks[selections[-1].stage]
    harder = {
        label: change(values, first, last)
        for name, label in DIFFICULTIES.items()
        if len(selections) > 1 and (values := reader.fixed.get(name)) is not None
    }
    verdicts = [
        over_stages(
            "selected prompts have lower entropy than the pool",
            "lower",
            {one.stage: one.figures.get("entropy") for one in selections},
        ),
        over_stages(
            "they are closer to the validation sets",
            "higher",
            {one.stage: one.figures.get("similarity") for one in selections},
        ),
        later_is_harder(harder),
    ]
    return RunChosen(artifacts.record.run, selections, verdicts, reader.notes)


class Reader:
    """Metrics of a run's pool; data used by several stages is read once."""

    def __init__(self, artifacts: Artifacts, pool: Pool, embed: Embed | None, fetch: bool) -> None:
        self.artifacts, self.pool, self.fetch = artifacts, pool, fetch
        self.notes: list[str] = []
        self.fixed: dict[str, np.ndarray] = {"level": level_numbers(pool.levels)}
        self._trajectories: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if pool.has_levels and not np.isfinite(self.fixed["level"]).any():
            self.note("levels are names without a number: they are counted, and have no mean")
        if (base := columns.base_pass_rate(artifacts, pool.ids)) is not None:
            self.fixed["difficulty"] = 1 - base.pass_rate
            if not base.same_policy:
                self.note(
                    "difficulty is 1 − pass rate in the first stage's trajectories, which another policy sampled"
                )
        self._similar(embed)

    def note(self, text: str) -> None:
        """Record a note about missing data or about the basis of a metric, once."""
        if text not in self.notes:
            self.notes.append(text)

    def stage_figures(self, stage: int, selected: np.ndarray) -> dict[str, Contrast]:
        """Compare a stage's selection with the pool by every metric."""
        values: dict[str, np.ndarray] = {}
        if (slot := self.artifacts.latest("rollouts/pool", stage)) is not None:
            if slot not in self._trajectories:
                self._trajectories[slot] = columns.trajectories(self.artifacts, slot, self.pool.ids)
            values["pass_rate"], values["length"] = self._trajectories[slot]
        compared = {name: contrast(column, selected) for name, column in (values | self.fixed).items()}
        contrasts = {name: one for name, one in compared.items() if one is not None}
        return self._of_gradients(stage, selected) | contrasts

    def _of_gradients(self, stage: int, selected: np.ndarray) -> dict[str, Contrast]:
        """Compare entropies and cosines; empty if the stage has no readable gradients."""
        slot, seed = self.artifacts.latest("gradients/pool", stage), self.artifacts.config.seed
        if slot is None:
            return {}
        try:
            gradients = columns.open_gradients(self.artifacts, slot, self.fetch)
            if gradients is None:
                self.note(f"{slot} is not on this machine or cannot be read: no entropy and no redundancy")
                return {}
            entropy = contrast(columns.entropy_of(gradients, self.pool.ids), selected)
            chosen_features, pool_features = columns.compared_features(
                gradients, self.pool.ids, selected, seed
            )
        except ArtifactError as error:
            self.artifacts.problem(slot, error)
            return {}
        contrasts = {} if entropy is None else {"entropy": entropy}
        alike = redundancy(chosen_features, pool_features, seed=seed)
        return contrasts | {
            {"alike": "alike", "nearest": "alike_nearest"}[name]: one for name, one in alike.items()
        }

    def _similar(self, embed: Embed | None) -> None:
        try:
            embed = embed or load_embedder()
        except ConfigError as error:
            self.note(str(error))
            return
        cosines = columns.similarities(self.artifacts, embed, self.pool.ids)
        if cosines:
            self.fixed["similarity"] = np.mean([mean for mean, _ in cosines.values()], axis=0)
        for name, (mean, nearest) in cosines.items():
            self.fixed |= {f"similarity:{name}": mean, f"nearest:{name}": nearest}


def _stage(
    reader: Reader,
    stage: int,
    before: int | None,
    tables: dict[int, pa.Table],
    masks: dict[int, np.ndarray],
) -> StageChosen:
    selected, pool = masks[stage], reader.pool
    figures = reader.stage_figures(stage, selected)
    if before is None:
        return StageChosen(stage, len(pool.ids), int(selected.sum()), figures)
    harder = {
        name: moved
        for name in DIFFICULTIES
        if (values := reader.fixed.get(name)) is not None
        and (moved := change(values, masks[before], selected)) is not None
    }
    return StageChosen(
        stage,
        len(pool.ids),
        int(selected.sum()),
        figures,
        moved=_moved(reader, tables[before], tables[stage], f"selection@{stage}"),
        chance_jaccard=chance_jaccard(int(masks[before].sum()), int(selected.sum()), len(pool.ids)),
        harder=harder,
    )


def _moved(reader: Reader, before: pa.Table, after: pa.Table, slot: str) -> SelectionDiff | None:
    pool = reader.pool
    levels = [level or None for level in pool.levels]
    origins = dict(zip(pool.ids, zip(pool.sources, levels, strict=True), strict=True))
    try:
        return compare_selections(before, after, origins)
    except SelectionError as error:  # a pinned selection can belong to another pool
        reader.artifacts.problem(slot, error)
        return None
