"""Metrics of a pool's prompts, read from a run's artifacts in the order of the pool."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from cropi_core.analysis.likeness import similarity
from cropi_core.analysis.sentences import Embed, prompt_text
from cropi_core.artifacts import GRADIENTS, PROMPTS_FILE, ROLLOUTS, floats, places
from cropi_core.runs import Artifacts
from data_schemas import STATUSES

if TYPE_CHECKING:
    from cropi_core.gradients import GradientStore

OK = STATUSES.index("ok")

pc: Any = pyarrow.compute  # pyarrow creates its functions at import time, so type checkers do not see them
BATCH = 4096
MOST_CHOSEN = 256
MOST_POOL = 1024
MOST_BYTES = 256 << 20
"""Limits for comparing gradient features with one another: rows of the selection, rows of the pool, bytes in memory."""


def in_order(ids: list[str], names: list[str], values: np.ndarray) -> np.ndarray:
    """Return values in the order of ``ids``, as float64; NaN for ids that ``names`` does not contain."""
    return np.append(values.astype(np.float64), np.nan)[
        places(ids, names)
    ]  # index -1 selects the appended NaN


def trajectories(artifacts: Artifacts, slot: str, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean graded reward and the mean completion length in tokens of every prompt, ``(n,)`` each.

    Token ids are counted while the files are scanned, so that completions are never all in memory.
    """
    unknown = np.full(len(ids), np.nan)
    path = artifacts.path(slot, ROLLOUTS)
    if path is None:
        return unknown, unknown
    columns = {"prompt_id": ds.field("prompt_id"), "reward": ds.field("reward")}
    columns["tokens"] = pc.list_value_length(ds.field("completion_ids"))
    table = None
    with artifacts.recorded_problems(slot, "rollouts cannot be read"):
        files = [str(file) for file in sorted(path.glob("part-*.parquet"))]
        table = ds.dataset(files, format="parquet").to_table(columns=columns)
    if table is None:
        return unknown, unknown
    means = table.group_by("prompt_id").aggregate([("reward", "mean"), ("tokens", "mean")])
    names = means["prompt_id"].to_pylist()
    rate, tokens = (floats(means[name]) for name in ("reward_mean", "tokens_mean"))
    return in_order(ids, names, rate), in_order(ids, names, tokens)


def selected_of(artifacts: Artifacts, table: pa.Table, ids: list[str]) -> np.ndarray:
    """Return a mask of the pool's prompts that a selection contains, ``(n,)`` bool."""
    names = table["prompt_id"].to_pylist()
    return in_order(ids, names, floats(table["selected"].cast(pa.float64()))) == 1


def open_gradients(artifacts: Artifacts, slot: str, fetch: bool) -> "GradientStore | None":
    """Open the gradients of a slot.

    Args:
        artifacts: Artifacts of the run.
        slot: Slot of the gradients.
        fetch: Download gradients that exist only in an object store; they are the largest artifacts.

    Returns:
        The store; None if the gradients are not on this machine or if files are missing.

    Raises:
        ArtifactError: The gradients are damaged.
    """
    manifest, store = artifacts.manifest(slot), artifacts.store
    if manifest is None or (not fetch and store.remote is not None and not store.path(manifest.ref).exists()):
        return None
    path = artifacts.path(slot, GRADIENTS)
    if path is None:
        return None
    from cropi_core.gradients import GradientStore  # imports Zarr

    return GradientStore.open(path)


def entropy_of(gradients: "GradientStore", ids: list[str]) -> np.ndarray:
    """Return the mean token entropy of every prompt in nats, ``(n,)``; NaN for prompts without a gradient."""
    values = np.where(gradients.column("status") == OK, gradients.column("entropy"), np.nan)
    return in_order(ids, list(gradients.column("prompt_id")), values)


def compared_features(
    gradients: "GradientStore", ids: list[str], selected: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Read the features to compare by cosine: of selected prompts, and of a random sample of the pool.

    Args:
        gradients: Gradients of the pool.
        ids: ``n`` prompt ids of the pool.
        selected: ``(n,)`` bool.
        seed: Seed of the samples, which are drawn if the features do not fit in memory.

    Returns:
        ``(m, k)`` and ``(r, k)`` float32, of prompts with a gradient; all of them if they fit in memory.
    """
    chosen = {name for name, is_selected in zip(ids, selected, strict=True) if is_selected}
    live = np.flatnonzero(gradients.column("status") == OK)
    is_selected = np.array([name in chosen for name in gradients.column("prompt_id")[live]], dtype=bool)
    capacity = MOST_BYTES // (4 * gradients.k)
    random = np.random.Generator(np.random.PCG64(seed))

    def part(rows: np.ndarray, limit: int) -> np.ndarray:
        return rows if len(rows) <= limit else np.sort(random.choice(rows, limit, replace=False))

    chosen_rows = part(live[is_selected], min(MOST_CHOSEN, capacity // 5))
    pool_rows = part(live, min(MOST_POOL, capacity - len(chosen_rows)))
    union = np.union1d(chosen_rows, pool_rows)
    features = np.empty((len(union), gradients.k), dtype=np.float32)
    for span, block in gradients.blocks() if len(union) else ():
        begin, end = np.searchsorted(union, [span.start, span.stop])
        features[begin:end] = block[union[begin:end] - span.start]
    return features[np.searchsorted(union, chosen_rows)], features[np.searchsorted(union, pool_rows)]


def similarities(
    artifacts: Artifacts, embed: Embed, ids: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return, by validation set, every pool prompt's mean and largest cosine with the set's prompts.

    The pool's texts are read and embedded in batches, so that they are never all in memory.
    """
    sets = {name: list(_texts(artifacts, f"prompts/{name}")) for name in artifacts.config.data.validation}
    targets = {
        name: np.concatenate([embed(texts) for _, texts in batches])
        for name, batches in sets.items()
        if batches
    }
    names: list[str] = []
    cosines: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in targets}
    for batch, texts in _texts(artifacts, "prompts/pool") if targets else ():
        vectors = embed(texts)
        names += batch
        for name, parts in cosines.items():
            parts.append(similarity(vectors, targets[name]))
    return {
        name: (
            in_order(ids, names, np.concatenate([mean for mean, _ in parts])),
            in_order(ids, names, np.concatenate([nearest for _, nearest in parts])),
        )
        for name, parts in cosines.items()
        if parts
    }


@dataclass(frozen=True)
class Base:
    """Every prompt's metrics from the first stage's trajectories, and whether the base policy sampled these."""

    pass_rate: np.ndarray
    same_policy: bool


def base_pass_rate(artifacts: Artifacts, ids: list[str]) -> Base | None:
    """Read the base policy's pass rates from the first stage's trajectories; None if they do not exist yet."""
    slot = next(
        (s for s in ("rollouts/pool/stored@1", "rollouts/pool@1") if s in artifacts.record.slots), None
    )
    manifest = artifacts.manifest(slot) if slot else None
    if slot is None or manifest is None:
        return None
    policy, base = manifest.inputs.get("policy"), artifacts.record.slots.get("policy@0")
    same_policy = policy is not None and base is not None and policy.digest == base.ref.digest
    return Base(trajectories(artifacts, slot, ids)[0], same_policy)


def _texts(artifacts: Artifacts, slot: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ids and texts of a set of prompts in batches."""
    path = artifacts.path(slot, PROMPTS_FILE)
    if path is None:
        return
    with artifacts.recorded_problems(slot, "prompts cannot be read"), pq.ParquetFile(path) as file:
        if lacking := sorted({"prompt_id", "messages"} - set(file.schema_arrow.names)):
            artifacts.problem(slot, f"{path.name} lacks the columns {', '.join(lacking)}")
            return
        for batch in file.iter_batches(BATCH, columns=["prompt_id", "messages"]):
            names, conversations = batch["prompt_id"].to_pylist(), batch["messages"].to_pylist()
            yield names, [prompt_text(messages) for messages in conversations]
