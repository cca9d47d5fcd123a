"""Consistency rules between sections of the configuration.

A rule takes the sections that it compares and returns one line for each contradiction, with the values and what to
change. :meth:`data_schemas.config.Config.contradictions` applies all rules.
"""

import shlex
from collections.abc import Iterable, Mapping

from data_schemas.data import Data, MixSource, ReasoningGymSource, TableSource, WorldSource
from data_schemas.diagnostics import Diagnostics
from data_schemas.gradients import Gradients, Objective, Projection
from data_schemas.grading import Grading
from data_schemas.policy import PolicySource
from data_schemas.rollouts import Rollouts
from data_schemas.runtime import Launch, Runtime
from data_schemas.scores import Scores
from data_schemas.selection import Selection
from data_schemas.training import Draw, Training
from data_schemas.trl import TrlRuntime, TrlTraining, set_fields

SCORE_COLUMNS = {"score", "rank", "status", "prompt_id", "mean_reward", "grad_norm"}
"""Fixed columns of the scores table; a validation set cannot have one of these names."""


def block_rows(gradients: Gradients) -> list[str]:
    """Require that blocks divide shards, so that no batch crosses a shard."""
    if gradients.rows_per_shard % gradients.block_rows:
        return [
            f"gradients.rows_per_shard={gradients.rows_per_shard} is not a multiple of "
            f"gradients.block_rows={gradients.block_rows}"
        ]
    return []


def exact_projection(projection: Projection) -> list[str]:
    """Require float32 for unprojected gradients."""
    if projection.kind == "none" and projection.dtype == "float16":
        return ["projection.kind=none is for exact checks; set projection.dtype=float32"]
    return []


def group_size(rollouts: Rollouts, objective: Objective, *, needs_rollouts: bool) -> list[str]:
    """Require enough samples per prompt for a gradient."""
    counts = {"pool.samples": rollouts.pool.samples}
    counts |= {f"samples_by_source.{name}": count for name, count in rollouts.samples_by_source.items()}
    return [
        f"rollouts.{name}={count} is below objective.min_gradable={objective.min_gradable}: no prompt could have a "
        "gradient"
        for name, count in counts.items()
        if count < objective.min_gradable and needs_rollouts
    ]


def sampling_passes(rollouts: Rollouts, *, needs_rollouts: bool) -> list[str]:
    """Require that passes after the first are possible, and that something reads the rollouts."""
    passes, most = rollouts.passes, rollouts.pool.samples
    if passes is None:
        return []
    if rollouts.samples_by_source:
        return [
            "rollouts.passes and rollouts.samples_by_source both decide how often a prompt is sampled; drop one"
        ]
    if not needs_rollouts:
        return ["rollouts.passes has no effect: the strategy reads no rollouts; drop it"]
    if passes.first >= most:
        return [
            f"rollouts.passes.first={passes.first} leaves no completions for a second pass with "
            f"rollouts.pool.samples={most}; set a smaller first, or drop rollouts.passes"
        ]
    return []


def full_ratio(selection: Selection) -> list[str]:
    """Require ratio 1 and no shares for the strategy `full`."""
    if selection.strategy != "full":
        return []
    faults = []
    if selection.ratio != 1.0:
        faults.append(
            f"selection.strategy=full selects every prompt; selection.ratio={selection.ratio} must be 1"
        )
    if selection.shares:
        faults.append("selection.strategy=full selects every prompt; drop selection.shares")
    return faults


def pool_share(rollouts: Rollouts, scores: Scores, selection: Selection) -> list[str]:
    """Require a strategy that values prompts without rollouts, if a part of the pool is not sampled."""
    if rollouts.pool_share == 1:
        return []
    stated = f"rollouts.pool_share={rollouts.pool_share}"
    strategies = {selection.at(stage).strategy for stage in (1, 2) if selection.at(stage).reads_rollouts}
    if others := sorted(strategies - {"influence"}):
        return [
            f"{stated} with selection.strategy={others[0]}, which needs rollouts of every prompt; set "
            "rollouts.pool_share=1 or select by influence"
        ]
    if strategies and not scores.neighbours:
        return [
            f"{stated} leaves prompts without a score; set scores.neighbours (8 is a good start), so that they are "
            "scored like the prompts that read alike"
        ]
    return []


def scored_once(rescore: str, rollouts: Rollouts, scores: Scores) -> list[str]:
    """List settings that have no effect when only the first stage is scored."""
    if rescore != "once":
        return []
    faults = []
    if rollouts.refresh != "never":
        faults.append(
            f"rollouts.refresh={rollouts.refresh} with rescore=once: the scores are those of the first stage's "
            "trajectories, so newer trajectories would not be used; set rescore=each_stage or rollouts.refresh=never"
        )
    if scores.memory:
        faults.append(
            f"scores.memory={scores.memory} with rescore=once: only the first stage is scored, so there are no "
            "earlier scores to add; set rescore=each_stage or scores.memory=0"
        )
    return faults


def preconditioner(projection: Projection, training: Training, *, needs_gradients: bool) -> list[str]:
    """Require stored second moments for gradients in the metric of Adam."""
    if projection.preconditioner == "adam" and needs_gradients and not training.second_moments:
        return [
            "projection.preconditioner=adam needs training.second_moments=true: each stage reads the moments of "
            "the previous stage"
        ]
    return []


def training_features(
    training: Training,
    scores: Scores,
    projection: Projection,
    launch: Launch | None,
    rollouts: Rollouts,
    rescore: str,
) -> list[str]:
    """List settings with which a stage cannot collect features, or the next one cannot use them."""
    if not training.features:
        if scores.pool_features == "training":
            return ["scores.pool_features=training needs training.features=true"]
        return []
    against = {
        "training.engine=command": training.engine == "command",
        "training.lora": training.lora is not None,
        "projection.preconditioner=adam": projection.preconditioner == "adam",
        "runtime.launch": launch is not None,
    }
    if scores.pool_features == "training":
        against |= {
            f"rollouts.refresh={rollouts.refresh}": rollouts.refresh != "never",
            f"rescore={rescore}": rescore != "each_stage",
        }
    return [
        f"training.features is not supported with {name}; drop one of the two"
        for name, used in against.items()
        if used
    ]


def spot_check_size(diagnostics: Diagnostics) -> list[str]:
    """Require enough prompts for a rank correlation."""
    if diagnostics.min_spot_correlation is not None and diagnostics.spot_check < 3:
        return [
            f"diagnostics.min_spot_correlation={diagnostics.min_spot_correlation} needs a spot check, but "
            f"diagnostics.spot_check={diagnostics.spot_check}: a correlation needs at least 3 prompts, better 100"
        ]
    return []


def training_stage(training: Training) -> list[str]:
    """List contradictions within the settings of a stage."""
    faults = []
    if training.sampling.samples < 2:
        faults.append("training.sampling.samples=1: a group of one has no advantage; set 2 or more")
    if training.reference == "base" and training.beta == 0:
        faults.append("training.reference=base has no effect with training.beta=0; set beta or drop it")
    if training.warmup_steps > training.steps:
        faults.append(
            f"training.warmup_steps={training.warmup_steps} exceeds training.steps={training.steps}"
        )
    if training.trl.sync_ref_model and (training.beta == 0 or training.lora):
        faults.append("training.trl.sync_ref_model needs training.beta above 0, and no training.lora")
    unused = [name for name, on in [("lora", training.lora), ("trl.optim", training.trl.optim)] if on]
    faults += [
        f"training.{kept} reads AdamW's moments of all weights: drop training.{name}"
        for kept in training.keeps_moments
        for name in unused
    ]
    if training.optimizer_state == "carried" and training.start == "base":
        faults.append(
            "training.optimizer_state=carried with training.start=base: no stage continues the previous one; set "
            "training.start=previous or training.optimizer_state=fresh"
        )
    if training.end and training.end.min_steps > training.steps:
        faults.append(
            f"training.end.min_steps={training.end.min_steps} exceeds training.steps={training.steps}"
        )
    first = training.draw.first_samples
    if first is not None and first >= training.sampling.samples:
        faults.append(
            f"training.draw.first_samples={first} leaves no completion of the {training.sampling.samples} of a group "
            "(training.sampling.samples); set a smaller number or drop it"
        )
    return faults + _adapter(training) + _draw(training.draw) + _command(training)


def _command(training: Training) -> list[str]:
    """List what a stage by another trainer lacks, and settings that only cropi's own trainer reads."""
    if training.engine != "command":
        return ["training.command is set: set training.engine=command too"] if training.command else []
    if training.command is None:
        return ["training.engine=command needs training.command.run and training.command.version"]
    unread = {
        "lora": training.lora is not None,
        "draw": training.draw != Draw(),
        "end": training.end is not None,
        "trl": training.trl != TrlTraining(),
        "beta": training.beta > 0,
        **dict.fromkeys(training.keeps_moments, True),
    }
    return [
        f"training.{name} has no effect with training.engine=command: the command reads its own settings"
        for name, is_set in unread.items()
        if is_set
    ]


def _draw(draw: Draw) -> list[str]:
    """List the settings of a draw that its method does not read."""
    read = {
        "uniform": {"drift"} if draw.oversampling > 1 else set(),
        "belief": {"drift", "influence", "sharpness"},
        "thompson": {"drift", "influence"},
    }[draw.method]
    plain = Draw()
    if draw.oversampling > 1:
        read |= {"first_samples"}
    elif draw.first_samples is not None:
        return [
            "training.draw.first_samples has no effect without training.draw.oversampling above 1; set it too"
        ]
    return [
        f"training.draw.{name}={getattr(draw, name)} has no effect with training.draw.method={draw.method}; set "
        "another method or drop it"
        for name in Draw.model_fields
        if name not in read | {"method", "oversampling"} and getattr(draw, name) != getattr(plain, name)
    ]


def kl_reference(training: Training, *, given: bool) -> list[str]:
    """Require a reference policy for a KL term, and none without one."""
    if training.beta > 0 and not given:
        return [f"training.beta={training.beta} needs the KL reference policy; give --reference"]
    if training.beta == 0 and given:
        return ["--reference has no effect with training.beta=0; set training.beta or drop --reference"]
    return []


def _adapter(training: Training) -> list[str]:
    """List the settings that adapter training does not support."""
    lora, faults = training.lora, []
    if lora is None:
        return faults
    if lora.carry == "adapter" and training.start == "base":
        faults.append("training.lora.carry=adapter has no effect with training.start=base; set merged")
    if training.beta > 0 and training.reference != "stage_start":
        faults.append(
            f"training.reference={training.reference} with training.lora: TRL's KL reference is the policy at the "
            "start of the stage, a copy of its adapter; set training.reference=stage_start"
        )
    return faults


def loss_parameters(objective: Objective, trl: TrlTraining) -> list[str]:
    """List parameters that the configured loss does not read, and required parameters that are missing."""
    loss, faults = objective.loss_type, []
    for name in ("sapo", "vespo"):
        if loss != name and (named := set_fields(trl, f"{name}_")):
            faults.append(f"training.trl: {named} with objective.loss_type={loss}, which does not read them")
    if loss == "cispo" and trl.epsilon_high is None:
        faults.append(
            "objective.loss_type=cispo caps ratios at training.trl.epsilon_high. It is empty, so TRL would take "
            f"clip_epsilon={objective.clip_epsilon}, which weighs every token far too little; set it, for example to 5"
        )
    if loss == "luspo" and trl.importance_sampling_level != "sequence":
        faults.append("objective.loss_type=luspo needs training.trl.importance_sampling_level=sequence")
    if loss == "vespo" and trl.importance_sampling_level == "sequence":
        faults.append("objective.loss_type=vespo needs training.trl.importance_sampling_level=token")
    return faults


def training_processes(training: Training, launch: Launch | None, trl: TrlRuntime) -> list[str]:
    """List settings that the training engine, or training with several processes, does not support."""
    faults = []
    if training.engine == "transformers" and (unused := set_fields(trl, "vllm_")):
        faults.append(f"runtime.trl: {unused} with training.engine=transformers; set training.engine=vllm")
    if launch is None:
        return faults
    if training.engine == "command":
        faults.append("runtime.launch with training.engine=command: the command starts its own processes")
    if training.prompts_per_step % launch.processes:
        faults.append(
            f"training.prompts_per_step={training.prompts_per_step} is not a multiple of "
            f"runtime.launch.processes={launch.processes}: a group would be split between two processes"
        )
    faults += _machines(launch)
    if launch.config and launch.sharded:
        faults.append(
            f"runtime.launch.sharded with runtime.launch.config={launch.config}: the file says how weights are "
            "distributed; drop one of the two"
        )
    if launch.config or launch.sharded:
        name = "config" if launch.config else "sharded"
        faults += [
            f"training.{kept} with runtime.launch.{name}: sharded moments cannot be read"
            for kept in training.keeps_moments
        ]
    return faults


def _machines(launch: Launch) -> list[str]:
    """List what is wrong with the machines of the training processes."""
    if not launch.machines:
        return []
    faults, count = [], 1 + len(launch.machines)
    if launch.processes % count:
        faults.append(
            f"runtime.launch.processes={launch.processes} is not a multiple of the {count} machines, this one and "
            "those of runtime.launch.machines: each runs the same number"
        )
    if launch.address is None:
        faults.append("runtime.launch.machines without runtime.launch.address, the name of this machine")
    for machine in launch.machines:
        try:
            empty = not shlex.split(machine)
        except ValueError:
            empty = True
        if empty:
            faults.append(f"runtime.launch.machines: {machine!r} is not a command line")
    return faults


def pins(pin: Mapping[str, str], policy: PolicySource, data: Data) -> list[str]:
    """List settings that have no effect because a pin replaces what they change."""
    faults = []
    pinned = {"policy", "policy@0"} & set(pin)
    if policy.chat is not None and pinned:
        faults.append(f"policy.chat with pin.{min(pinned)}: a pinned policy keeps its chat template")
    filtered = {"prompts", "prompts/pool", *[f"prompts/{name}" for name in data.validation]}
    if data.decontaminate is not None and (pinned := filtered & set(pin)):
        faults.append(f"data.decontaminate with pin.{min(pinned)}: pinned prompts are used unchanged")
    return faults


def set_names(data: Data) -> list[str]:
    """List set names that are reserved or used twice."""
    faults = []
    if shared := set(data.validation) & set(data.test):
        faults.append(f"data.validation and data.test share the names {sorted(shared)}")
    if reserved := set(data.validation) & SCORE_COLUMNS:
        faults.append(f"data.validation names {sorted(reserved)} are columns of the scores table")
    if slots := {"pool", "spot", "pilot", "waking", "halves"} & (set(data.validation) | set(data.test)):
        faults.append(
            f"data names {sorted(slots)} are reserved for slots such as rollouts/pool; use other names"
        )
    return faults


def ray(runtime: Runtime) -> list[str]:
    """List execution settings that cannot be combined with gradient shards on Ray."""
    faults = []
    if runtime.ray is None:
        return faults
    if runtime.mode == "subprocess":
        faults.append(
            "runtime.mode=subprocess with runtime.ray: a step in its own process has no Prefect to reach the "
            "cluster through; set in_process (the Ray workers are separate processes)"
        )
    if runtime.workers > 1:
        faults.append(
            f"runtime.workers={runtime.workers} with runtime.ray: runtime.workers is for one machine without Ray; set "
            "runtime.ray.workers"
        )
    if runtime.device.startswith("cuda:"):
        faults.append(
            f"runtime.device={runtime.device} with runtime.ray: each worker sees the GPUs it was given, numbered "
            "from cuda:0; set auto or cuda"
        )
    return faults


def running_vllm_servers(
    base_urls: Iterable[str], evaluation_engine: str, later_samples: list[str]
) -> list[str]:
    """List settings that attached vLLM servers cannot serve: a server has one policy, a run has one per stage.

    Args:
        base_urls: ``runtime.vllm.base_urls``.
        evaluation_engine: ``evaluation.engine``.
        later_samples: Settings that make vLLM sample from the policies of later stages.
    """
    faults: list[str] = []
    if not list(base_urls):
        return faults
    if evaluation_engine == "vllm":
        faults.append(
            "evaluation.engine=vllm with runtime.vllm.base_urls: each stage evaluates its own policy, but a "
            "running server serves one; set evaluation.engine=transformers, or let cropi start servers (no base_urls)"
        )
    if later_samples:
        faults.append(
            f"{later_samples[0]} samples from the policies of later stages, but runtime.vllm.base_urls serve the "
            "base policy: let cropi start servers (no base_urls), or set stages=1"
        )
    return faults


def verifier_names(data: Data, grading: Grading) -> list[str]:
    """List sources that name an undefined verifier."""
    named = {
        "data.pool": data.pool,
        **{f"data.validation.{name}": source for name, source in data.validation.items()},
        **{f"data.test.{name}": source for name, source in data.test.items()},
    }
    for place, source in list(named.items()):
        if isinstance(source, MixSource):
            named |= {f"{place}.sources.{number}": one for number, one in enumerate(source.sources)}
    chosen: dict[str, str | None] = {}
    for place, source in named.items():
        if isinstance(source, TableSource | WorldSource):
            chosen[place] = source.verifier
        elif isinstance(source, ReasoningGymSource):
            chosen |= {f"{place}.tasks.{name}": task.verifier for name, task in source.tasks.items()}
    return [
        f"{place}.verifier={verifier} is not one of {', '.join(grading.verifiers)}; define it in "
        "grading.functions, grading.http or grading.sums"
        for place, verifier in chosen.items()
        if verifier is not None and verifier not in grading.verifiers
    ]
