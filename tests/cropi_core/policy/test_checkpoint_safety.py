"""Untrusted checkpoints: no file names outside the checkpoint, no remote code, no hang on import."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from cropi_core.errors import PolicyError
from cropi_core.policy.chat import bounded_rendering, check_template
from cropi_core.policy.checkpoint import checkpoint_files
from cropi_core.policy.loading import copy_checkpoint, load_policy, render
from tests.support.stores import edit


def index(directory, name):
    text = json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}})
    (directory / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/tmp/weights.bin", "weights.bin", "gone.safetensors", ""]
)
def test_an_index_names_safetensors_of_its_own_directory_only(checkpoint, name):
    save_file({"x": torch.zeros(1)}, checkpoint.parent / "other.safetensors")
    (checkpoint / "weights.bin").write_bytes(b"pickle")
    index(checkpoint, name)
    with pytest.raises(PolicyError, match="files in its directory"):
        checkpoint_files(checkpoint)
    index(checkpoint, "model.safetensors")
    assert checkpoint_files(checkpoint)


def test_links_lead_inside_the_checkpoint_or_to_blobs_of_the_hub(checkpoint, tmp_path):
    (checkpoint / "again.txt").symlink_to("tokenizer.json")
    assert checkpoint_files(checkpoint)
    (checkpoint / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(PolicyError, match="outside the checkpoint"):
        checkpoint_files(checkpoint)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.iterdir():
        if not path.is_symlink():
            (blobs / path.name).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert checkpoint_files(snapshot)
    (blobs / "out").symlink_to("/etc/hostname")
    (snapshot / "out.txt").symlink_to("../../blobs/out")
    with pytest.raises(PolicyError, match="outside the checkpoint"):
        checkpoint_files(snapshot)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000"),
        ({"text_config": {"n_layer": 10**7}}, "n_layer=10000000"),
        ({"layer_types": ["full_attention"] * 5000}, "layer_types=5000"),
        ({"num_local_experts": 10**6}, "num_local_experts"),
        ({"_attn_implementation": "someone/kernels"}, "fetched from the hub"),
        ({"text_config": {"attn_implementation": {"": "someone/kernels"}}}, "fetched from the hub"),
        ({"vocab_size": 10**8}, "would be made up"),
    ],
)
def test_what_a_configuration_asks_for_is_bounded(checkpoint, tmp_path, changes, words):
    edit(checkpoint / "config.json", **changes)
    start = time.process_time()
    with pytest.raises(PolicyError, match=words):
        copy_checkpoint(checkpoint, tmp_path / "copy")
    assert time.process_time() - start < 5


def test_nested_or_long_settings_are_refused(checkpoint):
    (checkpoint / "config.json").write_text("[" * 100_000)
    with pytest.raises(PolicyError, match="nests deeper"):
        checkpoint_files(checkpoint)
    (checkpoint / "config.json").write_text(" " * (5 << 20))
    with pytest.raises(PolicyError, match="at most"):
        checkpoint_files(checkpoint)


def test_a_generation_configuration_that_would_be_ignored_is_refused(checkpoint):
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 2')
    with pytest.raises(PolicyError, match=r"generation_config\.json is not JSON"):
        checkpoint_files(checkpoint)


def test_an_adapter_next_to_the_weights_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(PolicyError, match="adapter"):
        checkpoint_files(checkpoint)


def test_a_pattern_that_panics_is_an_error(checkpoint, tmp_path):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(PolicyError, match="retry-limit"):
        copy_checkpoint(checkpoint, tmp_path / "copy")
    _, tokenizer = load_policy(checkpoint, "float32", "cpu")
    tokenizer.chat_template = None
    with pytest.raises(PolicyError, match="retry-limit"):
        render(tokenizer, [{"role": "user", "content": "a" * 40 + "!"}])


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
GROWING = "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"


@pytest.mark.parametrize("template", [ENDLESS, GROWING])
def test_a_template_that_does_not_end_is_stopped(original, template):
    _, tokenizer = load_policy(original, "float32", "cpu")
    tokenizer.chat_template = template
    start = time.process_time()
    with pytest.raises(PolicyError, match="was stopped after"):
        render(tokenizer, [{"role": "user", "content": "Hello"}])
    assert time.process_time() - start < 30


BOMBS = [
    "{{ 9 ** (9 ** 9) }}",
    "{{ 'a' * 100000000000 }}",
    "{{ ([0] * 10 ** 9) | length }}",
    "{{ 1000 * ('a' * 1000 * 1000) }}",
    "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a'.center(100000000000) }}",
    "{{ 'a' | center(width=100000000000) }}",
    "{{ 'a' | attr('center')(100000000000) }}",
    "{% set w = 10 ** 11 %}{{ 'a'.rjust(w) }}",
    "{{ 'a'['cen' ~ 'ter'](100000000000) }}",
    "{{ '%100000000000d' | format(1) }}",
    "{{ '%100000000000d' % 1 }}",
    "{{ '{:100000000000}'.format(1) }}",
    "{{ range(99999) | join('a' * 1000000) }}",
    "{{ ('a' * 1000000).join(range(99999)) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "{{ ['a' * 1000] | map('replace', 'a', 'b' * 1000000) | list }}",
    "{{ ['a'] | map('center', 100000000000) | list }}",
    "{% set name = 'center' %}{{ ['a'] | map(name, 100000000000) | list }}",
    "{{ (['a' * 1000000] * 100000) | string }}",
    "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ 1.5 | round(1000000000, 'floor') }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ 'a'.encode().center(100000000000) }}",
    "{% set a = ['x'] %}" + "{% set a = [a, a, a, a, a, a, a, a] %}" * 20 + "{{ a }}",
    "{% set a = {'k': 'x'} %}" + "{% set a = {'k': a, 'l': (a, a, a)} %}" * 20 + "{{ a | tojson }}",
    "{% set n = namespace(a='x') %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a ~ '' }}",
    "{% set a = dict(k='x') %}" + "{% set a = dict(k=a, l=a, m=a) %}" * 30 + "{{ a | upper }}",
    "{% set n = namespace(a='x') %}{% macro m() %}{% set n.a = varargs %}{% endmacro %}{% for i in range(40) %}"
    "{{ m(n.a, n.a) }}{% endfor %}{{ n.a | string }}",
    "{% if %}",
]


@pytest.mark.parametrize("text", BOMBS)
def test_operations_that_nothing_can_stop_are_refused_before_they_take_anything(checkpoint, tmp_path, text):
    (checkpoint / "chat_template.jinja").write_text(text)
    start = time.process_time()
    with pytest.raises(
        PolicyError,
        match=r"chat template (repeats|computes|calls|formats|joins|replaces|makes)|cannot render",
    ):
        copy_checkpoint(checkpoint, tmp_path / "copy", {"template": text, "arguments": {}})
    assert time.process_time() - start < 20


def test_products_of_ordinary_size_are_rendered(checkpoint, tmp_path):
    text = "{{ '-' * 40 }}{{ ' ' * messages | length }}{{ 2 ** 10 * 3 }}{{ messages[0].content | indent(2) }}"
    copy_checkpoint(checkpoint, tmp_path / "copy", {"template": text, "arguments": {}})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy")
    turns = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "-" * 40 + " 3072Hello"


@pytest.mark.parametrize(
    "name", ["qwen3", "llama3", "llama3_2", "gemma3", "deepseekv3", "gptoss", "glm4moe", "phi3"]
)
def test_templates_of_real_models_render_within_the_limits(name: str):
    """Those that TRL brings."""
    import trl

    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    turns = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "**5**"}]
    turns.append({"role": "user", "content": "And 4 + 3?\n" * 500})
    check_template(text, name)
    with bounded_rendering():
        (rendered,), _ = render_jinja_template(
            [turns], chat_template=text, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
    assert all(turn["content"].strip() in rendered for turn in turns)


def test_ordinary_templates_pass_and_tracing_ends():
    check_template(
        "{% generation %}{{ '-' * 40 }}{{ messages[0].content | trim }}{% endgeneration %}", "here"
    )
    import sys

    before = sys.gettrace()
    with bounded_rendering():
        pass
    assert sys.gettrace() is before
