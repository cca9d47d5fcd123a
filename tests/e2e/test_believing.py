"""When not to believe a score: what is measured on a real run, and that a limit does its action and nothing else."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from cropi_core import Checkpoint, FeatureSettings, extract_gradients
from cropi_core.artifacts.store import Store
from cropi_core.curriculum import slot_names
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import run_step
from cropi_core.diagnostics.limits import FIGURES, RULES, consequence
from cropi_core.errors import SelectionError, StepError
from cropi_core.runs.records import load_run, run_id
from data_schemas.gradients import Gradients, Projection
from tests.support.tiny import computed, digests, go, origins, tiny, world

SPOT = {"spot_check": 20, "spot_dead_share": 0.25}
SPOT_SLOTS = ("prompts/spot", "rollouts/spot", "gradients/spot", "scores/spot", "diagnostics")


@pytest.fixture(scope="module")
def checked(reference, tmp_path_factory):
    """The reference run with a spot check at every stage."""
    root = tmp_path_factory.mktemp("checked") / "root"
    shutil.copytree(reference[0], root)
    return root, go(tiny(diagnostics=SPOT), root)


@pytest.fixture
def own_checked(checked, tmp_path):
    root, record = checked
    shutil.copytree(root, tmp_path / "root")
    return tmp_path / "root", record


@pytest.fixture(scope="module")
def refreshed(checked, tmp_path_factory):
    """The checked run, refreshed at stage 2 because a limit on the KL divergence was passed."""
    root, before = checked
    limit, _ = beyond("max_kl", before)
    config = tiny(diagnostics={**SPOT, "max_kl": limit})
    own = shutil.copytree(root, tmp_path_factory.mktemp("refreshed") / "root")
    return own, config, go(config, own)


def values(check):
    return {finding.figure: finding.value for finding in check.findings}


def rows_of(root, record, slot, file):
    return pq.read_table(Store(root).path(record.slots[slot].ref) / file).to_pylist()


# -- what is measured ---------------------------------------------------------------------------------------


def test_on_policy_the_kl_is_zero_and_every_sample_counts(reference):
    first, second = (values(check) for check in reference[1].checks)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["kl_k1"] == pytest.approx(0, abs=1e-5)
    assert first["ess_share"] == pytest.approx(1, abs=1e-4)
    assert first["max_ratio"] == pytest.approx(1, abs=1e-3)
    assert (first["clip_fraction"], reference[1].checks[0].trajectories) == (0, "own")
    assert second["kl"] > 1e-3
    assert second["ess_share"] < 1
    assert reference[1].checks[1].trajectories == "stored"
    assert all(0 < v["dead_share"] < 1 and v["target_agreement"] is not None for v in (first, second))


@pytest.fixture(scope="module")
def way(reference, tmp_path_factory):
    """Policies on the straight way from the base to the one that stage 1 trained, and beyond it."""
    root, record = reference
    ends = [Store(root).path(record.slots[f"policy@{m}"].ref) / "checkpoint" for m in (0, 1)]
    weights = [load_file(end / "model.safetensors") for end in ends]

    def at(share):
        directory = tmp_path_factory.mktemp("way") / "checkpoint"
        shutil.copytree(ends[0], directory)
        mixed = {n: w + share * (weights[1][n] - w) for n, w in weights[0].items()}
        save_file(mixed, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return at


def test_the_kl_grows_and_the_effective_samples_shrink_with_the_distance(reference, way, tmp_path):
    root, record = reference
    rollouts = Store(root).path(record.slots["rollouts/pool@1"].ref) / "parts"
    found = [
        extract_gradients(
            policy=Checkpoint(way(share)),
            rollouts=rollouts,
            out=tmp_path / f"{share}.zarr",
            settings=FeatureSettings(
                projection=Projection(k=64), layout=Gradients(rows_per_shard=8, block_rows=4)
            ),
            runtime=tiny().runtime,
        )
        for share in (0.0, 0.5, 1.0, 2.0)
    ]
    kl = [summary["kl"] for summary in found]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl == sorted(kl)
    assert kl[1] > 1e-4
    shares = [summary["median_ess_share"] for summary in found]
    assert shares == sorted(shares, reverse=True)
    assert found[2]["kl"] == pytest.approx(values(record.checks[1])["kl"], rel=1e-3)


# -- the spot check -----------------------------------------------------------------------------------------


def test_a_spot_check_adds_its_own_slots_and_changes_nothing_else(reference, checked):
    root, record = checked
    added = {f"{name}@{stage}" for name in SPOT_SLOTS for stage in (1, 2)}
    assert computed(record) == added
    assert set(record.slots) == set(slot_names(tiny(diagnostics=SPOT)))
    assert {s: d for s, d in digests(record).items() if s not in added} == digests(reference[1])
    assert record.notes == []
    assert set(origins(go(tiny(diagnostics=SPOT), root)).values()) == {"cached"}


def test_a_spot_check_samples_the_current_policy_on_some_prompts_of_the_pool(checked):
    root, record = checked
    store = Store(root)
    for stage in (1, 2):
        spot = rows_of(root, record, f"prompts/spot@{stage}", "prompts.parquet")
        pool = rows_of(root, record, "prompts/pool", "prompts.parquet")
        assert len(spot) == 20
        assert all(row in pool for row in spot)
        status = {
            r["prompt_id"]: r["status"] for r in rows_of(root, record, f"scores@{stage}", "scores.parquet")
        }
        assert sum(status[row["prompt_id"]] != "ok" for row in spot) == 5
        inputs = store.manifest(record.slots[f"rollouts/spot@{stage}"].ref).inputs
        assert inputs["policy"] == record.slots[f"policy@{stage - 1}"].ref
        targets = [store.manifest(record.slots[f"scores{s}@{stage}"].ref).inputs for s in ("", "/spot")]
        assert targets[0]["validation.goal"] == targets[1]["validation.goal"]
        summary = store.manifest(record.slots[f"diagnostics@{stage}"].ref).summary
        assert summary["prompts"] == 20
        assert summary["compared"] + summary["lost"] == 15
        assert 0 < summary["chance"] <= summary["chance_95"] <= 1
        found = values(record.checks[stage - 1])
        assert found["spot_correlation"] == summary["spearman"] < 1
        assert (found["spot_overlap"], found["spot_chance"]) == (summary["overlap"], summary["chance"])


def test_on_policy_with_the_same_seed_the_scores_are_found_again(own_checked):
    root, _ = own_checked
    record = go(tiny(stages=1, diagnostics={**SPOT, "spot_seed": 0}), root)
    summary = Store(root).manifest(record.slots["diagnostics@1"].ref).summary
    assert (summary["spearman"], summary["overlap"]) == (pytest.approx(1), 1.0)
    assert (summary["compared"], summary["revived"], summary["lost"]) == (15, 0, 0)
    path = Store(root).path(record.slots["diagnostics@1"].ref) / "diagnostics.json"
    pairs = json.loads(path.read_text())["pairs"]
    assert all(pair["before"] == pytest.approx(pair["after"], abs=1e-4) for pair in pairs)


def test_strategies_without_influence_scores_have_no_spot_check(own_checked):
    root, _ = own_checked
    for strategy in ("random", "learnability", "grad_norm"):
        record = go(tiny(stages=1, selection={"strategy": strategy}, diagnostics=SPOT), root)
        assert not {s for s in record.slots if s.startswith("diagnostics") or "/spot" in s}
        assert len(record.checks) == (strategy == "grad_norm")


# -- limits -------------------------------------------------------------------------------------------------


def test_limits_that_are_kept_change_nothing(own_checked, reference):
    root, _ = own_checked
    loose = {"max_kl": 1e6, "min_ess": 0.0, "max_dead_share": 1.0}
    loose |= {"min_target_agreement": -1.0, "min_top_agreement": 0.0}
    record = go(tiny(diagnostics=loose), root)
    assert computed(record) == set()
    assert digests(record) == digests(reference[1])
    assert (record.notes, [check.action for check in record.checks]) == ([], ["none", "none"])


def beyond(rule, record):
    """A limit that stage 2 of a run passes by a little; stage 1 does too where its value is no better."""
    figure = next(f.name for f in FIGURES if f.rule == rule)
    found = [values(check)[figure] for check in record.checks]
    margin = 0.01 * abs(found[1]) + 1e-6
    limit = found[1] - margin if rule.startswith("max_") else found[1] + margin
    passed = [v > limit if rule.startswith("max_") else v < limit for v in found]
    assert passed[1]
    return limit, passed


ACTIONS = [*[(rule, "refresh") for rule in RULES], ("max_kl", "random"), ("min_target_agreement", "random")]


@pytest.mark.parametrize(("rule", "action"), ACTIONS)
def test_a_passed_limit_does_its_action_is_noted_and_recomputes_nothing_before(
    checked, request, tmp_path, rule, action
):
    _, before = checked
    limit, passed = beyond(rule, before)
    # Every rule refreshes the same artifacts: they are computed here for one rule, and found for the others.
    finds = action == "refresh" and rule != "max_kl"
    source = request.getfixturevalue("refreshed")[0] if finds else checked[0]
    root = shutil.copytree(source, tmp_path / "root")
    record = go(tiny(diagnostics={**SPOT, rule: limit, f"{rule}_action": action}), root)
    first = record.checks[0]
    assert first.action == ("random" if passed[0] and action == "random" else "none"), "nothing is fresher"
    assert record.notes == [said for check in record.checks if (said := consequence(check))]
    assert all(f"diagnostics.{rule}=" in note for note in record.notes)
    acted = 1 if first.action == "random" else 2
    follows = ("selection", "policy", "evaluation")
    if action == "refresh":
        assert [(c.stage, c.action) for c in record.checks[:2]] == [(1, "none"), (2, "refresh")]
        again, *more = record.checks[2:]
        assert (again.stage, again.trajectories, more) == (2, "own", [])
        assert again.action == "none"
        follows = ("rollouts", "gradients", "scores", "diagnostics", "prompts/spot", *follows)
        inputs = Store(root).manifest(record.slots["rollouts/pool@2"].ref).inputs
        assert inputs["policy"] == record.slots["policy@1"].ref
        kept = {s: e.ref for s, e in record.slots.items() if s.endswith("/stored@2")}
        assert kept["gradients/pool/stored@2"] == before.slots["gradients/pool@2"].ref
    else:
        assert "rollouts/pool@2" not in record.slots
        assert [c.action for c in record.checks if c.stage == acted] == ["random"]
    # `computed` of later stages is what follows; of the stage that acted only what the action asks for.
    at = {s for s in computed(record) if s.endswith(f"@{acted}") and "/stored" not in s}
    assert at <= {s for s in record.slots if s.endswith(f"@{acted}") and s.startswith(follows)}
    assert not {s for s in computed(record) if int(s.partition("@")[2] or 0) < acted}
    for stage in (1, 2):
        final = [c for c in record.checks if c.stage == stage][-1]
        summary = Store(root).manifest(record.slots[f"selection@{stage}"].ref).summary
        assert summary["strategy"] == ("random" if final.action == "random" else "influence")
        assert ("fallback" in summary) == (final.action == "random")


@pytest.mark.parametrize("at", ["gradients/spot@2", "gradients/pool@2", "policy@2"])
def test_a_run_that_stops_in_a_refresh_or_a_spot_check_resumes_to_the_same_end(own_checked, refreshed, at):
    root, _ = own_checked
    _, config, uninterrupted = refreshed
    store, asked = Store(root), []

    def stopped(spec):
        asked.append(spec.slot)
        # The gradients of the stored trajectories come first; what follows the refresh is the second of the slot.
        if spec.slot == at and (at != "gradients/pool@2" or asked.count(at) == 2):
            raise StepError("stopped")
        return run_step(spec, store)

    with pytest.raises(StepError):
        run_curriculum(config, store, stopped)
    half = load_run(store, run_id(config))
    assert (half.status, len(half.notes)) == ("failed", 1)
    record = go(config, root)
    assert digests(record) == digests(uninterrupted)
    assert (record.checks, record.notes) == (uninterrupted.checks, uninterrupted.notes)


def test_a_random_selection_says_that_it_is_and_draws_what_the_strategy_random_draws(own_checked):
    root, before = own_checked
    limit, _ = beyond("max_dead_share", before)
    fallen = go(
        tiny(stages=1, diagnostics={"max_dead_share": limit, "max_dead_share_action": "random"}), root
    )
    plain = go(tiny(stages=1, selection={"strategy": "random"}), root)
    runs = (before, fallen, plain)
    assert len({run.slots["selection@1"].ref.key for run in runs}) == 3
    said, drawn = (rows_of(root, run, "selection@1", "selection.parquet") for run in (fallen, plain))
    assert [row["selected"] for row in said] == [row["selected"] for row in drawn]
    assert all(row["reason"].endswith("instead of influence: max_dead_share") for row in said)
    assert {row["status"] for row in said} > {"ok"}, "what was measured stays known"
    summary = Store(root).manifest(fallen.slots["selection@1"].ref).summary
    assert summary["fallback"] == {"strategy": "influence", "limits": ["max_dead_share"]}
    assert fallen.slots["scores@1"].ref == before.slots["scores@1"].ref


def test_pinned_trajectories_are_not_collected_again(own_checked):
    root, before = own_checked
    limit, _ = beyond("max_kl", before)
    pin = {"rollouts/pool": before.slots["rollouts/pool@1"].ref.key}
    record = go(tiny(pin=pin, diagnostics={"max_kl": limit}), root)
    (note,) = record.notes
    assert "they are pinned" in note
    assert [check.trajectories for check in record.checks] == ["own", "pinned"]
    assert "rollouts/pool@2" not in record.slots


def test_a_pool_without_a_gradient_is_an_error_or_a_random_selection(own_checked):
    root, _ = own_checked
    data = {"pool": world(add3=8)}
    few = {"steps": 1, "prompts_per_step": 2}
    with pytest.raises(SelectionError, match="no prompt of the pool"):
        go(tiny(stages=1, data=data, training=few, selection={"ratio": 0.5}), root)
    limits = {"max_dead_share": 0.9, "max_dead_share_action": "random"}
    record = go(tiny(stages=1, data=data, training=few, selection={"ratio": 0.5}, diagnostics=limits), root)
    (note,) = record.notes
    assert "prompts without a gradient 1 is above diagnostics.max_dead_share=0.9" in note
    assert "scores@1" not in record.slots
    assert record.status == "done"
