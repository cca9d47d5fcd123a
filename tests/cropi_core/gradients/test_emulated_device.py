"""The feature engine on an emulated accelerator, where a tensor on the wrong device is an error as on a GPU."""

import json
import sys

import pytest

from tests.support import processes

pytestmark = [pytest.mark.slow, pytest.mark.extended]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Run all checks in one process: a process that has the device cannot give it up."""
    done = processes.run(
        [sys.executable, "-m", "tests.support.emulated_checks", tmp_path_factory.mktemp("emulated")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_device_refuses_operands_of_the_cpu(found):
    assert "CPU tensors [(3,)] with tensors of emulated" in found["mixed"]


def test_every_architecture_form_and_type_gives_the_features_of_the_cpu(found):
    """bfloat16 has 8 bits, and the order of sums differs."""
    assert len(found["equality"]) == 13
    for name, error in found["equality"].items():
        assert error < (2e-6 if "float32" in name else 5e-2), name


def test_a_store_computed_on_the_device_has_the_rows_of_the_cpu(found):
    assert found["store"] < 1e-5


def test_a_step_leaves_nothing_on_the_device_even_if_it_fails(found):
    """Models, hooks, optimizers and the frames of errors refer to each other; a server that starts next needs room."""
    assert {slot for slot in found["left"] if "failed" in slot} >= {
        "gradients/pool@1 failed",
        "policy@1 failed",
    }
    assert {slot: counts for slot, counts in found["left"].items() if counts != [0, 0]} == {}


def test_the_process_that_starts_workers_holds_no_memory_of_the_device(found):
    assert found["in_parent"] == 0


def test_a_pass_waits_for_the_device_once_and_three_times_a_prompt(found):
    """A prompt's log-probabilities, entropy and the number of its different tokens; none a token, sequence or layer."""
    budgets = found["budgets"]
    for more in ("samples", "tokens", "layers"):
        assert budgets[more]["waits"] == budgets["base"]["waits"] == 1 + 3 * 2
        assert budgets[more]["copies"] == budgets["base"]["copies"] <= 8 + 2 * 2
    assert budgets["prompts"]["waits"] == 1 + 3 * 4
    assert budgets["prompts"]["copies"] <= 8 + 2 * 4


def test_a_pass_launches_no_operation_for_a_token_or_a_completion(found):
    """With a kernel that needs no mask, as on a GPU; two layers and two prompts are counted."""
    budgets = {name: counts["launches"] for name, counts in found["budgets"].items()}
    assert budgets["samples"] == budgets["tokens"] == budgets["base"] <= 520
    assert (budgets["layers"] - budgets["base"]) / 2 <= 205
    assert (budgets["prompts"] - budgets["base"]) / 2 <= 55


def test_the_workspace_of_cublas_is_set_before_it_is_used(found):
    assert found["workspace"] == ":4096:8"


def test_sketches_of_a_bfloat16_policy_use_tf32_and_those_of_a_float32_policy_do_not(found):
    (full, short), (full16, short16) = found["products"]["float32"], found["products"]["bfloat16"]
    assert full > 0
    assert short == 0
    assert full16 == 0
    assert short16 > 0
