"""Pages in Prefect's UI, one for each kind of step: figures of the newest artifacts, and one table row per artifact.

    markdown = view("scores", [Shown("scores@1", "cached", manifest, path)])

Pages are built from manifests and small columns of finished artifacts, so cached and computed steps look alike. Names
and prompts are untrusted input: they are escaped in tables and figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cropi_core.artifacts import GRADIENTS, METRICS_FILE, SCORES_FILE
from cropi_core.formatting import percent
from cropi_core.markdown import code, escaped, markdown_table, wide_table
from cropi_core.runs import accuracies, stage_of
from data_schemas import SCORE_FIXED, STATUSES, Manifest, StepName
from tasks.ui.rows import figure, step_rows
from tasks.ui.selection_page import selection_view
from tasks.ui.svg import Point, bars, histogram, lines, picture

KEYS: dict[StepName, str] = {
    step: f"cropi-{step}"
    for step in ("rollouts", "gradients", "scores", "diagnostics", "selection", "training", "evaluation")
}
"""Key of a step's page in the UI."""

MOST_PICTURED = 4
"""Maximum number of prompt sets with figures of their rollouts; the table has all sets."""
NO_FILES = "No figures: this machine found the artifacts and did not download their files."
"""Text on the page of a root on an object store."""
RUN_PAGE = "/artifacts/key/cropi-run"
"""Address of the run's page in the UI."""
MOST_NAMED = 4
"""Most slots that a page's title names."""
DESCRIPTIONS: dict[StepName, str] = {
    "rollouts": "Pass rates, lengths, and completions that are not gradable.",
    "gradients": "Prompts by status, effective sample sizes, norms.",
    "scores": "Distribution, top and bottom.",
    "diagnostics": "Scores compared with those of fresh trajectories.",
    "selection": "Sources, levels, pass rates, and the validation set that ranked each prompt highest.",
    "training": "Reward, KL and completion length over the steps.",
    "evaluation": "Accuracy with 95 % intervals, by stage.",
}
"""Description of the page of each kind of step."""
ENDS = 8
"""Number of prompts listed from the top and from the bottom of the scores."""


@dataclass(frozen=True)
class Shown:
    """One artifact: its slot, how the run obtained it, its manifest, and its directory."""

    slot: str
    origin: str
    manifest: Manifest
    path: Path

    @property
    def summary(self) -> dict[str, Any]:
        """Summary in its manifest."""
        return self.manifest.summary

    @property
    def stage(self) -> int:
        """Stage number in its slot name."""
        return stage_of(self.slot)

    def row(self, *cells: Any) -> list[str]:
        """Build a table row: the slot, then cells that are already escaped, or numbers."""
        return [escaped(self.slot), *[c if isinstance(c, str) else figure(c) for c in cells]]


def view(step: StepName, shown: Sequence[Shown]) -> str:
    """Build the page for the artifacts of one kind of step, given in the order they were made.

    Raises:
        OSError: A file named in a manifest does not exist.
    """
    keys = [
        [escaped(one.slot), one.origin, figure(one.manifest.seconds), code(one.manifest.key)] for one in shown
    ]
    available = all(one.path.exists() for one in pictured(step, shown))
    parts = [
        f"# {escaped(shown[-1].slot)}",
        f"[Pages of runs]({RUN_PAGE}), the newest first",
        *(VIEWS[step](shown) if available else [NO_FILES]),
        markdown_table(["slot", "origin", "seconds", "key"], keys),
    ]
    return "\n\n".join([*parts, f"Files of the last: {code(str(shown[-1].path))}"]) + "\n"


def title(step: StepName, slots: Sequence[str]) -> str:
    """Name the slots on a page, the latest first, and say what the page shows, for the list of artifacts."""
    newest = list(dict.fromkeys(reversed(slots)))
    more = f" and {len(newest) - MOST_NAMED} more" if len(newest) > MOST_NAMED else ""
    return f"{', '.join(newest[:MOST_NAMED])}{more}. {DESCRIPTIONS[step]}"


def pictured(step: StepName, shown: Sequence[Shown]) -> list[Shown]:
    """Return the artifacts whose files a page reads; for the others their manifests are sufficient."""
    if step == "training":
        return list(shown)
    if step == "gradients":
        return [next((one for one in reversed(shown) if one.slot.startswith("gradients/pool")), shown[-1])]
    return [shown[-1]] if step in ("scores", "selection") else []


def _table(columns: str, rows: list[list[str]]) -> str:
    """Build a table of the last 50 rows; the first column is the slot."""
    return wide_table(["slot", *columns.split(" | ")], rows[-50:])


def _rollouts(shown: Sequence[Shown]) -> list[str]:
    newest = {one.slot.partition("@")[0]: one for one in shown}
    parts = []
    for one in list(newest.values())[:MOST_PICTURED]:
        counts = one.summary["pass_rate_histogram"]
        edges = [f"{i / 10:g}" for i in range(11)]
        parts.append(_figure(histogram, f"Prompts by pass rate, {one.slot}", [counts], edges))
        rows = [(name, [rate]) for name, rate in one.summary["pass_rate_by_source"].items()]
        if len(rows) > 1:
            parts.append(_figure(bars, f"Pass rate by source, {one.slot}", rows, percent=True))
        if lengths := one.summary.get("length_histogram"):  # older artifacts have none
            names = [f"{edge}" if i % 4 == 0 else "" for i, edge in enumerate(lengths["edges"])]
            parts.append(_figure(histogram, f"Completions by tokens, {one.slot}", [lengths["counts"]], names))
    for one in newest.values():
        parts += [
            f"**Warning, {escaped(one.slot)}:** {escaped(text)}"
            for text in one.summary.get("verifier_warnings", [])
        ]
    table = []
    for one in shown:
        s, completions = one.summary, max(one.summary["completions"], 1)
        share = percent(s["truncated"] / completions)
        figures = (s["mean_reward"], s["mean_tokens"], share, s["not_gradable"], s["no_variance"])
        table.append(one.row(s["prompts"], s["completions"], *figures))
    columns = "prompts | completions | mean reward | tokens each | truncated | not gradable | no variance"
    return [*parts, _table(columns, table), *_reward_terms(shown), *_parity(shown)]


def _reward_terms(shown: Sequence[Shown]) -> list[str]:
    """Show the mean of each term of rewards that are weighted sums; return nothing if there are none."""
    rows = [
        one.row(escaped(name), mean)
        for one in shown
        for name, mean in one.summary.get("mean_reward_terms", {}).items()
    ]
    return ["**Terms of the reward, before their weights**", _table("verifier | mean", rows)] if rows else []


def _parity(shown: Sequence[Shown]) -> list[str]:
    """Compare another sampler's log-probabilities with a local forward pass; return nothing if there are none."""
    rows = []
    for one in shown:
        if (p := one.summary.get("parity")) is not None:
            limits = f"{figure(p['mean_limit'])} and {figure(p['max_limit'])}"
            differences = (p["mean_difference"], p["max_difference"], limits)
            rows.append(one.row(p["completions"], p["tokens"], *differences, escaped(p["warning"] or "no")))
    if not rows:
        return []
    columns = "completions | tokens | mean difference | largest difference | limits | warning"
    return ["**Log-probabilities of vLLM compared with a forward pass in float32**", _table(columns, rows)]


def _gradients(shown: Sequence[Shown]) -> list[str]:
    from cropi_core.gradients import GradientStore  # imports Zarr

    counts = [(one.slot, [one.summary["status"].get(s, 0) for s in STATUSES]) for one in shown[-12:]]
    parts = [_figure(bars, "Prompts by status", counts, STATUSES, stacked=True)]
    (last,) = pictured("gradients", shown)
    store = GradientStore.open(last.path / GRADIENTS)
    live = store.column("status") == STATUSES.index("ok")
    for name, label in (("norm", "Gradient norm"), ("ess", "Effective sample size")):
        values = store.column(name)[live]
        if len(values):
            parts.append(_figure(histogram, f"{label}, {last.slot}", *_binned(values)))
    table = []
    for one in shown:
        s = one.summary
        share = percent(s["median_ess_share"], 0)
        live = f"{s['status'].get('ok', 0)} of {s['prompts']}"
        table.append(one.row(live, s["median_ess"], share, s["median_norm"], s["kl"], s["max_ratio"]))
    columns = "with gradient | median ESS | of the samples | median norm | KL | largest ratio"
    return [*parts, _table(columns, table)]


def _scores(shown: Sequence[Shown]) -> list[str]:
    last, parts = shown[-1], []
    with pq.ParquetFile(last.path / SCORES_FILE) as file:
        sets = [name for name in file.schema_arrow.names if name not in SCORE_FIXED]
        scored = file.read(columns=["prompt_id", "score", "rank", "mean_reward", "grad_norm", *sets])
    scored = scored.filter(scored["rank"].is_valid()).sort_by("rank")
    if scored.num_rows:
        parts.append(_figure(histogram, f"Score, {last.slot}", *_binned(scored["score"].to_numpy())))
        for name in sets[:MOST_PICTURED]:
            values = scored[name].drop_null().to_numpy()
            parts.append(_figure(histogram, f"Influence on {name}, {last.slot}", *_binned(values)))
    header = ["rank", "prompt", "score", *[escaped(name) for name in sets], "pass rate", "gradient norm"]
    names = ["score", *sets, "mean_reward", "grad_norm"]
    for title, part in (("Top", scored[:ENDS]), ("Bottom", scored[max(ENDS, len(scored) - ENDS) :])):
        rows = [
            [figure(r["rank"]), escaped(r["prompt_id"]), *[figure(r[n]) for n in names]]
            for r in part.to_pylist()
        ]
        if rows:
            parts += [f"**{title}, {escaped(last.slot)}**", wide_table(header, rows, 2)]
    table = []
    for one in shown:
        s = one.summary
        halves = ", ".join(f"{escaped(n)} {figure(v.get('split_half_cosine'))}" for n, v in s["sets"].items())
        recipe = [escaped(s["metric"]), escaped(s["fusion"])]
        table.append(one.row(f"{s['scored']} of {s['prompts']}", *recipe, s["median_ess"], halves))
    columns = "scored | metric | fusion | median ESS | agreement of a set's halves (cosine)"
    return [*parts, _table(columns, table)]


def _training(shown: Sequence[Shown]) -> list[str]:
    curves: dict[str, list[Point]] = {"reward": [], "kl": [], "completion_length": []}
    before = 0
    for one in shown:
        metrics = pq.read_table(one.path / METRICS_FILE, columns=["step", *curves]).to_pylist()
        for name, points in curves.items():
            points += [Point(before + row["step"], row[name]) for row in metrics if row[name] is not None]
        before += one.summary["steps"]
    across = "optimizer steps of " + (
        shown[0].slot if len(shown) == 1 else f"{shown[0].slot} to {shown[-1].slot}"
    )
    parts = [_figure(lines, "Mean reward", {"reward": curves["reward"]}, across)]
    if curves["kl"]:
        parts.append(_figure(lines, "KL to the reference", {"kl": curves["kl"]}, across))
    else:
        parts.append("No KL: training without a reference (`training.beta` is 0).")
    parts.append(_figure(lines, "Completion length, tokens", {"length": curves["completion_length"]}, across))
    table = []
    for one in shown:
        s = one.summary
        rewards = (s["first_quarter_reward"], s["last_quarter_reward"])
        table.append(one.row(s["steps"], s["prompts"], s["completions"], *rewards, s["not_gradable"]))
    columns = "steps | prompts | completions | reward, first quarter | last quarter | not gradable"
    return [*parts, _table(columns, table)]


def _evaluation(shown: Sequence[Shown]) -> list[str]:
    curves: dict[str, list[Point]] = {}
    table = []
    for one in shown:
        for row in accuracies(one.summary, one.stage):
            curves.setdefault(row.set, []).append(Point(row.stage, row.accuracy, row.low, row.high))
            measured = one.summary["accuracy"][row.set]
            counts = (measured["prompts"], measured["completions"], measured["not_gradable"])
            table.append(one.row(escaped(row.set), row.text, *counts))
    columns = "set | accuracy, 95 % interval | prompts | completions | not gradable"
    title = "Accuracy with 95 % intervals"
    accuracy = _figure(lines, title, curves, "stage (0: the base policy)")
    return [accuracy, _table(columns, table), *_parity(shown)]


def _diagnostics(shown: Sequence[Shown]) -> list[str]:
    rows = [row for one in shown for row in step_rows("diagnostics", one.slot, one.origin, one.manifest)]
    header = list(dict.fromkeys(name for row in rows for name in row))
    return [
        wide_table([escaped(h) for h in header], [[figure(r.get(h)) for h in header] for r in rows[-50:]])
    ]


def _selection(shown: Sequence[Shown]) -> list[str]:
    last = shown[-1]
    table = []
    for one in shown:
        s = one.summary
        table.append(one.row(escaped(s["strategy"]), s["ratio"], s["selected"], s["eligible"], s["pool"]))
    columns = "strategy | ratio | selected | eligible | pool"
    return [*selection_view(last.slot, last.manifest, last.path), _table(columns, table)]


def _figure(draw: Callable[..., str], title: str, *arguments: Any, **options: Any) -> str:
    return picture(title, draw(title, *arguments, **options))


def _binned(values: np.ndarray, bins: int = 16) -> tuple[list[list[int]], list[str]]:
    """Count finite values in equal bins; every fourth edge is labelled."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins=bins)
    names = [f"{edge:.3g}" if i % 4 == 0 else "" for i, edge in enumerate(edges)]
    return [counts.tolist()], names


VIEWS: dict[StepName, Callable[[Sequence[Shown]], list[str]]] = {
    "rollouts": _rollouts,
    "gradients": _gradients,
    "scores": _scores,
    "diagnostics": _diagnostics,
    "selection": _selection,
    "training": _training,
    "evaluation": _evaluation,
}
"""Function that builds the page of each kind of step."""
