"""The curriculum: which steps run, in which order, and from which artifacts.

``run_curriculum(config, store, execute)`` passes every step to ``execute`` and receives an artifact: an orchestrator
passes a function that submits a task, a script passes :func:`cropi_core.curriculum.run_step`. The record of the run is
written after every step, so an interruption loses only the step in progress.

The scores of a stage are checked before they are used (:mod:`cropi_core.diagnostics.limits`). When a limit of the
configuration is exceeded, trajectories are sampled again or the selection is random, and the record states it. The
slots of a run are listed in :mod:`cropi_core.curriculum.slots`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cropi_core.artifacts import CHECKPOINT, PROMPTS_FILE, Store
from cropi_core.curriculum.pins import check_pinned_prompts
from cropi_core.curriculum.run import Execute, Run
from cropi_core.curriculum.slots import pin_for, pins_rollouts, source_settings
from cropi_core.diagnostics import (
    GRADIENT_RULES,
    RULES,
    collect_figures,
    consequence,
    judge,
    random_limits,
    verdict_sentence,
)
from cropi_core.errors import SelectionError
from cropi_core.policy import chat_settings, check_targets, resolve_checkpoint, tree_digest
from cropi_core.prompts import check_disjoint, check_rendering, check_verifiers
from cropi_core.rewards import grading_location, key_settings
from cropi_core.runs import load_run, run_id
from cropi_core.scores import LEAST, RELIABLE, doubled
from data_schemas import (
    ArtifactRef,
    Config,
    DiagnosticsSettings,
    Draw,
    Dtype,
    EvaluationSettings,
    Fallback,
    GradientsSettings,
    HalvedRolloutsSettings,
    MergedRolloutsSettings,
    PolicySettings,
    RolloutsSettings,
    RunRecord,
    ScoresSettings,
    SelectionSettings,
    Slot,
    SpotDraw,
    SpotPromptsSettings,
    StageCheck,
    TrainingObjective,
    TrainingSettings,
    Verdict,
    WakingPromptsSettings,
)

Approve = Callable[[int, ArtifactRef, str | None], float | None]
"""Called with a stage, its selection and a fault of it, if any. Returns another ratio, or None to approve."""


class Curriculum:
    """The steps of one run: their inputs, their order, and the decisions between them."""

    def __init__(
        self,
        config: Config,
        store: Store,
        execute: Execute,
        notify: Callable[[str], None],
        approve: Approve | None,
    ) -> None:
        self.config = config
        self.approve = approve
        self.graders = grading_location(config.grading)
        self.verifiers: frozenset[str] = frozenset()
        self.run = Run(config, store, execute, notify)

    def execute(self) -> RunRecord:
        """Run all stages and return the record."""
        with self.run.recorded():
            sets = self._prompts()
            policy = self._base_policy(sets)
            self._evaluate(0, policy, sets)
            rollouts: dict[str, ArtifactRef] = {}
            for stage in range(1, self.config.stages + 1):
                selection, rollouts = self._choose(stage, policy, sets, rollouts)
                if stage == self.config.stages and self._selects_only:
                    break
                policy = self._train(stage, policy, sets, selection, rollouts.get("pool"))
                self._evaluate(stage, policy, sets)
        return self.run.record

    @property
    def _selects_only(self) -> bool:
        """Whether the run ends with a selection for another trainer."""
        return self.config.ends_with == "selection"

    # -- the steps -----------------------------------------------------------------------------------------------

    def _prompts(self) -> dict[str, ArtifactRef]:
        data = self.config.data
        sources = {"pool": ("pool", data.pool)}
        sources |= {name: ("validation", source) for name, source in data.validation.items()}
        sources |= {name: ("test", source) for name, source in data.test.items()}
        sets: dict[str, ArtifactRef] = {}
        # A set is decontaminated against the sets before it: test sets first, then validation sets, then the pool.
        for name in reversed(sources) if data.decontaminate else sources:
            split, source = sources[name]
            settings, location = source_settings(source, split)
            inputs = {f"against.{n}": sets[n] for n in sets if split == "pool" or n in data.test}
            if data.decontaminate is None or split == "test" or not inputs:
                inputs = {}
            else:
                settings = settings.model_copy(update={"decontaminate": data.decontaminate})
            sets[name] = self.run.step("prompts", f"prompts/{name}", settings, inputs, location)
        paths = {name: self.run.store.directory(ref) for name, ref in sets.items()}
        self.verifiers = check_verifiers(paths, self.config.grading.verifiers)
        check_disjoint(paths)
        if self.config.pin:
            check_pinned_prompts(self.config, self.run.store, sets["pool"])
        return sets

    def _base_policy(self, sets: dict[str, ArtifactRef]) -> ArtifactRef:
        paths = {name: self.run.store.directory(ref) / PROMPTS_FILE for name, ref in sets.items()}
        if pin_for(self.config.pin, "policy@0"):
            ref = self.run.pinned("policy@0")
            if (
                directory := self.run.store.path(ref) / CHECKPOINT
            ).is_dir():  # at an address it may not be fetched yet
                self._check_policy(directory, None, paths)
            return ref
        source = self.config.policy
        directory = resolve_checkpoint(source.path, source.revision)
        chat = None if source.chat is None else chat_settings(source.chat)
        self._check_policy(directory, chat, paths)
        settings = PolicySettings(sha256=tree_digest(directory), chat=chat)
        return self.run.step("policy", "policy@0", settings, location={"path": str(directory)})

    def _check_policy(self, directory: Path, chat: dict[str, Any] | None, sets: dict[str, Path]) -> None:
        """Refuse settings that contradict the checkpoint before the first step that needs it."""
        check_rendering(directory, chat, sets)
        if lora := self.config.training.lora:
            check_targets(directory, lora.targets)

    @property
    def _dtype(self) -> Dtype:
        return self.config.policy.dtype

    @property
    def _grading(self) -> dict[str, Any]:
        return key_settings(self.config.grading, self.verifiers)

    def _rollouts(
        self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef]
    ) -> dict[str, ArtifactRef]:
        """Sample trajectories of ``policy`` on the pool and, if gradients are needed, on the validation sets."""
        names = ["pool", *(self.config.data.validation if self.config.needs_gradients else [])]
        return {name: self._collect(name, stage, policy, sets[name]) for name in names}

    def _waking(
        self,
        stage: int,
        policy: ArtifactRef,
        sets: dict[str, ArtifactRef],
        stored: dict[str, ArtifactRef],
    ) -> dict[str, ArtifactRef]:
        """Sample the validation sets again, and the prompts of the pool that read like what begins to be solved."""
        config = self.config
        fresh = {name: self._collect(name, stage, policy, sets[name]) for name in config.data.validation}
        settings = WakingPromptsSettings(
            waking=config.rollouts.waking,
            samples=config.rollouts.waking.samples or config.rollouts.pool.samples,
            group=config.training.sampling.samples,
            seed=config.seed,
        )
        inputs = {"prompts": sets["pool"], "stored": stored["pool"]}
        inputs |= {f"validation.{name}": sets[name] for name in fresh}
        inputs |= {f"rollouts.{name}": ref for name, ref in fresh.items()}
        prompts = self.run.step("prompts", f"prompts/waking@{stage}", settings, inputs)
        waking = self._collect("waking", stage, policy, prompts)
        merged = {"prompts": sets["pool"], "stored": stored["pool"], "fresh": waking}
        pool = self.run.step("rollouts", f"rollouts/pool@{stage}", MergedRolloutsSettings(), merged)
        return {"pool": pool, **fresh}

    def _collect(
        self, name: str, stage: int, policy: ArtifactRef, prompts: ArtifactRef, seed: int = 0
    ) -> ArtifactRef:
        rollouts = self.config.rollouts
        sampling = rollouts.validation if name in self.config.data.validation else rollouts.pool
        if name == "waking" and rollouts.waking.samples:
            sampling = sampling.model_copy(update={"samples": rollouts.waking.samples})
        settings = RolloutsSettings(
            dtype=self._dtype,
            grading=self._grading,
            sampling=sampling,
            seed=self.config.seed + 1000 * (stage - 1) + seed,
            shard_prompts=rollouts.shard_prompts,
            engine=rollouts.engine,
            samples_by_source=rollouts.samples_by_source if name == "pool" else {},
            passes=rollouts.passes if name == "pool" else None,  # spot checks measure with full groups
        )
        inputs = {"policy": policy, "prompts": prompts}
        ref = self.run.step("rollouts", f"rollouts/{name}@{stage}", settings, inputs, self.graders)
        self._warn(f"rollouts/{name}@{stage}", ref)
        return ref

    def _warn(self, slot: str, ref: ArtifactRef) -> None:
        """Add an artifact's own warnings to the notes of the run."""
        summary = self.run.store.manifest(ref).summary
        warnings = [summary.get("parity", {}).get("warning"), *summary.get("verifier_warnings", [])]
        for warning in filter(None, warnings):
            self.run.note(f"{slot}: {warning}")

    def _gradients(
        self, stage: int, policy: ArtifactRef, rollouts: dict[str, ArtifactRef]
    ) -> dict[str, ArtifactRef]:
        config, projection = self.config, self.config.projection
        if projection.preconditioner == "adam" and policy == self.run.record.slots["policy@0"].ref:
            # The base policy was not trained by a stage, so it has no moments.
            projection = projection.model_copy(update={"preconditioner": "none"})
        settings = GradientsSettings(
            dtype=self._dtype,
            objective=config.objective,
            projection=projection,
            layout=config.gradients,
            max_new_tokens=config.training.sampling.max_new_tokens,
        )
        return {
            name: self.run.step(
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
        """Score the pool under ``policy`` and select the prompts of the stage."""
        config, inputs = self.config, {"prompts": sets["pool"]}
        chosen = config.selection.at(stage)
        settings = SelectionSettings(selection=chosen, seed=config.seed + stage)
        renewed = config.rollouts.refresh == "always" or pins_rollouts(config, stage)
        if config.needs_rollouts and (not rollouts or renewed):
            rollouts = self._rollouts(stage, policy, sets)
        elif config.rollouts.refresh == "waking" and chosen.reads_rollouts:
            rollouts = self._waking(stage, policy, sets, rollouts)
        if chosen.reads_gradients:
            if config.scores_at(stage):
                rollouts, scores, check = self._checked_scores(stage, policy, sets, rollouts)
            else:  # the scores of the first stage and their check apply to all stages
                entry = self.run.record.slots.get("scores@1")
                scores, check = entry.ref if entry else None, self.run.record.checks[-1]
            inputs |= {"scores": scores} if scores else {}
            if chosen.strategy == "auto":
                strategy = self._trusted(scores)
                settings = settings.model_copy(
                    update={"selection": chosen.model_copy(update={"strategy": strategy})}
                )
            if check.action == "random":
                settings = SelectionSettings(
                    selection=chosen.model_copy(update={"strategy": "random"}),
                    seed=settings.seed,
                    fallback=Fallback(strategy=chosen.strategy, limits=random_limits(check)),
                )
        elif chosen.reads_rollouts:
            inputs["rollouts"] = rollouts["pool"]
            inputs |= {"belief": policy} if self._has_belief(policy) else {}
        elif chosen.reads_targets:
            inputs |= {f"validation.{name}": sets[name] for name in config.data.validation}
        selection = self._select(stage, settings, inputs)
        if fault := self._shortage(stage, selection):
            raise SelectionError(fault)
        return selection, rollouts

    def _select(self, stage: int, settings: SelectionSettings, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
        """Select the prompts; if a reviewer approves selections, repeat for every ratio that the reviewer requests."""

        def choose(ratio: float) -> ArtifactRef:
            selection = settings.selection.model_copy(update={"ratio": ratio})
            chosen = settings.model_copy(update={"selection": selection})
            return self.run.step("selection", f"selection@{stage}", chosen, inputs)

        ratio = self.config.selection.ratio
        selection = proposed = choose(ratio)
        if self.approve is None:
            return selection
        approved = self.run.record.approved.get(proposed.key)
        if approved is not None:  # by an earlier start of this run
            return proposed if approved == ratio else choose(approved)
        while (other := self.approve(stage, selection, self._shortage(stage, selection))) is not None:
            ratio = other
            selection = choose(ratio)
        self.run.record.approved[proposed.key] = ratio
        self.run.save()
        return selection

    def _shortage(self, stage: int, selection: ArtifactRef) -> str | None:
        summary = self.run.store.manifest(selection).summary
        config, chosen = self.config, summary["selected"]
        if chosen >= config.training.prompts_per_step or self._selects_only:
            return None
        return (
            f"stage {stage} selected {chosen} prompts of {summary['pool']}, fewer than "
            f"training.prompts_per_step={config.training.prompts_per_step}: enlarge the pool, raise "
            f"selection.ratio={summary['ratio']}, or lower training.prompts_per_step"
        )

    # -- whether the scores are reliable --------------------------------------------------------------------------

    def _checked_scores(
        self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef], rollouts: dict[str, ArtifactRef]
    ) -> tuple[dict[str, ArtifactRef], ArtifactRef | None, StageCheck]:
        """Score the pool, with new trajectories if a limit asks for them; None if no prompt can be scored."""
        while True:
            gradients = self._gradients(stage, policy, rollouts)
            scores, spot = None, None
            # Limits on gradients come first: trajectories that will be replaced need no scores.
            check = self._judge(stage, policy, rollouts, gradients, GRADIENT_RULES)
            live = self.run.store.manifest(gradients["pool"]).summary["status"]["ok"]
            if check.action == "none" or (check.action == "random" and live):
                halves = self._halves(stage, policy, rollouts)
                scores = self._score(stage, gradients, sets["pool"], halves=halves)
                spot = self._spot_check(stage, policy, sets, gradients, scores)
                influence = self.config.selection.strategy in ("influence", "auto")
                rules = RULES if influence else GRADIENT_RULES
                check = self._judge(stage, policy, rollouts, gradients, rules, scores, spot)
                if influence:
                    verdict = self._verdict(scores)
                    check = check.model_copy(update={"verdict": verdict})
                    if self.config.selection.strategy == "auto":
                        self.run.note(f"stage {stage}: {verdict_sentence(verdict)}")
            self.run.record.checks.append(check)
            if note := consequence(check):
                self.run.note(note)
            if check.action != "refresh":
                return rollouts, scores, check
            self._set_aside(stage)
            rollouts = self._rollouts(stage, policy, sets)

    def _halves(
        self, stage: int, policy: ArtifactRef, rollouts: dict[str, ArtifactRef]
    ) -> ArtifactRef | None:
        """Compute the gradients of halves of some prompts' completions; None if too few prompts can be halved."""
        config = self.config
        if config.selection.strategy != "auto":
            return None
        settings = HalvedRolloutsSettings(halves=config.diagnostics.halves, seed=config.seed + stage)
        inputs = {"rollouts": rollouts["pool"]}
        halved = self.run.step("rollouts", f"rollouts/halves@{stage}", settings, inputs)
        if self.run.store.manifest(halved).summary.get("prompts", 0) < LEAST:
            return None
        return self._gradients(stage, policy, {"halves": halved})["halves"]

    def _trusted(self, scores: ArtifactRef | None) -> Literal["influence", "pass_rate", "random"]:
        """Return the strategy that the reliability of the scores allows."""
        found = self.run.store.manifest(scores).summary.get("reliability", {}) if scores else {}
        if found.get("verdict") != "noise":
            return "influence"
        slots = {
            Slot.parse(text).stage or 0: text for text in self.run.record.slots if "rollouts/halves@" in text
        }
        entry = self.run.record.slots[slots[max(slots)]] if slots else None
        summary = self.run.store.manifest(entry.ref).summary if entry else {}
        spread = doubled(summary.get("pass_rate_correlation"))
        return "pass_rate" if spread is not None and spread >= RELIABLE else "random"

    def _verdict(self, scores: ArtifactRef) -> Verdict:
        """State how reliable the scores are, and what the stage does."""
        found = self.run.store.manifest(scores).summary.get("reliability", {})
        grade = found.get("verdict") or "unknown"
        auto = self.config.selection.strategy == "auto"
        strategy = self._trusted(scores) if auto else "influence"
        follows = "selected by influence"
        if auto and strategy != "influence":
            follows = {"pass_rate": "selected by pass rate", "random": "selected at random"}[strategy]
        elif auto and grade == "weak":
            follows = "selected by influence, shrunk to clusters of gradients"
        elif grade in ("weak", "noise"):
            follows = "selected by influence all the same; selection.strategy=auto would act"
        return Verdict(
            grade=grade, figure=found.get("figure"), basis=found.get("basis", "unknown"), follows=follows
        )

    def _judge(
        self,
        stage: int,
        policy: ArtifactRef,
        rollouts: dict[str, ArtifactRef],
        gradients: dict[str, ArtifactRef],
        rules: tuple[str, ...],
        scores: ArtifactRef | None = None,
        spot: ArtifactRef | None = None,
    ) -> StageCheck:
        """Compare the measured figures with the limits."""
        measured = [gradients["pool"], scores, spot]
        measured_figures = collect_figures(
            *[self.run.store.manifest(ref).summary if ref else {} for ref in measured]
        )
        trajectories: Literal["own", "pinned", "stored"] = "stored"
        if self.run.store.manifest(rollouts["pool"]).inputs.get("policy") == policy:
            trajectories = "own"
        elif pin_for(self.config.pin, f"rollouts/pool@{stage}"):
            trajectories = "pinned"
        return judge(stage, measured_figures, self.config.diagnostics, trajectories=trajectories, rules=rules)

    def _set_aside(self, stage: int) -> None:
        """Move the slots that a stage computed from stored trajectories to slots marked ``stored`` in the record."""
        slots = self.run.record.slots
        for slot in [Slot.parse(text) for text in slots]:
            if slot.stage == stage:
                slots[str(replace(slot, stored=True))] = slots.pop(str(slot))

    def _spot_check(
        self,
        stage: int,
        policy: ArtifactRef,
        sets: dict[str, ArtifactRef],
        gradients: dict[str, ArtifactRef],
        scores: ArtifactRef,
    ) -> ArtifactRef | None:
        """Compare the scores of a few prompts with scores from fresh trajectories, if the configuration asks for it."""
        config, limits = self.config, self.config.diagnostics
        if not config.needs_spot_check:
            return None
        seed = config.seed + stage
        draw = SpotDraw(prompts=limits.spot_check, dead_share=limits.spot_dead_share)
        inputs = {"prompts": sets["pool"], "scores": scores}
        prompts = self.run.step(
            "prompts", f"prompts/spot@{stage}", SpotPromptsSettings(spot=draw, seed=seed), inputs
        )
        rollouts = self._collect("spot", stage, policy, prompts, limits.spot_seed)
        fresh = self._gradients(stage, policy, {"spot": rollouts})["spot"]
        if not self.run.store.manifest(fresh).summary["status"]["ok"]:
            self.run.note(
                f"stage {stage}: no prompt of the spot check has a gradient from fresh trajectories"
            )
            return None
        spot_scores = self._score(stage, gradients, prompts, spot=fresh)
        settings = DiagnosticsSettings(scores=config.scores, ratio=config.selection.ratio, seed=config.seed)
        return self.run.step(
            "diagnostics", f"diagnostics@{stage}", settings, {"scores": scores, "spot": spot_scores}
        )

    def _remembered(self, stage: int) -> ArtifactRef | None:
        """Return the most recent earlier scores, if `scores.memory` adds them to the scores of this stage."""
        if not self.config.scores.memory:
            return None
        slots = self.run.record.slots
        earlier = [f"scores@{number}" for number in range(stage - 1, 0, -1)]
        return next((slots[name].ref for name in earlier if name in slots), None)

    def _score(
        self,
        stage: int,
        gradients: dict[str, ArtifactRef],
        prompts: ArtifactRef,
        spot: ArtifactRef | None = None,
        halves: ArtifactRef | None = None,
    ) -> ArtifactRef:
        """Score the pool against the validation sets, or the gradients of a spot check."""
        inputs = {"train": spot or gradients["pool"]}
        inputs |= {f"validation.{name}": gradients[name] for name in self.config.data.validation}
        inputs |= {"halves": halves} if halves else {}
        scores, slot = self.config.scores, f"scores@{stage}"
        if spot:  # compares measured scores only
            scores, slot = scores.model_copy(update={"neighbours": 0}), f"scores/spot@{stage}"
        previous = None if spot else self._remembered(stage)
        if previous is None:  # the first stage and spot checks have no earlier scores
            scores = scores.model_copy(update={"memory": 0.0})
        else:
            inputs["previous"] = previous
        if scores.neighbours:
            inputs["prompts"] = prompts
        return self.run.step("scores", slot, ScoresSettings(scores=scores, seed=self.config.seed), inputs)

    def _train(
        self,
        stage: int,
        policy: ArtifactRef,
        sets: dict[str, ArtifactRef],
        selection: ArtifactRef,
        rollouts: ArtifactRef | None,
    ) -> ArtifactRef:
        config = self.config
        base = self.run.record.slots["policy@0"].ref
        start = base if config.training.start == "base" else policy
        inputs = {"policy": start, "prompts": sets["pool"], "selection": selection}
        if config.training.beta > 0:
            inputs["reference"] = base if config.training.reference == "base" else start
        lora = config.training.lora
        if lora and lora.carry == "adapter" and start != base:
            inputs["base"] = base
        if rollouts and self._informs_draw(start, rollouts):
            inputs["rollouts"] = rollouts
        objective = config.objective.model_dump(include=set(TrainingObjective.model_fields))
        settings = TrainingSettings(
            dtype=self._dtype,
            grading=self._grading,
            training=config.training,
            objective=TrainingObjective.model_validate(objective),
            seed=config.seed + stage,
        )
        trained = self.run.step("training", f"policy@{stage}", settings, inputs, self.graders)
        summary = self.run.store.manifest(trained).summary
        if "ended" in summary:
            self.run.note(f"stage {stage} ended after {summary['steps']} steps: {summary['ended']}")
        return trained

    def _informs_draw(self, start: ArtifactRef, rollouts: ArtifactRef) -> bool:
        """Whether stored rollouts tell the draw of a stage more than the belief that its initial policy brings."""
        if not self.config.training.draw.learns:
            return False
        on_policy = self.run.store.manifest(rollouts).inputs.get("policy") == start
        return on_policy or not self._has_belief(start)

    def _has_belief(self, policy: ArtifactRef) -> bool:
        """Whether a policy was trained by a stage that kept what it learned of pass rates."""
        draw = self.run.store.manifest(policy).settings.get("training", {}).get("draw")
        return draw is not None and Draw.model_validate(draw).learns

    def _evaluate(self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef]) -> None:
        if self._selects_only:
            return
        names = [*self.config.data.validation, *self.config.data.test]
        inputs = {"policy": policy} | {f"prompts.{name}": sets[name] for name in names}
        settings = EvaluationSettings(
            dtype=self._dtype, grading=self._grading, evaluation=self.config.evaluation
        )
        ref = self.run.step("evaluation", f"evaluation@{stage}", settings, inputs, self.graders)
        self._warn(f"evaluation@{stage}", ref)


def run_curriculum(
    config: Config,
    store: Store,
    execute: Execute,
    *,
    notify: Callable[[str], None] = lambda text: None,
    approve: Approve | None = None,
) -> RunRecord:
    """Run a curriculum.

    Args:
        config: What to run.
        store: Store in which artifacts are found and published.
        execute: Runs one step; see :func:`cropi_core.curriculum.execution.run_step`.
        notify: Called with every note of the run.
        approve: Called before a stage trains on its selection; None approves every selection. It raises
            :class:`~cropi_core.errors.DeclinedError` to end the run and ``WaitingError`` to suspend it. Approvals are
            kept in the record, and a resumed run does not ask again.

    Returns:
        The finished record, also written below ``<root>/runs``.

    Raises:
        CropiError: A step failed; the record states which, and the same call resumes there.

    References:
        CROPI, arXiv 2510.26491, algorithm 1.
    """
    return Curriculum(config, store, execute, notify, approve).execute()


__all__ = ["Curriculum", "Execute", "load_run", "run_curriculum", "run_id"]
