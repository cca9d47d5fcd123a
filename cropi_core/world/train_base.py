"""Train an embedded base policy: a supervised warm-up that stops while there is still much to learn.

    python -m cropi_core.world.train_base --out DIR                # as shipped; two minutes on 2 cores
    python -m cropi_core.world.train_base --out DIR --steps 20     # a quick try
    python -m cropi_core.world.train_base --ladder --out DIR --threads 1     # the base of the ladder

The accuracy of the learnable families should be 0.3 to 0.5 (sampled at temperature 1): near 0 or 1 all completions of a
prompt have the same reward, and between them is the headroom in which a good choice of prompts has an effect.

The base of the ladder solves `reverse` with 3 to 9 letters in 90, 94, 89, 65, 36, 12 and 0 % (200 tasks each): the long
words have no gradient until the shorter ones are learned.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cropi_core.world.families import FAMILIES, LONGEST_WORD, build
from cropi_core.world.tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer

STEPS = 150
BATCH = 256
LEARNING_RATE = 2e-3
RAMP_STEPS = 20
DECAY_STEPS = 40
SEED = 0
MAX_LENGTH = 64
MAX_COMPLETION = 8  # the longest answer has six letters, followed by eos


@dataclass(frozen=True)
class Recipe:
    """What a base policy learns.

    Attributes:
        shares: Shares of the families in the warm-up. ``lucky`` is included only so that the policy learns to answer
            with one digit.
        max_completion: Tokens of a completion, in the generation defaults of the checkpoint.
        families: Families whose accuracy is printed.
    """

    shares: dict[str, float]
    max_completion: int
    families: tuple[str, ...]


BASE = Recipe(
    {"reverse": 4, "sort": 4, "shift": 1, "dedup": 6, "copy": 12, "easy": 4, "add3": 2, "lucky": 2},
    MAX_COMPLETION,
    tuple(FAMILIES),
)
LADDER = Recipe(
    {
        **{"reverse-3": 5, "reverse-4": 7, "reverse-5": 5, "reverse-6": 3.5, "reverse-7": 2, "reverse-8": 1},
        **{"reverse-9": 0.5, "copy": 6, "sort": 3, "shift": 1, "lucky": 1},
    },
    LONGEST_WORD,
    tuple(f"reverse-{letters}" for letters in range(3, 10)),
)


def new_policy(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Create the untrained policy: 4 layers of 4 heads, hidden size 128, untied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerBase, shares: dict[str, float], steps: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, both (BATCH, length) int64; labels are -100 outside answer and eos.

    No task occurs twice. A run with fewer steps uses the first batches of a run with more steps.
    """
    families = list(shares)
    chances = np.array(list(shares.values())) / sum(shares.values())
    schedule = np.random.default_rng(seed).choice(len(families), size=(steps, BATCH), p=chances)
    counts = np.bincount(schedule.ravel(), minlength=len(families)).tolist()
    tasks = [
        zip(*texts_and_answers(build({name: count}, split="warmup", seed=seed)), strict=True)
        for name, count in zip(families, counts, strict=True)
    ]
    for step in schedule:
        pairs = [next(tasks[family]) for family in step]
        prompts = [tokenizer.encode(text) for text, _ in pairs]
        targets = [[*tokenizer.encode(a, add_special_tokens=False), EOS_ID] for _, a in pairs]
        length = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.full((BATCH, length), PAD_ID)
        labels = torch.full((BATCH, length), -100)
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
            labels[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
        yield ids, labels


def texts_and_answers(table: pa.Table) -> tuple[list[str], list[str]]:
    """Return the contents of the single messages and the answers of a table of prompts."""
    texts = [messages[0]["content"] for messages in table.column("messages").to_pylist()]
    return texts, table.column("answer").to_pylist()


def warm_up(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    shares: dict[str, float],
    steps: int,
    seed: int,
) -> None:
    """Train the policy in place on answers of the warm-up split.

    The learning rate decays to zero over the last steps: without the decay, the accuracy of solved families varies
    between 0.8 and 0.95 from one step to the next. Right padding needs no attention mask: with causal attention, no
    position with a label attends to it.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / RAMP_STEPS, (steps - step) / DECAY_STEPS)
    )
    policy.train()
    for step, (ids, labels) in enumerate(batches(tokenizer, shares, steps, seed)):
        loss = policy(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.3f}", flush=True)
    policy.eval()


@torch.no_grad()
def sampled_accuracy(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    n: int,
    seed: int,
    max_completion: int = MAX_COMPLETION,
) -> float:
    """Measure the share of correct answers: n tasks of the test split, one sample each at temperature 1."""
    texts, answers = texts_and_answers(build({family: n}, split="test", seed=seed))
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    ids = policy.generate(  # pyright: ignore[reportAttributeAccessIssue] -- transformers' mixin is a protocol
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_completion,
    )
    completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return float(np.mean([c == a for c, a in zip(completions, answers, strict=True)]))


def save(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    max_completion: int = MAX_COMPLETION,
) -> None:
    """Write weights, configuration, generation defaults and tokenizer, in the format that ``from_pretrained`` reads.

    The weights are stored in bfloat16 to keep the file small. ``config.json`` specifies float32, so that loading
    upcasts: updates of 1e-4 times a gradient would vanish in the eight bits of bfloat16.
    """
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=max_completion,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in policy.state_dict().items()}
    policy.save_pretrained(out, state_dict=weights)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Train, save, reload and print the sampled accuracy of every family."""
    parser = argparse.ArgumentParser(description="Train the embedded base policy.")
    parser.add_argument("--ladder", action="store_true", help="the base of the ladder")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of warm-up (default {STEPS})")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    recipe = LADDER if arguments.ladder else BASE

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(MAX_LENGTH)
    policy = new_policy(tokenizer)
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(tokenizer)} tokens")
    warm_up(policy, tokenizer, recipe.shares, arguments.steps, arguments.seed)
    save(policy, tokenizer, arguments.out, recipe.max_completion)

    policy = LlamaForCausalLM.from_pretrained(arguments.out)
    for name in recipe.families:
        accuracy = sampled_accuracy(policy, tokenizer, name, 400, 1, recipe.max_completion)
        print(f"{name:8s} {accuracy:.3f}")


if __name__ == "__main__":
    main()
