"""The columns of a gradient store that scoring uses, read once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cropi_core.artifacts import places
from cropi_core.gradients import GradientStore
from data_schemas import STATUSES


@dataclass(frozen=True)
class Pool:
    """Columns of a gradient store, one value per prompt; the features stay on disk.

    Attributes:
        ids: ``(n,)`` prompt ids.
        status: ``(n,)`` indices in :data:`data_schemas.tables.STATUSES`.
        ess: ``(n,)`` effective sample sizes, NaN without a gradient.
        mean_reward: ``(n,)``, NaN without a graded completion.
        norm: ``(n,)`` norms of the gradients, NaN without one.
    """

    ids: np.ndarray
    status: np.ndarray
    ess: np.ndarray
    mean_reward: np.ndarray
    norm: np.ndarray

    @classmethod
    def read(cls, store: GradientStore) -> "Pool":
        """Read the columns of a finished store."""
        return cls(
            store.column("prompt_id"),
            store.column("status"),
            store.column("ess"),
            store.column("mean_reward"),
            store.column("norm"),
        )

    def among(self, ids: Sequence[str]) -> "Pool":
        """Return the columns of a larger pool; prompts that were not sampled have too few graded completions."""
        rows = places(ids, list(self.ids))
        missing = rows < 0
        columns = [
            np.where(missing, np.nan, values[rows]) for values in (self.ess, self.mean_reward, self.norm)
        ]
        status = np.where(missing, STATUSES.index("too_few_gradable"), self.status[rows])
        return Pool(np.array(ids, dtype=object), status.astype(self.status.dtype), *columns)

    @property
    def with_gradient(self) -> np.ndarray:
        """``(n,)`` bool: the prompts that have a gradient."""
        return self.status == 0


def status_counts(status: np.ndarray) -> dict[str, int]:
    """Count prompts by status; every status is listed."""
    return {name: int((status == code).sum()) for code, name in enumerate(STATUSES)}


def describe_statuses(status: np.ndarray) -> str:
    """Describe the counts by status for an error message."""
    return ", ".join(f"{name} {count}" for name, count in status_counts(status).items())
