"""``cropi artifacts``: list, show, verify, tag and collect artifacts; import and export are in exchange.py."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from cropi_core.artifacts import Store, leftovers
from cropi_core.cli.output import (
    DEFAULT_ROOT,
    AsJson,
    Key,
    Root,
    print_json,
    print_summary,
    print_table,
    say,
)
from cropi_core.errors import ArtifactError, ConfigError
from cropi_core.formatting import age, human_bytes
from cropi_core.runs import ancestors, descendants, load_run, resolve_key, unnamed, unsuccessful, uses
from cropi_core.visible import for_terminal
from data_schemas import Manifest

app = typer.Typer(
    help="Artifacts: list, show, verify, import, export, name, collect.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _size(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files)


@app.command("ls")
def list_artifacts(
    kind: Annotated[str | None, typer.Argument(help="Only this kind.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Only those of this run.")] = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """List the artifacts, oldest first: the slot and the run that use each, its size, and its age."""
    from data_schemas import KINDS

    if kind is not None and kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    store = Store(root)
    names: dict[str, list[str]] = {}
    for tag, key in store.tags().items():
        names.setdefault(key, []).append(tag)
    used = uses(store)
    if run is not None:
        load_run(store, run)
    rows: list[dict[str, Any]] = []
    for key in store.keys(kind):
        artifact_uses = [use for use in used.get(key, []) if run in (None, use.run)]
        if run is not None and not artifact_uses:
            continue
        row: dict[str, Any] = {"key": key, "tags": sorted(names.get(key, []))}
        row["uses"] = [{"run": use.run, "slot": use.slot, "set": use.set} for use in artifact_uses]
        try:
            manifest = store.manifest(key)
        except ArtifactError as error:
            rows.append({**row, "fault": str(error)})  # one damaged artifact must not hide the others
            continue
        row |= {"step": manifest.step, "created": manifest.created, "bytes": _size(manifest)}
        rows.append({**row, "seconds": manifest.seconds, "summary": manifest.summary})
    if as_json:
        print_json(rows)
        return
    print_table(("key", "made by", "slot", "run", "age", "size", "tags"), [_listed(row) for row in rows])


def _age(created: str | None) -> str:
    """Format the time since a manifest was written; a dash for a time that cannot be read."""
    try:
        return age((datetime.now(UTC) - datetime.fromisoformat(created or "")).total_seconds())
    except (ValueError, TypeError):  # not a time, or one without a zone
        return "–"


def _listed(row: dict[str, Any]) -> tuple[str, ...]:
    """Build the row of an artifact in the table: its latest use, and how many runs more use it."""
    artifact_uses = row["uses"]
    runs = list(dict.fromkeys(use["run"] for use in artifact_uses))
    suffix = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return (
        row["key"],
        row.get("step", "damaged"),
        artifact_uses[-1]["slot"] if artifact_uses else "",
        f"{runs[-1]}{suffix}" if runs else "",
        _age(row.get("created")),
        human_bytes(row.get("bytes", 0)),
        " ".join(row["tags"]),
    )


@app.command()
def show(key: Key, root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Show an artifact's manifest: settings, inputs, files, summary."""
    store = Store(root)
    manifest = store.manifest(resolve_key(store, key))
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    fields = manifest.model_dump(mode="json", exclude={"files", "inputs"})
    fields["inputs"] = {name: ref.key for name, ref in manifest.inputs.items()}
    fields["files"] = f"{len(manifest.files)} files, {human_bytes(_size(manifest))}"
    fields["path"] = store.where(manifest.key)
    print_summary(fields, as_json=False)


@app.command()
def card(key: Key, root: Root = DEFAULT_ROOT) -> None:
    """Write the card of a set of prompts as Markdown: its sources, and what was dropped."""
    from cropi_core.prompts import data_card

    store = Store(root)
    manifest = store.manifest(resolve_key(store, key))
    if manifest.kind != "prompts":
        raise ConfigError(f"{manifest.key} is of kind {manifest.kind}; cards are of prompts")
    typer.echo(for_terminal(data_card(manifest)), nl=False)


@app.command()
def lineage(
    key: Key,
    down: Annotated[bool, typer.Option("--down", help="Show what was made from it instead.")] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Show the artifacts that an artifact was made from, or those made from it."""
    store = Store(root)
    key = resolve_key(store, key)
    manifests = descendants(store, key) if down else ancestors(store, key)
    if as_json:
        inputs = [{name: ref.key for name, ref in m.inputs.items()} for m in manifests]
        pairs = zip(manifests, inputs, strict=True)
        print_json([{"key": m.key, "kind": m.kind, "step": m.step, "inputs": i} for m, i in pairs])
        return
    from rich.console import Console
    from rich.tree import Tree

    edges: dict[str, list[tuple[str, str]]] = {m.key: [] for m in manifests}
    for manifest in manifests:
        for name, ref in manifest.inputs.items():
            if down and ref.key in edges:
                edges[ref.key].append((name, manifest.key))
            elif not down:
                edges[manifest.key].append((name, ref.key))
    tree, shown = Tree(key), {key}

    def grow(branch: Tree, parent: str) -> None:
        for name, child in edges[parent]:
            # Expand each artifact once: every stage refers to the policy before it several times.
            note = " (above)" if child in shown else "" if child in edges else " (no longer here)"
            twig = branch.add(for_terminal(f"{'as ' if down else ''}{name}: {child}{note}"))
            shown.add(child)
            if not note:
                grow(twig, child)

    grow(tree, key)
    Console(soft_wrap=True, markup=False, highlight=False).print(tree)


@app.command()
def diff(
    one: Annotated[
        str, typer.Argument(help="A selection: key, tag or RUN:slot, as in demo-1a2b3c4d:selection@1.")
    ],
    other: Annotated[str, typer.Argument(help="Another selection.")],
    top: Annotated[
        int, typer.Option(min=0, help="Number of added, and of removed, prompts that are listed.")
    ] = 10,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Compare two selections: overlap, rank correlation, added and removed prompts (JSON lists all of them)."""
    from cropi_core.analysis import selection_diff

    difference = selection_diff(Store(root), one, other)
    if as_json:
        print_json(difference.as_json())
        return
    correlation = "none" if difference.spearman is None else f"{difference.spearman:.3f}"
    rows = [
        ("pools", f"{difference.pools[0]} and {difference.pools[1]} prompts, {difference.common} in common"),
        ("selected", f"{difference.selected[0]} and {difference.selected[1]}, {difference.both} in common"),
        ("Jaccard index", "none" if difference.jaccard is None else f"{difference.jaccard:.3f}"),
        ("rank correlation", f"{correlation} (Spearman, of {difference.scored} prompts scored in both)"),
    ]
    print_table(("what", "value"), rows)
    for word, moved in (("came", difference.added), ("went", difference.removed)):
        say(f"\n{len(moved)} {word}" + (f", the best {top}:" if len(moved) > top else ""))
        if moved[:top]:
            columns = ("prompt", "source", "level", "rank before", "after")
            lines = [(m.prompt_id, m.source, m.level, m.before, m.after) for m in moved[:top]]
            print_table(columns, lines)


@app.command()
def verify(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, tags or RUN:slot; default: all.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Set damaged artifacts aside.")] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Compare artifacts with their manifests byte by byte; exit with 1 if one is damaged."""
    store = Store(root)
    rows = []
    for key in [resolve_key(store, name) for name in keys] if keys else _directories(store):
        try:
            faults, moved = store.audit(key, repair=repair)
        except ArtifactError as error:
            rows.append({"key": key, "faults": [str(error)], "set_aside": None})
            continue  # another schema version, not damaged: never set aside
        rows.append({"key": key, "faults": faults, "set_aside": moved})
    damaged = [row for row in rows if row["faults"]]
    if as_json:
        print_json(rows)
    else:
        for row in damaged:
            say(f"{row['key']}: " + "; ".join(row["faults"]))
            if row["set_aside"]:
                say(f"  set aside as {row['set_aside']}; the next run computes it again")
        say(f"{len(rows) - len(damaged)} of {len(rows)} artifacts are whole")
    if damaged:
        raise typer.Exit(1)


def _directories(store: Store) -> list[str]:
    """List every artifact directory, including those without a manifest."""
    from data_schemas import KINDS

    lost = [p.name for kind in KINDS for p in sorted((store.root / kind).glob(f"{kind}-v*"))]
    stored = store.keys()
    return stored + [key for key in lost if key not in stored]


@app.command()
def tag(name: str, key: Key, root: Root = DEFAULT_ROOT) -> None:
    """Tag an artifact; tagged artifacts are never collected."""
    store = Store(root)
    store.tag(name, resolve_key(store, key))


@app.command()
def untag(name: str, root: Root = DEFAULT_ROOT) -> None:
    """Remove a tag; the artifact stays until it is collected."""
    store = Store(root)
    say(f"{store.untag(name)} no longer has the tag {name}")


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Delete them.")] = False,
    age: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="HOURS",
            help="At an address, and for unfinished work: only what has not changed for this long.",
        ),
    ] = 24.0,
    cache: Annotated[
        bool, typer.Option("--cache", help="At an address: only copies on this machine, down to --keep-gb.")
    ] = False,
    keep_gb: Annotated[
        float,
        typer.Option(min=0, metavar="GB", help="With --cache: size of the latest copies that are kept."),
    ] = 0.0,
    failed: Annotated[
        bool,
        typer.Option("--failed", help="Also artifacts that only failed, crashed and cancelled runs use."),
    ] = False,
    unfinished: Annotated[
        bool,
        typer.Option("--unfinished", help="Also unfinished work of steps, and damaged artifacts set aside."),
    ] = False,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """List the artifacts that no run and no tag refers to; delete them with --yes."""
    store = Store(root)
    if cache and (failed or unfinished):
        raise ConfigError("--cache is of copies on this machine; --failed and --unfinished do not go with it")
    if cache:
        if store.remote is None:
            raise ConfigError(f"--cache: {store.url} is a directory and has no cache; run gc without it")
        from cropi_core.artifacts import evict

        evicted = evict(store, keep_gb * 1e9, delete=yes)
        collected("copies", [{"key": copy.path.name, "bytes": copy.size} for copy in evicted], yes, as_json)
        return
    rows = []
    for key in unnamed(store, ignoring=unsuccessful(store) if failed else ()):
        # Another machine's run refers to an artifact shortly after it appears.
        if store.remote and store.remote.written(key) > time.time() - age * 3600:
            continue
        try:
            size = _size(store.manifest(key))
        except ArtifactError:
            continue  # damaged: `verify` reports it and sets it aside; it is not deleted here
        rows.append({"key": key, "bytes": size})
        if yes:
            with store.claim(key):
                store.discard(key)
    for place, size in store.remote.remnants(age * 3600).items() if store.remote else ():
        rows.append({"key": place, "bytes": size})
        if yes and store.remote:
            store.remote.objects.clear(place)
    if unfinished:
        sizes = leftovers(store, age * 3600, delete=yes).items()
        rows += [{"key": name, "bytes": size} for name, size in sizes]
    collected("artifacts", rows, yes, as_json)


def collected(what: str, rows: list[dict[str, Any]], deleted: bool, as_json: bool) -> None:
    """Print what was collected, or would be collected."""
    total = sum(row["bytes"] for row in rows)
    if as_json:
        print_json({"deleted": deleted, what: rows, "bytes": total})
        return
    print_table(("key", "size"), [(row["key"], human_bytes(row["bytes"])) for row in rows])
    outcome = "deleted" if deleted else "nothing was deleted, --yes does"
    say(f"{len(rows)} {what}, {human_bytes(total)}: {outcome}")
