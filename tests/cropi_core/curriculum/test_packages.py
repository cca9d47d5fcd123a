"""A package that a later step needs is missed before the first step, not after hours of gradients."""

import importlib.machinery
import importlib.util

import pytest

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.packages import check_packages
from cropi_core.errors import ConfigError
from cropi_core.runs.records import load_run, run_id
from tests.support.tiny import settings, tiny


@pytest.fixture
def without(monkeypatch):
    """Return a function that hides packages, and shows all others of the check as installed."""
    real, spec = importlib.util.find_spec, importlib.machinery.ModuleSpec("there", None)

    def hide(*names):
        def find(name, package=None):
            if name in names:
                return None
            return spec if name in ("wandb", "prefect_ray", "ray") else real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return hide


CASES = {
    "trl": ({}, r"training needs trl.*cropi\[train\]"),
    "peft": ({"training": {"lora": {"r": 4}}}, r"training\.lora needs peft.*cropi\[train\]"),
    "wandb": ({"runtime": {"report_to": ["wandb"]}}, r"report_to: wandb needs wandb.*pip install wandb"),
    "ray": ({"runtime": {"ray": {}}}, r"runtime\.ray needs ray.*cropi\[ray\]"),
}


@pytest.mark.parametrize("package", CASES)
def test_a_run_names_what_is_not_installed_before_its_first_step(package, without, tmp_path):
    changes, message = CASES[package]
    config, store = tiny(**changes), Store(tmp_path)
    without(package)
    with pytest.raises(ConfigError, match=message):
        run_curriculum(config, store, lambda spec: pytest.fail(f"{spec.slot} was executed"))
    record = load_run(store, run_id(config))
    assert record.status == "failed"
    assert package in (record.error or "")


def test_what_no_open_slot_needs_may_be_missing(without):
    without("trl", "wandb")
    trained = {"policy@1", "policy@2"}
    check_packages(tiny(), trained)
    check_packages(tiny(pin={"policy@1": "KEY", "policy@2": "KEY"}))
    check_packages(type(tiny()).model_validate(settings(stages=1, ends_with="selection")))
    with pytest.raises(ConfigError, match="trl"):
        check_packages(tiny(), {"policy@1"})
