"""Fixed shares by source: every named source has its number, the rest is by rank, and nothing fills an empty place."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cropi_core.errors import SelectionError
from cropi_core.selection.shares import share_sizes, take
from cropi_core.selection.strategies import select
from cropi_core.world import build
from data_schemas.selection import Selection


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=6).filter(lambda weights: sum(weights) <= 100),
    st.integers(1, 500),
)
def test_sizes_add_up_and_are_within_one_of_the_shares(weights, size):
    shares = {f"s{i}": weight / 100 for i, weight in enumerate(weights)}
    sizes = share_sizes(shares, size)
    assert sum(sizes.values()) == (sum(weights) * size + 50) // 100
    for name, share in shares.items():
        assert abs(sizes[name] - share * size) < 1 + 1e-9


@given(
    st.lists(st.sampled_from("abcd"), min_size=8, max_size=60).filter(lambda s: {"a", "b"} <= set(s)),
    st.data(),
)
def test_each_source_gives_its_best_prompts(sources, data):
    best = np.array(data.draw(st.permutations(range(len(sources)))))
    size = data.draw(st.integers(1, len(sources)))
    shares = {"a": 0.5, "b": 0.2}
    chosen = take(best, sources, size, shares)
    assert len(set(chosen.tolist())) == len(chosen) <= size
    sizes = share_sizes(shares, size) | {"": size - sum(share_sizes(shares, size).values())}
    for name, count in sizes.items():
        of_source = [p for p in best.tolist() if (sources[p] if sources[p] in shares else "") == name]
        assert [p for p in chosen.tolist() if p in of_source] == of_source[:count]


def test_a_selection_has_the_shares_and_states_what_is_missing(tmp_path: Path):
    prompts, out = tmp_path / "prompts.parquet", tmp_path / "selection.parquet"
    pq.write_table(build({"reverse": 30, "copy": 60, "sort": 10}, "pool", 0), prompts)
    settings = Selection(strategy="random", ratio=0.4, shares={"reverse": 0.5, "sort": 0.375})
    summary = select(prompts=prompts, out=out, settings=settings)
    taken = {name: counts["selected"] for name, counts in summary["sources"].items()}
    assert taken == {"reverse": 20, "sort": 10, "copy": 5}
    assert summary["shares"] == {"reverse": 20, "sort": 15}
    assert (summary["selected"], summary["short_by"]) == (35, 5)
    table = pq.read_table(out).to_pylist()
    whole = select(
        prompts=prompts, out=tmp_path / "w.parquet", settings=Selection(strategy="random", ratio=0.4)
    )
    assert "shares" not in whole
    assert [row["rank"] for row in table] == pq.read_table(tmp_path / "w.parquet")["rank"].to_pylist()


def test_shares_that_cannot_hold_are_refused(tmp_path: Path):
    with pytest.raises(ValidationError, match=r"add up to 1\.1, more than 1"):
        Selection(shares={"a": 0.6, "b": 0.5})
    assert Selection(shares={"a": 0.7, "b": 0.2, "c": 0.1}).shares
    prompts = tmp_path / "prompts.parquet"
    pq.write_table(build({"reverse": 4, "copy": 4}, "pool", 0), prompts)
    with pytest.raises(SelectionError, match="names the source 'code', and the pool has none"):
        select(
            prompts=prompts,
            out=tmp_path / "s.parquet",
            settings=Selection(strategy="random", shares={"code": 0.5}),
        )


def test_the_key_of_a_selection_without_shares_is_unchanged():
    assert "shares" not in Selection().for_key()
    assert Selection(shares={"a": 0.5}).for_key()["shares"] == {"a": 0.5}
