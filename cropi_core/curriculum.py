"""The curriculum: which steps, in which order, from which artifacts. It runs nothing itself.

``curriculum(config, store, execute)`` hands every step to ``execute`` and gets an artifact back; an orchestrator
passes a function that submits a task, a script passes :func:`cropi_core.steps.run_step`. What the run used, slot by
slot, is written to its record after every step, so a stop at any instant loses nothing but the step under way.

Slots: ``prompts/pool``, ``prompts/<set>``, ``policy@0`` (the base), ``rollouts/pool@1``, ``rollouts/<set>@1``,
``gradients/pool@m``, ``gradients/<set>@m``, ``scores@m``, ``selection@m``, ``policy@m`` (after stage m),
``evaluation@m``. ``<set>`` is the name of a validation or test set.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cropi_core.checkpoint import resolve_checkpoint, tree_digest
from cropi_core.errors import ConfigError, SelectionError
from cropi_core.prompts import check_disjoint
from cropi_core.runs import load_run, new_run, now, run_id, save_run
from cropi_core.steps import StepResult
from cropi_core.store import Store, file_sha256, is_full
from data_schemas.config import Config, Source, TableSource
from data_schemas.manifest import ArtifactRef, Manifest, RunRecord, SlotRecord, StepName, StepSpec

Execute = Callable[[StepSpec], StepResult]


class Curriculum:
    """One run under way: its configuration, its record, and the function that executes steps."""

    def __init__(self, config: Config, store: Store, execute: Execute, notify: Callable[[str], None]) -> None:
        self.config = config
        self.store = store
        self.execute = execute
        self.notify = notify
        self.record = new_run(config)

    def run(self) -> RunRecord:
        """Run all stages; the record says at every moment how far it came."""
        self.store.prepare()
        try:
            save_run(self.store, self.record)
            self._check_pins()
            sets = self._prompts()
            policy = self._base_policy()
            self._evaluate(0, policy, sets)
            rollouts: dict[str, ArtifactRef] = {}
            for stage in range(1, self.config.stages + 1):
                selection, rollouts = self._choose(stage, policy, sets, rollouts)
                policy = self._train(stage, policy, sets, selection)
                self._evaluate(stage, policy, sets)
        except BaseException as error:
            with contextlib.suppress(OSError):  # a disk too full for the record must not hide why
                self._close("failed", f"{type(error).__name__}: {error}")
            if isinstance(error, OSError) and is_full(error):
                raise self.store.no_space("the run's record") from error
            raise
        self._close("done", None)
        return self.record

    def _close(self, status: Any, error: str | None) -> None:
        self.record = self.record.model_copy(update={"status": status, "error": error, "finished": now()})
        save_run(self.store, self.record)

    def _note(self, text: str) -> None:
        self.record.notes.append(text)
        self.notify(text)

    def _manifest(self, ref: ArtifactRef) -> Manifest:
        return self.store.manifest(ref)

    # -- one step ------------------------------------------------------------------------------------------------

    def _step(
        self,
        step: StepName,
        slot: str,
        settings: dict[str, Any],
        inputs: dict[str, ArtifactRef] | None = None,
        location: dict[str, str] | None = None,
    ) -> ArtifactRef:
        pinned = pin_for(self.config.pin, slot)
        if pinned is not None:
            ref = self._pinned(slot, pinned)
            entry = SlotRecord(ref=ref, origin="pinned")
        else:
            spec = StepSpec(
                step=step,
                slot=slot,
                settings=settings,
                inputs=inputs or {},
                location=location or {},
                runtime=self.config.runtime.model_dump(mode="json"),
            )
            result = self._execute(spec)
            ref = result.ref
            entry = SlotRecord(
                ref=ref, origin="cached" if result.cached else "computed", seconds=result.seconds
            )
        self.record.slots[slot] = entry
        save_run(self.store, self.record)
        return ref

    def _execute(self, spec: StepSpec) -> StepResult:
        """Execute a step, and say so when its stored artifact was damaged and had to be computed again."""
        before = set(self.store.damaged())
        result = self.execute(spec)
        for path in self.store.damaged():
            if path not in before:
                faults = path.with_name(f"{path.name}.txt").read_text(encoding="utf-8").splitlines()
                self._note(
                    f"{spec.slot} was damaged ({'; '.join(faults[:3])}), set aside as {path}, computed again"
                )
        return result

    def _check_pins(self) -> None:
        """Refuse pins that could not be used, before anything is run."""
        known = slots(self.config)
        for name, key in self.config.pin.items():
            meant = [slot for slot in known if pin_for({name: key}, slot)]
            if not meant:
                raise ConfigError(f"pin: no slot is called {name!r}; there are {', '.join(known)}")
            self._pinned(meant[0], key)

    def _pinned(self, slot: str, name: str) -> ArtifactRef:
        """Find a pinned artifact, whole and of the slot's kind: it cannot be computed again."""
        ref = self.store.manifest(self.store.resolve(name)).ref
        kind = slot.partition("@")[0].partition("/")[0]
        if ref.kind != kind:
            raise ConfigError(f"pin {slot}: {ref.key} is of kind {ref.kind}, {kind} is wanted")
        self.store.require(ref)
        return ref

    # -- the steps -----------------------------------------------------------------------------------------------

    def _prompts(self) -> dict[str, ArtifactRef]:
        data = self.config.data
        sources = {"pool": ("pool", data.pool)}
        sources |= {name: ("validation", source) for name, source in data.validation.items()}
        sources |= {name: ("test", source) for name, source in data.test.items()}
        sets = {}
        for name, (split, source) in sources.items():
            settings, location = source_settings(source, split)
            sets[name] = self._step("prompts", f"prompts/{name}", settings, location=location)
        check_disjoint({name: self.store.path(ref) for name, ref in sets.items()})
        return sets

    def _base_policy(self) -> ArtifactRef:
        if pin_for(self.config.pin, "policy@0"):
            return self._step("policy", "policy@0", {})
        directory = resolve_checkpoint(self.config.policy.path, self.config.policy.revision)
        return self._step(
            "policy", "policy@0", {"sha256": tree_digest(directory)}, location={"path": str(directory)}
        )

    def _model_settings(self) -> dict[str, Any]:
        return {"dtype": self.config.policy.dtype, "grading": self.config.grading.model_dump()}

    def _rollouts(
        self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef]
    ) -> dict[str, ArtifactRef]:
        """Collect trajectories of ``policy`` on the pool and, where gradients are needed, on the validation sets."""
        config, refs = self.config, {}
        names = ["pool", *(config.data.validation if config.needs_gradients else [])]
        for name in names:
            sampling = config.rollouts.pool if name == "pool" else config.rollouts.validation
            settings = {
                **self._model_settings(),
                "sampling": sampling.model_dump(),
                "seed": config.seed + 1000 * (stage - 1),
                "shard_prompts": config.rollouts.shard_prompts,
            }
            inputs = {"policy": policy, "prompts": sets[name]}
            refs[name] = self._step("rollouts", f"rollouts/{name}@{stage}", settings, inputs)
        return refs

    def _gradients(
        self, stage: int, policy: ArtifactRef, rollouts: dict[str, ArtifactRef]
    ) -> dict[str, ArtifactRef]:
        config = self.config
        settings = {
            "dtype": config.policy.dtype,
            "objective": config.objective.model_dump(),
            "projection": config.projection.model_dump(),
            "layout": config.gradients.model_dump(),
            "max_new_tokens": config.training.sampling.max_new_tokens,
        }
        return {
            name: self._step(
                "gradients",
                f"gradients/{name}@{stage}",
                settings,
                {"policy": policy, "rollouts": rollouts[name]},
            )
            for name in rollouts
        }

    def _choose(
        self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef], rollouts: dict[str, ArtifactRef]
    ) -> tuple[ArtifactRef, dict[str, ArtifactRef]]:
        """Score the pool under ``policy`` and choose the stage's subset."""
        config = self.config
        inputs = {"prompts": sets["pool"]}
        if config.needs_rollouts:
            if not rollouts or config.rollouts.refresh == "always":
                rollouts = self._rollouts(stage, policy, sets)
            if config.needs_gradients:
                gradients = self._gradients(stage, policy, rollouts)
                drift = self._drifted(stage, gradients["pool"])
                if drift is not None and f"rollouts/pool@{stage}" not in self.record.slots:
                    self._note(drift)
                    rollouts = self._rollouts(stage, policy, sets)
                    gradients = self._gradients(stage, policy, rollouts)
                inputs["scores"] = self._score(stage, gradients)
            else:
                inputs["rollouts"] = rollouts["pool"]
        settings = {"selection": config.selection.model_dump(), "seed": config.seed + stage}
        selection = self._step("selection", f"selection@{stage}", settings, inputs)
        chosen = self._manifest(selection).summary["selected"]
        if chosen < config.training.prompts_per_step:
            raise SelectionError(
                f"stage {stage} selected {chosen} prompts of {self._manifest(sets['pool']).summary['prompts']}, fewer "
                f"than training.prompts_per_step={config.training.prompts_per_step}: enlarge the pool, raise "
                f"selection.ratio={config.selection.ratio}, or lower training.prompts_per_step"
            )
        return selection, rollouts

    def _drifted(self, stage: int, gradients: ArtifactRef) -> str | None:
        """Say why the trajectories should be collected again, if they should."""
        summary = self._manifest(gradients).summary
        share, least = summary["median_ess_share"], self.config.rollouts.min_ess
        if self.config.rollouts.refresh != "drift" or share is None or share >= least:
            return None
        return (
            f"stage {stage}: trajectories collected again, the median effective sample size of the stored ones is "
            f"{share:.2f} of the samples, below rollouts.min_ess={least}"
        )

    def _score(self, stage: int, gradients: dict[str, ArtifactRef]) -> ArtifactRef:
        inputs = {"train": gradients["pool"]}
        inputs |= {f"validation.{name}": gradients[name] for name in self.config.data.validation}
        settings = {"scores": self.config.scores.model_dump(), "seed": self.config.seed}
        return self._step("scores", f"scores@{stage}", settings, inputs)

    def _train(
        self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef], selection: ArtifactRef
    ) -> ArtifactRef:
        config = self.config
        base = self.record.slots["policy@0"].ref
        start = base if config.training.start == "base" else policy
        inputs = {"policy": start, "prompts": sets["pool"], "selection": selection}
        if config.training.beta > 0:
            inputs["reference"] = base if config.training.reference == "base" else start
        settings = {
            **self._model_settings(),
            "training": config.training.model_dump(),
            "objective": config.objective.model_dump(include={"loss_type", "scale_rewards", "clip_epsilon"}),
            "seed": config.seed + stage,
        }
        return self._step("training", f"policy@{stage}", settings, inputs)

    def _evaluate(self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef]) -> None:
        names = [*self.config.data.validation, *self.config.data.test]
        inputs = {"policy": policy} | {f"prompts.{name}": sets[name] for name in names}
        settings = {**self._model_settings(), "evaluation": self.config.evaluation.model_dump()}
        self._step("evaluation", f"evaluation@{stage}", settings, inputs)


def curriculum(
    config: Config, store: Store, execute: Execute, *, notify: Callable[[str], None] = lambda text: None
) -> RunRecord:
    """Run a curriculum.

    Args:
        config: What to run.
        store: Where artifacts are found and put.
        execute: Runs one step; see :func:`cropi_core.steps.run_step`.
        notify: Told of decisions taken on the way.

    Returns:
        The finished record, also written below ``<root>/runs``.

    Raises:
        CropiError: A step failed; the record says which, and the same call goes on from there.

    References:
        CROPI, arXiv 2510.26491, algorithm 1.
    """
    return Curriculum(config, store, execute, notify).run()


def slots(config: Config) -> list[str]:
    """List the slots that a run of ``config`` may fill, in order."""
    validation, test = list(config.data.validation), list(config.data.test)
    names = [f"prompts/{name}" for name in ["pool", *validation, *test]] + ["policy@0", "evaluation@0"]
    for stage in range(1, config.stages + 1):
        if config.needs_rollouts:
            measured = ["pool", *(validation if config.needs_gradients else [])]
            if stage == 1 or config.rollouts.refresh != "never":
                names += [f"rollouts/{name}@{stage}" for name in measured]
            if config.needs_gradients:
                names += [f"gradients/{name}@{stage}" for name in measured] + [f"scores@{stage}"]
        names += [f"selection@{stage}", f"policy@{stage}", f"evaluation@{stage}"]
    return names


def pin_for(pins: dict[str, str], slot: str) -> str | None:
    """Find the pin of a slot: by the slot itself, without its stage, or by kind alone for the pool's.

    ``rollouts/pool@1`` is pinned by ``rollouts/pool@1``, ``rollouts/pool`` or ``rollouts``; ``policy`` alone pins the
    base, never a trained policy.
    """
    name, _, stage = slot.partition("@")
    names = [slot] if name == "policy" and stage != "0" else [slot, name]
    if name.endswith("/pool"):
        names.append(name.removesuffix("/pool"))
    return next((pins[n] for n in names if n in pins), None)


def source_settings(source: Source, split: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Split a source into what its prompts depend on and where they lie: a file counts by content."""
    settings = source.model_dump(mode="json")
    if not isinstance(source, TableSource):
        return {"source": settings, "split": split}, {}
    if source.kind == "hub":
        return {"source": settings, "split": split}, {}
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise ConfigError(f"data: {path} is no file")
    settings["path"] = "sha256:" + file_sha256(path)
    return {"source": settings, "split": split}, {"path": str(path)}


__all__ = ["Curriculum", "Execute", "curriculum", "load_run", "pin_for", "run_id", "slots", "source_settings"]
