"""Sets of prompts from others: several sources as one, in which shared prompts are kept once; random draws."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from cropi_core.errors import DataError
from cropi_core.prompts.loading import load_source
from cropi_core.prompts.rows import Row, asked_text
from data_schemas import PROMPTS, MixSource


def load_mix(source: MixSource, split: str, location: Mapping[str, str]) -> tuple[pa.Table, dict[str, int]]:
    """Read the sources of a mix, one after another.

    Args:
        source: The sources.
        split: As for :func:`cropi_core.prompts.loading.load_source`.
        location: ``path.i`` of source i, if that is a file.

    Returns:
        The table (``data_schemas.tables.PROMPTS``), and the number of dropped rows by reason: the sums over the
        sources, and ``duplicates_of_another_source``.

    Raises:
        ConfigError: See :func:`cropi_core.prompts.loading.load_source`.
        DataError: See there; or two sources give different prompts the same id.
    """
    dropped: Counter[str] = Counter()
    kept: dict[str, Row] = {}
    names: dict[str, int] = {}
    for number, one in enumerate(source.sources):
        table, counts = load_source(one, split, location.get(f"path.{number}"))
        dropped.update(counts)
        for row in table.to_pylist():
            if (text := asked_text(row)) in kept:
                dropped["duplicates_of_another_source"] += 1
                continue
            if (other := names.get(row["prompt_id"])) is not None:
                raise DataError(
                    f"sources {other} and {number} of the mix have different prompts called {row['prompt_id']!r}: "
                    "leave out columns.prompt_id of one, and ids are made of the prompts"
                )
            kept[text] = row
            names[row["prompt_id"]] = number
    return pa.Table.from_pylist(list(kept.values()), schema=PROMPTS), dict(dropped)


def draw_prompts(table: pa.Table, count: int, seed: int) -> pa.Table:
    """Draw prompts at random, in their order; a larger draw with the same seed contains a smaller one.

    Args:
        table: Prompts (``data_schemas.tables.PROMPTS``).
        count: How many.
        seed: Seed of the draw.
    """
    shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(table.num_rows)
    return table.take(pa.array(np.sort(shuffled[:count])))
