"""Tiny real models and rollouts for tests: random weights, float32, a few thousand parameters."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cropi_core.world.tokenizer import build_tokenizer
from data_schemas.rollouts import Sampling
from data_schemas.tables import rollouts_schema

OWN = {
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 8, "sliding_window": 6},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 6,
        "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4},
}
"""Additional settings of each architecture; attention windows are shorter than the sequences."""


def tiny_model(kind="llama", seed=0, tie=True, layers=2):
    """Build a model of a few layers; the weights are large enough that no gradient vanishes."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "tie_word_embeddings": tie,
    }
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 128}
    else:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
    config = CONFIG_MAPPING[kind](**shape, **OWN.get(kind, {}), **common)
    # Gemma's soft cap requires eager attention; other implementations ignore it.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    for parameter in model.parameters():  # norm weights of exactly 1 would hide a wrong slope
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval(), tokenizer


def save_tiny(directory, kind="llama", seed=0, tie=True):
    """Write a tiny checkpoint."""
    model, tokenizer = tiny_model(kind, seed, tie)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_rollouts(
    path,
    prompts=5,
    samples=4,
    seed=0,
    temperature=1.0,
    longest=12,
    vocabulary=40,
    dead=(),
    ungraded=(),
    masked=(),
):
    """Write rollouts of random tokens, lengths, log-probabilities and rewards."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for p in range(prompts):
        prompt = torch.randint(4, vocabulary, (integer(3, 9),), generator=generator).tolist()
        for s in range(samples):
            length = integer(1, longest)
            rows.append(
                {
                    "prompt_id": f"p{p}",
                    "sample": s,
                    "prompt_ids": prompt,
                    "completion_ids": torch.randint(0, vocabulary, (length,), generator=generator).tolist(),
                    "behavior_logprobs": (-3 * torch.rand(length, generator=generator)).tolist(),
                    "text": "",
                    "reward": 1.0 if p in dead else float(s % 2 == 0) + 0.25 * integer(0, 3),
                    "finish_reason": "stop",
                }
            )
            if (p, s) in ungraded:
                rows[-1]["reward"] = None
            if (p, s) in masked:  # a conversation: the policy's first token, what it was told, and the rest
                told = range(1, 1 + length // 2)
                rows[-1]["completion_mask"] = [t not in told for t in range(length)]
    sampling = Sampling(samples=samples, temperature=temperature, max_new_tokens=longest)
    metadata = {b"cropi.sampling": json.dumps(sampling.model_dump()).encode(), b"cropi.policy": b"test"}
    schema = rollouts_schema(["completion_mask"] if masked else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata)), path)
    return path
