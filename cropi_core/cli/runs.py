"""``cropi runs``: list runs, their space and cost; follow one, its accuracy, a note; log one to a tracker; remove."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cropi_core.cli import following as cli_following
from cropi_core.cli.output import DEFAULT_ROOT, AsJson, Root, print_json, print_table, say
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.formatting import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cropi_core.artifacts import Store
    from cropi_core.runs import SlotSummary
    from data_schemas import RunRecord

app = typer.Typer(
    help="List the runs of a root, newest last; follow one, show its accuracy, note something; remove runs.",
    rich_markup_mode=None,
    invoke_without_command=True,
)
app.command()(cli_following.follow)


@app.callback()
def runs(
    context: typer.Context,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="List the space of each run's artifacts, by kind.")
    ] = False,
    costs: Annotated[
        bool, typer.Option("--costs", help="List the tokens and seconds of each run, by purpose.")
    ] = False,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help="Only runs in this state, such as Failed; repeatable."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only runs whose id contains this text.")
    ] = None,
    note: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only runs whose note contains this text, in any case.")
    ] = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """List the runs of a root, newest last."""
    if context.invoked_subcommand is not None:
        for option in ("sizes", "costs", "state", "name", "note", "root", "as_json"):
            source = context.get_parameter_source(option)
            if source is not None and source.name == "COMMANDLINE":
                raise ConfigError(
                    f"an option stands before {context.invoked_subcommand!r}, which would not see it: "
                    f"write cropi runs {context.invoked_subcommand} ... --root DIR"
                )
        return
    from cropi_core.artifacts import Store

    store = Store(root)
    if sizes:
        if state or name or note or costs:
            raise ConfigError(
                "--sizes lists all runs; it does not go with --costs, --state, --name and --note"
            )
        _list_sizes(store, as_json)
    elif costs:
        if note:
            raise ConfigError("--costs does not go with --note; choose runs by --state and --name")
        _list_costs(store, _parse_states(state or []), name or "", as_json)
    else:
        _list_runs(store, _parse_states(state or []), name or "", note or "", as_json)


def _parse_states(names: list[str]) -> set[str]:
    """Return the states with these names, in any case; empty for every state.

    Raises:
        ConfigError: A name is not a state.
    """
    from cropi_core.runs import STATES

    spellings = {word.lower(): word for word in (*STATES.values(), "damaged")}
    if wrong := [name for name in names if name.lower() not in spellings]:
        raise ConfigError(f"--state {wrong[0]}: there are {', '.join(spellings.values())}")
    return {spellings[name.lower()] for name in names}


def _list_runs(store: "Store", states: set[str], name: str, note: str, as_json: bool) -> None:
    rows = [row for row in _rows(store, name) if not states or row["state"] in states]
    rows = [row for row in rows if note.lower() in row["note"].lower()]
    if as_json:
        print_json(rows)
        return
    names = ["run", "state", "stages", "scores", "artifacts", "started", "finished", "error"]
    names += ["note"] if any(row["note"] for row in rows) else []
    shown = [
        row if row["stages_done"] is None else {**row, "stages": f"{row['stages_done']}/{row['stages']}"}
        for row in rows
    ]
    print_table(names, [[row[column] for column in names] for row in shown])


def _records(store: "Store", name: str) -> "Iterator[tuple[str, RunRecord | ArtifactError]]":
    """Yield the runs whose id contains a text, with their records, or why a record cannot be read."""
    from cropi_core.runs import list_runs, load_run

    for run in [run for run in list_runs(store) if name in run]:
        try:
            record = load_run(store, run)
        except ArtifactError as error:
            record = error
        yield run, record


def _rows(store: "Store", name: str) -> list[dict[str, Any]]:
    from cropi_core.runs import read_note, state_name

    rows: list[dict[str, Any]] = []
    noted = {one.removesuffix(".note") for one in store.names("runs") if one.endswith(".note")}
    for run, record in _records(store, name):
        note = read_note(store, run) if run in noted else ""
        if isinstance(record, ArtifactError):
            lost = dict.fromkeys(("stages_done", "stages", "scores", "artifacts", "started", "finished"))
            rows.append(
                {
                    "run": run,
                    "status": "damaged",
                    "state": "damaged",
                    **lost,
                    "error": str(record),
                    "note": note,
                }
            )
            continue
        finished = sum(slot.startswith("policy@") and slot != "policy@0" for slot in record.slots)
        rows.append(
            {
                "run": record.run,
                "status": record.status,
                "state": state_name(store, record),
                "stages_done": finished,
                "stages": record.config.get("stages"),
                "scores": next((c.verdict.grade for c in reversed(record.checks) if c.verdict), None),
                "artifacts": len(record.slots),
                "started": record.started,
                "finished": record.finished,
                "error": record.error,
                "note": note,
            }
        )
    return rows


def _list_sizes(store: "Store", as_json: bool) -> None:
    from cropi_core.runs import run_spaces
    from data_schemas import KINDS

    spaces = run_spaces(store)
    if as_json:
        print_json([{"run": s.run, "bytes": s.total, "alone": s.alone, "kinds": s.kinds} for s in spaces])
        return
    kinds = [kind for kind in KINDS if any(kind in space.kinds for space in spaces)]
    rows = [
        [s.run, human_bytes(s.total), human_bytes(s.alone), *[human_bytes(s.kinds.get(k, 0)) for k in kinds]]
        for s in spaces
    ]
    print_table(("run", "all", "of it alone", *kinds), rows)


def _list_costs(store: "Store", states: set[str], name: str, as_json: bool) -> None:
    """List what the runs' selection, training and evaluation cost; artifacts that no longer exist do not count."""
    from cropi_core.runs import selection_in_steps, spending, state_name

    rows: list[dict[str, Any]] = []
    for run, record in _records(store, name):
        if isinstance(record, ArtifactError) or (states and state_name(store, record) not in states):
            continue
        slots = _slots(store, record)
        steps = selection_in_steps(slots)
        rows += [
            {
                "run": run,
                "purpose": purpose,
                **vars(cost.tokens),
                "token_forwards": cost.tokens.forwards,
                "seconds": round(cost.seconds, 3),
                "in_training_steps": round(steps[1], 1) if steps and purpose == "selection" else None,
            }
            for purpose, cost in spending(slots).items()
        ]
    if as_json:
        print_json(rows)
        return
    header = (
        "run",
        "purpose",
        "generated",
        "forward and backward",
        "forward only",
        "seconds",
        "in training steps",
    )
    columns = ("run", "purpose", "generated", "passed", "forward", "seconds", "in_training_steps")
    print_table(header, [["" if row[c] is None else _thousands(row[c]) for c in columns] for row in rows])


def _thousands(value: object) -> str:
    """Format counts with separators."""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _slots(store: "Store", record: "RunRecord") -> "list[SlotSummary]":
    """Summarise the artifacts of a run that the store still has."""
    from cropi_core.runs import slot_summaries

    manifests = {}
    for slot, entry in record.slots.items():
        with suppress(ArtifactError):
            manifests[slot] = store.manifest(entry.ref.key)
    return slot_summaries(record, manifests)


@app.command()
def accuracy(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, as `cropi runs` lists it.")],
    parts: Annotated[
        bool, typer.Option("--parts", help="Also by source and by level, and pass@k if it was estimated.")
    ] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show the accuracy of a run on every set, before the first stage and after each, with 95 % intervals."""
    from cropi_core.runs import Run, accuracy_grid, detail_grid

    opened = Run(run, root)
    rows, details = opened.accuracy(), opened.details() if parts else []
    if as_json:
        print_json({"accuracy": [vars(row) for row in rows], "details": [vars(row) for row in details]})
        return
    if not rows:
        say(f"no policy of run {run} has been evaluated")
        return
    print_table(*accuracy_grid(rows))
    if parts:
        say()
        if details:
            print_table(*detail_grid(details))
        else:
            say(
                "its evaluations state no parts: every set has one source and level, or they are of an older version"
            )


@app.command()
def note(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run.")],
    text: Annotated[
        str | None, typer.Argument(help="One line of at most 500 characters; empty quotes remove the note.")
    ] = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Attach a note to a run, or show it; `cropi runs`, the report and `cropi compare` have it."""
    from cropi_core.artifacts import Store
    from cropi_core.runs import load_run, read_note, write_note

    store = Store(root)
    if text is None:
        load_run(store, run)
        found = read_note(store, run)
    else:
        found = write_note(store, run, text)
    if as_json:
        print_json({"run": run, "note": found})
    else:
        say(found or f"run {run} has no note")


@app.command()
def log(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a finished run.")],
    tracker: Annotated[str, typer.Option(help="mlflow, wandb or trackio.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="Directory of the tracker's data, default trackers/TRACKER; for MLflow also an address.",
        ),
    ] = None,
    project: Annotated[str, typer.Option(help="Project, or experiment of MLflow.")] = "cropi",
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Log a finished run to a tracker, once: metrics, costs, selections, report and lineage.

    Files of this machine are written and nothing is sent, unless --to is the address of an MLflow server.
    """
    from cropi_core.artifacts import Store
    from cropi_core.trackers import log_run

    logged = log_run(Store(root), run, tracker, to=to, project=project)  # pyright: ignore[reportArgumentType] - checked
    if as_json:
        print_json(vars(logged))
        return
    state = "logged" if logged.new else "was logged before, nothing was written"
    say(f"{run}: {state}; {logged.tracker} run {logged.id} in {logged.where}")
    for note in logged.notes:
        say(note)
    say(f"show or send it: {logged.show}")


@app.command()
def rm(
    names: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Ids of runs.")] = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Runs that ended at least this long ago.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="All runs but the N that ended last.")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only failed, crashed and cancelled runs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them.")] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """List the runs that names or rules choose; remove their records and reports with --yes.

    Artifacts stay until `cropi artifacts gc --yes`. Several rules hold together. A run in progress is not removed.
    """
    from cropi_core.artifacts import Store
    from cropi_core.runs import in_progress, remove_run, state_name, unnamed

    store = Store(root)
    records = _readable(store)
    states = {run: state_name(store, record) for run, record in records.items()}
    chosen = _chosen(records, states, names or [], older_than, keep, failed)
    if missing := [run for run in chosen if run not in records]:
        raise ArtifactError(
            f"no run {missing[0]!r} with a readable record under {store.url}; `cropi runs` lists the runs"
        )
    if alive := [run for run in chosen if in_progress(store, run)]:
        raise ArtifactError(f"run {alive[0]} is in progress; cancel it or wait for its end, then remove it")
    freed = set(unnamed(store, ignoring=chosen)) - set(unnamed(store))
    size = sum(sum(entry.size for entry in store.manifest(key).files) for key in freed)
    if yes:
        for run in chosen:
            remove_run(store, run)
    if as_json:
        print_json({"removed": yes, "runs": chosen, "artifacts": sorted(freed), "bytes": size})
        return
    print_table(
        ("run", "state", "ended"), [(run, states[run], records[run].finished or "") for run in chosen]
    )
    outcome = "removed" if yes else "nothing was removed, --yes does"
    say(f"{len(chosen)} runs: {outcome}")
    say(
        f"{len(freed)} artifacts, {human_bytes(size)}, are of no other run or tag: `cropi artifacts gc` lists them"
    )


def _readable(store: "Store") -> "dict[str, RunRecord]":
    from cropi_core.runs import list_runs, load_run

    records = {}
    for run in list_runs(store):
        try:
            records[run] = load_run(store, run)
        except ArtifactError as error:
            # Its artifacts are unknown, so nothing can be said about what a removal frees.
            raise ArtifactError(f"{error}. Runs cannot be removed before") from error
    return records


def _chosen(
    records: "dict[str, RunRecord]",
    states: dict[str, str],
    names: list[str],
    older_than: float | None,
    keep: int | None,
    failed: bool,
) -> list[str]:
    from cropi_core.runs import ENDED, UNSUCCESSFUL, expired

    ruled = older_than is not None or keep is not None or failed
    if bool(names) == ruled:
        raise ConfigError("name runs, or give a rule: --older-than DAYS, --keep N, --failed; not both")
    if names:
        return list(dict.fromkeys(names))
    wanted = UNSUCCESSFUL if failed else ENDED
    return expired(
        [record for run, record in records.items() if states[run] in wanted],
        ended_before=None if older_than is None else datetime.now(UTC) - timedelta(days=older_than),
        keep=keep or 0,
    )
