"""A study: its file, its curricula, their costs, and its output files."""

import html
import itertools
import json
import re
import sys

import pyarrow.parquet as pq
import pytest
import yaml

pytest.importorskip("trl", reason="training needs the extra `train`")
pytest.importorskip("matplotlib", reason="pages need the extra `report`")

from matplotlib.figure import Figure

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.curriculum import run_curriculum
from cropi_core.curriculum.execution import run_step
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.runs.accuracy import Accuracy
from cropi_core.runs.records import load_run, run_id
from cropi_core.study import tables
from cropi_core.study.compare import ALL, common_steps, compare, headline
from cropi_core.study.measure import Cost, Curve, Point, cost, curve
from cropi_core.study.output import Failed, into_page, write_study
from cropi_core.study.plan import cells, load_study
from cropi_core.study.plots import draw_distances
from cropi_core.study.stages import dead_groups
from data_schemas.steps import StepSpec
from data_schemas.study import Study
from tests.support import processes
from tests.support.paths import CHECKOUT
from tests.support.studies import settings, world

STUDIES = sorted((CHECKOUT / "configs" / "studies").glob("*.yaml"))


def study(**changes):
    return Study.model_validate(settings(**changes))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run all curricula of the tiny study in one root."""
    store = Store(tmp_path_factory.mktemp("study") / "root")
    plan = study()
    for cell in cells(plan):
        run_curriculum(cell.config, store, lambda spec: run_step(spec, store))
    return plan, store


def curves_of(plan, store):
    return [
        curve(c, plan.worlds[c.world].targets, load_run(store, run_id(c.config)), store) for c in cells(plan)
    ]


# -- the file -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_shipped_study_is_complete(path):
    plan = load_study(str(path))
    made = cells(plan)
    assert len(made) == len(plan.seeds) * len(plan.worlds) * len(plan.arms)
    assert len({run_id(cell.config) for cell in made}) == len(made)
    for (_, reference), (_, arm) in itertools.product(
        [(c.seed, c) for c in made if c.arm == plan.reference], [(c.seed, c) for c in made]
    ):
        if (reference.world, reference.seed) == (arm.world, arm.seed):
            # The evaluation is the same for all: prompts, samples and seed.
            assert reference.config.data.test == arm.config.data.test
            assert reference.config.evaluation == arm.config.evaluation
            # second_moments changes what is stored, not the training. One study compares how stages begin, one how
            # batches are drawn.
            trained = {"second_moments"}
            trained |= {"draw"} if plan.name == "acceleration" else set()
            trained |= {"optimizer_state", "warmup_steps"} if plan.name == "between_stages" else set()
            trained |= {"steps"} if reference.config.training.steps != arm.config.training.steps else set()
            assert reference.config.training.model_dump(exclude=trained) == arm.config.training.model_dump(
                exclude=trained
            )


def written(path, **changes):
    path.write_text(yaml.safe_dump(settings(**changes)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "ful"}, "did you mean full"),
        ({"subject": "full"}, "not compared with itself"),
        ({"seeds": [1, 1]}, r"seeds \[1\] occur twice"),
        ({"sedes": [1]}, "did you mean seeds"),
        ({"settings": {"seed": 3}}, "gives each curriculum its own"),
        ({"worlds": {"one": {"targets": []}}}, "worlds.one.targets"),
        ({"bootstrap": {"draws": 3}}, "bootstrap.draws"),
    ],
)
def test_a_wrong_study_is_reported_with_a_suggestion(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_study(written(tmp_path / "s.yaml", **changes))


def test_a_study_of_curricula_that_evaluate_nothing_is_refused(tmp_path):
    plan = load_study(written(tmp_path / "s.yaml", settings={"ends_with": "selection"}))
    with pytest.raises(ConfigError, match="ends_with=selection: such a curriculum evaluates no policy"):
        cells(plan)


def test_all_wrong_arms_and_worlds_are_reported_together(tmp_path):
    arms = {
        "full": {"settings": {"selection.strateg": "full"}},
        "cropi": {"settings": {"training.steps": 0}},
    }
    worlds = {"one": {"targets": ["goal"]}, "two": {"targets": ["held_out"], "settings": {"data.tset": {}}}}
    with pytest.raises(ConfigError) as told:
        cells(load_study(written(tmp_path / "s.yaml", arms=arms, worlds=worlds)))
    text = str(told.value)
    for part in ("world one, arm full", "did you mean strategy", "world two, arm cropi", "training.steps"):
        assert part in text
    arms["full"], arms["cropi"] = {}, {"settings": {"selection.ratio": 0.3}}
    with pytest.raises(ConfigError, match=r"goal is not one of its test sets.*may not judge"):
        cells(load_study(written(tmp_path / "s.yaml", arms=arms, worlds={"one": worlds["one"]})))


def test_an_unknown_study_is_reported_with_the_existing_ones():
    with pytest.raises(ConfigError, match="did you mean demo"):
        load_study("demos")


def test_seeds_are_complete_and_the_reference_is_first():
    plan = study(seeds=[3, 1], worlds={"a": {"targets": ["other"]}, "b": {"targets": ["held_out"]}})
    made = cells(plan, ["stages=1"])
    assert [cell.seed for cell in made] == [3] * 6 + [1] * 6
    assert made[0].arm == "full"
    assert all(cell.config.stages == 1 and cell.config.seed == cell.seed for cell in made)


def test_the_ceiling_trains_on_prompts_of_the_pool(tmp_path):
    from cropi_core.world import build

    oracle = {"pool": "targets", "settings": {"selection.strategy": "full", "selection.ratio": 1.0}}
    made = {
        c.arm: c
        for c in cells(study(arms={"full": {}, "cropi": {"settings": {"stages": 1}}, "oracle": oracle}))
    }
    whole, part = (made[name].config.data.pool for name in ("full", "oracle"))
    ids = [set(build(p.families, "pool", p.seed)["prompt_id"].to_pylist()) for p in (whole, part)]
    assert part.families == {"reverse": 16}
    assert ids[1] < ids[0]
    far = {"data.validation": {"goal": world(shift=8)}}
    with pytest.raises(ConfigError, match="targets leaves nothing"):
        cells(
            study(
                arms={"full": {}, "cropi": {"settings": {"stages": 1}}, "oracle": oracle},
                worlds={"one": {"targets": ["held_out"], "settings": far}},
            )
        )


# -- measurements and costs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_of_the_first_stage_serve_all_stages_on_request(ran):
    plan, store = ran
    records = {c.arm: load_run(store, run_id(c.config)) for c in cells(plan)}
    once, each = records["once"], records["cropi"]
    assert [s for s in once.slots if s.startswith("scores")] == ["scores@1"]
    assert [s for s in each.slots if s.startswith("scores")] == ["scores@1", "scores@2"]
    assert not any(slot.startswith("gradients") and slot.endswith("@2") for slot in once.slots)
    used = store.manifest(once.slots["selection@2"].ref).inputs["scores"]
    assert used == once.slots["scores@1"].ref == each.slots["scores@1"].ref
    assert once.slots["policy@1"].ref == each.slots["policy@1"].ref, "the first stage is shared"


def test_selection_is_charged_to_who_uses_it_also_when_it_was_found(ran):
    plan, store = ran
    found = {c.arm: c for c in curves_of(plan, store)}
    full, once, each = (found[name].points for name in ("full", "once", "cropi"))
    assert once[1].cost == each[1].cost, "the same first stage, computed by one and found by the other"
    pool = store.manifest(load_run(store, found["once"].run).slots["rollouts/pool@1"].ref)
    assert once[1].cost.generated - pool.summary["tokens"] > 0
    assert once[2].cost.work < each[2].cost.work, "scored once, not twice"
    assert full[0].cost == Cost(), "the base costs nothing, nor does looking at it"
    for points in (full, once, each):
        assert [p.steps for p in points] == [0, 2, 4]
        assert all(a.cost.work < b.cost.work for a, b in itertools.pairwise(points))


def test_the_cost_of_a_whole_run_is_the_sum_of_its_artifacts(ran):
    plan, store = ran
    for one in curves_of(plan, store):
        record = load_run(store, one.run)
        made = {
            e.ref.key: (slot, store.manifest(e.ref)) for slot, e in record.slots.items() if "@0" not in slot
        }
        total = sum((cost(slot, m, store) for slot, m in made.values() if m.step != "prompts"), Cost())
        assert one.points[-1].cost.generated == total.generated
        assert one.points[-1].cost.trained == total.trained
        assert one.points[-1].cost.seconds == pytest.approx(total.seconds)


def test_gradients_cost_what_the_engine_reads(ran, monkeypatch):
    """The tokens charged are those of the packs that the gradients were computed from."""
    from cropi_core.gradients import batches as group_features

    plan, store = ran
    record = load_run(store, next(c.run for c in curves_of(plan, store) if c.arm == "cropi"))
    made = store.manifest(record.slots["gradients/pool@1"].ref)
    read, make = [], group_features.make_pack
    original = group_features.project_groups

    def counted(prompts, completions, device):
        read.append(sum(map(len, prompts)) + sum(len(c) for group in completions for c in group))
        return make(prompts, completions, device)

    def project(*arguments):
        # Only while groups are projected, because the engine first reads a few sequences of its own.
        with monkeypatch.context() as patch:
            patch.setattr(group_features, "make_pack", counted)
            return original(*arguments)

    monkeypatch.setattr(group_features, "project_groups", project)
    store.discard(made.key)
    spec = StepSpec(
        step="gradients",
        slot="gradients/pool@1",
        settings=made.settings,
        inputs=made.inputs,
        runtime={"device": "cpu", "threads": 1},
    )
    assert run_step(spec, store).ref.digest == made.digest
    assert cost("gradients/pool@1", made, store).trained == sum(read) < made.summary["tokens"]


def test_a_stage_says_what_it_chose_and_used_up(ran):
    plan, store = ran
    for one in curves_of(plan, store):
        record = load_run(store, one.run)
        assert [facts.stage for facts in one.stages] == [1, 2]
        for facts in one.stages:
            table = pq.read_table(
                store.path(record.slots[f"selection@{facts.stage}"].ref) / "selection.parquet"
            )
            chosen = [row["prompt_id"] for row in table.to_pylist() if row["selected"]]
            assert facts.of_targets == sum(name.startswith("reverse") for name in chosen) / len(chosen)
            assert bool(facts.checked) == (f"scores@{facts.stage}" in record.slots)
            if facts.checked:
                manifest = store.manifest(record.slots[f"scores@{facts.stage}"].ref)
                halves = manifest.summary["sets"]["goal"]["split_half_cosine"]
                assert facts.checked["target_agreement"] == halves
            assert 0 <= facts.dead_groups <= 1
    header, rows = tables.stages_grid(plan, curves_of(plan, store))
    assert "halves: cosine of the targets" in header
    assert not any("spot check" in name for name in header)  # no spot check was configured
    assert [row[:3] for row in rows] == [["one", arm, stage] for arm in plan.arms for stage in ("1", "2")]
    assert dead_groups([0.0, 1.0, 0.5, None]) is None
    assert dead_groups([0.0, 0.0, 0.25]) == 0.25


def test_an_unfinished_run_has_no_curve(ran):
    plan, store = ran
    cell = cells(plan)[0]
    record = load_run(store, run_id(cell.config)).model_copy(update={"status": "running"})
    with pytest.raises(ArtifactError, match="is running"):
        curve(cell, ["held_out"], record, store)


# -- output ----------------------------------------------------------------------------------------------------


def made_up(arm, y, seed=0, where="one", step=10):
    """Return a curve with given accuracies and a cost of ten tokens per step."""
    points = [
        Point(
            i,
            step * i,
            Cost(10 * step * i, seconds=1.0 * i),
            {"held_out": Accuracy("held_out", "test", i, v, v, v)},
        )
        for i, v in enumerate(y)
    ]
    return Curve(where, arm, seed, f"run-{arm}-{seed}", points, ["held_out"], [], [], [])


def test_ratios_are_paired_and_censored_as_the_rule_says():
    plan = study(seeds=[0, 1])
    found = [
        made_up("full", [0.4, 0.5, 0.6, 0.7]),
        made_up("cropi", [0.4, 0.7, 0.7, 0.7]),
        made_up("full", [0.4, 0.5, 0.6, 0.7], seed=1),
        made_up("cropi", [0.4, 0.5, 0.6, 0.6], seed=1),
    ]
    row = next(r for r in compare(plan, found) if r.arm == "cropi")
    steps = row.speed["steps"]
    assert steps.pairs == {"one": {0: pytest.approx(3.0), 1: 0.0}}
    assert steps.never == 1
    assert steps.median is not None
    assert steps.median.value == 0, "of two, one of whom failed, the worse: no ratio is made up between them"
    figures = headline(plan, compare(plan, found))
    assert figures["median_step_ratio"] == 0
    assert figures["never_reached"] == 1
    assert figures["seeds"] == 2


def test_one_seed_has_no_interval():
    plan = study()
    row = next(
        r for r in compare(plan, [made_up("full", [0.4, 0.6]), made_up("cropi", [0.4, 0.7])]) if r.speed
    )
    assert row.speed["steps"].median.low is None
    assert row.speed["steps"].curves.low is None
    assert "(" not in tables.times(row.speed["steps"].median)
    assert headline(plan, [row])["ci95_low"] is None


def test_an_arm_is_ahead_by_the_reported_difference():
    plan = study()
    found = [made_up("full", [0.4, 0.5]), made_up("cropi", [0.4, 0.6]), made_up("once", [0.4, 0.6])]
    rows = {r.arm: r for r in compare(plan, found)}
    assert rows["full"].ahead[10].value == pytest.approx(0.1)
    assert rows["once"].ahead[10].value == pytest.approx(0.0)
    assert rows["cropi"].ahead == {}


def test_the_picture_of_distances_has_every_arm_where_the_table_has_it():
    plan = study(seeds=[0, 1])
    curves = {
        "full": ([0.4, 0.5], [0.4, 0.6]),
        "cropi": ([0.4, 0.6], [0.4, 0.6]),
        "once": ([0.4, 0.7], [0.4, 0.6]),
    }
    found = [made_up(arm, y, seed) for arm, seeds in curves.items() for seed, y in enumerate(seeds)]
    ax = Figure().subplots()
    rows = compare(plan, found)
    draw_distances(ax, plan, rows)
    (drawn,) = ax.containers
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full", "once"]
    assert drawn.lines[0].get_xdata() == pytest.approx([-5, 5])
    (whiskers,) = drawn.lines[2]
    ends = {
        arm: [x for x, _ in ends] for arm, ends in zip(("full", "once"), whiskers.get_segments(), strict=True)
    }
    assert ends["full"] == pytest.approx([-10, 0])  # with two seeds the interval spans their values
    assert ends["once"] == pytest.approx([0, 10])


def test_an_arm_that_trains_longer_is_shown_to_its_end_and_compared_where_both_were():
    plan = study()
    found = [made_up("full", [0.4, 0.5, 0.6, 0.7, 0.8]), made_up("cropi", [0.4, 0.6, 0.7])]
    rows = {r.arm: r for r in compare(plan, found)}
    assert list(rows["full"].targets) == [0, 10, 20, 30, 40]
    assert list(rows["full"].ahead) == [0, 10, 20]
    assert rows["cropi"].speed["steps"].never == 1, "0.8 is what the full pool has at its own end"
    _, lines = tables.accuracy_grid(compare(plan, found), "targets")
    assert [line[-1] for line in lines] == ["80.0 %", "–"]


def test_worlds_are_combined_in_a_last_row():
    two = {"a": {"targets": ["held_out"]}, "b": {"targets": ["held_out"]}}
    plan = study(worlds=two)
    y = {"full": [0.4, 0.5, 0.6], "cropi": [0.4, 0.6, 0.6]}
    found = [made_up(arm, values, where=name) for name in two for arm, values in y.items()]
    results = compare(plan, found)
    assert [r.world for r in results] == ["a", "a", "b", "b", ALL, ALL]
    assert set(headline(plan, results)["worlds"]) == {"a", "b"}
    assert common_steps(found) == [0, 10, 20]


def test_steps_shown_have_both_ends():
    assert tables.shown_steps(list(range(0, 210, 10)), 6) == [0, 40, 80, 120, 160, 200]
    assert tables.shown_steps([0, 20], 6) == [0, 20]


def test_files_agree_with_the_curves_and_contain_nothing_executable(ran, tmp_path):
    plan, store = ran
    hostile = "<script>alert(1)</script> | {{ 7 * 7 }}"
    plan = plan.model_copy(update={"description": hostile})
    found = curves_of(plan, store)
    files = write_study(plan, found, [Failed("x", hostile)], 4, tmp_path / "a")
    table = pq.read_table(files["results"])
    assert table.schema.equals(tables.POINTS)
    assert table.num_rows == sum(len(p.sets) for c in found for p in c.points)
    text = files["page"].read_text(encoding="utf-8")
    assert "<script" not in text
    assert html.escape("<script>alert(1)</script>") in text
    assert "{{ 7 * 7 }}" in html.unescape(text)
    assert not re.search(r"(?:src|href)=[\"'](?!#)", text), "nothing is loaded from anywhere"
    assert files["picture"].read_bytes().startswith(b"\x89PNG")
    again = write_study(plan, found, [Failed("x", hostile)], 4, tmp_path / "b")
    for name in ("results", "summary", "headline", "page", "markdown", "picture"):
        assert files[name].read_bytes() == again[name].read_bytes(), name


def test_tables_go_between_the_marks_of_a_page_and_nowhere_else(ran, tmp_path):
    plan, store = ran
    files = write_study(plan, curves_of(plan, store), [], 3, tmp_path / "out")
    page = tmp_path / "evidence.md"
    around = ["# Said by a person\n\n<!-- study tiny -->\n", "<!-- end of study tiny -->\n\nand this too\n"]
    for between in ("", "\nwhat an earlier study wrote\n"):
        page.write_text(between.join(around), encoding="utf-8")
        into_page(page, "tiny", files["markdown"], files["picture"])
        text = page.read_text(encoding="utf-8")
        assert text.startswith(around[0])
        assert text.endswith(around[1])
        assert "earlier" not in text
        assert "](evidence.png)" in text
        assert (tmp_path / "evidence.png").read_bytes() == files["picture"].read_bytes()
    for wrong in ("", around[0], "".join(reversed(around)), around[0] * 2 + around[1]):
        page.write_text(wrong, encoding="utf-8")
        with pytest.raises(ConfigError, match="each once"):
            into_page(page, "tiny", files["markdown"], files["picture"])
        assert page.read_text(encoding="utf-8") == wrong


def test_an_artifact_whose_tokens_were_not_counted_is_named(ran):
    plan, store = ran
    record = load_run(store, curves_of(plan, store)[0].run)
    made = store.manifest(record.slots["policy@1"].ref)
    old = made.model_copy(update={"summary": {k: v for k, v in made.summary.items() if "token" not in k}})
    with pytest.raises(ArtifactError, match=f"{made.key}.*--refresh training"):
        cost("policy@1", old, store)


@pytest.mark.slow
def test_the_benchmark_writes_the_figures_of_what_is_finished(ran, tmp_path):
    _, store = ran
    plan = written(tmp_path / "tiny.yaml")
    out = tmp_path / "acceleration.json"
    script = CHECKOUT / "benchmarks" / "acceleration.py"
    command = [sys.executable, script, "--root", store.root, "--study", plan, "--json", out]
    processes.run(command, check=True, capture_output=True)
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["curricula"] == {"planned": 3, "done": 3}
    assert {"median_step_ratio", "ci95_low", "seeds", "median_cost_ratio", "machine"} <= figures.keys()
    assert figures["worlds"]["one"]["targets"] == ["held_out"]
