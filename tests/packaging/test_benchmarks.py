"""The benchmarks run, write the figures that the documentation quotes, and leave nothing behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import CHECKOUT
from tests.support.servers import require_vllm

pytestmark = pytest.mark.extended

ROOT = CHECKOUT
MACHINE = {"cpu", "cores", "memory_gb", "python", "torch", "numpy", "zarr", "date"}
# One line a benchmark: its options for a few seconds, and the keys of its JSON beside `machine`.
BENCHMARKS: dict[str, tuple[list[str], set[str]]] = {
    "scoring": (
        ["--rows", "300", "--k", "40", "--sets", "2", "--repeats", "1"],
        {"rows", "k", "sets", "targets", "threads", "seconds", "rows_per_second", "peak_memory_mb"}
        | {"ratio_to_limit", "cpu_ratio_to_limit", "stream_ratio_to_limit", "bytes_per_dimension", "figures"},
    ),
    "features": (
        ["--limit", "8", "--repeats", "1", "--precision-prompts", "60"],
        {"tokens", "packed_tokens", "ratio_to_forward_backward", "speedup_over_released_recipe"}
        | {"precision_at_10", "peak_over_forward", "time_over_live_alone", "live_share", "cpu_seconds"},
    ),
    "embedded": (
        ["--prompts", "60", "--repeats", "1"],
        {
            "ms_a_prompt",
            "limit_ms",
            "share_of_limit",
            "speedup_over_released_recipe",
            "speedup_over_completion_loop",
        }
        | {"speedup_over_recipe_and_dense", "bfloat16", "prompts", "k"},
    ),
    "training_features": (
        [
            "--prompts",
            "2",
            "--samples",
            "2",
            "--micro-batch",
            "4",
            "--repeats",
            "1",
            "--k",
            "64",
            "--layers",
            "all",
        ],
        {"policy", "prompts", "samples", "tokens", "layers", "all"},
    ),
    "long": (
        ["--tokens", "40"],
        {"policy", "gb_limit", "lengths", "growth_by_way", "peak_growth_by_doubling"},
    ),
    "plan": (
        ["-o", "stages=1", "-o", "training.steps=2"],
        {
            "config",
            "overrides",
            "load",
            "wall_per_cpu",
            "calibration",
            "steps",
            "totals",
            "seconds_at_equal_load",
        },
    ),
    "engines": (
        ["--prompts", "16", "--samples", "2", "--argument=--enforce-eager"],
        {
            "vllm",
            "policy",
            "prompts",
            "sampling",
            "dtype",
            "concurrency",
            "load",
            "figures",
            "ratio",
            "parity",
        },
    ),
    "prefect_cost": (
        ["--repeats", "1", "-o", "stages=1", "-o", "training.steps=2", "-o", "selection.strategy=random"],
        {"config", "overrides", "straight", "prefect", "found_s", "found_overhead_s", "overhead_s"}
        | {"share_of_ten_minutes"},
    ),
    "s3_root": (
        ["--repeats", "1", "-o", "stages=1", "-o", "training.steps=2", "-o", "selection.strategy=random"],
        {"config", "overrides", "directory", "directory_found", "s3", "s3_found", "s3_elsewhere", "ratio"}
        | {"cpu_ratio", "requests", "artifacts", "objects", "megabytes"},
    ),
    "store": (["--rows", "40", "--k", "64", "--repeats", "1"], {"rows", "k", "figures"}),
}


NEEDS_VLLM = {"engines"}
ALL = [pytest.param(name, marks=[pytest.mark.vllm] * (name in NEEDS_VLLM)) for name in sorted(BENCHMARKS)]


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run a benchmark with a folder of its own for what it writes; its JSON."""
    scratch = folder / "scratch"
    scratch.mkdir()
    out = folder / "results" / f"{name}.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *BENCHMARKS[name][0], "--json", str(out)],
        cwd=ROOT,
        # torch makes a cache of compiled code in the temporary directory when it is imported.
        env={**os.environ, "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(scratch.iterdir())
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", ALL)
def test_a_benchmark_writes_its_figures_and_the_machine(name: str, tmp_path: Path):
    if name in NEEDS_VLLM:
        require_vllm()
    result = run(name, tmp_path)
    assert result["machine"].keys() >= MACHINE
    assert result.keys() >= BENCHMARKS[name][1]
    for figures in _dictionaries(result.get("figures", result)):
        assert all(value > 0 for value in figures.values() if isinstance(value, float)), figures


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_recorded_results_have_the_same_keys(name: str):
    """What the documentation quotes was written by the script as it is."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert result["machine"].keys() >= MACHINE
    assert result.keys() >= BENCHMARKS[name][1]


def test_the_gpu_benchmark_runs_its_path_on_a_cpu(tmp_path: Path):
    """Not measured on a GPU yet: what would be is kept working."""
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--repeats", "1", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["prompts_per_second"] > 0
    assert 0 < result["share_of_matrix_rate"] < 1
    assert 0 < result["packing_share"] < 1
    assert result["head_prompts_per_second"] > 0
    assert "not installed" in result["bergson"] or result["bergson_prompts_per_second"] > 0
    assert result["machine"].keys() >= MACHINE


def test_the_store_is_compared_with_a_memory_map_and_json_lines(tmp_path: Path):
    figures = run("store", tmp_path)["figures"]
    assert set(figures) == {"live", "dead"}
    for pool in figures.values():
        assert {"GradientStore", "memmap", "JSON lines"} <= pool.keys()
        ratios = {f"{way}_to_{peer}" for way in ("write", "read") for peer in ("memmap", "json_lines")}
        assert pool["GradientStore"].keys() >= ratios | {"bytes_per_dimension", "write_mb_s", "read_mb_s"}


def test_the_store_takes_about_two_bytes_a_dimension():
    """The figure to hold, on rows that a codec can do nothing with, at the size that was recorded."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "store.json").read_text())
    assert recorded["figures"]["live"]["GradientStore"]["bytes_per_dimension"] <= 2.1


def _dictionaries(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The innermost tables."""
    inner = [value for value in figures.values() if isinstance(value, dict)]
    return [table for value in inner for table in _dictionaries(value)] if inner else [figures]
