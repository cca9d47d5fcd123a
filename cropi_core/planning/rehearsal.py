"""Rehearse a curriculum: list its steps in order and the artifacts that exist; only prompts are computed.

    with TemporaryDirectory() as folder:
        rehearsed = rehearse(config, Store(root), Path(folder))

The real :func:`cropi_core.curriculum.run_curriculum` runs on a temporary store, with a function in place of the steps
that names the artifact of each step. Prompts are read, because all counts depend on them. Artifacts in the real store
are linked, so a key is known if the keys of all its inputs are known. The real store is only read.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi_core.artifacts import CHECKPOINT, MANIFEST, PROMPTS_FILE, Store, write_atomic
from cropi_core.curriculum import StepResult, run_curriculum, run_step
from cropi_core.planning.terms import Work
from cropi_core.policy import chat_settings, checkpoint_files, resolve_checkpoint, write_chat
from cropi_core.runs import now, resolve_key
from cropi_core.selection import subset_size
from data_schemas import Chat, Config, Manifest, Slot, StepSpec

READ = ("prompts", "policy")
"""Steps with files that a plan reads; for others it needs only the manifest."""


@dataclass(frozen=True)
class Rehearsed:
    """Result of a rehearsal.

    Attributes:
        works: Steps of the run, in order.
        prompts: Prompts table of every set, by name, in the folder of the rehearsal.
        policy: Checkpoint directory of the base policy.
    """

    works: list[Work]
    prompts: dict[str, Path]
    policy: Path


def rehearse(config: Config, store: Store, folder: Path) -> Rehearsed:
    """List the steps of a run of ``config`` on ``store``.

    Args:
        config: Configuration of the run.
        store: Store in which artifacts are looked up; nothing is written to it.
        folder: An empty directory for prompts and links, which are not deleted.

    Raises:
        CropiError: The run itself would raise it before it computes anything.
    """
    stage = _Rehearsal(config, store, Store(folder))
    record = run_curriculum(stage.linked_pins(), stage.store, stage.execute)
    names = ["pool", *config.data.validation, *config.data.test]
    paths = {n: stage.store.path(record.slots[f"prompts/{n}"].ref) / PROMPTS_FILE for n in names}
    sources = {n: stage.store.manifest(record.slots[f"prompts/{n}"].ref).summary["by_source"] for n in names}
    works = []
    for slot, entry in record.slots.items():
        work = stage.done.get(slot) or Work(slot, "training" if slot.startswith("policy@") else _step(slot))
        works.append(counted(work, entry.origin, config, sources))
    policy = stage.store.path(record.slots["policy@0"].ref) / CHECKPOINT
    if not policy.is_dir():
        policy = resolve_checkpoint(config.policy.path, config.policy.revision)
        if config.policy.chat is not None:
            policy = _with_chat(policy, config.policy.chat, folder / CHECKPOINT)
    return Rehearsed(works, paths, policy)


def _with_chat(policy: Path, chat: Chat, folder: Path) -> Path:
    """Make a checkpoint of links to ``policy`` with the run's chat template, which affects the length of prompts."""
    folder.mkdir()
    for path in checkpoint_files(policy):
        (folder / path.name).symlink_to(path.resolve())
    write_chat(folder, chat_settings(chat))
    return folder


def _link_or_copy(source: str, target: str) -> None:
    """Link a file, or copy it where the two directories are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class _Rehearsal:
    """The temporary store that replaces the real one, and the steps requested so far."""

    def __init__(self, config: Config, real: Store, store: Store) -> None:
        self.config = config
        self.real = real
        self.store = store
        self.done: dict[str, Work] = {}

    def linked_pins(self) -> Config:
        """Link the pinned artifacts, and return the configuration with their full keys."""
        keys = {slot: resolve_key(self.real, name) for slot, name in self.config.pin.items()}
        for key in keys.values():
            self._link(key)
        return self.config.model_copy(update={"pin": keys})

    def execute(self, spec: StepSpec) -> StepResult:
        """Find the artifact of a step, or write the manifest that it will have."""
        key = spec.key
        measured: dict[str, Any] = {}
        cached = self.real.has(key)
        if cached and (spec.step in READ or self.real.path(key).exists()):
            self._link(key)
        elif cached:  # its files are elsewhere, and only its manifest is needed
            write_atomic(self.store.path(key) / MANIFEST, self.real.manifest(key).model_dump_json())
        elif spec.step == "prompts" and not {"spot", "pilot", "waking"} & set(spec.settings):
            runtime = {**spec.runtime, "mode": "in_process"}
            result = run_step(spec.model_copy(update={"runtime": runtime}), self.store)
            measured["bytes"] = sum(entry.size for entry in self.store.manifest(key).files)
            measured["seconds"] = result.seconds
        else:
            self._promise(spec, key)
        self.done[spec.slot] = Work(spec.slot, spec.step, **measured)
        return StepResult(self.store.manifest(key).ref, cached=cached, seconds=0.0)

    def _link(self, key: str) -> None:
        target = self.store.path(key)
        if not target.exists():
            shutil.copytree(self.real.directory(key), target, copy_function=_link_or_copy)

    def _promise(self, spec: StepSpec, key: str) -> None:
        """Write the manifest of a missing artifact, with a digest that no content has."""
        pool = spec.inputs.get("prompts")
        prompts = int(self.store.manifest(pool).summary["prompts"]) if pool else 0
        summary: dict[str, Any] = {"status": {"ok": 1}}  # not a share of the pool, so it exceeds no limit
        if spec.step == "selection":
            ratio = self.config.selection.ratio
            summary |= {"selected": subset_size(ratio, prompts), "pool": prompts, "ratio": ratio}
        if "spot" in spec.settings:
            summary["prompts"] = min(spec.settings["spot"]["prompts"], prompts)
        if "pilot" in spec.settings:
            summary["prompts"] = subset_size(spec.settings["pilot"], prompts)
        if "waking" in spec.settings:
            summary["prompts"] = waking_count(self.config, prompts)
        if "halves" in spec.settings:
            summary["prompts"] = spec.settings["halves"]
        manifest = Manifest(
            kind=spec.kind,
            key=key,
            digest=hashlib.sha256(f"planned {key}".encode()).hexdigest(),
            step=spec.step,
            inputs=spec.inputs,
            settings=spec.settings,
            files=[],
            summary=summary,
            versions={},
            git_revision=None,
            host="",
            device="",
            created=now(),
            seconds=0.0,
            peak_memory_bytes=0,
            checksum="",
        )
        write_atomic(self.store.path(key) / MANIFEST, manifest.model_dump_json())


def _step(slot: str) -> Any:
    """Return the step that fills a slot."""
    return Slot.parse(slot).kind


def waking_count(config: Config, pool: int) -> int:
    """Return how many prompts of the pool a later stage samples again, if completions have full length."""
    waking, sampling = config.rollouts.waking, config.rollouts.pool
    tokens = (waking.samples or sampling.samples) * sampling.max_new_tokens
    return max(1, min(pool, waking.tokens // tokens))


def mean_samples(samples: int, by_source: Mapping[str, int], sources: Mapping[str, int]) -> float:
    """Return the mean number of completions of a prompt.

    Args:
        samples: Completions of a prompt whose source has no number of its own.
        by_source: Completions by source.
        sources: Number of prompts by source, 1 or more in all.
    """
    total = sum(sources.values())
    return sum(n * by_source.get(name, samples) for name, n in sources.items()) / total


def counted(work: Work, origin: Any, config: Config, sources: Mapping[str, Mapping[str, int]]) -> Work:
    """Add the counts of a step's work to it.

    Args:
        work: The step.
        origin: Whether its artifact exists.
        config: Configuration of the run.
        sources: Number of prompts by source, of every set.
    """
    sizes = {name: sum(counts.values()) for name, counts in sources.items()}
    slot = Slot.parse(work.slot)
    kind, place = slot.kind, slot.set
    waking = config.rollouts.refresh == "waking"
    reuses = config.scores.pool_features == "training"
    wanted: dict[str, Any] = {"origin": origin, "stage": slot.stage or 0}
    drawn = {
        "spot": min(config.diagnostics.spot_check, sizes["pool"]),
        "pilot": subset_size(config.rollouts.pool_share, sizes["pool"]),
        "waking": waking_count(config, sizes["pool"]),
        "halves": 2 * min(config.diagnostics.halves, sizes["pool"]),
    }
    wanted["prompts"] = (sizes | drawn)[place or "pool"]
    if place in config.data.validation:
        wanted["source"] = "validation"
    if kind in ("rollouts", "gradients"):
        if (place or "pool") == "pool":
            wanted["prompts"] = drawn["pilot"]
        of = config.rollouts.validation if place in config.data.validation else config.rollouts.pool
        passes = config.rollouts.passes is not None and (place or "pool") == "pool"
        again = config.rollouts.waking.samples if place == "waking" else None
        more = config.rollouts.samples_by_source if (place or "pool") == "pool" else {}
        mean = mean_samples(of.samples, more, sources["pool"]) if more else of.samples
        wanted |= {"samples": again or mean, "passes": passes, "max_new_tokens": of.max_new_tokens}
        if work.step == "rollouts" and place == "pool" and wanted["stage"] > 1 and waking:
            wanted["prompts"] = 0  # put together from stored completions and those sampled again
        if work.step == "gradients" and place == "pool" and wanted["stage"] > 1 and reuses:
            wanted |= {"samples": 0, "passes": False, "seconds": 0.0}  # nothing passes through the model
        if place == "halves":  # of completions that exist
            wanted["samples"] = max(1, of.samples // 2)
            wanted["prompts"] = 0 if work.step == "rollouts" else wanted["prompts"]
    if place == "spot" and kind in ("gradients", "scores"):
        wanted["rows"] = wanted["prompts"] * (1 - config.diagnostics.spot_dead_share)
    if kind == "evaluation":
        names = [*config.data.validation, *config.data.test]
        of = config.evaluation.sampling
        prompts = sum(sizes[n] for n in names)
        means = {n: mean_samples(of.samples, config.evaluation.samples_by_source, sources[n]) for n in names}
        wanted |= {"source": "validation", "prompts": prompts, "calls": len(names)}
        wanted |= {"samples": sum(sizes[n] * means[n] for n in names) / prompts}
        wanted |= {"max_new_tokens": of.max_new_tokens}
    if kind == "scores":
        validation = config.data.validation
        nearest = config.scores.target == "nearest"
        wanted["products"] = (
            sum(sizes[n] for n in validation) if nearest else 2 * len(validation)
        )  # of halves
    if work.step == "training":
        training, of = config.training, config.training.sampling
        wanted |= {"prompts": training.prompts_per_step, "steps": training.steps}
        wanted |= {"samples": of.samples, "max_new_tokens": of.max_new_tokens}
        wanted["batches"] = -(-training.steps // training.iterations)
        # The most that may be sampled: all groups in full, or their first completions and the rest of one batch.
        first = training.draw.first_samples or of.samples
        most = (training.draw.oversampling - 1) * first / of.samples + 1
        wanted["batches"] = math.ceil(wanted["batches"] * most)
    return Work(**{**vars(work), **wanted})
