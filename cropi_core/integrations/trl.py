"""For TRL's trainers: a dataset that follows a selection, and a callback that collects features while they train.

from cropi_core.integrations.trl import InfluenceCallback, selected_dataset

dataset = selected_dataset("chosen", root="/data/cropi")
trainer = GRPOTrainer(model, reward_funcs=correct, args=config, train_dataset=dataset)
callback = InfluenceCallback(trainer, "features")
trainer.add_callback(callback)
trainer.train()
trainer.save_model("trained")
callback.write("trained.zarr", policy="trained")
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset

from cropi_core.artifacts import Store
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.exporting import selected_prompts
from cropi_core.policy import Checkpoint
from cropi_core.prompts import TRL_SCHEMA, trl_record
from cropi_core.runs import list_runs, load_run, resolve_key
from cropi_core.training import FeatureCollector
from data_schemas import Layers, Objective, Projection, Slot


def selected_dataset(name: str, root: Path | str = ".cropi") -> IterableDataset:
    """Return a dataset that reads the newest selection of ``name`` at the beginning of every pass.

    The rows are those of ``cropi artifacts export --format trl``, in the order of their rank: ``prompt``, ``solution``,
    ``prompt_id`` and so on. A trainer that runs while new selections are made follows them from one pass to the next;
    within a pass nothing changes. ``max_steps`` of the trainer must be set, because a dataset that is read as a stream
    has no length.

    Args:
        name: A tag, which may be moved to another selection; a run, whose newest selection is meant; a key, or
            ``RUN:selection@m``.
        root: Directory or address of the artifacts.

    Raises:
        ArtifactError: The selection does not exist, or is not a selection.
    """
    store = Store(root)
    _newest(store, name)  # a wrong name is an error now, not in the first step
    return IterableDataset.from_generator(
        _rows, features=Features.from_arrow_schema(TRL_SCHEMA), gen_kwargs={"root": store.url, "name": name}
    )


def _rows(root: str, name: str) -> Iterator[dict[str, Any]]:
    """Read the newest selection and yield its rows: one pass."""
    store = Store(root)
    manifest = store.manifest(_newest(store, name))
    pool = store.manifest(manifest.inputs["prompts"])
    for row in selected_prompts(store, manifest, pool):
        record = trl_record(row)
        yield {column: record.get(column) for column in TRL_SCHEMA.names}


def _newest(store: Store, name: str) -> str:
    """Return the key of the newest selection that ``name`` means now."""
    if name in list_runs(store) and name not in store.tags():
        slots = [Slot.parse(slot) for slot in load_run(store, name).slots]
        stages = [slot.stage or 0 for slot in slots if slot.kind == "selection"]
        if not stages:
            raise ArtifactError(f"run {name} has no selection yet; wait for its first, or name another run")
        name = f"{name}:selection@{max(stages)}"
    manifest = store.manifest(resolve_key(store, name))
    if manifest.kind != "selection" or "prompts" not in manifest.inputs:
        raise ArtifactError(
            f"{name} is {manifest.key}, which is not a selection that a run made; name a run, or a tag of its selection"
        )
    return manifest.key


class InfluenceCallback(FeatureCollector):
    """Collects a feature of every group that TRL's ``GRPOTrainer`` trains on, from the passes of the training.

    The features are those that ``cropi gradients`` computes for the same completions. :meth:`write` makes a gradient
    store of them, which ``cropi scores`` compares with the gradients of validation sets under the trained policy, so
    that a choice among these prompts needs no further pass over them. The loss, the gradients and the optimizer steps
    are not changed.
    """

    def __init__(
        self,
        trainer: Any,
        directory: Path | str,
        *,
        projection: Projection = Projection(),
        layers: Layers = "all",
        objective: Objective | None = None,
    ) -> None:
        """Surround the methods of a trainer, before it trains.

        Args:
            trainer: The trainer. Its dataset has the column ``prompt_id``.
            directory: Directory of the features until :meth:`write`: a file for each pass over a generation batch.
            projection: Kind, size and seed of the projection, as for the gradients that the features are compared with.
            layers: Layers whose gradients are projected.
            objective: Objective of the gradients that the features are compared with; None takes the trainer's loss.

        Raises:
            ConfigError: Features cannot be collected with the settings of the trainer, or its loss is not that of
                ``objective``.
        """
        super().__init__(trainer, projection, Path(directory), layers, _prompt_id)
        scaled = trainer.scale_rewards != "none"
        self.objective = objective or Objective(loss_type=trainer.loss_type, scale_rewards=scaled)
        given = self.objective.loss_type, self.objective.scale_rewards
        if given != (trainer.loss_type, scaled):
            raise ConfigError(
                f"objective has loss_type={given[0]} and scale_rewards={given[1]}, and the trainer has "
                f"loss_type={trainer.loss_type} and scale_rewards={trainer.scale_rewards}. Make them equal"
            )

    def write(self, out: Path | str, policy: Path | str) -> dict[str, Any]:
        """Write the newest feature of every prompt as a gradient store, and the table of all groups next to it.

        Args:
            out: The store, such as ``trained.zarr``; the table is ``trained.parquet``.
            policy: Checkpoint of the trained policy. The features count as its features, although each is of the policy
                a few steps before; the table has the steps.

        Returns:
            Summary: number of prompts, groups and groups with a gradient, and the median cosine of two groups of one
            prompt that follow each other.

        Raises:
            DataError: The trainer has not finished a step.
        """
        digest = Checkpoint(Path(policy)).content_digest()
        out = Path(out)
        return self.gather(out, out.with_suffix(".parquet"), self.objective, digest)


def _prompt_id(row: Mapping[str, Any]) -> str:
    if "prompt_id" not in row:
        raise ConfigError(
            f"a row of the trainer's dataset has the columns {', '.join(sorted(row))} and not prompt_id, so its "
            "feature has no name. Add the column, or use selected_dataset"
        )
    return str(row["prompt_id"])
