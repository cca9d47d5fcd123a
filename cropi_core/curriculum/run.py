"""A run in progress: it passes steps to be executed, and keeps the record of the artifacts it used.

    run = Run(config, store, execute, notify)
    with run.recorded():
        prompts = run.step("prompts", "prompts/pool", settings)

The record is written after every step, so an interruption loses only the step in progress. A slot that the
configuration pins is filled from the store, and no step is executed for it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

from cropi_core.artifacts import Store, is_full
from cropi_core.curriculum.execution import StepResult
from cropi_core.curriculum.packages import check_packages
from cropi_core.curriculum.slots import pin_for, slot_names
from cropi_core.errors import ArtifactError, ConfigError, DeclinedError, WaitingError
from cropi_core.runs import (
    load_run,
    new_run,
    now,
    remove_current,
    resolve_key,
    run_lock,
    save_run,
    write_current,
)
from data_schemas import ArtifactRef, Config, Section, Slot, SlotRecord, StepName, StepSpec

Execute = Callable[[StepSpec], StepResult]


class Run:
    """A run: its configuration, its store, its record, and the function that executes steps."""

    def __init__(self, config: Config, store: Store, execute: Execute, notify: Callable[[str], None]) -> None:
        self.config = config
        self.store = store
        self.execute = execute
        self.notify = notify
        self.record = new_run(config)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep the record up to date inside the block: the progress of the run, and how it ended."""
        self.store.prepare()
        with run_lock(self.store, self.record.run):
            yield from self._recorded()

    def _recorded(self) -> Iterator[None]:
        try:
            filled: set[str] = set()
            with contextlib.suppress(ArtifactError):  # the record does not exist yet, or cannot be read
                before = load_run(self.store, self.record.run)
                self.record.approved.update(before.approved)
                filled |= before.slots.keys()
            self.save()
            self._check_pins()
            check_packages(self.config, filled)
            yield
        except WaitingError as error:
            self._close("waiting", str(error))
            raise
        except BaseException as error:
            # A disk too full for the record, or an unreachable server, must not hide the original error.
            with contextlib.suppress(OSError, ArtifactError):
                self._close(_ending(error), f"{type(error).__name__}: {error}")
            if isinstance(error, OSError) and is_full(error):
                raise self.store.no_space("the run's record") from error
            raise
        self._close("done", None)

    def save(self) -> None:
        """Write the record."""
        save_run(self.store, self.record)

    def _close(self, status: Any, error: str | None) -> None:
        self.record = self.record.model_copy(update={"status": status, "error": error, "finished": now()})
        self.save()
        remove_current(self.store, self.record.run)

    def note(self, text: str) -> None:
        """Add a decision to the record and report it."""
        self.record.notes.append(text)
        self.notify(text)

    def note_warnings(self, slot: str, ref: ArtifactRef) -> None:
        """Add an artifact's own warnings to the notes of the run."""
        summary = self.store.manifest(ref).summary
        warnings = [summary.get("parity", {}).get("warning"), *summary.get("verifier_warnings", [])]
        for warning in filter(None, warnings):
            self.note(f"{slot}: {warning}")

    def step(
        self,
        step: StepName,
        slot: str,
        settings: Section,
        inputs: dict[str, ArtifactRef] | None = None,
        location: dict[str, str] | None = None,
    ) -> ArtifactRef:
        """Fill a slot from its pin, or by executing the step."""
        if pin_for(self.config.pin, slot) is not None:
            return self.pinned(slot)
        spec = StepSpec(
            step=step,
            slot=slot,
            settings=settings.for_key(),
            inputs=inputs or {},
            location=location or {},
            runtime=self.config.runtime.model_dump(mode="json"),
        )
        result = self._execute(spec)
        origin = "cached" if result.cached else "computed"
        return self._fill(slot, SlotRecord(ref=result.ref, origin=origin, seconds=result.seconds))

    def pinned(self, slot: str) -> ArtifactRef:
        """Fill a slot that the configuration pins."""
        key = pin_for(self.config.pin, slot)
        assert key is not None
        return self._fill(slot, SlotRecord(ref=self._resolved(slot, key), origin="pinned"))

    def _fill(self, slot: str, entry: SlotRecord) -> ArtifactRef:
        self.record.slots[slot] = entry
        self.save()
        return entry.ref

    def _execute(self, spec: StepSpec) -> StepResult:
        """Execute a step; note it in the record if a stored artifact was damaged and had to be recomputed."""
        before = set(self.store.damaged())
        if not self.store.has(spec.key):  # a step of seconds or hours; a stored artifact is found at once
            write_current(self.store, self.record.run, spec.slot, spec.key)
        result = self.execute(spec)
        for path in self.store.damaged():
            if path not in before:
                faults = path.with_name(f"{path.name}.txt").read_text(encoding="utf-8").splitlines()
                self.note(
                    f"{spec.slot} was damaged ({'; '.join(faults[:3])}); it was moved to {path} and computed again"
                )
        return result

    def _check_pins(self) -> None:
        """Check every pin before anything runs."""
        names = slot_names(self.config)
        for name, key in self.config.pin.items():
            matches = [slot for slot in names if pin_for({name: key}, slot)]
            if not matches:
                raise ConfigError(f"pin: there is no slot {name!r}; slots are {', '.join(names)}")
            self._resolved(matches[0], key)

    def _resolved(self, slot: str, name: str) -> ArtifactRef:
        """Find a pinned artifact; it must be complete and of the slot's kind, since it cannot be recomputed."""
        ref = self.store.manifest(resolve_key(self.store, name)).ref
        kind = Slot.parse(slot).kind
        if ref.kind != kind:
            raise ConfigError(f"pin {slot}: {ref.key} is of kind {ref.kind}, but the slot needs {kind}")
        self.store.require(ref)
        return ref


def _ending(error: BaseException) -> Literal["failed", "cancelled", "crashed"]:
    """Return how a run ended: declined by a person, failed with an error, or interrupted by a signal."""
    if isinstance(error, DeclinedError):
        return "cancelled"
    return "failed" if isinstance(error, Exception) else "crashed"
