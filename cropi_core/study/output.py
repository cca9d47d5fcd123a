"""Write the files of a study: long table, JSON results, an HTML page, a figure, and Markdown tables.

    write_study(study, curves, failures, planned=40, out=Path(".cropi/studies/demo"))

Equal curves give equal bytes: no file contains a time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cropi_core.artifacts import write_atomic, write_parquet
from cropi_core.errors import ConfigError
from cropi_core.report import environment
from cropi_core.runs import FORWARD_AND_BACKWARD
from cropi_core.study import tables
from cropi_core.study.compare import ALL, ArmResult, compare, headline
from cropi_core.study.measure import Curve
from cropi_core.study.plots import arms_svg, distances_svg, has_lines, study_png
from data_schemas import Study

RULES = (
    "Each figure is a ratio: what the reference needed, divided by what the arm needed with the same seed, to reach "
    "the reference's final mean accuracy on the targets for the first time. Curves are straight lines between "
    "evaluations. "
    "Given are the median over pairs and a 95 % bootstrap interval over seeds within each world. The same rule applies "
    "to the reference: if it reached that accuracy before its end, that point counts.",
    "An arm that never reaches it has ratio 0 and counts as the worst in the median. Of an even number of pairs, the "
    "median is the lower of the middle two, so that it is a measured ratio. A pair whose reference ends no higher than "
    "it began is undefined; it is omitted, and counted in the last column. Mean curves: the same ratio of the curves "
    "averaged over seeds, with the interval over redrawn seeds.",
)


@dataclass(frozen=True)
class Failed:
    """A curriculum that failed."""

    label: str
    error: str


def write_study(
    study: Study, curves: Sequence[Curve], failures: Sequence[Failed], planned: int, out: Path
) -> dict[str, Path]:
    """Write all files of a study.

    Args:
        study: The study.
        curves: Finished curricula, at least one.
        failures: Failed curricula.
        planned: Number of curricula in the study.
        out: Directory, created if missing.

    Returns:
        The files by name.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = compare(study, curves)
    files = {
        name: out / file
        for name, file in (
            ("results", "results.parquet"),
            ("summary", "summary.json"),
            ("headline", "headline.json"),
            ("page", "study.html"),
            ("picture", "accuracy.png"),
            ("markdown", "tables.md"),
        )
    }
    write_parquet(tables.points_table(curves), files["results"])
    _json(files["summary"], tables.summary(study, results, planned, len(curves)))
    figures = {"study": study.name, "curricula": {"planned": planned, "done": len(curves)}}
    _json(files["headline"], figures | headline(study, results))
    write_atomic(files["page"], page(study, curves, results, failures, planned))
    files["picture"].write_bytes(study_png(study, results))
    write_atomic(files["markdown"], markdown(study, curves, results, failures, planned))
    return files


def into_page(page: Path, name: str, tables: Path, picture: Path) -> None:
    """Insert a study's tables between its markers in a Markdown page, and write its figure under the page's name.

    The markers are lines: ``<!-- study NAME -->`` and ``<!-- end of study NAME -->``. The text between them is
    replaced.

    Raises:
        ConfigError: The page does not exist, or does not contain both markers exactly once and in this order.
    """
    begin, end = f"<!-- study {name} -->\n", f"<!-- end of study {name} -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, mark, remainder = text.partition(begin)
    _, closed, after = remainder.partition(end)
    if not mark or not closed or begin in remainder:
        raise ConfigError(
            f"{page} must have a line {begin.strip()!r} and below it {end!r}, each once; the tables go between them"
        )
    figure = page.with_suffix(".png")
    figure.write_bytes(picture.read_bytes())
    body = tables.read_text(encoding="utf-8").replace("(accuracy.png)", f"({figure.name})")
    write_atomic(page, f"{before}{begin}\n{body}\n{end}{after}")


def _json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def sentence(study: Study, results: Sequence[ArmResult]) -> str:
    """Summarize the subject's result in one sentence."""
    rows = [row for row in results if row.arm == study.subject and row.speed]
    if not rows:
        return f"{study.subject} and {study.reference} have no seed in common yet"
    row = next((row for row in rows if row.world == ALL), rows[0])
    steps, work = row.speed["steps"], row.speed["work"]
    where = f"in {len([r for r in rows if r.world != ALL])} worlds" if row.world == ALL else f"in {row.world}"
    pairs = steps.median.n if steps.median else 0
    about = f"{len(row.seeds)} seeds {where}, {pairs} pairs, {steps.never} of which never reach it"
    if steps.median is not None and steps.median.value == 0:
        return f"{study.subject} does not reach the final accuracy of {study.reference} in the median pair: {about}"
    return (
        f"{study.subject} reaches the final accuracy of {study.reference} with {tables.times(steps.median)} fewer "
        f"steps and {tables.times(work.median)} lower total cost: {about}"
    )


def page(
    study: Study,
    curves: Sequence[Curve],
    results: Sequence[ArmResult],
    failures: Sequence[Failed],
    planned: int,
) -> str:
    """Return a self-contained HTML page; names and errors are escaped."""
    worlds = [world for world in study.worlds if any(row.world == world for row in results)]
    figures = [(w, Markup(arms_svg(study, results, w))) for w in worlds]  # noqa: S704 - matplotlib escapes
    runs = [[c.world, c.arm, str(c.seed), c.run, f"{c.points[-1].steps}"] for c in curves]
    return (
        environment()
        .get_template("study.html.jinja")
        .render(
            study=study,
            sentence=sentence(study, results),
            planned=planned,
            done=len(curves),
            failures=failures,
            figures=figures,
            distances=Markup(distances_svg(study, results)),  # noqa: S704 - matplotlib escapes
            rules=RULES,
            speed=tables.speed_grid(study, results),
            targets=tables.accuracy_grid(results, "targets"),
            others=tables.accuracy_grid(results, "others"),
            leads=tables.lead_grid(results),
            costs=tables.cost_grid(curves),
            stages=tables.stages_grid(study, curves),
            runs=(["world", "arm", "seed", "run", "steps"], runs),
        )
    )


def markdown(
    study: Study,
    curves: Sequence[Curve],
    results: Sequence[ArmResult],
    failures: Sequence[Failed],
    planned: int,
) -> str:
    """Return the tables as Markdown, to be included in documents."""
    grids = (
        ("Accuracy on the targets at equal steps", tables.accuracy_grid(results, "targets")),
        (f"Lead of {study.subject} on the targets, in points", tables.lead_grid(results)),
        ("Accuracy on the other test sets at equal steps", tables.accuracy_grid(results, "others")),
        ("Selection and groups with one reward, by stage", tables.stages_grid(study, curves)),
        (
            "What a whole curriculum costs, selection included; token forwards: one per generated token, "
            f"{FORWARD_AND_BACKWARD} per token of a forward and backward pass",
            tables.cost_grid(curves),
        ),
    )
    picture = "accuracy on the targets by optimizer step"
    if not has_lines(study):
        picture = f"distance of every arm from {study.subject}"
    parts = [
        "<!-- written by the study, not by hand -->",
        f"**{sentence(study, results)}.** {len(curves)} of {planned} curricula are done.",
        f"![{picture}](accuracy.png)",
        f"### Steps and cost to the final accuracy of {study.reference}",
        *RULES,
        tables.markdown(tables.speed_grid(study, results)),
    ]
    for title, grid in grids:
        if grid[1]:
            parts += [f"<details><summary>{title}</summary>", tables.markdown(grid), "</details>"]
    parts += [f"- failed, and not in any figure: {failure.label}: {failure.error}" for failure in failures]
    return "\n\n".join(parts) + "\n"
