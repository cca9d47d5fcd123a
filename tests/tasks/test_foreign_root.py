"""A root that somebody else made is data and never code: what lies in it is read, and nothing of it runs."""

import ast
import json
import os
from pathlib import Path

import pytest
import yaml
from prefect.results import ResultRecord

from data_schemas.records import ArtifactRef
from tasks.cache_records import is_genuine, remove_foreign
from tests.support.paths import CHECKOUT
from tests.support.prefect_records import KEY, OWN, pickled


def changed(**metadata) -> bytes:
    return json.dumps({**OWN, "metadata": {**OWN["metadata"], **metadata}}).encode()


def with_serializer(**fields) -> bytes:
    return changed(serializer={**OWN["metadata"]["serializer"], **fields})


def with_result(**fields) -> bytes:
    return json.dumps({**OWN, "result": json.dumps({**json.loads(OWN["result"]), **fields})}).encode()


def test_what_prefect_does_with_a_pickle_is_what_is_guarded_against(tmp_path: Path):
    ResultRecord.deserialize(pickled(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


def test_a_record_that_prefect_writes_is_accepted(tmp_path: Path):
    from prefect.results import ResultStore
    from prefect.serializers import JSONSerializer

    ref = ArtifactRef(kind="prompts", key=KEY, digest="f" * 64)
    record = ResultStore(serializer=JSONSerializer()).create_result_record(ref, key=KEY)
    assert is_genuine(record.serialize(), KEY)
    assert is_genuine(json.dumps(OWN).encode(), KEY)


@pytest.mark.parametrize(
    "content",
    [
        with_serializer(type="pickle"),
        with_serializer(type="compressed/pickle"),
        with_serializer(object_decoder="os.system"),
        with_serializer(jsonlib="evil"),
        with_serializer(loads_kwargs={"cls": "evil"}),
        changed(storage_block_id="00000000-0000-0000-0000-000000000000"),
        changed(more=1),
        with_result(__class__="os.system"),
        with_result(more=1),
        with_result(data={"kind": "prompts", "key": "prompts-v1-0000000000000000", "digest": "f" * 64}),
        json.dumps(OWN).replace('"metadata":', '"metadata": {}, "metadata":', 1).encode(),
        json.dumps({**OWN, "more": 1}).encode(),
        b"[" * 5000,
        b"[]",
        b"\xff",
        b"",
    ],
)
def test_a_record_that_differs_from_cropis_is_removed(tmp_path: Path, content: bytes):
    (tmp_path / KEY).write_bytes(content)
    assert remove_foreign(tmp_path, KEY)
    assert not (tmp_path / KEY).exists()


def test_links_and_directories_are_removed_and_their_targets_stay(tmp_path: Path):
    target, records = tmp_path / "target", tmp_path / "records"
    target.write_bytes(json.dumps(OWN).encode())
    records.mkdir()
    (records / KEY).symlink_to(target)
    assert remove_foreign(records, KEY)
    (records / KEY).mkdir()
    assert remove_foreign(records, KEY)
    assert not remove_foreign(records, KEY)
    (tmp_path / "link").symlink_to(records)
    assert remove_foreign(tmp_path / "link", KEY)
    assert target.exists()
    assert records.exists()
    os.mkfifo(records / KEY)  # a read would wait for ever
    assert remove_foreign(records, KEY)


def test_a_record_of_cropi_stays(tmp_path: Path):
    (tmp_path / KEY).write_bytes(json.dumps(OWN).encode())
    assert not remove_foreign(tmp_path, KEY)
    assert (tmp_path / KEY).exists()


UNSAFE = {
    "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle",
}  # fmt: skip
RUNS_CODE = {"eval", "exec", "__import__", "unsafe_load", "full_load", "read_pickle", "runpy"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "_Loader"}
"""`_Loader` of cropi_core/config/loading.py is a SafeLoader, which a test below holds."""
EXCEPTIONS = {
    ("cropi_core/rewards/worker.py", "exec"),  # a function that the operator allows, by its digest
}


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Name what could make a program of data: loaders of pickles, evaluation, numpy's and torch's unsafe modes."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            call = node.func
            name = call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "")
            owner = getattr(call.value, "id", "?") if isinstance(call, ast.Attribute) else ""
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            if name in RUNS_CODE and owner in ("", "yaml", "pd", "pandas", "builtins"):
                found.append(name)
            loader = [getattr(word.value, "id", "") for word in node.keywords if word.arg == "Loader"]
            loader += [getattr(value, "id", "") for value in node.args[1:]]
            if (owner, name) == ("yaml", "load") and not set(loader) & SAFE_LOADERS:
                found.append("yaml.load")
            if given.get("allow_pickle") or given.get("trust_remote_code"):
                found.append(f"{owner}.{name}")
            if (owner, name) == ("torch", "load") and given.get("weights_only") is not True:
                found.append("torch.load")
    return found


def test_no_reader_executes_data():
    seen = set()
    for package in ("data_schemas", "cropi_core", "tasks", "flows", "deployments"):
        for file in sorted((CHECKOUT / package).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            seen |= {(str(file.relative_to(CHECKOUT)), what) for what in unsafe_calls(tree)}
    assert seen == EXCEPTIONS


def test_the_scan_detects_its_patterns():
    bad = "import pickle\nfrom dill import loads\neval('1')\ntorch.load(x)\nnp.load(x, allow_pickle=True)\nyaml.load(x)"
    assert len(unsafe_calls(ast.parse(bad))) == 6
    assert unsafe_calls(ast.parse("torch.load(x, weights_only=True); model.eval(); yaml.safe_load(x)")) == []


def test_our_loader_of_yaml_is_safe():
    from cropi_core.config import loading

    assert issubclass(loading._Loader, yaml.SafeLoader)
