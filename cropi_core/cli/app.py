"""The command line ``cropi`` without an orchestrator; ``flows.command.app`` adds ``run`` and ``serve``.

    cropi gradients --policy DIR --rollouts PATH --out OUT.zarr -o projection.kind=none
    cropi scores --train A.zarr --validation gsm8k=B.zarr --out scores.parquet
    cropi artifacts ls
    python -m cropi_core doctor

Exit codes: 0 success, 1 failure, 2 wrong command or configuration, 130 interrupted. Large packages are imported only by
the commands that need them, so that help and listings appear at once.
"""

import io
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from cropi_core.cli import analysis as cli_chosen
from cropi_core.cli import artifacts as cli_artifacts
from cropi_core.cli import exchange as cli_exchange
from cropi_core.cli import plan as cli_plan
from cropi_core.cli import runs as cli_runs
from cropi_core.cli import steps as cli_steps
from cropi_core.cli import verify_rewards as cli_verify_rewards
from cropi_core.cli.output import DEFAULT_ROOT, AsJson, Root, print_json, print_table, say
from cropi_core.errors import CropiError, outer_error
from cropi_core.system import Channel, guard_logs, ignore_working_directory, masked_values

app = typer.Typer(
    name="cropi",
    help="Curriculum reinforcement learning with off-policy influence guidance.",
    no_args_is_help=True,
    # Tracebacks are for developers and stay plain; an error that a user can cause is one message, see main().
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cli_steps.add_to(app)
app.command()(cli_plan.plan)
app.command()(cli_chosen.chosen)
app.command()(cli_chosen.compare)
app.command("verify-rewards")(cli_verify_rewards.verify_rewards)
cli_exchange.add_to(cli_artifacts.app)
app.add_typer(cli_artifacts.app, name="artifacts")
app.add_typer(cli_runs.app, name="runs")


def main() -> None:
    """Run the command line and exit with its code."""
    prepare_process()
    try:
        app(prog_name="cropi")
    except CropiError as error:
        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception as error:
        if (text := outer_error(error)) is None:
            raise
        say(f"error: {text}", err=True)
        sys.exit(1)


def prepare_process() -> None:
    """Prepare the process of a command before it imports or prints anything foreign."""
    ignore_working_directory()
    guard_logs()
    write_anything()


def write_anything() -> None:
    """Write characters that the terminal's encoding lacks as escapes, so that they cannot end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@app.command(hidden=True)
def step(
    root: Root = DEFAULT_ROOT,
    claimed: Annotated[bool, typer.Option(help="The starting process holds the claim.")] = False,
) -> None:
    """Run one step: read its spec as JSON from stdin, write progress and errors as messages to stdout."""
    from pydantic import ValidationError

    from cropi_core.artifacts import Store
    from cropi_core.curriculum import run_step
    from data_schemas import StepSpec

    channel = Channel.of_stdout()

    def send(message: dict[str, Any]) -> None:
        channel.send(masked_values(message))

    try:
        spec = StepSpec.model_validate_json(sys.stdin.read())
        result = run_step(spec, Store(root), report=lambda p: send({"progress": vars(p)}), claimed=claimed)
    except ValidationError as error:
        send({"error": f"stdin holds no step: {error}"})
        raise typer.Exit(2) from error
    except CropiError as error:
        send({"error": str(error)})
        raise typer.Exit(error.exit_code) from error
    except Exception as error:
        # The parent shows one line; the traceback goes to stderr, which the parent shares.
        send({"error": f"{type(error).__name__}: {error}"})
        say(traceback.format_exc(), err=True)
        raise typer.Exit(1) from error
    send({"result": {"key": result.ref.key, "cached": result.cached, "seconds": result.seconds}})


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(help="A run's id; default: the newest.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: below the root.")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write a self-contained HTML report of a run."""
    from cropi_core.artifacts import Store
    from cropi_core.errors import ConfigError
    from cropi_core.runs import list_runs

    store = Store(root)
    run_ids = list_runs(store)
    if not run_ids:
        raise ConfigError(f"no run under {store.url}; `cropi run` makes one, --root names another root")
    try:
        from cropi_core.report import write_report
    except ImportError as error:
        raise ConfigError(f"reports need more packages ({error}): pip install 'cropi[report]'") from error
    say(write_report(store, run or run_ids[-1], out))


@app.command()
def doctor(root: Root = DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Check the installation and advise what to do; exit with 1 if something required is broken."""
    from cropi_core.cli.doctor import examine

    checks = examine(root)
    if as_json:
        print_json(
            [{"what": c.name, "state": c.state, "found": c.message, "remedy": c.remedy} for c in checks]
        )
    else:
        print_table(
            ("", "what", "found", "what to do"), [(c.state, c.name, c.message, c.remedy) for c in checks]
        )
    if any(check.state == "broken" for check in checks):
        raise typer.Exit(1)
