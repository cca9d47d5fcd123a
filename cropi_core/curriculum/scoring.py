"""The scores of a stage: gradients, scores, and whether they are reliable enough to select by.

The scores are checked before they are used (:mod:`cropi_core.diagnostics.limits`). When a limit of the configuration is
exceeded, trajectories are sampled again or the selection is random, and the record states it.
"""

from dataclasses import replace
from typing import Literal

from cropi_core.curriculum.run import Run
from cropi_core.curriculum.sampling import Sampler
from cropi_core.curriculum.slots import pin_for
from cropi_core.diagnostics import (
    GRADIENT_RULES,
    RULES,
    collect_figures,
    consequence,
    judge,
    verdict_sentence,
)
from cropi_core.scores import LEAST, RELIABLE, doubled
from data_schemas import (
    ArtifactRef,
    DiagnosticsSettings,
    GradientsSettings,
    HalvedRolloutsSettings,
    MergedGradientsSettings,
    ScoresSettings,
    Slot,
    SpotDraw,
    SpotPromptsSettings,
    StageCheck,
    Verdict,
)


class Scorer:
    """Scores the pool of a run at its stages."""

    def __init__(self, run: Run, sampler: Sampler) -> None:
        self.run = run
        self.config = run.config
        self.sampler = sampler
        self._scores = run.config.scores.model_copy(update={"pool_features": "computed"})
        """Settings of every scoring; where the pool's features are from, its inputs say."""
        self._scored: tuple[ArtifactRef, ArtifactRef] | None = None
        """Rollouts and gradients of the pool at the stage before."""

    def checked_scores(
        self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef], rollouts: dict[str, ArtifactRef]
    ) -> tuple[dict[str, ArtifactRef], ArtifactRef | None, StageCheck]:
        """Score the pool, with new trajectories if a limit asks for them; None if no prompt can be scored."""
        while True:
            gradients = self._gradients(stage, policy, rollouts)
            self._scored = rollouts["pool"], gradients["pool"]
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
            rollouts = self.sampler.sample(stage, policy, sets)

    def _gradients(
        self, stage: int, policy: ArtifactRef, rollouts: dict[str, ArtifactRef]
    ) -> dict[str, ArtifactRef]:
        config, projection = self.config, self.config.projection
        if projection.preconditioner == "adam" and policy == self.run.record.slots["policy@0"].ref:
            # The base policy was not trained by a stage, so it has no moments.
            projection = projection.model_copy(update={"preconditioner": "none"})
        settings = GradientsSettings(
            dtype=self.config.policy.dtype,
            objective=config.objective,
            projection=projection,
            layout=config.gradients,
            max_new_tokens=config.training.sampling.max_new_tokens,
        )
        return {
            name: self._trained_gradients(stage, policy, rollouts[name])
            if name == "pool" and self._reuses(policy, rollouts[name])
            else self.run.step(
                "gradients",
                f"gradients/{name}@{stage}",
                settings,
                {"policy": policy, "rollouts": rollouts[name]},
            )
            for name in rollouts
        }

    def _reuses(self, policy: ArtifactRef, rollouts: ArtifactRef) -> bool:
        """Whether the pool's features are those of the stage before and those that its training collected."""
        if self.config.scores.pool_features != "training" or self._scored is None:
            return False
        collects = self.run.store.manifest(policy).settings.get("features") is not None
        return collects and self._scored[0] == rollouts

    def _trained_gradients(self, stage: int, policy: ArtifactRef, rollouts: ArtifactRef) -> ArtifactRef:
        """Replace the features of the trained prompts; no prompt of the pool passes through the model."""
        assert self._scored is not None
        inputs = {"policy": policy, "rollouts": rollouts, "stored": self._scored[1]}
        ref = self.run.step("gradients", f"gradients/pool@{stage}", MergedGradientsSettings(), inputs)
        found = self.run.store.manifest(ref).summary.get("trained")
        if found is None:  # a plan computes nothing
            return ref
        between = self.run.store.manifest(policy).summary["features"]["cosine_between_groups"]
        self.run.note(
            f"stage {stage}: features of {found['prompts']} trained prompts are those of the training, others are "
            f"stored (median cosine of stored and new features {_shown(found['cosine_to_stored'])}, of two groups of a "
            f"prompt in training {_shown(between)})"
        )
        return ref

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

    def trusted_strategy(self, scores: ArtifactRef | None) -> Literal["influence", "pass_rate", "random"]:
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
        strategy = self.trusted_strategy(scores) if auto else "influence"
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
        rollouts = self.sampler.collect("spot", stage, policy, prompts, limits.spot_seed)
        fresh = self._gradients(stage, policy, {"spot": rollouts})["spot"]
        if not self.run.store.manifest(fresh).summary["status"]["ok"]:
            self.run.note(
                f"stage {stage}: no prompt of the spot check has a gradient from fresh trajectories"
            )
            return None
        spot_scores = self._score(stage, gradients, prompts, spot=fresh)
        settings = DiagnosticsSettings(scores=self._scores, ratio=config.selection.ratio, seed=config.seed)
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
        scores, slot = self._scores, f"scores@{stage}"
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


def _shown(cosine: float | None) -> str:
    return "unknown" if cosine is None else f"{cosine:.2f}"
