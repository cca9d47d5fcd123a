"""Measure the feature engine on a GPU: prompts a second, share of the matrix rate, memory, against the released recipe.

    python benchmarks/gpu.py --json gpu.json                 # Qwen2.5-1.5B's shape, random weights, 8 × 1,024 tokens
    python benchmarks/gpu.py --tiny                          # the same path on a CPU, in seconds; no figure to quote

Weights are random, so nothing is downloaded; time does not depend on their values. The share is that of the floating
point operations which the pass needs at least (forward and backward to activations, 4 a parameter and token, prompts
counted once a group) over what a large product of the same type reaches on this device in the same run. Completions
have from half of ``--tokens`` to all of it, so no two packs have one shape. Packing is timed apart, and features of the
output layer alone have a rate of their own. bergson computes a gradient a completion of the same groups, if it is
installed (``pip install -c constraints.txt bergson==2.5.1``); the figures say so if it is not. :data:`TARGETS` are
computed for an H100 at 1.5B, not measured.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, write_figures
from peers import bergson_features, check_features, peer_rows
from recipe import released_recipe
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from cropi_core.gradients import OK, FeatureSettings, Group, batch_groups
from cropi_core.gradients.batches import Budget, project_blocks
from cropi_core.gradients.engine import FeatureEngine
from cropi_core.gradients.job import Job
from cropi_core.gradients.packing import make_pack
from cropi_core.policy.checkpoint import Checkpoint
from data_schemas.gradients import Projection
from data_schemas.rollouts import Sampling
from data_schemas.runtime import Runtime

# Qwen2.5-1.5B's config.json.
QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TARGETS = {"prompts_per_second": 9.0, "head_prompts_per_second": 25.0, "share_of_matrix_rate": 0.5}
"""Computed for 8 completions of 768 tokens and a prompt of 256 on an H100."""
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def random_groups(
    prompts: int, samples: int, prompt_tokens: int, tokens: int, vocabulary: int
) -> list[Group]:
    """Draw groups of random tokens, every second completion right."""
    random = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return random.integers(0, vocabulary, count).tolist()

    rewards = np.arange(samples, dtype=np.float64) % 2
    return [
        Group(
            f"p{i}",
            draw(prompt_tokens),
            completions := [draw(int(random.integers(tokens // 2, tokens + 1))) for _ in range(samples)],
            [[-1.0] * len(completion) for completion in completions],
            rewards,
            OK,
        )
        for i in range(prompts)
    ]


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the floating point operations a second of a square product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = timed(lambda: a @ b, device, repeats=10)
    return 2 * size**3 / seconds


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the least seconds of a call, after one that is not counted."""
    best = float("inf")
    for i in range(repeats + 1):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        if i:
            best = min(best, time.perf_counter() - begin)
    return best


def compare_bergson(
    model: PreTrainedModel, groups: list[Group], seconds: float, budget: int
) -> dict[str, Any]:
    """Time bergson over the same groups and the same weights, on the GPU if there is one.

    Args:
        model: The policy.
        groups: Groups with a gradient.
        seconds: Time that the feature engine takes for them.
        budget: Padded tokens of a batch of bergson, which has the logits of all of them at once.

    Returns:
        ``bergson``: what it chose, or that it is not installed; its rate, and the engine's speed as a ratio to it.
    """
    if importlib.util.find_spec("bergson") is None:
        return {"bergson": "not installed: pip install -c constraints.txt bergson==2.5.1"}
    rows = peer_rows(groups)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        precision = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        features, watch, choices = bergson_features(Path(folder), rows, Projection().k, budget, precision)
    check_features(features, rows)
    return {
        "bergson": choices | {"dimensions": features.shape[1], "precision": precision},
        "bergson_prompts_per_second": len(groups) / watch.seconds,
        "speedup_over_bergson": watch.seconds / seconds,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time the engine and the recipe over the same groups."""
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device != "cpu" else torch.float32
    shape = TINY if options.tiny else QWEN
    groups = random_groups(
        options.prompts, options.samples, options.prompt_tokens, options.tokens, shape["vocab_size"]
    )
    torch.manual_seed(0)
    config = Qwen2Config(**shape, max_position_embeddings=32_768)
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).to(device).eval()
    )
    found: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "tokens_a_prompt": sum(g.tokens for g in groups) / len(groups),
    }
    few = groups[:2]
    recipe = timed(
        lambda: [None for _ in released_recipe(model, few, temperature=1.0)], device, options.repeats
    ) / len(few)
    found["recipe_prompts_per_second"] = 1 / recipe
    if device.type == "cuda":
        found["recipe_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    model.zero_grad()
    engine = FeatureEngine(model, Projection())
    sampling = Sampling(samples=options.samples, max_new_tokens=options.tokens)
    job = Job(
        Checkpoint(Path(), "bfloat16"), FeatureSettings(), sampling, Runtime(token_budget=options.budget)
    )
    seconds = timed(
        lambda: list(project_blocks(engine, groups, job, Budget(options.budget))), device, options.repeats
    )
    found["packing_seconds"] = timed(
        lambda: [
            make_pack([groups[i].prompt for i in batch], [groups[i].completions for i in batch], device)
            for batch in batch_groups(groups, job.settings.layout.block_rows, options.budget)
        ],
        device,
        options.repeats,
    )
    found["packing_share"] = found["packing_seconds"] / seconds
    rate = matrix_rate(device, dtype, 512 if options.tiny else 8192)
    needed = 4 * model.num_parameters() * sum(g.packed for g in groups)
    found |= {
        "prompts_per_second": len(groups) / seconds,
        "speedup_over_released_recipe": recipe * len(groups) / seconds,
        "matrix_rate_tflops": rate / 1e12,
        "share_of_matrix_rate": needed / seconds / rate,
    }
    if device.type == "cuda":
        found["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        found["device"] = torch.cuda.get_device_name(device)
    engine.close()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    head = FeatureEngine(model, Projection(), layers="head")
    head_seconds = timed(
        lambda: list(project_blocks(head, groups, job, Budget(options.budget))), device, options.repeats
    )
    head.close()
    found["head_prompts_per_second"] = len(groups) / head_seconds
    found |= compare_bergson(model, groups, seconds, options.bergson_budget)
    if not options.tiny:
        found["ratio_to_target"] = {name: found[name] / target for name, target in TARGETS.items()}
    return found | {"machine": machine()}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a model of 0.1 M parameters on the CPU")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=768, help="of a completion; 1,024 with its prompt")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens a pass")
    parser.add_argument("--bergson-budget", type=int, default=8192, help="padded tokens a batch of bergson")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    if options.tiny:
        options.prompts, options.samples, options.prompt_tokens, options.tokens = 2, 4, 12, 20
    elif not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny runs the same path on a CPU")
    found = measure(options)
    print(json.dumps(found, indent=1))
    write_figures(found, options.json)


if __name__ == "__main__":
    main()
