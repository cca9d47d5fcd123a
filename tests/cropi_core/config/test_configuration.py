"""Configuration files: parsing, and reporting of all faults at once."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cropi_core.config import loading as configuration
from cropi_core.config.loading import load_config, load_sections
from cropi_core.errors import ConfigError
from data_schemas.config import Config
from data_schemas.gradients import Objective, Projection

WORLD = {"kind": "world", "families": {"sort": 4}}
GOOD = {"data": {"pool": WORLD, "validation": {"sorting": WORLD}}}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def faults(path, overrides=None):
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    assert raised.value.exit_code == 2
    return str(raised.value).splitlines()[1:] or [str(raised.value)]


def test_a_file_and_its_overrides_become_a_configuration(write):
    config = load_config(
        write(GOOD),
        [
            "selection.ratio=0.25",
            "training.learning_rate=1e-5",
            "stages=3",
            "pin={rollouts: abc}",
            "stages=4",
        ],
    )
    assert (config.selection.ratio, config.training.learning_rate, config.stages) == (0.25, 1e-5, 4)
    assert config.pin == {"rollouts": "abc"}
    assert load_config(write(GOOD)) == Config.model_validate(GOOD)


def test_overrides_reach_into_sections_the_file_leaves_out_or_empty(write):
    config = load_config(
        write({**GOOD, "rollouts": None}),
        ["rollouts.pool.samples=4", "projection.kind=none", "projection.dtype=float32"],
    )
    assert config.rollouts.pool.samples == 4
    assert config.projection.kind == "none"


def test_a_preset_is_found_by_name_and_its_near_miss_is_named(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "demo.yaml").write_text(yaml.safe_dump(GOOD))
    monkeypatch.setattr(configuration, "PRESETS", (tmp_path / "presets", tmp_path / "absent"))
    assert load_config("demo") == Config.model_validate(GOOD)
    with pytest.raises(ConfigError, match="did you mean demo"):
        load_config("dmeo")


def test_unknown_wrong_and_contradicting_settings_are_reported_together(write):
    bad = {
        "sed": 3,
        "stages": 0,
        "data": {
            "pool": {"kind": "world", "familes": {"sort": 4}},
            "validation": {
                "score": WORLD,
                "Bad-Name": WORLD,
                "file": {"kind": "file", "path": "x", "columns": {"promt": "q"}},
                "odd": {"kind": "wrld"},
            },
            "test": {"score": WORLD},
        },
        "selection": {"strategy": "full", "ratio": 0.5, "clip_epsilon": 1},
        "projection": {"kind": "none", "k": "two"},
    }
    lines = faults(
        write(bad), ["gradients.block_rows=33", "seed.x=1", "nothing", "objectve.ratio=none", "a=["]
    )
    for start in (
        "nothing: an override is written",
        "a=[: the value is not YAML",
        "sed: unknown; did you mean seed?",
        "stages = 0: ",
        "seed = {'x': 1}: ",
        "objectve: unknown; did you mean objective?",
        "data.pool.familes: unknown; did you mean families?",
        "data.pool.families: is required",
        "data.validation.Bad-Name = 'Bad-Name': ",
        "data.validation.file.columns.promt: unknown; did you mean prompt?",
        "data.validation.odd = {'kind': 'wrld'}: kind is none of 'world', 'file', 'hub'",
        "selection.clip_epsilon: unknown; there is objective.clip_epsilon",
        "projection.k = 'two': ",
        "gradients.rows_per_shard=128 is not a multiple of gradients.block_rows=33",
        "selection.strategy=full selects every prompt",
        "projection.kind=none",
        "data.validation and data.test share the names ['score']",
        "data.validation names ['score']",
    ):
        assert any(line.strip().startswith(start) for line in lines), f"{start!r} is not in {lines}"
    assert len(lines) == 18


def test_contradictions_alone_are_a_line_each(write):
    lines = faults(
        write(GOOD), ["training.sampling.samples=1", "training.reference=base", "gradients.block_rows=5"]
    )
    assert len(lines) == 3


def test_a_missing_required_section_does_not_hide_contradictions(write):
    lines = faults(write({"training": {"sampling": {"samples": 1}}}))
    assert [line.strip().split(":")[0] for line in lines] == ["data", "training.sampling.samples=1"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("stages: 1\nstages: 2\n", "'stages' twice"),
        ("data: {pool: {kind: world, kind: file}}", "'kind' twice"),
        ("a: [1", "YAML"),
        ("- 1\n", "mapping"),
        ("", "mapping"),
        ("a: !!python/object/apply:os.system [true]", "YAML"),
    ],
)
def test_files_that_are_not_a_configuration_are_refused_with_a_reason(write, text, word):
    assert word in faults(write(text))[0]


def test_a_missing_file_lists_the_presets():
    with pytest.raises(ConfigError, match=r"neither a file .* nor a preset"):
        load_config("no/such.yaml")


@given(
    st.sampled_from(
        [
            "seed",
            "stages",
            "selection.ratio",
            "training.steps",
            "data.pool.seed",
            "diagnostics.spot_dead_share",
        ]
    ),
    st.one_of(
        st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.none(), st.lists(st.integers())
    ),
)
def test_a_value_is_taken_or_refused_by_its_path(tmp_path_factory, name, value):
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    override = (
        f"{name}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
    )
    try:
        config = load_config(str(path), [override])
    except ConfigError as refused:
        assert name in str(refused)  # noqa: PT017 - a refusal is one of the two valid outcomes
    else:
        node = config
        for part in name.split("."):
            node = getattr(node, part)
        assert node == float(value)  # pydantic accepts "0.0" as an integer


def test_sections_are_built_from_overrides_alone():
    built = load_sections({"projection": Projection, "objective": Objective}, ["projection.k=64"])
    assert built == {"projection": Projection(k=64), "objective": Objective()}
    with pytest.raises(ConfigError) as raised:
        load_sections({"projection": Projection}, ["projecton.k=1", "projection.k=1", "projection.kk=1", "x"])
    for word in ("did you mean projection?", "projection.k = 1", "projection.kk: unknown", "x: an override"):
        assert word in str(raised.value)


def test_an_undefined_verifier_is_reported_with_the_other_faults_of_a_file(tmp_path):
    source = {"kind": "file", "path": "p.jsonl", "columns": {}, "verifier": "mine"}
    data = {"pool": source, "validation": {"v": source | {"limit": 0}, "w": source}}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"data": data, "seeds": 1}))
    with pytest.raises(ConfigError) as raised:
        load_config(str(path))
    message = str(raised.value)
    assert "4 faults" in message
    for word in (
        "data.pool.verifier=mine is not one of exact",
        "data.validation.w.verifier=mine",
        "limit",
        "seeds",
    ):
        assert word in message
