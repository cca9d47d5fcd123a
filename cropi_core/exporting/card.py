"""The card of an exported dataset: what was selected, by which validation sets, and from which artifacts.

The card is a README.md as the hub reads it: YAML between two lines of dashes, then Markdown. Texts of datasets are
escaped, so that they cannot become markup.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from cropi_core.artifacts import Store
from cropi_core.formatting import percent
from cropi_core.markdown import code, escaped, markdown_table
from cropi_core.runs import ancestors
from data_schemas import Manifest

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
BINS = ((0.0, 0.0, "0"), (0.0, 0.5, "above 0, below ½"), (0.5, 1.0, "½ or more, below 1"), (1.0, 1.0, "1"))
"""Pass rates that the card counts: from, to, and the words for it."""


def selection_card(store: Store, manifest: Manifest, pool: Manifest, rows: Sequence[dict[str, Any]]) -> str:
    """Write the card of a selection, or of a whole set of prompts.

    Args:
        store: Store with the artifacts that it was made from.
        manifest: The selection, or the set.
        pool: The set that it selects from.
        rows: The exported prompts.
    """
    title = "Prompts selected by cropi" if manifest.kind == "selection" else "Prompts"
    parts = [_front_matter(len(rows)), f"# {title}", *_selected(manifest, rows)]
    if targets := list(_targets(store, manifest)):
        parts += ["## Validation sets", markdown_table(["set", "prompts", "artifact", "digest"], targets)]
    if rates := [row["pass_rate"] for row in rows if row.get("pass_rate") is not None]:
        parts += ["## Pass rates", *_pass_rates(rates, len(rows))]
    parts += ["## By source and level", _group_table(rows)]
    parts += ["## Decontamination", _decontamination(pool)]
    parts += _lineage(store, manifest)
    parts += [
        "## Columns",
        COLUMNS,
        "The licence is that of the prompts' own dataset; cropi does not know it.",
    ]
    return "\n\n".join(parts) + "\n"


def policy_card(store: Store, manifest: Manifest) -> str:
    """Write the card of a policy: how it was made, and from which artifacts."""
    front = "\n".join(
        ["---", "library_name: transformers", "tags:", "- cropi", "- reinforcement-learning", "---"]
    )
    steps = manifest.summary.get("steps")
    trained = (
        f" It was trained for {steps:,} optimizer steps in its last stage." if isinstance(steps, int) else ""
    )
    parts = [
        front,
        "# Policy trained by cropi",
        f"Artifact {code(manifest.key)}.{trained}",
        *_lineage(store, manifest),
    ]
    parts.append("The licence is that of the base model; cropi does not know it.")
    return "\n\n".join(parts) + "\n"


def _lineage(store: Store, manifest: Manifest) -> list[str]:
    """List every artifact that an artifact was made from, with its digest."""
    listed = [
        [one.kind, code(one.key), code(one.digest), code(one.created)]
        for one in ancestors(store, manifest.key)
    ]
    table = markdown_table(["kind", "key", "digest", "made"], listed, most=None)
    return ["## Lineage", "Each artifact with the digest of its files (SHA-256).", table]


COLUMNS = (
    "`prompt`: messages. `solution`: the answer; `answers`: all right answers. `prompt_id`: the stable id. `verifier`: "
    "cropi's name of the grader. `rank`: 1 is the best. `score`: the value that gave the rank. `pass_rate`: mean "
    "reward of the completions that the selection was made with."
)


def _front_matter(rows: int) -> str:
    size = next((name for most, name in SIZES if rows < most), "n>1M")
    lines = ["---", "configs:", "- config_name: default", "  data_files:", "  - split: train"]
    lines += ["    path: data/train-*.parquet", "tags:", "- cropi", "- reinforcement-learning"]
    return "\n".join([*lines, "size_categories:", f"- {size}", "---"])


def _selected(manifest: Manifest, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    summary = manifest.summary
    if manifest.kind != "selection":
        yield f"{len(rows):,} prompts, a whole set."
        return
    total = summary.get("pool", summary.get("prompts"))
    pool_size = f" of {total:,}" if isinstance(total, int) else ""
    yield f"{len(rows):,} prompts{pool_size}, selected by the strategy {code(str(summary.get('strategy', 'unknown')))}."
    if fallback := summary.get("fallback"):
        yield f"The strategy was to be {code(str(fallback.get('strategy')))}; its scores exceeded limits."


def _targets(store: Store, manifest: Manifest) -> Iterator[list[str]]:
    """List the validation sets that the scores of a selection are the influence on."""
    scores = manifest.inputs.get("scores")
    if scores is None or not store.has(scores):
        return
    for name, ref in store.manifest(scores).inputs.items():
        if name.startswith("validation.") and store.has(ref):
            prompts = next((one for one in ancestors(store, ref.key) if one.kind == "prompts"), None)
            if prompts is not None:
                count = prompts.summary.get("prompts", 0)
                shown = escaped(name.removeprefix("validation."))
                yield [shown, f"{count:,}", code(prompts.key), code(prompts.digest)]


def _pass_rates(rates: Sequence[float], rows: int) -> Iterator[str]:
    mean = sum(rates) / len(rates)
    yield f"Mean {percent(mean)}, of {len(rates):,} of the {rows:,} prompts."
    counts = [
        sum(rate == low if low == high else low <= rate < high and rate > 0 for rate in rates)
        for low, high, _ in BINS
    ]
    yield markdown_table(
        ["pass rate", "prompts"], [[b[2], f"{n:,}"] for b, n in zip(BINS, counts, strict=True)]
    )


def _group_table(rows: Sequence[dict[str, Any]]) -> str:
    groups = Counter((row["source"], row["level"] or "") for row in rows)
    ordered = sorted(groups.items(), key=lambda item: (-item[1], item[0]))
    return markdown_table(
        ["source", "level", "prompts"],
        [[escaped(source), escaped(level) or "–", f"{n:,}"] for (source, level), n in ordered],
    )


def _decontamination(pool: Manifest) -> str:
    overlap = pool.summary.get("decontamination")
    if overlap is None:
        return (
            "Not asked for: no n-grams were compared. Prompts that are equal to one of a validation or test set are "
            "refused by every run."
        )
    sets = ", ".join(f"{escaped(name)} {count:,}" for name, count in overlap["by_set"].items())
    return (
        f"{overlap['prompts']:,} prompts of the pool shared {overlap['ngram']} words in a row with another set"
        f"{f' ({sets})' if sets else ''}; action: {code(str(overlap['action']))}."
    )
