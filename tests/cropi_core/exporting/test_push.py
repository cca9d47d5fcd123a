"""Uploads with the hub's own client to a server that speaks its API: private, in one commit, only by the command."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cropi_core.artifacts import SELECTION_FILE, Store
from cropi_core.artifacts.layout import PROMPTS_FILE
from cropi_core.cli.app import app
from cropi_core.errors import ConfigError, CropiError, ServerError
from cropi_core.world import build
from data_schemas.tables import SELECTION
from tests.support.hub import Repository, running_hub
from tests.support.paths import CHECKOUT
from tests.support.stores import publish
from tests.support.tables import table_bytes

README, DATA = "README.md", "data/train-00000-of-00001.parquet"


@pytest.fixture
def hub(monkeypatch):
    """A hub that the client is logged in to; Xet, which stores large files, has a protocol of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a selection, tagged `chosen`, and a policy, tagged `trained`."""
    store = Store(tmp_path / "root")
    prompts = build({"reverse": 6}, "pool", 0)
    pool = publish(store, {PROMPTS_FILE: table_bytes(prompts)}, summary={"prompts": 6})
    rows = [
        {
            "prompt_id": one,
            "selected": i < 2,
            "rank": i + 1,
            "score": 1.0 - i / 8,
            "status": "ok",
            "reason": "",
        }
        for i, one in enumerate(prompts["prompt_id"].to_pylist())
    ]
    selection = publish(
        store,
        {SELECTION_FILE: table_bytes(pa.Table.from_pylist(rows, schema=SELECTION))},
        "selection",
        inputs={"prompts": pool},
        summary={"strategy": "influence", "pool": 6},
    )
    files = {
        "checkpoint/config.json": "{}",
        "checkpoint/model.safetensors": "weights",
        "metrics.parquet": "x",
    }
    policy = publish(
        store, files, "policy", inputs={"selection": selection}, summary={"steps": 20}, step="training"
    )
    store.tag("chosen", selection.key)
    store.tag("trained", policy.key)
    return store


def push(store: Store, *words: str):
    """Run the command in this process."""
    return CliRunner().invoke(app, ["artifacts", "push", *words, "--root", str(store.root)])


def test_a_selection_becomes_a_private_dataset_in_one_commit(store, hub, tmp_path):
    done = push(store, "chosen", "--repo", "me/chosen", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["private"], answer["created"], answer["kind"]) == (True, True, "dataset")
    repository = hub.repositories["dataset/me/chosen"]
    assert repository.private
    assert set(repository.files) == {README, DATA} == set(answer["files"])
    (tmp_path / "back.parquet").write_bytes(repository.files[DATA])
    assert pq.read_table(tmp_path / "back.parquet")["rank"].to_pylist() == [1, 2]
    assert "Prompts selected by cropi" in repository.files[README].decode()
    assert str(tmp_path) not in repository.files[README].decode()
    assert len(repository.commits) == 1
    repository.files |= {"data/train-00001-of-00002.parquet": b"of before", "LICENSE": b"own"}
    again = push(store, "chosen", "--repo", "me/chosen")
    assert again.exit_code == 0, again.output
    assert "private dataset me/chosen updated" in again.stdout
    assert set(repository.files) == {README, DATA, "LICENSE"}


def test_a_policy_becomes_a_private_model_with_a_card(store, hub):
    done = push(store, "trained", "--repo", "me/policy")
    assert done.exit_code == 0, done.output
    files = hub.repositories["model/me/policy"].files
    assert files["model.safetensors"] == b"weights"
    assert set(files) == {"config.json", "model.safetensors", README}
    card = files[README].decode()
    assert "trained for 20 optimizer steps" in card
    assert store.tags()["chosen"] in card


def test_a_public_repository_needs_the_word(store, hub):
    hub.repositories["dataset/me/open"] = Repository(private=False)
    refused = push(store, "chosen", "--repo", "me/open")
    assert isinstance(refused.exception, ConfigError)
    assert "exists and is public. Give --public" in str(refused.exception)
    assert not hub.repositories["dataset/me/open"].files
    assert push(store, "chosen", "--repo", "me/open", "--public").exit_code == 0
    done = push(store, "chosen", "--repo", "me/new", "--public")
    assert done.exit_code == 0, done.output
    assert not hub.repositories["dataset/me/new"].private
    assert "PUBLIC dataset me/new created" in done.stdout


def test_nothing_is_sent_by_a_dry_run_and_faults_are_one_error(store, hub, monkeypatch):
    dry = push(store, "chosen", "--repo", "me/chosen", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert DATA in dry.stdout
    for words, said in {
        ("chosen", "--repo", "chosen"): "not of the form OWNER/NAME",
        ("nothing", "--repo", "me/x"): "nothing",
    }.items():
        wrong = push(store, *words)
        assert isinstance(wrong.exception, CropiError)
        assert said in str(wrong.exception)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = push(store, "chosen", "--repo", "me/x")
    assert isinstance(offline.exception, ServerError)
    assert "me/x was not written" in str(offline.exception)
    assert hub.requests == []


def test_a_refused_commit_leaves_the_repository_as_it_was(store, hub, monkeypatch):
    hub.repositories["dataset/me/chosen"] = Repository(private=True, files={"LICENSE": b"own"})
    hub.refuse = "/api/datasets/me/chosen/commit"
    done = push(store, "chosen", "--repo", "me/chosen")
    assert isinstance(done.exception, ServerError)
    assert "me/chosen was not written" in str(done.exception)
    assert hub.repositories["dataset/me/chosen"].files == {"LICENSE": b"own"}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    stranger = push(store, "chosen", "--repo", "me/chosen")
    assert isinstance(stranger.exception, ServerError)
    assert "hf auth whoami" in str(stranger.exception)


def test_the_commands_of_the_page_are_accepted(store, hub):
    page = (CHECKOUT / "docs/guides/other-trainers.md").read_text(encoding="utf-8")
    commands = re.findall(r"^cropi artifacts push (.*?)(?:  #.*)?$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        words = command.replace("RUN:selection@1", "chosen").replace("RUN:policy@2", "trained").split()
        done = push(store, *words)
        assert done.exit_code == 0, done.output
