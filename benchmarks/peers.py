"""What the gradient-feature engine is measured against: other programs' ways to one projected gradient.

    python benchmarks/peers.py --peer released --policy smollm2 --rollouts speed.parquet --json released.json
    python benchmarks/peers.py --peer dense    --policy smollm2                          # a slice, extrapolated
    python benchmarks/peers.py --peer bergson  --policy smollm2 --rollouts speed.parquet --python peers/bin/python

bergson, dattri and traker live in an environment of their own, which ``--python`` names; this file then runs itself
there, with the modules of cropi that it imports, so cropi is installed too:
``python -m venv peers && peers/bin/pip install -c constraints.txt . bergson==2.5.1 dattri==0.3.0 traker==0.3.2``.
(With a CPU build of torch, uninstall the CUDA builds of torchvision and torchaudio that bergson draws in: transformers
trips over them.)
Tokens are real ones, prompt and completion; padding is never counted. Where a peer leaves a choice, it gets the
faster one, and what was chosen is in the figures. Loading, the first batch and writing to disk are not timed.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from machine import machine, write_figures
from recipe import Implementation, Stopwatch, compare_projections, live_groups, released_recipe
from torch import Tensor

from cropi_core.gradients import Group
from cropi_core.gradients.objective import advantages
from cropi_core.policy import load_policy

REPOSITORY = Path(__file__).resolve().parents[1]
Method = Literal["factgrass", "logra"]


# -- programs with an environment of their own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A completion as the peers take it: token ids, labels (-100 on the prompt) and its advantage."""

    ids: list[int]
    labels: list[int]
    advantage: float


def peer_rows(groups: Sequence[Group]) -> list[Row]:
    """Flatten groups to completions."""
    rows = []
    for group in groups:
        weights = advantages(torch.from_numpy(group.rewards), scale=True).tolist()
        for completion, weight in zip(group.completions, weights, strict=True):
            rows.append(Row(group.prompt + completion, [-100] * len(group.prompt) + completion, weight))
    return rows


def check_features(features: Tensor, rows: Sequence[Row]) -> None:
    """Check that there is a real projected gradient (dimensions,) for every completion.

    Raises:
        RuntimeError: Features are too few, not finite, zero, or the same for different completions.
    """
    if features.dim() != 2 or len(features) != len(rows):
        raise RuntimeError(f"{len(rows)} completions gave features of shape {tuple(features.shape)}")
    norms = features.double().norm(dim=1)
    if not features.isfinite().all() or not (norms > 0).all():
        raise RuntimeError(f"features are not finite or zero; their norms are {norms.tolist()}")
    # A completion that was drawn twice has one gradient, so only different ones are compared.
    different = list({(*row.ids, row.advantage): i for i, row in enumerate(rows)}.values())
    unit = (features.double() / norms[:, None])[different]
    nearest = (unit @ unit.T).fill_diagonal_(0).max().item()
    if nearest > 1 - 1e-9:
        raise RuntimeError(f"two different completions have the same feature (cosine {nearest})")


def bergson_features(
    policy: Path, rows: Sequence[Row], k: int, token_budget: int, precision: Literal["fp32", "bf16"] = "fp32"
) -> tuple[Tensor, Stopwatch, dict[str, Any]]:
    """Compute a feature a completion with bergson: its own model loading, batching, hooks and in-memory builder.

    Every linear layer but the head is projected from both sides to p × p; p is the one that brings p²·layers nearest
    to ``k``. Embeddings, head, norms and biases have no part in it. Its default is 2,048 padded tokens a batch; with
    8,192 it passed 16 GB on SmolLM2-135M, as it takes the logits of every token at once.

    Returns:
        (rows, dimensions) features in the order of ``rows``, their time, and what was chosen.
    """
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config import IndexConfig
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import processor_for, setup_model_and_peft
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as run:
        config = IndexConfig(
            run_path=f"{run}/index", model=str(policy), precision=precision, loss_reduction="mean"
        )
        config.partial_run_path.mkdir()
        model, _ = setup_model_and_peft(config)
        layers = len(InMemoryCollector.discover_targets(model.base_model))
        config.projection_dim = max(1, round(math.sqrt(k / layers)))
        processor = processor_for(config)

        def collect(part: Sequence[Row]) -> tuple[Tensor, Stopwatch]:
            data = Dataset.from_list(
                [{"input_ids": r.ids, "labels": r.labels, "advantage": r.advantage} for r in part]
            )
            batches = allocate_batches([len(r.ids) for r in part], token_budget)
            collector = InMemoryCollector(model=model.base_model, data=data, cfg=config, processor=processor)
            computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
            with Stopwatch() as watch:
                computer.run_with_collector_hooks()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            return torch.cat(list(collector.gradients.values()), dim=1), watch

        collect(rows[:2])  # draws the projection matrices
        features, watch = collect(rows)
    return features, watch, {"layers": layers, "p": config.projection_dim, "token_budget": token_budget}


def dattri_features(
    policy: Path, rows: Sequence[Row], k: int, token_budget: int, method: Method
) -> tuple[Tensor, Stopwatch, dict[str, Any]]:
    """Compute a feature a completion with dattri: ``cache`` of its block-projected attributors, kept in memory.

    Every linear layer, the head included (its default), is projected to p² dimensions, the square nearest to
    ``k`` / layers. ``factgrass`` keeps 2p entries of input and of output gradient and projects their product; without
    CUDA that second projection is dense, as its SJLT is a CUDA kernel. ``logra`` projects both densely to p entries.

    Returns:
        As :func:`bergson_features`.
    """
    from dattri.algorithm.factgrass import FactGraSSAttributor
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    model, _ = load_policy(policy, "float32", "cpu")
    layers = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    p = max(1, round(math.sqrt(k / layers)))
    task = AttributionTask(_dattri_loss, model, [model.state_dict()])
    attributor = {"factgrass": FactGraSSAttributor, "logra": LoGraAttributor}[method](
        task, hessian="Identity", proj_dim=p * p, offload="none"
    )
    # Its batches have a fixed number of rows: those of like length together, as many as the longest allow.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    size = max(1, token_budget // len(rows[order[-1]].ids))

    def cache(indices: list[int]) -> tuple[Tensor, Stopwatch]:
        data: Any = [rows[i] for i in indices]
        stored = attributor.offload_manager.cached_gradients
        stored.clear()
        with Stopwatch() as watch:
            attributor.cache(DataLoader(data, batch_size=size, collate_fn=_dattri_batch))
        return torch.cat([stored[batch] for batch in sorted(stored)]), watch

    with tempfile.TemporaryDirectory() as scratch:
        attributor.metadata.cache_dir = scratch  # its metadata file would land in the working directory
        cache(order[:size] + order[-size:])  # draws the projections, and compiles for two lengths
        features, watch = cache(order)
    choices = {"method": method, "layers": layers, "p": p, "batch_rows": size, "token_budget": token_budget}
    return features[torch.tensor(order).argsort()], watch, choices


def _dattri_batch(rows: list[Row]) -> dict[str, Tensor]:
    """Pad on the right."""
    longest = max(len(row.ids) for row in rows)
    return {
        "input_ids": torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows]),
        "labels": torch.tensor([row.labels + [-100] * (longest - len(row.ids)) for row in rows]),
        "advantage": torch.tensor([row.advantage for row in rows]),
    }


def _dattri_loss(model: torch.nn.Module, batch: dict[str, Tensor], device: str) -> Tensor:
    """Sum advantage-weighted mean token losses; padding on the right is behind every real token."""
    logits = model(batch["input_ids"].to(device), use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:].to(device)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    means = losses.view_as(labels).sum(1) / (labels != -100).sum(1)
    return (means * batch["advantage"].to(device)).sum()


# -- running one -------------------------------------------------------------------------------------------------------


def measure_peer(options: argparse.Namespace) -> dict[str, Any]:
    """Run one peer in this process.

    Returns:
        ``tokens_per_second`` and ``tokens_per_cpu_second`` over ``tokens`` real tokens, dimensions and choices; of
        dense projections, see :func:`compare_projections`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peer in ("dense", "traker"):
        implementation: Implementation = "own" if options.peer == "dense" else "traker"
        return compare_projections(options.policy, options.k, options.rows, implementation)
    groups, temperature = live_groups(options.rollouts, options.limit)
    rows, tokens, choices = peer_rows(groups), sum(g.tokens for g in groups), {}
    if options.peer == "released":
        model, _ = load_policy(options.policy, "float32", "cpu")
        dimensions = len(next(released_recipe(model, groups, temperature=temperature)))
        with Stopwatch() as watch:
            for _gradient in released_recipe(model, groups, temperature=temperature):
                pass
    else:
        arguments = (options.policy, rows, options.k, options.token_budget)
        if options.peer == "bergson":
            features, watch, choices = bergson_features(*arguments)
        else:
            features, watch, choices = dattri_features(*arguments, options.method)
        check_features(features, rows)
        dimensions = features.shape[1]
    return {
        "peer": options.peer,
        "prompts": len(groups),
        "completions": len(rows),
        "tokens": tokens,
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "tokens_per_second": tokens / watch.seconds,
        "tokens_per_cpu_second": tokens / watch.cpu_seconds,
        "dimensions": dimensions,
        "threads": torch.get_num_threads(),
        **choices,
    }


def run_peer(python: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run this file in the environment of ``python`` with ``options`` of the command line; returns its figures.

    Raises:
        RuntimeError: The peer failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "figures.json"
        command = [str(python), __file__, "--json", str(out)]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text())


def main() -> None:
    """Measure one peer, here or in the environment of ``--python``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    peers = ["released", "dense", "traker", "bergson", "dattri"]
    parser.add_argument("--peer", required=True, choices=peers)
    parser.add_argument("--policy", type=Path, required=True, help="Checkpoint directory.")
    parser.add_argument("--rollouts", type=Path, help="Parquet file; not for dense and traker.")
    parser.add_argument("--python", type=Path, help="Interpreter of an environment that has the peer.")
    parser.add_argument("--k", type=int, default=8192, help="Dimensions of a feature.")
    parser.add_argument("--token-budget", type=int, default=2048, help="Padded tokens of a batch.")
    parser.add_argument("--method", choices=["factgrass", "logra"], default="factgrass", help="Of dattri.")
    parser.add_argument("--rows", type=int, default=4, help="Gradients that share a dense matrix.")
    parser.add_argument("--limit", type=int, help="Prompts.")
    parser.add_argument("--threads", type=int, help="Torch threads.")
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    options = parser.parse_args()
    if options.rollouts is None and options.peer not in ("dense", "traker"):
        parser.error(f"--peer {options.peer} needs --rollouts")
    if options.python:
        rest = {name: value for name, value in vars(options).items() if name not in ("python", "json")}
        figures = run_peer(options.python, rest)
    else:
        figures = measure_peer(options)
    if options.python or options.peer in ("released", "dense"):
        figures["machine"] = machine()  # not in a peer's environment, which lacks some of what it names
    print(json.dumps(figures, indent=1))
    write_figures(figures, options.json)


if __name__ == "__main__":
    main()
