"""Measure what collecting features adds to the steps of TRL's GRPO trainer.

    python benchmarks/training_features.py                                   # the embedded policy, a minute
    python benchmarks/training_features.py --policy smollm2 --prompts 4 --samples 4 --tokens 64 --json FILE

One run of the trainer takes steps with and without the features in turn, on the same prompts. Times are processor
seconds of whole steps, sampling and optimizer included, and of the passes alone. Every group has two rewards, so every
group has a gradient: the most that features can cost. A ratio is of the medians over the steps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from machine import machine, write_figures
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from cropi_core.integrations.trl import InfluenceCallback
from cropi_core.policy import load_policy
from cropi_core.world import base_checkpoint
from cropi_core.world.families import build
from data_schemas import Layers, Projection


class Turns(TrainerCallback):
    """Switches the features on in every second step, and measures the steps."""

    def __init__(self, collector: InfluenceCallback) -> None:
        self.collector, self.passes = collector, None
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.without_sampling: dict[bool, list[float]] = {True: [], False: []}
        self.sampling = 0.0
        trainer = collector.trainer
        generate = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            begin = time.process_time()
            found = generate(inputs)
            self.sampling += time.process_time() - begin
            return found

        trainer._generate_and_score_completions = timed

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Take the hooks, which the collector has attached."""
        self.passes = self.collector.passes

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Switch the features on or off."""
        self.collector.passes = self.passes if state.global_step % 2 else None
        self.sampling, self.begin = 0.0, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the times of a step; the first two warm up."""
        if state.global_step > 2:
            seconds, collects = time.process_time() - self.begin, self.collector.passes is not None
            self.steps[collects].append(seconds)
            self.without_sampling[collects].append(seconds - self.sampling)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Give the hooks back."""
        self.collector.passes = self.passes


def measure(arguments: argparse.Namespace, layers: Layers, work: Path) -> dict[str, Any]:
    """Train, and return the seconds of both kinds of step and their ratios."""
    policy = base_checkpoint() if arguments.policy == "embedded" else Path(arguments.policy)
    rows = build({"reverse": arguments.prompts}, split="pool", seed=0).to_pylist()
    model, tokenizer = load_policy(policy, "float32", "cpu", "sdpa")

    def halves(completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    trainer = GRPOTrainer(
        model,
        halves,
        GRPOConfig(
            output_dir=str(work),
            max_steps=2 * arguments.repeats + 2,
            num_generations=arguments.samples,
            per_device_train_batch_size=min(arguments.micro_batch, arguments.prompts * arguments.samples),
            gradient_accumulation_steps=max(
                1, arguments.prompts * arguments.samples // arguments.micro_batch
            ),
            max_completion_length=arguments.tokens,
            gradient_checkpointing=model.num_parameters() >= 50_000_000,
            learning_rate=1e-6,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            generation_kwargs={"min_new_tokens": arguments.tokens},
        ),
        Dataset.from_list([{"prompt": row["messages"], "prompt_id": row["prompt_id"]} for row in rows]),
        processing_class=tokenizer,
    )
    collector = InfluenceCallback(
        trainer, work / "features", projection=Projection(k=arguments.k), layers=layers
    )
    turns = Turns(collector)
    trainer.add_callback(collector)
    trainer.add_callback(turns)
    trainer.train()
    figures: dict[str, Any] = {}
    for name, times in (("step", turns.steps), ("passes", turns.without_sampling)):
        off, on = median(times[False]), median(times[True])
        figures |= {f"{name}_seconds": round(off, 3), f"{name}_ratio": round(on / off, 4)}
        figures |= {f"{name}_seconds_with_features": round(on, 3)}
    return figures


def main() -> None:
    """Measure the layers that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="embedded", help="a checkpoint directory")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12, help="of every completion")
    parser.add_argument("--micro-batch", type=int, default=128, help="completions of a pass")
    parser.add_argument("--k", type=int, default=Projection().k)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parser.add_argument("--layers", nargs="+", default=["all"], choices=["all", "last_quarter", "head"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "policy")}
    figures = {"machine": machine(), "policy": Path(arguments.policy).name, **settings}
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as work:
            figures[layers] = measure(arguments, layers, Path(work))
    print(json.dumps(figures, indent=1))
    write_figures(figures, arguments.json)


if __name__ == "__main__":
    main()
