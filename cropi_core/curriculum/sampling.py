"""The rollouts of a run: which prompts are sampled at a stage, with which settings, and which stored ones are kept."""

from typing import Any

from cropi_core.curriculum.run import Run
from data_schemas import (
    ArtifactRef,
    MergedRolloutsSettings,
    PilotPromptsSettings,
    RolloutsSettings,
    WakingPromptsSettings,
)


class Sampler:
    """Samples rollouts for the stages of a run.

    Attributes:
        run: The run.
        grading: The settings of the verifiers that are part of a key.
        graders: Where the verifiers are, which is not part of a key.
    """

    def __init__(self, run: Run, grading: dict[str, Any], graders: dict[str, Any]) -> None:
        self.run = run
        self.config = run.config
        self.grading = grading
        self.graders = graders

    def sample(self, stage: int, policy: ArtifactRef, sets: dict[str, ArtifactRef]) -> dict[str, ArtifactRef]:
        """Sample trajectories of ``policy`` on the pool and, if gradients are needed, on the validation sets."""
        names = ["pool", *(self.config.data.validation if self.config.needs_gradients else [])]
        sampled = sets | {"pool": self._pilot(stage, sets["pool"])}
        return {name: self.collect(name, stage, policy, sampled[name]) for name in names}

    def _pilot(self, stage: int, pool: ArtifactRef) -> ArtifactRef:
        """Draw the part of the pool that a stage samples; another one at every stage that samples the pool again."""
        if (share := self.config.rollouts.pool_share) == 1:
            return pool
        settings = PilotPromptsSettings(pilot=share, seed=self.config.seed + 1000 * (stage - 1))
        return self.run.step("prompts", f"prompts/pilot@{stage}", settings, {"prompts": pool})

    def sample_waking(
        self,
        stage: int,
        policy: ArtifactRef,
        sets: dict[str, ArtifactRef],
        stored: dict[str, ArtifactRef],
    ) -> dict[str, ArtifactRef]:
        """Sample the validation sets again, and the prompts of the pool that read like what begins to be solved."""
        config = self.config
        fresh = {name: self.collect(name, stage, policy, sets[name]) for name in config.data.validation}
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
        waking = self.collect("waking", stage, policy, prompts)
        merged = {"prompts": sets["pool"], "stored": stored["pool"], "fresh": waking}
        merging = MergedRolloutsSettings(keep_stored=config.rollouts.waking.keep_stored)
        pool = self.run.step("rollouts", f"rollouts/pool@{stage}", merging, merged)
        return {"pool": pool, **fresh}

    def collect(
        self, name: str, stage: int, policy: ArtifactRef, prompts: ArtifactRef, seed: int = 0
    ) -> ArtifactRef:
        """Sample the prompts of one set, the waking prompts or those of a spot check, by the settings that apply."""
        rollouts = self.config.rollouts
        sampling = rollouts.validation if name in self.config.data.validation else rollouts.pool
        if name == "waking" and rollouts.waking.samples:
            sampling = sampling.model_copy(update={"samples": rollouts.waking.samples})
        settings = RolloutsSettings(
            dtype=self.config.policy.dtype,
            grading=self.grading,
            sampling=sampling,
            seed=self.config.seed + 1000 * (stage - 1) + seed,
            shard_prompts=rollouts.shard_prompts,
            engine=rollouts.engine,
            samples_by_source=rollouts.samples_by_source if name == "pool" else {},
            passes=rollouts.passes if name == "pool" else None,  # spot checks measure with full groups
        )
        inputs = {"policy": policy, "prompts": prompts}
        ref = self.run.step("rollouts", f"rollouts/{name}@{stage}", settings, inputs, self.graders)
        self.run.note_warnings(f"rollouts/{name}@{stage}", ref)
        return ref
