"""A checkpoint that cannot be used ends in one error, before anything is computed with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from cropi_core.errors import DataError, PolicyError
from cropi_core.policy.checkpoint import check_targets
from cropi_core.policy.loading import copy_checkpoint, end_tokens, load_policy, render, turn_end
from cropi_core.policy.lora import attach
from cropi_core.prompts.loading import write_prompts
from cropi_core.prompts.rendering import check_rendering
from cropi_core.rollouts.sampling import check_prompts, sample_completions
from cropi_core.world import build
from data_schemas.rollouts import Sampling
from data_schemas.training import Lora
from tests.support.models import save_tiny
from tests.support.stores import edit

USER = [{"role": "user", "content": "ab?"}]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def change_weight(directory, part, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if part in name)
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    return name


def add_token(directory, **tokens):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(directory)


def refused(checkpoint, tmp_path, match, load=True):
    """Both doors, a run's policy step and a single step's load, say the same and name the checkpoint."""
    with pytest.raises(PolicyError, match=match) as caught:
        copy_checkpoint(checkpoint, tmp_path / "copy")
    assert str(checkpoint) in str(caught.value)
    if load:
        with pytest.raises(PolicyError, match=match):
            load_policy(checkpoint, "float32", "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(checkpoint, tmp_path, value):
    def spoil(weight):
        weight[1, 2] = value
        return weight

    name = change_weight(checkpoint, "layers.1.mlp.up_proj", spoil)
    refused(checkpoint, tmp_path, f"{name} holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_another_type_are_refused_although_nothing_declares_them(checkpoint, tmp_path, dtype):
    name = change_weight(checkpoint, "q_proj", lambda weight: weight.to(dtype))
    refused(checkpoint, tmp_path, f"{name} is .*as in quantised checkpoints")


@pytest.mark.parametrize(
    "field",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
        {"compression_config": {"format": "pack-quantized"}},
    ],
)
def test_quantised_checkpoints_are_refused_by_method(checkpoint, tmp_path, field):
    edit(checkpoint / "config.json", **field)
    refused(checkpoint, tmp_path, r"quantised weights \((gptq|awq|bitsandbytes|fp8|mxfp4|compression_config)")


def test_weights_of_another_shape_are_named(checkpoint, tmp_path):
    name = change_weight(checkpoint, "k_proj", lambda weight: weight[:-1])
    refused(checkpoint, tmp_path, rf"{name} has the shape \[15, 32\], .*\[16, 32\]", load=False)


def test_weights_of_an_adapter_are_not_ignored_silently(checkpoint):
    path = checkpoint / "model.safetensors"
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(load_file(path) | {layer: torch.zeros(2, 32)}, path, metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=r"lora_A\.weight.*merge the adapter"):
        load_policy(checkpoint, "float32", "cpu")


@pytest.mark.parametrize("size", [60, -100])
def test_truncated_weights_are_refused(checkpoint, tmp_path, size):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(checkpoint, tmp_path, "not a whole safetensors file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "trunc'),
        ("tokenizer_config.json", "[1]"),
    ],
)
def test_a_damaged_tokenizer_is_distinguished_from_damaged_weights(checkpoint, tmp_path, name, content):
    (checkpoint / name).write_text(content)
    refused(checkpoint, tmp_path, "its tokenizer cannot be used")


def test_a_missing_tokenizer_says_what_to_copy(checkpoint, tmp_path):
    for path in checkpoint.glob("token*"):
        path.unlink()
    refused(checkpoint, tmp_path, r"has no tokenizer \(tokenizer.json.*Copy the tokenizer's files")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None},
        {"model_type": "nosuchmodel"},
        {"hidden_act": "nope"},
        {"num_attention_heads": 3},
        {"hidden_size": "32"},
        {"dtype": "floaty"},
        {"rope_parameters": {"rope_type": "nosuchrope", "rope_theta": 1e4}},
    ],
)
def test_configurations_that_no_model_has_are_errors(checkpoint, tmp_path, changes):
    path = checkpoint / "config.json"
    kept = {name: value for name, value in changes.items() if value is not None}
    edit(path, **kept)
    if len(kept) < len(changes):
        path.write_text(
            json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n not in changes})
        )
    refused(checkpoint, tmp_path, str(checkpoint))


def test_an_end_token_that_is_no_id_is_named(checkpoint):
    edit(checkpoint / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(PolicyError, match="eos_token_id='</s>'"):
        load_policy(checkpoint, "float32", "cpu")


# -- tokenizers larger than the embedding ---------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(original, tmp_path):
    small = save_tiny(tmp_path / "small")
    other = json.loads((small / "tokenizer.json").read_text())
    other["model"]["vocab"] |= {f"w{i}": 44 + i for i in range(10)}
    (small / "tokenizer.json").write_text(json.dumps(other))
    refused(small, tmp_path, "54 tokens and the policy embeds 44. It belongs to another model")


def test_added_tokens_without_an_embedding_cost_only_the_prompts_that_hold_them(checkpoint):
    add_token(checkpoint, additional_special_tokens=["<extra>"])
    model, tokenizer = load_policy(checkpoint, "float32", "cpu")
    pairs = [
        ("a", render(tokenizer, USER)),
        ("b", render(tokenizer, [{"role": "user", "content": "a<extra>"}])),
    ]
    check_prompts(model, pairs[:1], Sampling(max_new_tokens=4))
    with pytest.raises(DataError, match="prompt b holds the token 44, and the policy embeds 44"):
        check_prompts(model, pairs, Sampling(max_new_tokens=4))
    with pytest.raises(DataError, match="prompt c has no tokens"):
        check_prompts(model, [("c", [])], Sampling(max_new_tokens=4))


def test_a_padding_token_without_an_embedding_is_replaced(checkpoint):
    plain = sampled(*load_policy(checkpoint, "float32", "cpu"))
    add_token(checkpoint, pad_token="<newpad>")
    model, tokenizer = load_policy(checkpoint, "float32", "cpu")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert sampled(model, tokenizer) == plain


def sampled(model, tokenizer):
    prompts = [
        ("a", render(tokenizer, USER)),
        ("b", render(tokenizer, [{"role": "user", "content": "abcdef?"}])),
    ]
    groups = sample_completions(
        model, tokenizer, prompts, Sampling(samples=2, max_new_tokens=6), seed=0, rows=4
    )
    return [one.ids for group in groups for one in group]


@pytest.mark.parametrize("token", ["eos_token", "additional_special_tokens"])
def test_end_tokens_and_templates_of_tokens_without_an_embedding_are_refused(checkpoint, tmp_path, token):
    if token == "eos_token":
        add_token(checkpoint, eos_token="<end>")
        refused(checkpoint, tmp_path, "the end token '<end>' has the id 44, and the policy embeds 44")
    else:
        add_token(checkpoint, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
        (checkpoint / "chat_template.jinja").write_text(QWEN)
        refused(checkpoint, tmp_path, r"writes '<\|im_start\|>', token 44", load=False)


# -- ends of turns --------------------------------------------------------------------------------------------


def test_a_turn_ends_a_completion_although_the_tokenizer_ends_documents(tmp_path):
    """Qwen2.5's base models declare the end of a document, and their template ends turns with another token."""
    directory = save_tiny(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    start, end = tokenizer.convert_ids_to_tokens([5, 6])
    (directory / "chat_template.jinja").write_text(
        QWEN.replace("<|im_start|>", start).replace("<|im_end|>", end).replace("\n", "")
    )
    edit(directory / "tokenizer_config.json", additional_special_tokens=[start, end])
    model, tokenizer = load_policy(directory, "float32", "cpu")
    assert (tokenizer.eos_token_id, turn_end(tokenizer)) == (2, 6)
    assert end_tokens(model, tokenizer) == [2, 6]
    prompts = [("a", render(tokenizer, USER))]
    groups = sample_completions(
        model, tokenizer, prompts, Sampling(samples=64, max_new_tokens=30), seed=0, rows=64
    )
    stopped = [one.ids for one in groups[0] if 6 in one.ids]
    assert stopped
    assert all(ids[-1] == 6 and ids.count(6) == 1 for ids in stopped)
    model.save_pretrained(tmp_path / "trained")  # what a trained policy declares, other programs read
    assert GenerationConfig.from_pretrained(tmp_path / "trained").eos_token_id == [2, 6]


def test_ends_that_are_declared_stay_as_they_are(checkpoint):
    before = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    assert load_policy(checkpoint, "float32", "cpu")[0].generation_config.eos_token_id == before


# -- chat templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content | nosuch }}", "No filter named 'nosuch'.*written for another program"),
        ("{{ messages[0].content }}{{ date.today }}", "'date' is undefined.*policy.chat.arguments"),
        ("{{ messages[0].content }}{{ now() }}", "'now' is undefined.*policy.chat.arguments"),
        ("{{ messages[1].content }}", "has no element 1.*policy.chat"),
    ],
)
def test_a_template_that_cannot_render_a_question_is_refused_with_the_policy(
    checkpoint, tmp_path, template, words
):
    (checkpoint / "chat_template.jinja").write_text(template)
    refused(checkpoint, tmp_path, words, load=False)
    _, tokenizer = load_policy(checkpoint, "float32", "cpu")
    with pytest.raises(PolicyError, match=words):
        render(tokenizer, USER)


def table(path, **messages):
    base = build({"copy": 2}, "pool", 0).to_pylist()[0]
    rows = [{**base, "prompt_id": name, "messages": turns} for name, turns in messages.items()]
    write_prompts(build({"copy": 2}, "pool", 0).from_pylist(rows), path)
    return path


def test_a_template_that_refuses_a_system_message_is_reported_before_sampling(checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").write_text(NO_SYSTEM)
    copy_checkpoint(checkpoint, tmp_path / "copy")  # a question alone is rendered
    sets = {
        "pool": table(tmp_path / "a.parquet", one=USER),
        "gsm8k": table(tmp_path / "b.parquet", two=WITH_SYSTEM),
    }
    with pytest.raises(
        PolicyError, match=r"gsm8k, prompt two: .*System role not supported.*`system` and `template`"
    ):
        check_rendering(checkpoint, None, sets)
    check_rendering(checkpoint, {"template": "{{ messages[0].content }}", "arguments": {}}, sets)
    check_rendering(checkpoint, None, {"pool": sets["pool"]})
    _, tokenizer = load_policy(checkpoint, "float32", "cpu")
    with pytest.raises(PolicyError, match="System role not supported"):
        render(tokenizer, WITH_SYSTEM)


def test_the_check_reads_the_template_and_the_tokens_that_the_tokenizer_has(checkpoint, tmp_path):
    template = "{{ bos_token + messages[0].content + eos_token + pad_token }}"
    (checkpoint / "chat_template.jinja").unlink()
    edit(checkpoint / "tokenizer_config.json", chat_template=[{"name": "default", "template": template}])
    sets = {"pool": table(tmp_path / "a.parquet", one=WITH_SYSTEM)}
    check_rendering(checkpoint, None, sets)
    edit(checkpoint / "tokenizer_config.json", chat_template=NO_SYSTEM)
    with pytest.raises(PolicyError, match="pool, prompt one"):
        check_rendering(checkpoint, None, sets)


# -- adapters on tied embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_tied_embeddings_is_refused(original, tmp_path, target):
    pytest.importorskip("peft", reason="adapters need the extra `train`")
    words = f"targets names .*{target}.*one matrix for the embeddings and the output layer"
    lora = Lora(r=2, targets=["q_proj", target])
    with pytest.raises(PolicyError, match=words):
        check_targets(original, lora.targets)
    with pytest.raises(PolicyError, match=words):
        attach(load_policy(original, "float32", "cpu")[0], lora, None, 0)
    untied = save_tiny(tmp_path / "untied", tie=False)
    check_targets(untied, lora.targets)
    attach(load_policy(untied, "float32", "cpu")[0], lora, None, 0)
    check_targets(original, "all-linear")
    attach(load_policy(original, "float32", "cpu")[0], Lora(r=2), None, 0)
