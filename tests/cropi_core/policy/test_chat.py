"""The chat template of a run: written to the policy's files once, and rendered identically everywhere."""

import json

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from cropi_core.artifacts.store import Store
from cropi_core.curriculum.execution import run_step
from cropi_core.curriculum.run import Run
from cropi_core.curriculum.start import base_policy
from cropi_core.errors import ConfigError, PolicyError
from cropi_core.planning.rehearsal import rehearse
from cropi_core.policy.chat import PLAIN, chat_settings, with_arguments, write_chat
from cropi_core.policy.loading import copy_checkpoint, load_policy, render
from data_schemas.config import Config
from data_schemas.policy import Chat, PolicySource
from tests.support.models import save_tiny

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "ab?"},
    {"role": "assistant", "content": "ba"},
    {"role": "user", "content": "cd?"},
]
THINKING = """{% macro turn(m) %}{% if thinking is defined and not thinking %}!{% endif %}{{ m.content }}{% endmacro %}
{%- for m in messages %}
{%- if thinking is defined and thinking is false %}-{% endif %}{{ turn(m) }}
{%- endfor %}
  {% if words %}{{ words | join(',') }}{{ words | length }}{% endif %}"""
"""A template that reads its arguments at the top, in a loop and in a macro."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def chosen(**settings):
    return chat_settings(Chat(**settings))


def text(directory, turns=TURNS, **arguments):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **arguments)


def copied(checkpoint, target, **settings):
    copy_checkpoint(checkpoint, target, chosen(**settings))
    return target


def test_the_plain_template_names_the_turns(checkpoint, tmp_path):
    policy = copied(checkpoint, tmp_path / "a", template="plain")
    said = "Be brief.\n\nUser: ab?\n\nAssistant: ba\n\nUser: cd?\n\nAssistant:"
    assert text(policy).removeprefix("<s>").endswith(said)


def test_the_plain_template_begins_as_the_tokenizer_does(checkpoint, tmp_path):
    policy = copied(checkpoint, tmp_path / "a", template="plain")
    tokenizer = load_policy(policy, "float32", "cpu")[1]
    plain = tokenizer.apply_chat_template(
        TURNS, add_generation_prompt=True, tokenize=False, chat_template=PLAIN
    )
    assert render(tokenizer, TURNS) == tokenizer(plain)["input_ids"]


def test_a_model_without_a_template_is_given_one(checkpoint, tmp_path):
    base = tmp_path / "base"
    copy_checkpoint(checkpoint, base)
    (base / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    assert "User: ab?" in text(copied(base, tmp_path / "a", template="plain"))
    with pytest.raises(PolicyError, match="has no chat template"):
        copied(base, tmp_path / "b", arguments={"enable_thinking": False})


@pytest.mark.parametrize(
    "arguments",
    [
        {"thinking": False},
        {"thinking": True, "words": ["a", "b\"%}'\\", None, 1.5, {"k": "é😀\n"}]},
        {"words": "{{ 1 }}"},
    ],
)
def test_arguments_are_rendered_as_if_they_had_been_given(checkpoint, tmp_path, arguments):
    given = copied(checkpoint, tmp_path / "a", template=THINKING)
    fixed = copied(checkpoint, tmp_path / "b", template=THINKING, arguments=arguments)
    assert text(fixed) == text(given, **arguments)
    assert text(fixed) != text(given)


@pytest.mark.parametrize(
    "template", ["\n  {% if x %}a{% endif %}\n{{ messages[0].content }}", "{{ x }}", " \n{#c#}\n{{x}}"]
)
def test_assignments_in_front_change_no_white_space(checkpoint, tmp_path, template):
    write_chat(copied(checkpoint, tmp_path / "a", template="plain"), chosen(template="plain"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")

    def rendered(template, **arguments):
        return tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template=template, **arguments)

    assert rendered(with_arguments(template, {"x": 1})) == rendered(template, x=1)


def test_arguments_go_before_the_checkpoints_own_template(checkpoint, tmp_path):
    own = tmp_path / "own"
    copy_checkpoint(checkpoint, own, chosen(template=THINKING))
    policy = copied(own, tmp_path / "a", arguments={"thinking": False})
    assert text(policy) == text(own, thinking=False)


@pytest.mark.parametrize(
    "kept", [THINKING, [{"name": "default", "template": THINKING}, {"name": "tool_use", "template": "x"}]]
)
def test_a_template_inside_the_tokenizers_configuration_is_read_and_replaced(checkpoint, tmp_path, kept):
    old = tmp_path / "old"
    copy_checkpoint(checkpoint, old)
    (old / "chat_template.jinja").unlink()
    path = old / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": kept}))
    policy = copied(old, tmp_path / "a", arguments={"thinking": False})
    assert "chat_template" not in json.loads((policy / "tokenizer_config.json").read_text())
    wanted = copied(checkpoint, tmp_path / "b", template=THINKING, arguments={"thinking": False})
    assert text(policy) == text(wanted)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"template": "{% for %}"}, "cannot render"),
        ({"template": "{{ raise_exception('no') }}"}, "cannot render"),
        ({"template": "{{ 'hello' }}"}, "loses what a user says"),
        ({"template": "plain", "arguments": {"colour": 1}}, "reads no colour"),
        ({"template": "{{ messages.__class__.__mro__ }}{{ x }}"}, "cannot render|loses"),
    ],
)
def test_templates_that_fail_are_reported_before_anything_runs(checkpoint, tmp_path, settings, word):
    with pytest.raises(PolicyError, match=word):
        copied(checkpoint, tmp_path / "a", **settings)


def test_a_file_is_read_by_content(tmp_path):
    (tmp_path / "t.jinja").write_text(THINKING)
    assert chosen(template=str(tmp_path / "t.jinja")) == chosen(template=THINKING)
    with pytest.raises(ConfigError, match="is not a file"):
        chosen(template="nowhere.jinja")
    (tmp_path / "big.jinja").write_bytes(b"{" * (1 << 21))
    with pytest.raises(ConfigError, match="more than 1 MB"):
        chosen(template=str(tmp_path / "big.jinja"))


def test_the_section_describes_the_choice_and_leaves_the_rest_to_the_run():
    with pytest.raises(ValidationError, match="needs a template"):
        Chat()
    with pytest.raises(ValidationError, match="messages"):
        Chat(arguments={"messages": []})
    with pytest.raises(ValidationError, match="arguments"):
        Chat(arguments={"a b": 1})


def configuration(**policy):
    world = {"kind": "world", "families": {"reverse": 8}}
    return {
        "policy": policy,
        "data": {"pool": world, "validation": {"val": world}},
        "selection": {"strategy": "random", "ratio": 1.0},
        "stages": 1,
        "training": {"prompts_per_step": 4},
    }


def test_a_pinned_policy_keeps_its_template():
    with pytest.raises(ValidationError, match=r"policy\.chat with pin\.policy"):
        Config.model_validate(configuration(chat={"template": "plain"}) | {"pin": {"policy": "base"}})


def base_key(tmp_path, checkpoint, **policy):
    """Run only the first steps; return the key of the base policy and its directory."""
    config = Config.model_validate(configuration(path=str(checkpoint), **policy))
    store = Store(tmp_path / "root")
    store.prepare()
    ref = base_policy(Run(config, store, lambda spec: run_step(spec, store), print), {})
    return ref.key, store.path(ref) / "checkpoint"


def test_the_template_is_in_the_policys_key_and_only_when_it_is_set(checkpoint, tmp_path):
    plain, _ = base_key(tmp_path, checkpoint)
    assert PolicySource().for_key() == {"path": "embedded", "revision": None, "dtype": "float32"}
    chat = {"template": "plain"}
    changed, policy = base_key(tmp_path, checkpoint, chat=chat)
    argued, _ = base_key(tmp_path, checkpoint, chat={"template": THINKING, "arguments": {"thinking": True}})
    assert len({plain, changed, argued}) == 3
    assert base_key(tmp_path, checkpoint, chat=chat)[0] == changed
    assert "User: ab?" in text(policy)


def test_a_plan_counts_the_prompts_as_the_run_renders_them(checkpoint, tmp_path):
    config = Config.model_validate(configuration(path=str(checkpoint), chat={"template": "plain"}))
    (tmp_path / "plan").mkdir()
    before = (checkpoint / "chat_template.jinja").read_text()
    rehearsed = rehearse(config, Store(tmp_path / "root"), tmp_path / "plan")
    assert "User: ab?" in text(rehearsed.policy)
    assert (checkpoint / "chat_template.jinja").read_text() == before
    assert not (tmp_path / "root" / "policy").exists()
