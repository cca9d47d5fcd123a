"""Direct reads of shard files return what zarr returns, and an error for every incomplete file."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec

from cropi_core.errors import ArtifactError
from cropi_core.gradients import reader as shard_reader
from cropi_core.gradients.reader import direct_layout, in_order, widen
from cropi_core.gradients.store import GradientStore


def filled(
    path: Path, n: int = 23, k: int = 6, rows_per_shard: int = 4, dtype: str = "float16"
) -> GradientStore:
    """Create a store with a gradient in two of three rows, and none in the second shard."""
    rng = np.random.default_rng(0)
    rows, status = rng.standard_normal((n, k)).astype(np.float32), (np.arange(n) % 3 == 1).astype(np.uint8)
    status[rows_per_shard : 2 * rows_per_shard] = 1
    ids = [str(i) for i in range(n)]
    store = GradientStore.create(path, ids, k=k, dtype=dtype, rows_per_shard=rows_per_shard, attributes={})
    for shard in range(store.shards):
        here = slice(store.shard_rows(shard).start, store.shard_rows(shard).stop)
        store.write_shard(shard, rows[here], {"status": status[here]})
    store.finish()
    return GradientStore.open(path)


def by_zarr(store: GradientStore) -> np.ndarray:
    features = np.asarray(zarr.open_group(store.path, mode="r")["features"][:])  # type: ignore[index]
    return features.astype(np.float32) * store.column("scale")[:, None]


@pytest.fixture(params=["float16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GradientStore:
    """Return a store with chunks of two rows, two per shard: spans can start inside chunks, some chunks are absent."""
    monkeypatch.setattr("cropi_core.gradients.layout.CHUNK_BYTES", 2 * 6 * np.dtype(request.param).itemsize)
    return filled(tmp_path / "a.zarr", dtype=request.param)


def test_every_span_is_what_zarr_reads(store: GradientStore):
    assert store._layout == shard_reader.ShardLayout(chunk_rows=2, chunks=2)
    expected = by_zarr(store)
    for start in range(store.n + 1):
        for stop in range(start, store.n + 1):
            np.testing.assert_array_equal(store.rows(start, stop), expected[start:stop])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("rows", [None, 1, 3, 100])
def test_blocks_are_the_same_for_any_number_of_threads(store: GradientStore, rows: int | None, threads: int):
    seen = list(store.blocks(rows, threads))
    np.testing.assert_array_equal(np.concatenate([block for _, block in seen]), by_zarr(store))
    assert [i for place, _ in seen for i in range(store.n)[place]] == list(range(store.n))


def test_a_bit_flipped_anywhere_in_a_shard_is_an_error(store: GradientStore):
    """The index, which has its own checksum, is included."""
    shard = store.path / "features" / "c" / "2" / "0"
    whole = shard.read_bytes()
    for place in range(len(whole)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match="features is damaged"):
            store.rows(8, 12)
    for length in range(len(whole)):
        shard.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="features is damaged"):
            store.rows(8, 12)
    shard.write_bytes(whole)
    np.testing.assert_array_equal(store.rows(8, 12), by_zarr(store)[8:12])


def test_a_shard_lost_after_opening_is_an_error_and_not_zeros(store: GradientStore):
    (store.path / "features" / "c" / "2" / "0").unlink()
    with pytest.raises(ArtifactError, match="features is damaged"):
        list(store.blocks())


def test_an_array_of_another_codec_is_read_through_zarr(tmp_path: Path):
    store = filled(tmp_path / "a.zarr")
    expected = store.rows(0, store.n)
    group = zarr.open_group(store.path, mode="r+")
    stored = np.asarray(group["features"][:])  # type: ignore[index]
    del group["features"]
    codec = BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=2)
    array = group.create_array(
        "features", shape=stored.shape, dtype="float16", chunks=(2, 6), shards=(4, 6), compressors=[codec]
    )
    array[:] = stored
    assert direct_layout(array) is None
    np.testing.assert_array_equal(GradientStore.open(store.path).rows(0, store.n), expected)


def test_every_half_is_widened_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    for part in (halves, halves[:, 3:100], halves[:0], np.sort(halves[np.isfinite(halves)])[None, :]):
        got = np.empty(part.shape, dtype=np.float32)
        widen(part, got)
        np.testing.assert_array_equal(got, part.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(got), np.signbit(part.astype(np.float32)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 6))
def test_results_have_the_order_of_the_items(delays: list[int], threads: int):
    def work(item: tuple[int, int]) -> int:
        time.sleep(item[1] / 1000)
        return -item[0]

    items = list(enumerate(delays))
    assert list(in_order(work, items, threads)) == [(item, -item[0]) for item in items]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_takes_the_place_of_its_result_and_stops_later_items(threads: int):
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return 1 // (item - 5)

    seen = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(item for item, _ in in_order(work, range(1000), threads))
    assert seen == [0, 1, 2, 3, 4]
    assert max(begun) <= 5 + threads + 1


def test_who_stops_half_way_leaves_no_thread():
    before = threading.active_count()
    stream = in_order(lambda item: item, range(1000), 3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
