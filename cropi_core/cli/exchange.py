"""``cropi artifacts import``, ``import-log``, ``export`` and ``push``: copy files into the store and out of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cropi_core.artifacts import Store
from cropi_core.cli.output import DEFAULT_ROOT, AsJson, Key, Overrides, Root, print_json, progress_bar, say
from cropi_core.errors import ConfigError
from cropi_core.formatting import human_bytes
from cropi_core.runs import resolve_key
from data_schemas import ArtifactRef, PromptFormat

if TYPE_CHECKING:
    from data_schemas import Sampling

PoolOption = Annotated[
    str | None, typer.Option("--prompts", help="Pool of an imported selection: key, tag or RUN:slot.")
]


def add_to(app: typer.Typer) -> None:
    """Add these commands to ``cropi artifacts``."""
    app.command("import")(import_)
    app.command()(import_log)
    app.command()(export)
    app.command()(push)


def import_(
    kind: Annotated[str, typer.Argument(help="prompts, rollouts, scores, selection or policy.")],
    path: Annotated[Path, typer.Argument(help="Parquet or JSONL file; a policy's directory.")],
    policy: Annotated[
        str | None, typer.Option(help="Rollouts: digest of their policy, or `unknown`.")
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(help="Rollouts: `{samples: 8, temperature: 1.0, top_p: 1.0, max_new_tokens: 512}`."),
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Name for the artifact.")] = None,
    layout: Annotated[
        PromptFormat | None,
        typer.Option("--format", help="Prompts: the format that `artifacts export` wrote them in."),
    ] = None,
    override: Overrides = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Check a file made elsewhere and store it as an artifact; pin its key or tag in a configuration to use it.

    Prompts in another format are mapped with options such as `-o columns.prompt=problem -o verifier=numeric`; rollouts
    of another trainer are read by `import-log`.
    """
    from cropi_core.config import load_sections
    from cropi_core.importing import import_artifact
    from data_schemas import TableSource

    source = None
    if layout is not None:
        if kind != "prompts" or override:
            raise ConfigError("--format reads prompts that were exported in it; no other kind, and no -o")
        from cropi_core.exporting import import_exported

        store = Store(root)
        _filed(store, import_exported(store, path, layout), tag, as_json)
        return
    if override:
        if kind != "prompts":
            raise ConfigError(f"-o describes how prompts are read; {kind} takes no overrides")
        head = ["source.kind=file", f"source.path='{path}'"]
        source = load_sections({"source": TableSource}, head + [f"source.{text}" for text in override])[
            "source"
        ]
    how = None if sampling is None else _stated(sampling)
    store = Store(root)
    ref = import_artifact(store, kind, path, source=source, policy=policy, sampling=how)
    if not as_json:
        for reason, count in store.manifest(ref).summary.get("dropped", {}).items():
            if not count:
                continue
            say(
                f"{'kept' if reason.startswith('kept') else 'dropped'}: {count}, {reason.replace('_', ' ')}",
                err=True,
            )
    _filed(store, ref, tag, as_json)


def import_log(
    layout: Annotated[str, typer.Argument(help="Trainer that wrote the log: verl, trl, prime_rl or cropi.")],
    path: Annotated[Path, typer.Argument(help="A file, or the directory that the trainer wrote.")],
    policy: Annotated[
        str,
        typer.Option(
            help="Checkpoint directory, hub id or `embedded`: the policy that sampled, or is assumed to."
        ),
    ],
    sampling: Annotated[
        str, typer.Option(help="`{samples: 8, temperature: 1.0, top_p: 1.0, max_new_tokens: 512}`.")
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts table, artifact key, tag or RUN:slot: in which the log's prompts are looked up."
        ),
    ] = None,
    reward: Annotated[str | None, typer.Option(help="trl: column of the reward.")] = None,
    on_bad_rows: Annotated[
        Literal["refuse", "drop"],
        typer.Option(help="Refuse a log with faulty rows, or drop these rows and count them."),
    ] = "refuse",
    device: Annotated[str, typer.Option(help="Where log-probabilities are computed.")] = "auto",
    tag: Annotated[str | None, typer.Option(help="Name for the artifact.")] = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Import rollouts from another trainer's log; missing values are computed, and assumptions are reported."""
    from cropi_core.cli.steps import find_policy
    from cropi_core.importing import LogSource, layout_of
    from cropi_core.importing import import_log as import_source

    how, store = _stated(sampling), Store(root)
    table = Path(prompts) if prompts is not None else None
    if prompts is not None and table is not None and not table.is_file():
        table = store.directory(resolve_key(store, prompts)) / "prompts.parquet"
    with progress_bar("import") as report:
        ref = import_source(
            store,
            LogSource(path, layout_of(layout), reward, on_bad_rows),
            policy=find_policy(policy),
            sampling=how,
            prompts=table,
            device=device,
            report=report,
        )
    if not as_json:
        for text in store.manifest(ref).summary["approximations"]:
            say(f"assumed: {text}", err=True)
    _filed(store, ref, tag, as_json)


def _stated(sampling: str) -> "Sampling":
    """Parse how rollouts were sampled; every field is required."""
    from cropi_core.config import load_sections
    from data_schemas import Sampling

    how = load_sections({"sampling": Sampling}, [f"sampling={sampling}"])["sampling"]
    if missing := sorted(set(Sampling.model_fields) - how.model_fields_set):
        raise ConfigError(f"--sampling lacks {', '.join(missing)}: how rollouts were sampled has no defaults")
    return how


def _filed(store: Store, ref: ArtifactRef, tag: str | None, as_json: bool) -> None:
    """Tag an imported artifact and print its key."""
    if tag is not None:
        store.tag(tag, ref.key)
    if as_json:
        print_json({**ref.model_dump(), "tag": tag, "summary": store.manifest(ref).summary})
    else:
        say(ref.key)


def export(
    key: Key,
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    layout: Annotated[
        PromptFormat | None,
        typer.Option("--format", help="Selection or prompts: write the prompts in this format."),
    ] = None,
    prompts: PoolOption = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Verify an artifact and copy its files out of the store, or write its prompts in another trainer's format."""
    store = Store(root)
    if layout is not None:
        from cropi_core.exporting import export_prompts

        files = export_prompts(store, key, out, layout, prompts=prompts)
    elif prompts is not None:
        raise ConfigError("--prompts is the pool of a selection that is exported with --format")
    else:
        from cropi_core.importing import export_artifact

        files = export_artifact(store, resolve_key(store, key), out)
    if as_json:
        print_json([str(path) for path in files])
    else:
        say(f"{len(files)} files in {out}")


def push(
    key: Key,
    repo: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Repository; created if it does not exist.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Create it public, or upload to one that is public.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Send nothing; list what would be sent.")
    ] = False,
    prompts: PoolOption = None,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Upload a selection or prompts as a dataset, or a policy as a model, to a private repository of a hub.

    The account is that of `hf auth login` or HF_TOKEN, the hub that of HF_ENDPOINT. No other command uploads anything.
    """
    from cropi_core.exporting import push_artifact

    pushed = push_artifact(Store(root), key, repo, public=public, dry_run=dry_run, prompts=prompts)
    if as_json:
        print_json(vars(pushed))
        return
    for name, size in pushed.files.items():
        say(f"{human_bytes(size):>10}  {name}")
    visible = "private" if pushed.private else "PUBLIC"
    if dry_run:
        say(f"nothing was sent; without --dry-run: {visible} {pushed.kind} {pushed.repo}, if it is new")
    else:
        state = "created" if pushed.created else "updated"
        say(f"{visible} {pushed.kind} {pushed.repo} {state}: {pushed.url}")
