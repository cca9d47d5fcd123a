"""The configurations for GPUs, as they are but for the policy, the files and the budgets: planned, and run to the end.

The embedded policy answers tasks of the embedded world, put into the layouts of GSM8K and MATH.
"""

import json

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.config.loading import load_config
from cropi_core.planning.prediction import predict
from cropi_core.runs.records import load_run
from cropi_core.world import build
from data_schemas.config import Config
from tests.support.tiny import go

pytestmark = [pytest.mark.extended, pytest.mark.slow, pytest.mark.timeout(900)]

PRESETS = ["paper-1.5b", "paper-7b", "single-80gb", "small-gpu"]
LAYOUTS = {
    "gsm8k": lambda q, a: {"question": q, "answer": f"It is so.\n#### {a}"},
    "math": lambda q, a: {
        "problem": q,
        "solution": f"It is $\\boxed{{{a}}}$.",
        "level": "Level 1",
        "type": "Words",
    },
    "math_500": lambda q, a: {"problem": q, "answer": a, "solution": "So.", "subject": "Words", "level": 1},
}


def tasks(path, preset, split, count, seed):
    rows = build({"reverse": count}, split, seed).to_pylist()
    lines = [json.dumps(LAYOUTS[preset](row["messages"][0]["content"], row["answer"])) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def shrunk(name, folder):
    """The same configuration with a tiny model, files of this machine, and budgets of a minute."""
    settings = load_config(name).model_dump(mode="json", exclude_none=True)
    settings["policy"] |= {"path": "embedded"}
    settings["stages"] = 2

    def local(source, split):
        if source["kind"] == "mix":
            return source | {"sources": [local(one, split) for one in source["sources"]]}
        preset = source["preset"]
        seed = sorted(LAYOUTS).index(preset)
        # The draws of one file stay disjoint: the pool leaves out what a validation set takes.
        file = "test" if source["split"] == "test" else "pool"
        path = tasks(folder / f"{preset}-{file}.jsonl", preset, file, 60, seed)
        few = {"kind": "file", "path": path, "template": "{prompt}", "verifier": "exact"}
        few |= {"limit": 8, "skip": 0} if split != "pool" else {"limit": 40, "skip": 8}
        return {key: value for key, value in source.items() if key not in ("subset", "revision")} | few

    data = settings["data"]
    settings["data"] = {
        "pool": local(data["pool"], "pool"),
        **{kind: {n: local(s, kind) for n, s in data[kind].items()} for kind in ("validation", "test")},
    }
    little = {"max_new_tokens": 6}
    rollouts, training = settings["rollouts"], settings["training"]
    for sampling in (rollouts["pool"], rollouts["validation"], training["sampling"]):
        sampling |= little | {"samples": 8, "temperature": 1.0}
    settings["evaluation"]["sampling"] |= little | {"samples": 2}
    settings["evaluation"]["engine"] = settings["rollouts"]["engine"] = "transformers"
    settings["projection"]["k"] = 256
    settings["gradients"] |= {"rows_per_shard": 16, "block_rows": 16}
    settings["diagnostics"]["spot_check"] = min(settings["diagnostics"]["spot_check"], 6)
    settings["selection"]["ratio"] = 0.2
    settings["training"] |= {"steps": 2, "prompts_per_step": 4, "engine": "transformers"}
    settings["runtime"] |= {"device": "cpu", "threads": 1, "vllm": {}}
    if "launch" in settings["runtime"]:
        settings["runtime"]["launch"]["processes"] = 2
    # Neither a process a step, two dozen that each import torch, nor a Ray cluster, which Prefect's flows start; nor an
    # interpreter with vLLM and its settings.
    for elsewhere in ("mode", "ray", "python", "trl", "workers"):
        settings["runtime"].pop(elsewhere, None)
    return Config.model_validate(settings)


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_planned_and_runs_to_its_end(name, tmp_path):
    config = shrunk(name, tmp_path)
    (tmp_path / "plan").mkdir()
    plan = predict(config, str(tmp_path / "root"), tmp_path / "plan", calibrated=True)
    record = go(config, tmp_path / "root")
    assert record.status == "done"
    assert load_run(Store(tmp_path / "root"), record.run).slots.keys() == record.slots.keys()
    assert {step["slot"] for step in plan["steps"]} == set(record.slots)
    assert f"policy@{config.stages}" in record.slots


def test_the_papers_numbers_are_in_its_configuration():
    """Those that the paper's abstract or its released scripts state."""
    config = load_config("paper-1.5b")
    assert config.selection.ratio == 0.1
    assert (config.rollouts.pool.samples, config.rollouts.validation.samples) == (8, 32)
    assert {config.rollouts.pool.temperature, config.rollouts.validation.temperature} == {0.5}
    assert {config.rollouts.pool.max_new_tokens, config.training.sampling.max_new_tokens} == {2048}
    assert config.projection.k == 32768
    assert all(source.limit == 100 for source in config.data.validation.values())
    assert (config.training.prompts_per_step, config.training.sampling.samples) == (128, 8)
    assert (config.training.learning_rate, config.training.beta) == (1e-6, 1e-3)
