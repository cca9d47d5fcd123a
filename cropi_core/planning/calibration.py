"""Measure this machine on a few prompts of a run: the real sampler, the real gradients, a few real training steps.

    measured = Calibration(config, policy, prompts, folder).run()
    measured.samples["pool"].live, measured.speeds.training.completion_s

The functions are those of the run's steps, applied to tables of a few dozen prompts in a folder of the caller; their
progress reports serve as the clock. Nothing is written outside that folder, and the trained weights are discarded.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi_core.artifacts import write_parquet
from cropi_core.curriculum import provenance
from cropi_core.gradients import OK, FeatureSettings, Group, batch_groups, extract_gradients, group_rollouts
from cropi_core.planning.files import checkpoint_bytes, rollout_lines, store_bytes
from cropi_core.planning.meter import Meter
from cropi_core.planning.samples import (
    Clock,
    EnoughError,
    in_passes,
    lengths,
    packed,
    rate_of,
    shared,
    spread,
    steady_rate,
    with_sizes,
)
from cropi_core.planning.terms import (
    Assumptions,
    Disk,
    Line,
    Memory,
    Rate,
    Sample,
    Source,
    Speeds,
    TrainingRate,
)
from cropi_core.policy import Checkpoint, pick_device, release_device
from cropi_core.progress import Progress
from cropi_core.prompts import read_prompts, write_prompts
from cropi_core.rollouts import RolloutPlan, Sampler, open_sampler, read_rollouts, sample_rollouts
from cropi_core.scores import score
from cropi_core.training import StageFiles
from data_schemas import Config, Engine, Runtime, Sampling

SHARDS = 5
"""Number of batches sampled from the pool, and from the validation sets; the first is a warm-up."""

SAMPLING_BUDGET_S = 4.0
"""Seconds after which no other batch is started."""

TRAINING_BUDGET_S = 6.0
"""Seconds after which no other step is taken, once two generation batches are used up."""

TRAINING_CYCLES = 6
"""Generation batches of training; the first is a warm-up."""

Groups = dict[Source, list[Group]]


@dataclass(frozen=True)
class Measured:
    """Results of a calibration."""

    assumptions: Assumptions
    speeds: Speeds
    memory_of: str
    memory_exact: bool
    seconds: float


class Calibration:
    """A calibration in progress."""

    def __init__(self, config: Config, policy: Path, prompts: dict[str, Path], folder: Path) -> None:
        """Prepare the measurements.

        Args:
            config: Configuration of the run.
            policy: Checkpoint directory of the base policy.
            prompts: Prompts table of every set.
            folder: Directory for all files.
        """
        self.config, self.policy, self.folder = config, policy, folder
        changes = {"workers": 1, "ray": None, "launch": None, "mode": "in_process", "save_steps": 10**6}
        self.runtime = config.runtime.model_copy(update=changes)
        self.meter = Meter(pick_device(config.runtime.device))
        validation = [read_prompts(prompts[name]) for name in config.data.validation]
        self.tables: dict[Source, pa.Table] = {
            "pool": read_prompts(prompts["pool"]),
            "validation": pa.concat_tables(validation),
        }
        self.samplings: dict[Source, Sampling] = {
            "pool": config.rollouts.pool,
            "validation": config.rollouts.validation,
        }
        self.rows: dict[str, float] = {}

    def run(self, imports_s: float = 0.0) -> Measured:
        """Measure; ``imports_s`` is the time of importing the libraries, which is measurable only once per process."""
        began, base = time.monotonic(), self.meter.now()
        with self._sampler(self.config.rollouts.engine) as sampler:
            engine = self.config.rollouts.engine
            sampled: dict[Source, tuple[pa.Table, Rate]] = {
                s: self._sample(s, self.folder / s, engine, sampler) for s in self.tables
            }
        if self.config.rollouts.passes:
            _, rate = sampled["pool"]
            sampled["pool"] = in_passes(self.folder / "pool", self.config.rollouts.passes), rate
        least = self.config.objective.min_gradable
        groups: Groups = {source: group_rollouts(t, least) for source, (t, _) in sampled.items()}
        pool, validation = (rate for _, rate in sampled.values())
        if (
            engine == "vllm"
        ):  # the second call used servers that the first had started; in a run each step starts its own
            validation = replace(validation, start_s=pool.start_s)
        sampling = shared([pool, validation])
        evaluation = self._evaluation()
        sampling_memory = Line(self.rows["sampling"], self.rows["sampling_row"])
        release_device(self.runtime.device)
        gradients, gradient_memory, scores_s = self._gradients(groups)
        release_device(self.runtime.device)
        training = self._training(groups["pool"])
        release_device(self.runtime.device)
        workers, ranks = processes_at_once(self.config.runtime, on_gpu=self.meter.memory_kind == "gpu")
        for source, rate in gradients.items():
            gradients[source] = replace(rate, token_s=rate.token_s / workers)
        training = replace(training, completion_s=training.completion_s / ranks)
        start = time.monotonic()
        provenance()
        step_s = time.monotonic() - start
        samples: dict[Source, Sample] = {s: lengths(sampled[s][0], g) for s, g in groups.items()}
        if self.config.rollouts.passes:
            samples["pool"] = with_sizes(samples["pool"])
        memory = Memory(base, sampling_memory, gradient_memory, self.rows["training"])
        return Measured(
            Assumptions(samples, self._disk(groups)),
            Speeds(imports_s, step_s, scores_s, sampling, gradients, training, memory, evaluation),
            self.meter.memory_kind,
            self.meter.exact,
            time.monotonic() - began,
        )

    def _checkpoint(self) -> Checkpoint:
        """Return the base policy; the digest is only written into files of the folder."""
        return Checkpoint(self.policy, self.config.policy.dtype, "calibration")

    # -- sampling ------------------------------------------------------------------------------------------------

    def _sampler(self, engine: Engine) -> contextlib.AbstractContextManager[Sampler | None]:
        """Start servers once for all sampling here; transformers loads again, as every step of a run does."""
        if engine == "transformers":
            return contextlib.nullcontext()
        return open_sampler(
            engine,
            policy=self._checkpoint(),
            runtime=self.runtime,
            logs=self.folder / "logs",
        )

    def _evaluation(self) -> Rate | None:
        """Measure the engine of evaluation if it differs; ``first_s`` is included in ``start_s``."""
        engine = self.config.evaluation.engine
        if engine == self.config.rollouts.engine:
            return None
        with self._sampler(engine) as sampler:
            return self._sample("validation", self.folder / "evaluation", engine, sampler)[1]

    def _sample(
        self, source: Source, out: Path, engine: Engine, sampler: Sampler | None
    ) -> tuple[pa.Table, Rate]:
        """Sample a few batches of prompts; return the rollouts and the rate, with ``first_s`` not set yet."""
        sampling, rows = self.samplings[source], self.runtime.generation_rows
        if engine == "vllm":  # one wave: as many prompts as are in flight at the same time
            wave = self.runtime.vllm.concurrency * max(
                self.runtime.vllm.servers, len(self.runtime.vllm.base_urls)
            )
            rows = max(1, wave // SHARDS) * sampling.samples
        shard = max(1, min(self.config.rollouts.shard_prompts, rows // sampling.samples))
        shard = min(shard, -(-self.tables[source].num_rows // SHARDS))
        path = self.folder / f"{source}.parquet"
        write_prompts(spread(self.tables[source], shard * SHARDS, SHARDS), path)
        # Servers work on all shards at once; after an early stop, unfinished shards would not count.
        clock = Clock() if engine == "vllm" else Clock(SAMPLING_BUDGET_S)
        before = self.meter.now()
        self.meter.reset()
        with contextlib.suppress(EnoughError):  # the batches sampled so far are measured
            sample_rollouts(
                policy=self._checkpoint(),
                prompts=path,
                out=out,
                plan=RolloutPlan(sampling, self.config.seed, shard, engine),
                grading=self.config.grading,
                runtime=self.runtime,
                report=clock,
                sampler=sampler,
            )
        tail = time.monotonic() - clock.marks[-1][0]
        table = read_rollouts(out)
        if source == "pool" and "sampling" not in self.rows:
            growth = max(0.0, self.meter.peak() - before)
            self.rows["sampling"], used = before, min(rows, shard * sampling.samples)
            self.rows["sampling_row"] = growth / used
        if engine == "vllm":
            return table, steady_rate(clock, table, tail)
        return table, rate_of(clock, table, sampling.samples, tail)

    # -- gradients -----------------------------------------------------------------------------------------------

    def _gradients(self, groups: Groups) -> tuple[dict[Source, Rate], Line, float]:
        """Compute gradients of the sampled prompts; return rates, memory per token of a pass, seconds of scoring."""
        none: dict[Source, Rate] = dict.fromkeys(groups, Rate(0.0, 0.0, 0.0))
        if not self.config.needs_gradients:
            return none, Line(0.0, 0.0), 0.0
        measured = {source: self._gradient_rate(source, groups[source]) for source in groups}
        memory = max((line for _, line in measured.values()), key=lambda line: line.fixed)
        slopes = [line.per_row for _, line in measured.values() if line.per_row > 0]
        if not all(any(g.status == OK for g in members) for members in groups.values()):
            return (
                shared([rate for rate, _ in measured.values()]),
                Line(memory.fixed, max(slopes, default=0.0)),
                0.0,
            )
        start = time.monotonic()
        paths = [self.folder / f"{source}.zarr" for source in ("pool", "validation")]
        unused = {"memory": 0.0, "neighbours": 0}  # there is no earlier stage, and no text is compared
        settings = self.config.scores.model_copy(update=unused)
        score(train=paths[0], validation={"goal": paths[1]}, out=self.folder / "s.parquet", settings=settings)
        seconds = time.monotonic() - start
        slope = measured["validation"][1].per_row
        return shared([rate for rate, _ in measured.values()]), Line(memory.fixed, slope), seconds

    def _gradient_rate(self, source: Source, groups: list[Group]) -> tuple[Rate, Line]:
        layout = self.config.gradients
        layout = layout.model_copy(update={"rows_per_shard": layout.block_rows})
        # The base policy has no moments: later stages with `adam` take longer than measured here.
        projection = self.config.projection.model_copy(update={"preconditioner": "none"})
        most = self.config.training.sampling.max_new_tokens
        settings = FeatureSettings(self.config.objective, projection, layout, most)
        clock, loaded = Clock(), []

        def report(progress: Progress) -> None:
            if not loaded:
                loaded.append((self.meter.peak(), self.meter.now()))
                self.meter.reset()
            clock(progress)

        self.meter.reset()
        extract_gradients(
            policy=self._checkpoint(),
            rollouts=self.folder / source,
            out=self.folder / f"{source}.zarr",
            settings=settings,
            runtime=self.runtime,
            report=report,
        )
        start = clock.since_start() + time.monotonic() - clock.marks[-1][0]
        laps = clock.laps()
        steady = laps[1:] if sum(packed(groups[a:b]) for _, a, b in laps[1:]) else laps
        passed = sum(packed(groups[a:b]) for _, a, b in steady)
        token_s = sum(s for s, _, _ in steady) / passed if passed else 0.0
        rows = 1 if layout.deterministic else layout.block_rows
        cuts = [[groups[i] for i in cut] for cut in batch_groups(groups, rows, self.runtime.token_budget)]
        largest = max((packed(cut) for cut in cuts), default=0)
        _, before = loaded[0]
        growth = max(0.0, self.meter.peak() - before)
        return Rate(0.0, start, token_s), Line(before, growth / largest if largest else 0.0)

    # -- training ------------------------------------------------------------------------------------------------

    def _training(self, groups: Sequence[Group]) -> TrainingRate:
        """Take a few real optimizer steps on the sampled prompts, those with a gradient first."""
        start = time.monotonic()
        from cropi_core.training import train  # TRL: the first stage of a run also pays for this import

        first_s = time.monotonic() - start
        training, sampling = self.config.training, self.config.training.sampling
        full = max(self.runtime.generation_rows, self.runtime.train_micro_batch)
        chosen = sorted(groups, key=lambda group: group.status != OK)
        prompts = min(training.prompts_per_step, -(-full // sampling.samples), len(chosen))
        ids = [group.prompt_id for group in chosen][: max(prompts, min(len(chosen), 2 * prompts))]
        table = pa.table({"prompt_id": ids, "selected": [True] * len(ids)})
        write_parquet(table, self.folder / "selection.parquet")
        steps = training.iterations * TRAINING_CYCLES
        few = {"steps": steps, "prompts_per_step": prompts, "warmup_steps": 0}
        clock = Clock(TRAINING_BUDGET_S, 2 * training.iterations)
        self.meter.reset()
        with contextlib.suppress(EnoughError):  # the steps taken so far are measured
            train(
                StageFiles(
                    policy=self.policy,
                    prompts=self.folder / "pool.parquet",
                    selection=self.folder / "selection.parquet",
                    out=self.folder / "trained",
                    metrics=self.folder / "metrics.parquet",
                    scratch=self.folder / "scratch",
                    reference=self.policy if training.beta > 0 else None,
                ),
                training=training.model_copy(update=few),
                objective=self.config.objective,
                grading=self.config.grading,
                dtype=self.config.policy.dtype,
                seed=self.config.seed,
                runtime=self.runtime,
                report=clock,
            )
        save_s = time.monotonic() - clock.marks[-1][0]
        times = [at for at, _ in clock.marks]
        warm = training.iterations - 1
        step_s = (times[-1] - times[warm]) / (len(times) - 1 - warm)
        start_s = max(0.0, times[warm] - clock.started_at - step_s * training.iterations)
        self.rows["training"] = self.meter.peak()
        return TrainingRate(first_s, start_s, step_s / (prompts * sampling.samples), save_s)

    def _disk(self, groups: Groups) -> Disk:
        lines: dict[Source, tuple[Line, Line]] = {
            source: rollout_lines(self.folder / source, self.folder) for source in groups
        }
        policy, trained = checkpoint_bytes(self.policy, moment_bytes=self.config.training.moment_bytes)
        features, columns = 0.0, Line(0.0, 0.0)
        if self.config.needs_gradients:
            live: dict[Source, int] = {
                s: sum(g.status == OK for g in members) for s, members in groups.items()
            }
            best: Source = max(live, key=lambda s: live[s])
            features, columns = store_bytes(self.folder / f"{best}.zarr", live[best], len(groups[best]))
        return Disk(
            {s: line for s, (line, _) in lines.items()},
            lines["validation"][1],
            features,
            columns,
            policy,
            trained,
        )


def processes_at_once(runtime: Runtime, *, on_gpu: bool) -> tuple[int, int]:
    """Return how many processes compute gradients and train at the same time, each as fast as the measured one.

    On the CPU, processes of this machine share the processors that one process was measured with.
    """
    elsewhere = runtime.ray is not None and runtime.ray.address is not None
    workers = runtime.ray.workers if runtime.ray else runtime.workers
    ranks = runtime.launch.processes if runtime.launch else 1
    return (workers if on_gpu or elsewhere else 1), (ranks if on_gpu else 1)


def facts(measured: Measured) -> dict[str, Any]:
    """Return the measurements as JSON types: rates per second, lengths in tokens, bytes."""
    samples, speeds = measured.assumptions.samples, measured.speeds
    return {
        "seconds": round(measured.seconds, 3),
        "memory_of": measured.memory_of,
        "imports_s": round(speeds.imports_s + speeds.training.first_s, 3),
        "samples": {
            source: {
                "prompts": s.prompts,
                "prompt_tokens": s.prompt_tokens,
                "completion_tokens": sum(s.lengths) / len(s.lengths) if s.lengths else None,
                "live_share": s.live,
                "tokens_per_s": _per_second(speeds.sampling[source].token_s),
                "gradient_tokens_per_s": _per_second(speeds.gradients[source].token_s),
            }
            for source, s in samples.items()
        },
        "training_completions_per_s": _per_second(speeds.training.completion_s),
        "gradient_bytes_per_token": speeds.memory.gradients.per_row,
    }


def _per_second(seconds: float) -> float | None:
    return 1 / seconds if seconds > 0 else None
