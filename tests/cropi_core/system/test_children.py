"""Child processes import nothing from the working directory, and their imports are declared."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import cropi_core
from cropi_core.curriculum.execution import git_revision
from cropi_core.system.children import child_environment, ignore_working_directory, python_command
from tests.support.decoys import PACKAGES, decoys, imported
from tests.support.paths import CHECKOUT


def test_a_child_imports_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    markers = decoys(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "sub"]))
    done = subprocess.run(
        python_command("cropi_core", "--help"), env=child_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not imported(markers)


def test_absolute_entries_of_the_user_reach_a_child_and_relative_ones_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "relative", "/data/mine"]))
    monkeypatch.setattr(sys, "path", ["", "/added/by/this/process", *sys.path])
    environment = child_environment()
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(CHECKOUT), "/data/mine"]
    assert environment["PYTHONSAFEPATH"] == "1"


def test_a_console_script_and_its_children_have_no_relative_entry(monkeypatch: pytest.MonkeyPatch):
    """multiprocessing starts its children with `python -c`; only the environment makes that safe."""
    monkeypatch.setenv("PYTHONPATH", ":.:/data/mine")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "path", ["", ".", *[entry for entry in sys.path if entry]])
    ignore_working_directory()
    assert os.environ["PYTHONPATH"] == "/data/mine"
    assert os.environ["PYTHONSAFEPATH"] == "1"
    assert all(Path(entry).is_absolute() for entry in sys.path)


def test_no_process_is_started_with_the_working_directory_first():
    """Every `-m` in the product comes from python_command, or runs in an environment with PYTHONSAFEPATH."""
    allowed = {
        "cropi_core/system/children.py",
        "cropi_core/system/warm.py",  # reads the module out of a command
        "cropi_core/training/launch.py",
        "cropi_core/rollouts/vllm/server.py",
    }
    found = {
        str(path.relative_to(CHECKOUT))
        for room in PACKAGES
        for path in (CHECKOUT / room).rglob("*.py")
        if '"-m"' in path.read_text(encoding="utf-8")
    }
    assert found <= allowed


def test_the_revision_is_that_of_the_checkout_and_never_of_a_repository_around_it(tmp_path: Path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_revision(tmp_path) is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    packages = tmp_path / "venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    assert re.fullmatch("[0-9a-f]{40}", git_revision(tmp_path) or "")
    assert git_revision(packages) is None


def _canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for name, kept in extras.items() if name != "dev" for line in kept),
    ]
    declared = {_canonical(re.split(r"[\[<>=!~ ;]", line)[0]) for line in lines}
    # Packages of optional extras need not be installed.
    owners = {"mlflow": ["mlflow-skinny"]} | dict(metadata.packages_distributions())
    missing = {}
    for room in PACKAGES:
        for path in (CHECKOUT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for top in (
                    {name.partition(".")[0] for name in names} - set(PACKAGES) - sys.stdlib_module_names
                ):
                    if not declared & {_canonical(owner) for owner in owners.get(top, [top])}:
                        missing[top] = str(path.relative_to(CHECKOUT))
    assert not missing


def test_the_package_says_its_version_and_that_it_is_typed():
    assert cropi_core.__version__ == metadata.version("cropi")
    assert all((CHECKOUT / room / "py.typed").is_file() for room in PACKAGES)
