"""What the gradient-feature engine is measured against: other programs' ways to one projected gradient.

    python benchmarks/peers.py --peer released --policy smollm2 --rollouts speed.parquet --json released.json
    python benchmarks/peers.py --peer dense    --policy smollm2                          # a slice, extrapolated
    python benchmarks/peers.py --peer bergson  --policy smollm2 --rollouts speed.parquet --python peers/bin/python

bergson, dattri and traker live in an environment of their own, which ``--python`` names; this file then runs itself
there: ``python -m venv peers && peers/bin/pip install -c constraints.txt bergson==2.5.1 dattri==0.3.0 traker==0.3.2``.
(With a CPU build of torch, uninstall the CUDA build of torchvision that bergson draws in: transformers trips over it.)
Tokens are real ones, prompt and completion; padding is never counted. Where a peer leaves a choice, it gets the
faster one, and what was chosen is in the figures. Loading, the first batch and writing to disk are not timed.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from machine import machine
from torch import Tensor
from transformers import PreTrainedModel

from cropi_core.groups import OK, Group, group_rollouts
from cropi_core.objective import advantages
from cropi_core.policy import load_policy
from cropi_core.projection import ParameterSketch, build_sketches
from cropi_core.rollouts import read_rollouts, sampling_of
from data_schemas.config import Projection

REPOSITORY = Path(__file__).resolve().parents[1]
Kind = Literal["rademacher", "normal"]
Implementation = Literal["own", "traker"]
Method = Literal["factgrass", "logra"]


@dataclass
class Stopwatch:
    """Times a ``with`` block. On a machine that others use, the processor's seconds say more than the clock's."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _begin: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __enter__(self) -> Self:
        self._begin = (time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin[0]
        self.cpu_seconds = time.process_time() - self._begin[1]


def live_groups(rollouts: Path, limit: int | None = None) -> tuple[list[Group], float]:
    """Read the groups that have a gradient, at most ``limit`` of them, and the temperature they were sampled at."""
    table = read_rollouts(rollouts)
    groups = [g for g in group_rollouts(table, min_gradable=2) if g.status == OK]
    return groups[:limit], sampling_of(table).temperature


# -- the released recipe ---------------------------------------------------------------------------------------------


def released_recipe(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    temperature: float,
    behavior: PreTrainedModel | None = None,
) -> Iterator[Tensor]:
    """Yield the full gradient of every prompt, by the steps of the paper's released code, without a projection.

    Prompt by prompt: log-probabilities under the behaviour policy and under the reference policy, a forward each
    without gradients (the second is used by nothing); then a forward and a backward of the unclipped GRPO surrogate
    (mean over completions of the mean over tokens of ρ·A) into every parameter's gradient, and their copy into one
    float32 vector. Left out in its favour: activation checkpointing (one more forward), logits of prompt tokens, and
    zero-variance prompts, which it runs unless the caller drops them.

    Args:
        model: The current policy; all of its parameters are made to require gradients.
        groups: Graded completions, a prompt each.
        temperature: Of the ratio; the released code takes 1 whatever the completions were sampled at.
        behavior: Policy that sampled, also the reference; the same as ``model`` when None.

    Yields:
        (parameters,) float32 ∇J in the order of ``named_parameters``, the caller's to keep.

    References:
        thu-coai/CROPI 293c663, cropi/core/get_grad.py and cropi/utils/rl_utils.py, with --cancel_ppo_clip as in
        cropi/scripts/run_cropi.sh.
    """
    sampler = model if behavior is None else behavior
    parameters = list(model.requires_grad_(True).parameters())
    for group in groups:
        with torch.no_grad():
            old, _ = _logprobs(sampler, group, temperature)
            _logprobs(sampler, group, temperature)
        logprobs, mask = _logprobs(model, group, temperature)
        advantage = advantages(torch.from_numpy(group.rewards).to(old), scale=True)
        surrogate = (logprobs - old).exp() * advantage[:, None] * mask
        (surrogate.sum(1) / mask.sum(1)).mean().backward()
        flat = torch.zeros(sum(p.numel() for p in parameters), device=model.device)
        offset = 0
        for parameter in parameters:
            if parameter.grad is not None:
                flat[offset : offset + parameter.numel()] = parameter.grad.flatten()
            offset += parameter.numel()
        model.zero_grad()
        yield flat


def _logprobs(model: PreTrainedModel, group: Group, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log π of a group's completion tokens and their mask, both (G, T); padding is on the right."""
    size, begin, length = len(group.completions), len(group.prompt), max(map(len, group.completions))
    ids = torch.zeros(size, begin + length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, completion in enumerate(group.completions):
        ids[i, : begin + len(completion)] = torch.tensor(group.prompt + completion)
        mask[i, : begin + len(completion)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    output = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1, use_cache=False).logits
    logprobs = (output[:, :-1].float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[:, begin:, None])[..., 0], mask[:, begin:]


# -- projections of a gradient that is there ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseSlice:
    """A part of a dense projection that was carried out, and what the whole would take.

    Attributes:
        projected: (rows, columns); inner products of rows are ``columns`` times those of the gradients' slice.
        coordinates: Coordinates of the gradients that were used, of d.
        columns: Dimensions that were made, of k.
        watch: The slice's time, for all rows.
        factor: (d / coordinates) · (k / columns); the work is linear in both (within a tenth from 2^19 to 2^21
            coordinates and from 200 to 400 columns).
    """

    projected: Tensor
    coordinates: int
    columns: int
    watch: Stopwatch
    factor: float

    @property
    def whole_seconds(self) -> float:
        """Return what the whole projection of all rows would take."""
        return self.watch.seconds * self.factor


def dense_projection_slice(
    gradients: Tensor,
    k: int,
    *,
    coordinates: int = 1 << 20,
    columns: int = 200,
    block: int = 100,
    seed: int = 0,
    kind: Kind = "rademacher",
    implementation: Implementation = "own",
) -> DenseSlice:
    """Project the first coordinates of gradients onto the first dimensions, as traker's ``BasicProjector`` does.

    Block by block a (coordinates, block) matrix is drawn into one buffer and multiplied; nothing of it is kept, as
    all of it would be d·k numbers (4.4 TB at d = 134 M, k = 8,192). ``own`` is that arithmetic without the package.

    Args:
        gradients: (rows, d) float32. A matrix is drawn once for all rows.
        k: Dimensions of the whole projection.
        coordinates: How many of d to use.
        columns: How many of k to make; more than a block, as with one alone traker keeps the matrix between calls.
        block: Dimensions a block; traker's default is 100, and its buffer at the whole d would be 54 GB.
        seed: Of the matrices.
        kind: ``rademacher`` or ``normal`` entries.
        implementation: ``own``, or ``traker``'s class, which must be installed.
    """
    coordinates, columns = min(coordinates, gradients.shape[1]), min(columns, k)
    part = gradients[:, :coordinates].contiguous()
    if implementation == "traker":
        from trak.projectors import BasicProjector, ProjectionType

        projector = BasicProjector(
            coordinates, columns, seed, ProjectionType(kind), part.device, block_size=block
        )
        with Stopwatch() as watch:
            projected = projector.project(part, model_id=0)
    else:
        generator = torch.Generator(part.device)
        matrix = part.new_empty(coordinates, min(block, columns))
        projected = part.new_zeros(len(part), columns)
        with Stopwatch() as watch:
            for start in range(0, columns, block):
                generator.manual_seed(seed + 1000 * (start // block))
                if kind == "normal":
                    matrix.normal_(generator=generator)
                else:
                    matrix.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
                stop = min(start + block, columns)
                projected[:, start:stop] = part @ matrix[:, : stop - start]
    factor = (gradients.shape[1] / coordinates) * (k / columns)
    return DenseSlice(projected, coordinates, columns, watch, factor)


def sjlt_projection(gradient: Tensor, sketches: dict[str, ParameterSketch], k: int) -> Tensor:
    """Project a full gradient (d,) by our ``uniform`` sketches, without the engine's hooks; returns (k,)."""
    total, offset = gradient.new_zeros(2 * k), 0
    for sketch in sketches.values():
        size = math.prod(sketch.shape)
        part = gradient[offset : offset + size]
        assert sketch.kept is not None, "only uniform sketches name the coordinates they keep"
        if len(sketch.kept) < size:
            part = part.index_select(0, sketch.kept)
        total.index_add_(0, sketch.cells, part, alpha=sketch.scale)
        offset += size
    return total[:k] - total[k:]


def compare_projections(
    policy: Path, k: int = 8192, rows: int = 4, implementation: Implementation = "own"
) -> dict[str, Any]:
    """Time a dense projection's slice and our SJLT over random gradients of a policy's shapes.

    Args:
        policy: Checkpoint directory, for the shapes.
        k: Dimensions of a feature.
        rows: Gradients that share a dense matrix; the released code's default is 4.
        implementation: See :func:`dense_projection_slice`.

    Returns:
        Seconds a gradient by the clock (``_s``) and of the processor (``_cpu_s``), and how many times the SJLT's the
        faster dense one takes: ``ratio_1`` with all coordinates in both, ``ratio_0.1`` with the engine's share of them.
    """
    model, _ = load_policy(policy, "float32", "cpu")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    del model
    gradient = torch.randn(sum(math.prod(s) for s in shapes.values()))
    figures: dict[str, Any] = {"d": len(gradient), "k": k, "rows": rows, "implementation": implementation}
    kinds: tuple[Kind, ...] = ("rademacher", "normal")
    for kind in kinds:
        part = dense_projection_slice(gradient.expand(rows, -1), k, kind=kind, implementation=implementation)
        figures |= {"coordinates": part.coordinates, "columns": part.columns}
        figures[f"{kind}_slice_s"] = part.watch.seconds
        figures[f"{kind}_s"] = part.whole_seconds / rows
        figures[f"{kind}_cpu_s"] = part.watch.cpu_seconds * part.factor / rows
    for density in (1.0, 0.1):
        projection = Projection(k=k, density=density, form="uniform")
        sketches = build_sketches(shapes, projection, torch.device("cpu"))
        watches = [Stopwatch() for _ in range(4)]  # the first touches memory for the first time
        for watch in watches:
            with watch:
                sjlt_projection(gradient, sketches, k)
        for clock, unit, suffix in (("seconds", "s", ""), ("cpu_seconds", "cpu_s", "_cpu")):
            sparse = min(getattr(watch, clock) for watch in watches)
            dense = min(figures[f"{kind}_{unit}"] for kind in kinds)
            figures[f"sjlt_{density:g}_{unit}"] = sparse
            figures[f"ratio_{density:g}{suffix}"] = dense / sparse
    return figures


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
    policy: Path, rows: Sequence[Row], k: int, token_budget: int
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
            run_path=f"{run}/index", model=str(policy), precision="fp32", loss_reduction="mean"
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


def bergson_tokens_per_second(
    python: Path, policy: Path, rollouts: Path, *, k: int = 8192, token_budget: int = 2048
) -> dict[str, Any]:
    """Measure bergson in the environment of ``python``; see :func:`bergson_features`, :func:`measure_peer`."""
    options = {"peer": "bergson", "policy": policy, "rollouts": rollouts, "k": k}
    return run_peer(python, options | {"token_budget": token_budget})


def dattri_tokens_per_second(
    python: Path,
    policy: Path,
    rollouts: Path,
    *,
    k: int = 8192,
    token_budget: int = 2048,
    method: Method = "factgrass",
) -> dict[str, Any]:
    """Measure dattri in the environment of ``python``; see :func:`dattri_features`, :func:`measure_peer`."""
    options = {"peer": "dattri", "policy": policy, "rollouts": rollouts, "k": k, "method": method}
    return run_peer(python, options | {"token_budget": token_budget})


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
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
