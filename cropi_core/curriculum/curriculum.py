"""The curriculum: which steps run, in which order, and from which artifacts.

``run_curriculum(config, store, execute)`` passes every step to ``execute`` and receives an artifact: an orchestrator
passes a function that submits a task, a script passes :func:`cropi_core.curriculum.run_step`. The record of the run is
written after every step, so an interruption loses only the step in progress.

The prompts and the base policy come from :mod:`~cropi_core.curriculum.start`, rollouts from
:mod:`~cropi_core.curriculum.sampling`, checked scores from :mod:`~cropi_core.curriculum.scoring`. The slots of a run
are listed in :mod:`cropi_core.curriculum.slots`.
"""

from collections.abc import Callable

from cropi_core.artifacts import Store
from cropi_core.curriculum.run import Execute, Run
from cropi_core.curriculum.sampling import Sampler
from cropi_core.curriculum.scoring import Scorer
from cropi_core.curriculum.slots import pins_rollouts
from cropi_core.curriculum.start import base_policy, prompt_sets
from cropi_core.diagnostics import random_limits
from cropi_core.errors import SelectionError
from cropi_core.rewards import grading_location, key_settings
from cropi_core.runs import load_run, run_id
from data_schemas import (
    ArtifactRef,
    Config,
    Draw,
    EvaluationSettings,
    Fallback,
    RunRecord,
    SelectionSettings,
    TrainingFeatures,
    TrainingObjective,
    TrainingSettings,
)

Approve = Callable[[int, ArtifactRef, str | None], float | None]
"""Called with a stage, its selection and a fault of it, if any. Returns another ratio, or None to approve."""


class Curriculum:
    """The stages of one run: which prompts each trains on, and from which policy it starts.

    Attributes:
        run: The run, whose record is being kept.
        sets: Prompts of the pool, the validation sets and the test sets.
        sampler: Samples rollouts.
        scorer: Scores the pool.
        approve: Asks a reviewer about selections; None approves every selection.
    """

    def __init__(
        self, run: Run, sets: dict[str, ArtifactRef], sampler: Sampler, approve: Approve | None
    ) -> None:
        self.run = run
        self.config = run.config
        self.sets = sets
        self.sampler = sampler
        self.scorer = Scorer(run, sampler)
        self.approve = approve

    def execute(self, policy: ArtifactRef) -> None:
        """Run all stages, beginning with the base policy."""
        self._evaluate(0, policy)
        rollouts: dict[str, ArtifactRef] = {}
        for stage in range(1, self.config.stages + 1):
            selection, rollouts = self._choose(stage, policy, rollouts)
            if stage == self.config.stages and self._selects_only:
                break
            policy = self._train(stage, policy, selection, rollouts.get("pool"))
            self._evaluate(stage, policy)

    @property
    def _selects_only(self) -> bool:
        """Whether the run ends with a selection for another trainer."""
        return self.config.ends_with == "selection"

    def _choose(
        self, stage: int, policy: ArtifactRef, rollouts: dict[str, ArtifactRef]
    ) -> tuple[ArtifactRef, dict[str, ArtifactRef]]:
        """Score the pool under ``policy`` and select the prompts of the stage."""
        config, sets, inputs = self.config, self.sets, {"prompts": self.sets["pool"]}
        chosen = config.selection.at(stage)
        settings = SelectionSettings(selection=chosen, seed=config.seed + stage)
        renewed = config.rollouts.refresh == "always" or pins_rollouts(config, stage)
        if config.needs_rollouts and (not rollouts or renewed):
            rollouts = self.sampler.sample(stage, policy, sets)
        elif config.rollouts.refresh == "waking" and chosen.reads_rollouts:
            rollouts = self.sampler.sample_waking(stage, policy, sets, rollouts)
        if chosen.reads_gradients:
            if config.scores_at(stage):
                rollouts, scores, check = self.scorer.checked_scores(stage, policy, sets, rollouts)
            else:  # the scores of the first stage and their check apply to all stages
                entry = self.run.record.slots.get("scores@1")
                scores, check = entry.ref if entry else None, self.run.record.checks[-1]
            inputs |= {"scores": scores} if scores else {}
            if chosen.strategy == "auto":
                strategy = self.scorer.trusted_strategy(scores)
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
            f"training.prompts_per_step={config.training.prompts_per_step}: {_remedy(config, stage, summary['ratio'])}"
        )

    def _train(
        self,
        stage: int,
        policy: ArtifactRef,
        selection: ArtifactRef,
        rollouts: ArtifactRef | None,
    ) -> ArtifactRef:
        config = self.config
        base = self.run.record.slots["policy@0"].ref
        start = base if config.training.start == "base" else policy
        inputs = {"policy": start, "prompts": self.sets["pool"], "selection": selection}
        if config.training.beta > 0:
            inputs["reference"] = base if config.training.reference == "base" else start
        lora = config.training.lora
        if lora and lora.carry == "adapter" and start != base:
            inputs["base"] = base
        if rollouts and self._informs_draw(start, rollouts):
            inputs["rollouts"] = rollouts
        objective = config.objective.model_dump(include=set(TrainingObjective.model_fields))
        settings = TrainingSettings(
            dtype=self.config.policy.dtype,
            grading=self.sampler.grading,
            training=config.training,
            objective=TrainingObjective.model_validate(objective),
            seed=config.seed + stage,
            features=TrainingFeatures(
                projection=config.projection, layers=config.gradients.layers, objective=config.objective
            )
            if config.training.features
            else None,
        )
        trained = self.run.step("training", f"policy@{stage}", settings, inputs, self.sampler.graders)
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

    def _evaluate(self, stage: int, policy: ArtifactRef) -> None:
        if self._selects_only:
            return
        names = [*self.config.data.validation, *self.config.data.test]
        inputs = {"policy": policy} | {f"prompts.{name}": self.sets[name] for name in names}
        settings = EvaluationSettings(
            dtype=self.config.policy.dtype, grading=self.sampler.grading, evaluation=self.config.evaluation
        )
        ref = self.run.step("evaluation", f"evaluation@{stage}", settings, inputs, self.sampler.graders)
        self.run.note_warnings(f"evaluation@{stage}", ref)


def _remedy(config: Config, stage: int, ratio: float) -> str:
    """State what enlarges a selection that is smaller than a batch."""
    waking = config.rollouts.waking
    if stage > 1 and config.rollouts.refresh == "waking" and not waking.keep_stored:
        return (
            "it chose among the prompts that it sampled again, as rollouts.waking.keep_stored=false asks. Raise "
            f"rollouts.waking.tokens={waking.tokens}, keep stored completions, or lower training.prompts_per_step"
        )
    return f"enlarge the pool, raise selection.ratio={ratio}, or lower training.prompts_per_step"


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
    run = Run(config, store, execute, notify)
    graders = grading_location(config.grading)
    with run.recorded():
        sets, verifiers = prompt_sets(run)
        policy = base_policy(run, sets)
        sampler = Sampler(run, key_settings(config.grading, verifiers), graders)
        Curriculum(run, sets, sampler, approve).execute(policy)
    return run.record


__all__ = ["Curriculum", "Execute", "load_run", "run_curriculum", "run_id"]
