"""The gradient store returns what was written, and its bytes depend only on that."""

import hashlib
import multiprocessing
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi_core.errors import ArtifactError, DataError
from cropi_core.gradients import layout as gradient_layout
from cropi_core.gradients.store import GradientStore
from tests.support import processes
from tests.support.gradient_stores import ROWS, STATUS, K, N, create, features, ids, write
from tests.support.paths import CHECKOUT


def filled(path: Path, order: tuple[int, ...] = (0, 1, 2), dtype: str = "float16") -> GradientStore:
    store = create(path, dtype=dtype)
    for shard in order:
        write(store, shard)
    store.finish()
    return GradientStore.open(path)


def tree(path: Path) -> dict[str, str]:
    """Return every file below a directory with its hash."""
    files = (p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gives_back_what_was_put_in(tmp_path: Path, dtype: str):
    store = filled(tmp_path / "a.zarr", dtype=dtype)
    expected = np.where(STATUS[:, None] == 0, features(), 0)
    got = store.rows(0, N)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=2**-10 if dtype == "float16" else 0, atol=1e-7)
    assert list(store.column("prompt_id")) == ids()
    np.testing.assert_array_equal(store.column("status"), STATUS)
    np.testing.assert_array_equal(store.column("norm"), np.arange(N))
    assert np.isnan(store.column("ess")).all()
    assert (store.column("tokens") == 0).all()
    assert store.attributes == {"projection": {"kind": "sjlt", "k": K}, "policy": "abc"}
    assert (store.n, store.k, store.rows_per_shard, store.shards, store.dtype) == (N, K, ROWS, 3, dtype)
    assert [len(store.shard_rows(s)) for s in range(3)] == [4, 4, 3]


@pytest.mark.parametrize("rows", [None, 1, 3, 4, 5, 100])
def test_blocks_cover_all_rows_in_order(tmp_path: Path, rows: int | None):
    store = filled(tmp_path / "a.zarr")
    seen = list(store.blocks(rows))
    np.testing.assert_array_equal(np.concatenate([block for _, block in seen]), store.rows(0, N))
    assert [i for place, _ in seen for i in range(N)[place]] == list(range(N))
    assert max(len(block) for _, block in seen) <= (rows or ROWS)


def test_sharded_equals_whole(tmp_path: Path):
    whole = create(tmp_path / "whole.zarr", rows_per_shard=16)
    write(whole, 0)
    whole.finish()
    got = GradientStore.open(tmp_path / "whole.zarr").rows(0, N)
    np.testing.assert_array_equal(got, filled(tmp_path / "sharded.zarr").rows(0, N))


def _write_one(path: Path, shard: int) -> None:
    write(create(path), shard)


def test_bytes_depend_neither_on_order_nor_on_processes(tmp_path: Path):
    filled(tmp_path / "a.zarr", order=(0, 1, 2))
    filled(tmp_path / "b.zarr", order=(2, 0, 1))
    processes = [  # all three create the store at the same time
        multiprocessing.get_context("spawn").Process(target=_write_one, args=(tmp_path / "c.zarr", s))
        for s in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
    create(tmp_path / "c.zarr").finish()
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr") == tree(tmp_path / "c.zarr")
    assert {p.name for p in tmp_path.iterdir()} == {"a.zarr", "b.zarr", "c.zarr"}


@pytest.mark.slow
@pytest.mark.parametrize("instant", ["sync", "np.savez", "finish"])
def test_killed_at_any_instant_resumes_to_the_same_bytes(tmp_path: Path, instant: str):
    """A kill after the data and before the marker costs that shard; one inside finish() costs nothing."""
    script = f"""
        import os, signal, sys
        from pathlib import Path
        import numpy as np
        sys.path.insert(0, {str(CHECKOUT)!r})
        from tests.support import gradient_stores as t
        from cropi_core.gradients import store as gradient_store
        store = t.create(Path({str(tmp_path / "a.zarr")!r}))
        t.write(store, 0); t.write(store, 1)
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        if {instant!r} == "sync":
            gradient_store.sync = die
        elif {instant!r} == "np.savez":
            gradient_store.np.savez = die
        t.write(store, 2)
        gradient_store.shutil.rmtree = die
        store.finish()
    """
    done = processes.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "a.zarr" / "features" / "c" / "2" / "0.ab12.partial").write_bytes(b"torn write")
    store = create(tmp_path / "a.zarr")
    if instant == "finish":
        (tmp_path / "a.zarr" / "features" / "c" / "2" / "0.ab12.partial").unlink()
        assert all(store.done(s) for s in range(3))
    else:
        assert [store.done(s) for s in range(3)] == [True, True, False]
        with pytest.raises(ArtifactError, match="unfinished"):
            GradientStore.open(tmp_path / "a.zarr")
        write(store, 2)
    store.finish()
    filled(tmp_path / "b.zarr")
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


def test_a_creation_that_was_killed_leaves_nothing(tmp_path: Path):
    (tmp_path / ".a.zarr.creating").mkdir()
    (tmp_path / ".a.zarr.creating" / "zarr.json").write_text("{")
    filled(tmp_path / "a.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_missing_shards_are_an_error_that_names_them(tmp_path: Path):
    store = create(tmp_path / "a.zarr")
    write(store, 1)
    with pytest.raises(ArtifactError, match=r"2 of 3 shards are missing \(0, 2\)"):
        store.finish()
    with pytest.raises(ArtifactError, match="unfinished"):
        GradientStore.open(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    "gone", ["features/c/0/0", "status/c/0", "prompt_id/c/0", "ess/c/0", "tokens/zarr.json"]
)
def test_a_lost_file_is_an_error_and_not_zeros(tmp_path: Path, gone: str):
    filled(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / gone).unlink()
    with pytest.raises(ArtifactError):
        GradientStore.open(tmp_path / "a.zarr")


def test_a_flipped_bit_is_an_error_and_not_a_score(tmp_path: Path):
    store = filled(tmp_path / "a.zarr")
    shard = tmp_path / "a.zarr" / "features" / "c" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        store.rows(0, ROWS)


def test_a_changed_byte_of_an_unfinished_store_does_not_reach_the_finished_one(tmp_path: Path):
    """Each file in turn, at three places: resumed to the same bytes, or an error that names the store."""
    filled(tmp_path / "whole.zarr")
    expected = tree(tmp_path / "whole.zarr")
    begun = create(tmp_path / "begun.zarr")
    for shard in (0, 1):
        write(begun, shard)
    names = [p.relative_to(begun.path) for p in sorted(begun.path.rglob("*")) if p.is_file()]
    assert any(".done" in name.parts for name in names)
    resumed, named = 0, []
    for number, name in enumerate(names):
        copy = tmp_path / f"{number}.zarr"
        shutil.copytree(begun.path, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) * (number % 3 + 1) // 4] ^= 1
        (copy / name).write_bytes(data)
        try:
            store = create(copy)
        except ArtifactError as error:
            named.append(str(copy) in str(error))
            continue
        for shard in range(store.shards):
            if not store.done(shard):
                write(store, shard)
        store.finish()
        assert tree(copy) == expected, name
        resumed += 1
    assert all(named)
    assert resumed > len(names) // 2


@pytest.mark.parametrize("name", ["norm/zarr.json", "zarr.json", ".done/0.npz", "features/c/0/0"])
def test_a_file_that_a_power_failure_left_empty_is_written_again(tmp_path: Path, name: str):
    filled(tmp_path / "whole.zarr")
    store = create(tmp_path / "a.zarr")
    for shard in range(store.shards):
        write(store, shard)
    (store.path / name).write_bytes(b"")
    again = create(store.path)
    for shard in range(again.shards):
        if not again.done(shard):
            write(again, shard)
    again.finish()
    assert tree(store.path) == tree(tmp_path / "whole.zarr")


def test_what_is_not_a_store_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"no zarr\.json"):
        GradientStore.open(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "foreign.zarr", zarr_format=3, attributes={"format": "other"})
    with pytest.raises(ArtifactError, match="has format other"):
        GradientStore.open(tmp_path / "foreign.zarr")


def test_another_store_at_the_same_path_is_refused(tmp_path: Path):
    create(tmp_path / "a.zarr")
    for changed in ({"k": 32}, {"dtype": "float32"}, {"rows_per_shard": 2}, {"n": 10}):
        with pytest.raises(ArtifactError, match="another store"):
            create(tmp_path / "a.zarr", **changed)


def test_a_finished_store_is_not_written_again(tmp_path: Path):
    filled(tmp_path / "a.zarr")
    store = create(tmp_path / "a.zarr")
    assert all(store.done(s) for s in range(3))
    with pytest.raises(ArtifactError, match="finished"):
        write(store, 0)


def test_a_shard_without_gradients_has_no_file(tmp_path: Path):
    filled(tmp_path / "a.zarr")
    shards = sorted(p.parent.name for p in (tmp_path / "a.zarr" / "features" / "c").rglob("0") if p.is_file())
    assert shards == ["0", "2"]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 2, 3, 4]), st.sampled_from(["float16", "float32"]), st.data())
def test_a_shard_is_byte_for_byte_what_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, n: int, chunk: int, dtype: str, data: st.DataObject
):
    """Chunks of zeros are omitted, negative zeros kept, the last shard is short: any Zarr reader returns the same."""
    folder, k = tmp_path_factory.mktemp("same"), 5
    values = st.sampled_from([0.0, -0.0, 1.0, 0.25, 6e-8])
    rows = np.array(data.draw(st.lists(values, min_size=n * k, max_size=n * k)), dtype=np.float32).reshape(
        n, k
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_layout, "CHUNK_BYTES", chunk * k * np.dtype(dtype).itemsize)
        direct = create(folder / "direct.zarr", n, k, dtype)
        through_zarr = create(folder / "zarr.zarr", n, k, dtype)
    through_zarr._layout = None
    for shard in range(direct.shards):
        here = direct.shard_rows(shard)
        for store in (direct, through_zarr):
            store.write_shard(shard, rows[here.start : here.stop], {"status": np.zeros(len(here))})
    for store in (direct, through_zarr):
        store.finish()
    assert tree(folder / "direct.zarr") == tree(folder / "zarr.zarr")


@pytest.mark.parametrize("norm", [1e-6, 1e-3, 1e-2, 1.0, 1e4, 1e20])
def test_half_precision_loses_less_than_a_thousandth_at_any_norm(tmp_path: Path, norm: float):
    rows = features(4, 1 << 14, norm)
    store = create(tmp_path / "a.zarr", n=4, k=1 << 14)
    store.write_shard(0, rows, {"status": np.zeros(4)})
    store.finish()
    got = GradientStore.open(tmp_path / "a.zarr").rows(0, 4)
    lost = np.linalg.norm(got.astype(np.float64) - rows, axis=1) / np.linalg.norm(
        rows.astype(np.float64), axis=1
    )
    assert lost.max() < 1e-3


@pytest.mark.slow
def test_rows_beyond_two_to_the_32_elements_are_distinct(tmp_path: Path):
    k, n = 1 << 20, (1 << 12) + 4
    store = create(tmp_path / "a.zarr", n=n, k=k, rows_per_shard=4)
    last = store.shards - 1
    assert store.shard_rows(last).start * k == 1 << 32
    rows = features(4, k)
    for shard in range(store.shards):
        live = shard in (0, last)
        block = (rows if shard else -rows) if live else np.broadcast_to(np.float32(0), (4, k))
        store.write_shard(shard, block, {"status": np.full(4, 0 if live else 1)})
    store.finish()
    store = GradientStore.open(tmp_path / "a.zarr")
    np.testing.assert_allclose(store.rows(n - 1, n), rows[3:], rtol=2**-10, atol=1e-7)
    np.testing.assert_allclose(store.rows(3, 4), -rows[3:], rtol=2**-10, atol=1e-7)
    assert not store.rows(n - 5, n - 4).any()


def test_a_row_that_is_ok_must_be_finite(tmp_path: Path):
    store, rows = create(tmp_path / "a.zarr"), features()[:4]
    rows[1] = np.nan
    with pytest.raises(DataError, match="row 1 has status ok"):
        store.write_shard(0, rows, {"status": np.zeros(4)})
    store.write_shard(0, rows, {"status": np.array([0, 2, 0, 0])})
    assert store.done(0)


@pytest.mark.parametrize(
    "columns",
    [{}, {"status": np.zeros(3)}, {"status": np.full(4, 9)}, {"status": np.zeros(4), "loss": np.zeros(4)}],
)
def test_columns_are_checked(tmp_path: Path, columns: dict):
    store = create(tmp_path / "a.zarr")
    with pytest.raises(DataError):
        store.write_shard(0, features()[:4], columns)
    with pytest.raises(DataError, match="shape"):
        store.write_shard(0, features()[:3], {"status": np.zeros(4)})
    assert not store.done(0)


def test_prompts_are_keyed_by_unique_ids(tmp_path: Path):
    with pytest.raises(DataError, match="occur twice"):
        GradientStore.create(
            tmp_path / "a.zarr", ["a", "a"], k=4, dtype="float16", rows_per_shard=2, attributes={}
        )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, unique=True))
def test_any_text_is_an_id(tmp_path_factory: pytest.TempPathFactory, prompt_ids: list[str]):
    path = tmp_path_factory.mktemp("ids") / "a.zarr"
    store = GradientStore.create(path, prompt_ids, k=2, dtype="float32", rows_per_shard=3, attributes={})
    assert list(store.column("prompt_id")) == prompt_ids


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.sampled_from([2, 16, 4096, 1 << 20]))
def test_inner_chunks_tile_a_shard_and_stay_small(rows_per_shard: int, k: int):
    chunk = gradient_layout.chunk_rows(rows_per_shard, k, 2)
    assert rows_per_shard % chunk == 0
    assert chunk == 1 or chunk * k * 2 <= gradient_layout.CHUNK_BYTES


def test_a_marker_under_the_name_of_another_shard_is_noticed(tmp_path):
    """Power loss can keep renames in another order: shard 1 is of zeros and has no file, shard 2 has lost its file."""
    path = tmp_path / "a.zarr"
    store = create(path)
    for shard in range(store.shards):
        write(store, shard)
    (path / ".done" / "2.npz").write_bytes((path / ".done" / "1.npz").read_bytes())
    (path / "features" / "c" / "2" / "0").unlink()
    again = create(path)
    assert [again.done(shard) for shard in range(again.shards)] == [True, True, False]
