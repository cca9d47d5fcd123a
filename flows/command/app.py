"""The command `cropi`: the library's commands, and the commands that use Prefect, such as `run` and `serve`.

    cropi run demo --root .cropi -o stages=1
    cropi serve

Only these commands import Prefect; all other commands work without it.
"""

import gc
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from cropi_core.cli import DEFAULT_ROOT, AsJson, Overrides, Root, app, prepare_process
from cropi_core.config import load_config
from cropi_core.errors import ConfigError, CropiError, DeclinedError, outer_error
from cropi_core.system import shown
from data_schemas import Config, PromptFormat, StepName

if TYPE_CHECKING:
    from cropi_core.artifacts import Store

INTERRUPTED = 130
"""Exit code of a command interrupted by Ctrl-C: 128 plus the signal's number."""


@contextmanager
def resumable() -> Iterator[None]:
    """End a command that Ctrl-C interrupts with its exit code, and say that the same command resumes it."""
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command("run")
def run_command(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a preset.")],
    root: Root = DEFAULT_ROOT,
    override: Overrides = None,
    refresh: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Compute this step again; repeatable.")
    ] = None,
    approve: Annotated[
        bool, typer.Option("--approve", help="Ask before each training; y, n, or another ratio.")
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no HTML report.")] = False,
) -> None:
    """Run a curriculum through Prefect, or resume it."""
    settings = load_config(config, override or [])
    steps = checked_steps(refresh or [])
    require_prefect("run")
    from cropi_core.artifacts import Store

    store = Store(root)
    with resumable(), ExitStack() as stack:
        outcome = run_flow(settings, store, steps, stack, quiet=quiet or as_json, approve=approve)
        report = None if no_report else write_html(store, outcome["run"])
    if as_json:
        print(json.dumps(outcome | {"report": str(report) if report else None}, indent=1))
    else:
        show_end(store, outcome["run"], report)


@app.command("select")
def select_command(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a preset.")],
    root: Root = DEFAULT_ROOT,
    override: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to create: the selected prompts, in --format.")
    ] = None,
    layout: Annotated[PromptFormat, typer.Option("--format", help="Format of --out.")] = "hf",
    after: Annotated[
        str | None,
        typer.Option("--continue", metavar="RUN", help="The previous selection, which was trained on."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NEW", help="With --continue: directory, hub id or key of the trained policy."),
    ] = None,
    rollouts: Annotated[
        str | None, typer.Option(help="With --continue: key or tag of rollouts of that policy on the pool.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Select the prompts of a stage for another trainer, without training; or those of the stage after it."""
    settings = load_config(config, override or [])
    require_prefect("select")
    from cropi_core.artifacts import Store
    from cropi_core.curriculum import run_step
    from cropi_core.exporting import export_prompts, last_selection, selecting
    from cropi_core.runs import load_run

    store = Store(root)
    given = {"after": after, "policy": policy, "rollouts": rollouts}
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; nothing is overwritten. Name a directory to make")
    with resumable(), ExitStack() as stack:
        settings = selecting(settings, store, lambda spec: run_step(spec, store), **given)
        outcome = run_flow(settings, store, [], stack, quiet=as_json, approve=False)
    record = load_run(store, outcome["run"])
    name = last_selection(record)
    files = export_prompts(store, name, out, layout) if out is not None else []
    if as_json:
        print(json.dumps(outcome | {"selection": name, "files": [str(path) for path in files]}, indent=1))
        return
    from cropi_core.runs import summarise
    from flows.command.display import show_summary

    show_summary(summarise(record, store.manifest))
    print(shown(f"selection {name}, artifacts under {store.url}"))
    print(
        shown(
            f"written {out}" if out is not None else f"next: cropi artifacts export {name} OUT --format verl"
        )
    )


@app.command("study")
def study_command(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="A YAML file, or the name of a shipped study.")
    ],
    root: Root = DEFAULT_ROOT,
    override: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Curricula that run at the same time; default: one per core."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Run only the first seeds, this many.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(metavar="ARM", help="Run only this arm; repeatable.")
    ] = None,
    tabulate: Annotated[
        bool, typer.Option("--tabulate", help="Run nothing; compare the finished curricula.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(metavar="PAGE.md", help="Write the tables into this page, between its marks."),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Run complete curricula (arms x worlds x seeds) and compare them, or resume the study."""
    from flows.study import compare_study, plan_study, run_study

    require_prefect("study")
    with resumable(), ExitStack() as stack:
        plan = plan_study(study, root, override or [], seeds=seeds, arms=arm or [])
        silent = quiet or as_json
        failures = [] if tabulate else run_study(plan, stack, processes=processes, quiet=silent)
        compare_study(plan, failures, write=write, as_json=as_json)
    raise typer.Exit(1 if failures else 0)


@app.command("serve")
def serve_command(
    root: Root = DEFAULT_ROOT,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of 127.0.0.1.")] = 4200,
) -> None:
    """Run a Prefect server with its UI on this machine, and execute flows on it, until Ctrl-C."""
    require_prefect("serve")
    from flows.serving import serve_flows

    try:
        serve_flows(root, port)
    except KeyboardInterrupt:
        print(
            "Interrupted. Artifacts and runs are kept; run the same command again to resume.", file=sys.stderr
        )
        raise typer.Exit(INTERRUPTED) from None


@app.command("deploy")
def deploy_command() -> None:
    """Register the deployments with the server at PREFECT_API_URL; a worker then executes them."""
    require_prefect("deploy")
    from flows.serving import deploy_all

    raise typer.Exit(deploy_all(lambda text: print(shown(text), file=sys.stderr)))


@app.command("automations")
def automations_command(
    root: Root = DEFAULT_ROOT,
    notify: Annotated[
        str | None,
        typer.Option(metavar="TYPE/NAME", help="Send messages to this notification block of the server."),
    ] = None,
    silence: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Time without a heartbeat until a run is Crashed; default and minimum: three heartbeats (540).",
        ),
    ] = None,
) -> None:
    """Configure Prefect's server to send messages, and to mark runs without a process as Crashed."""
    require_prefect("automations")
    from cropi_core.artifacts import Store
    from flows.serving import check_api, prepare, read_served

    url = prepare(Store(root).root)
    if url is None and (served := read_served(Path(os.environ["PREFECT_HOME"]).expanduser())):
        served.enter()
        url = served.url
    if url is None:
        raise ConfigError(
            f"no server: PREFECT_API_URL names none, and `cropi serve` does not serve {root}; automations are the "
            "server's, so start it first"
        )
    os.environ["PREFECT_API_URL"] = url
    check_api(url)
    from flows.serving import checked_silence, install

    for name in install(notify, checked_silence(silence)):
        print(shown(name))


def checked_steps(names: list[str]) -> list[StepName]:
    """Validate the names of the steps to recompute.

    Raises:
        ConfigError: A name is not a step.
    """
    step_names: tuple[StepName, ...] = get_args(StepName)
    if wrong := [name for name in names if name not in step_names]:
        raise ConfigError(f"--refresh {wrong[0]}: no such step; there are {', '.join(step_names)}")
    return [name for name in step_names if name in names]


def require_prefect(command: str) -> None:
    """Refuse a command that requires Prefect if Prefect is not installed.

    Raises:
        ConfigError: Prefect is not installed.
    """
    if importlib.util.find_spec("prefect") is None:
        raise ConfigError(
            f"`cropi {command}` needs Prefect, which is not installed: pip install 'cropi[flows]'"
        )


def run_flow(
    config: Config, store: "Store", refresh: list[StepName], stack: ExitStack, *, quiet: bool, approve: bool
) -> dict[str, Any]:
    """Run the flow and return the run's summary.

    Args:
        config: Configuration to run.
        store: Artifact store.
        refresh: Steps to recompute.
        stack: Stops the server that is started if the user has not configured one.
        quiet: Show no progress.
        approve: Ask on the terminal before each training.

    Raises:
        DeclinedError: A selection was declined.
    """
    from flows.command.display import watcher
    from flows.serving import has_database, home_without_server, start_server

    view = watcher(quiet=quiet)
    home = home_without_server(store, view.note)
    # Prefect's database shows the finished run already; a server started for nothing would take most of the call.
    if home is not None and has_database(home) and not (refresh or approve):
        from cropi_core.curriculum import repeat_finished
        from cropi_core.runs import summarise
        from flows.command.summary import as_json

        with view.context():
            record = repeat_finished(config, store, view.finished)
        if record is not None:
            return as_json(summarise(record, store.manifest))
    server = None if home is None else start_server(home, stack, view.note)
    # Imported while the server starts.
    from prefect.states import State

    from flows.curriculum import curriculum
    from flows.serving import quiet_console, settle
    from tasks import watched_by

    quiet_console()
    logging.getLogger("cropi_core").setLevel(logging.INFO)
    if server is not None:
        server.wait()
    try:
        with view.context(), watched_by(view):
            state: State[Any] = curriculum(
                config=config, root=store.url, refresh=refresh or None, approve=approve, return_state=True
            )
    finally:
        if server is not None:
            settle()
            server.release()  # the server shuts down while the report is written
    if state.is_cancelled():
        raise DeclinedError(state.message or "the selection was declined")
    return state.result()


def write_html(store: "Store", run: str) -> Path | None:
    """Write the run's HTML report, or print a message if its packages are missing."""
    from cropi_core.report import write_report

    try:
        return write_report(store, run)
    except ImportError as error:
        print(
            shown(f"no report: {error.name} is not installed: pip install 'cropi[report]'"), file=sys.stderr
        )
        return None


def show_end(store: "Store", run: str, report: Path | None) -> None:
    """Print the result tables and the possible next commands."""
    from cropi_core.runs import load_run, summarise
    from flows.command.display import show_summary

    show_summary(summarise(load_run(store, run), store.manifest))
    print(shown(f"run {run}, artifacts under {store.url}"))
    if report:
        print(shown(f"report {report}"))
    again = "or again with -o selection.ratio=0.2 or --refresh scores"
    print(shown(f"next: cropi artifacts ls --root {store.url}; {again}"))


def main() -> None:
    """Run the command line; report user errors as one line on standard error."""
    prepare_process()
    try:
        app(prog_name="cropi")
    except CropiError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if (text := outer_error(error)) is None:
            raise
        print(f"error: {shown(text)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        # There is nothing left to collect, and traversing PyTorch's objects at exit takes a second.
        gc.freeze()


if __name__ == "__main__":
    main()
