"""Prompts in other trainers' formats: what those projects document, read by the libraries that they read with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cropi_core.errors import ConfigError, DataError
from cropi_core.prompts.formats import LAYOUTS, read_format, write_format
from data_schemas import ALTERNATIVE
from tests.support.paths import CHECKOUT

ASK = [{"role": "user", "content": "2 + 2?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *ASK]
TURNS = [*SYSTEM, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And ½ + ½ …\n“sum”?"}]
ROWS = [
    {
        "prompt_id": "b/2",
        "source": "sums",
        "messages": SYSTEM,
        "answer": f"4{ALTERNATIVE}four",
        "verifier": "math",
        "level": None,
        "tags": ["index=7"],
    },
    {
        "prompt_id": "a:1",
        "source": "turns",
        "messages": TURNS,
        "answer": "1",
        "verifier": "exact",
        "level": "5",
        "tags": [],
    },
]
RANKED = [
    row | {"rank": i, "score": 1 / i, "pass_rate": None if i == 2 else 0.25} for i, row in enumerate(ROWS, 1)
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_survive_every_format_in_their_order(tmp_path, layout):
    files = write_format(RANKED, tmp_path / "out", layout)
    assert tmp_path / "out" / LAYOUTS[layout].file in files
    assert read_format(tmp_path / "out", layout) == ROWS
    assert read_format(tmp_path / "out" / LAYOUTS[layout].file, layout) == ROWS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_lost_its_ids_is_refused_with_the_field_and_the_row(tmp_path, layout):
    write_format(ROWS, tmp_path / "out", layout)
    file = tmp_path / "out" / LAYOUTS[layout].file
    if file.suffix == ".jsonl":
        lost = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for record in lost:
            record.pop("prompt_id", None), record.pop("id", None)
        file.write_text("".join(json.dumps(record) + "\n" for record in lost))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        lost = pq.read_table(file).to_pylist()
        for record in lost:
            record.pop("prompt_id", None), record.get("extra_info", {}).pop("id", None)
        pq.write_table(pa.Table.from_pylist(lost), file)
    with pytest.raises(DataError, match=r"row 1 .*field '(prompt_id|id)' is missing"):
        read_format(file, layout)


def test_a_trainer_may_leave_rows_out_and_repeat_none(tmp_path):
    write_format(ROWS, tmp_path / "out", "openrlhf")
    file = tmp_path / "out/train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text(lines[1], encoding="utf-8")
    assert read_format(file, "openrlhf") == ROWS[1:]
    file.write_text(lines[1] * 2, encoding="utf-8")
    with pytest.raises(DataError, match="prompt_id is not unique: a:1"):
        read_format(file, "openrlhf")


def test_nothing_is_overwritten_and_a_killed_export_is_done_again(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/old").write_text("of an export that was killed")
    (tmp_path / "out").mkdir()
    files = write_format(ROWS, tmp_path / "out", "trl")
    assert [path.name for path in files] == ["train.parquet"]
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        write_format(ROWS, tmp_path / "out", "trl")
    with pytest.raises(DataError, match=r"train\.parquet is not a file"):
        read_format(tmp_path, "trl")


def test_trl_verl_and_the_hub_read_their_files_with_datasets(tmp_path):
    """All three load Parquet with `datasets.load_dataset`; fields are those that their documentation names."""
    import datasets

    for layout in ("trl", "verl", "hf"):
        write_format(RANKED, tmp_path / layout, layout)
    cache = str(tmp_path / "cache")
    for layout in ("trl", "verl"):
        file = str(tmp_path / layout / "train.parquet")
        rows = datasets.load_dataset("parquet", data_files=file, cache_dir=cache)["train"]
        assert [row["prompt"] for row in rows] == [SYSTEM, TURNS]
        if layout == "verl":
            assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": "4"}
            assert [row["extra_info"]["index"] for row in rows] == [0, 1]
            assert (rows[0]["extra_info"]["id"], rows[0]["data_source"], rows[0]["ability"]) == (
                "b/2",
                "sums",
                "math",
            )
        else:
            assert rows["solution"][:] == ["4", "1"]
    hub = datasets.load_dataset(str(tmp_path / "hf"), cache_dir=cache)["train"]
    assert hub["prompt_id"][:] == ["b/2", "a:1"]
    assert hub["rank"][:] == [1, 2]


def test_trl_rewards_read_the_answer_column(tmp_path):
    """TRL hands every column of its dataset to the reward functions by name; its own one reads `solution`."""
    import pyarrow.parquet as pq
    from trl.rewards import accuracy_reward

    write_format(ROWS[:1], tmp_path / "out", "trl")
    columns = pq.read_table(tmp_path / "out/train.parquet").drop_columns(["prompt"]).to_pydict()
    for text, reward in ((r"\boxed{4}", 1.0), (r"\boxed{5}", 0.0)):
        assert accuracy_reward([[{"role": "assistant", "content": text}]], **columns) == [reward]


def test_openrlhf_finds_its_keys_in_json_lines(tmp_path):
    """`--input_key input --label_key label --apply_chat_template`, and `datasource`, as its PromptDataset reads."""
    import datasets

    write_format(ROWS, tmp_path / "out", "openrlhf")
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out/train.jsonl"), cache_dir=str(tmp_path)
    )["train"]
    assert [(row["input"], row["label"], row["datasource"]) for row in rows] == [
        (SYSTEM, "4", "sums"),
        (TURNS, "1", "turns"),
    ]


VERIFIERS_PYTHON = Path(os.environ.get("CROPI_VERIFIERS_PYTHON", CHECKOUT / ".venv-verifiers/bin/python"))
READ = """
import asyncio, json, sys
import verifiers.v1 as vf
from types import SimpleNamespace
from pathlib import Path
from verifiers.v1.utils.loaders import load_taskset, taskset_class
from verifiers.v1.tasksets.nemo_gym.taskset import NeMoGymConfig, NeMoGymTaskset

config = vf.TasksetConfig(id="cropi-selection")
own = list(load_taskset(config))
named = list(load_taskset(config).include(ids=["a:1"]))
def grade(task, reply):
    return asyncio.run(task.correct(SimpleNamespace(last_reply=reply)))
gym = list(NeMoGymTaskset(NeMoGymConfig(dataset=Path(sys.argv[1]))))
print(json.dumps({
    "ids": [task.data.id for task in own],
    "keys": len({task.key for task in own}),
    "systems": [task.data.system_prompt for task in own],
    "turns": [len(task.data.prompt) for task in own],
    "named": [task.data.id for task in named],
    "grades": [grade(own[0], "\\\\boxed{4}"), grade(own[0], "\\\\boxed{5}"), grade(own[1], " 1 ")],
    "gym": [[len(task.data.prompt), task.data.row["prompt_id"], task.data.row["expected_answer"]] for task in gym],
}))
"""


@pytest.mark.extended
@pytest.mark.skipif(not VERIFIERS_PYTHON.is_file(), reason="`make verifiers` makes an interpreter with it")
def test_verifiers_loads_the_selected_tasks_and_grades_them_and_reads_nemo_gym_rows(tmp_path):
    """The package that is exported and the real `verifiers`, which also has NeMo Gym's reader of rows."""
    write_format(RANKED, tmp_path / "package", "verifiers")
    write_format(ROWS, tmp_path / "gym", "nemo_gym")
    done = subprocess.run(
        [VERIFIERS_PYTHON, "-c", READ, tmp_path / "gym/train.jsonl"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "package")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "ids": ["b/2", "a:1"],
        "keys": 2,
        "systems": ["Be brief.", "Be brief."],
        "turns": [1, 3],
        "named": ["a:1"],
        "grades": [1.0, 0.0, 1.0],
        "gym": [[2, "b/2", "4"], [4, "a:1", "1"]],
    }


def test_the_exported_package_is_valid_python_without_cropi(tmp_path):
    import tomllib

    write_format(ROWS, tmp_path, "verifiers")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == ["verifiers>=0.4"]
    for name in ("__init__", "taskset"):
        source = (tmp_path / "cropi_selection" / f"{name}.py").read_text(encoding="utf-8")
        compile(source, name, "exec")
        assert "cropi_core" not in source
    assert sys.version_info >= (3, 11)
