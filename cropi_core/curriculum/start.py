"""Where a run starts: the prompts of its sets, and its base policy, both checked before anything is sampled."""

from pathlib import Path
from typing import Any

from cropi_core.artifacts import CHECKPOINT, PROMPTS_FILE
from cropi_core.curriculum.pins import check_pinned_prompts
from cropi_core.curriculum.run import Run
from cropi_core.curriculum.slots import pin_for, source_settings
from cropi_core.policy import chat_settings, check_targets, resolve_checkpoint, tree_digest
from cropi_core.prompts import check_disjoint, check_rendering, check_verifiers
from data_schemas import ArtifactRef, Config, PolicySettings


def prompt_sets(run: Run) -> tuple[dict[str, ArtifactRef], frozenset[str]]:
    """Read the pool, the validation sets and the test sets.

    Returns:
        The artifacts by set, and the names of the verifiers that their prompts use.

    Raises:
        ConfigError: A prompt names a verifier that the configuration lacks, or pinned artifacts are of other prompts.
        DataError: A source cannot be read, or two sets have a prompt in common.
    """
    data = run.config.data
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
        sets[name] = run.step("prompts", f"prompts/{name}", settings, inputs, location)
    paths = {name: run.store.directory(ref) for name, ref in sets.items()}
    verifiers = check_verifiers(paths, run.config.grading.verifiers)
    check_disjoint(paths)
    if run.config.pin:
        check_pinned_prompts(run.config, run.store, sets["pool"])
    return sets, verifiers


def base_policy(run: Run, sets: dict[str, ArtifactRef]) -> ArtifactRef:
    """Take the base policy from its pin or its path, and refuse settings that contradict it.

    Raises:
        ConfigError: The checkpoint lacks modules that the configuration adapts.
        PolicyError: There is no checkpoint, or its chat template cannot render the prompts.
    """
    paths = {name: run.store.directory(ref) / PROMPTS_FILE for name, ref in sets.items()}
    if pin_for(run.config.pin, "policy@0"):
        ref = run.pinned("policy@0")
        directory = run.store.path(ref) / CHECKPOINT
        if directory.is_dir():  # at an address it may not be fetched yet
            _check_policy(run.config, directory, None, paths)
        return ref
    source = run.config.policy
    directory = resolve_checkpoint(source.path, source.revision)
    chat = None if source.chat is None else chat_settings(source.chat)
    _check_policy(run.config, directory, chat, paths)
    settings = PolicySettings(sha256=tree_digest(directory), chat=chat)
    return run.step("policy", "policy@0", settings, location={"path": str(directory)})


def _check_policy(
    config: Config, directory: Path, chat: dict[str, Any] | None, sets: dict[str, Path]
) -> None:
    """Refuse settings that contradict the checkpoint before the first step that needs it."""
    check_rendering(directory, chat, sets)
    if lora := config.training.lora:
        check_targets(directory, lora.targets)
