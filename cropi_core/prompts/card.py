"""The card of a prompt set: a Markdown description of its origin, built from its manifest alone.

    print(data_card(store.manifest(key)))

Values from a dataset or a configuration are shown in code font on one line, so they cannot become markup or table
cells.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cropi_core.markdown import code
from data_schemas import PRESETS, Manifest

LONGEST = 200
"""Maximum number of characters shown of a value; the manifest has the full value."""
LISTED = 30
"""Maximum number of sources or levels listed."""


def data_card(manifest: Manifest) -> str:
    """Build the card of a prompts artifact."""
    settings, summary = manifest.settings, manifest.summary
    lines = [f"# Prompts {_code(manifest.key)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in _facts(manifest)]
    for number, source in enumerate(_sources(settings)):
        lines += ["", f"## Source {number + 1}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {text} |" for name, text in _source(source)]
    for title, name in (("By source", "by_source"), ("By level", "by_level")):
        if counts := summary.get(name):
            lines += ["", f"## {title}", "", *_counts(counts)]
    if decontamination := summary.get("decontamination"):
        lines += ["", "## Decontamination", "", *_decontamination(decontamination)]
    return "\n".join(lines) + "\n"


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    summary = manifest.summary
    yield "prompts", f"{summary.get('prompts', 0):,}"
    for reason, count in summary.get("dropped", {}).items():
        yield f"dropped: {reason.replace('_', ' ')}", f"{count:,}"
    if lengths := summary.get("characters"):
        yield (
            "characters of a prompt",
            f"{lengths['least']:,} to {lengths['most']:,}, median {lengths['median']:,}",
        )
    if turns := summary.get("turns"):
        yield "turns, at most", str(turns)
    if verifiers := summary.get("by_verifier"):
        yield "graded by", ", ".join(f"{_code(name)} ({count:,})" for name, count in verifiers.items())
    yield "made by", _code(manifest.step)
    if "split" in manifest.settings:
        yield "for", _code(manifest.settings["split"])
    for name, ref in manifest.inputs.items():
        yield f"made from {_code(name)}", _code(ref.key)
    if "reasoning_gym" in manifest.settings:
        yield "reasoning-gym", _code(manifest.settings["reasoning_gym"])
    yield "on", _code(manifest.created)


def _sources(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    source = settings.get("source")
    if source is None:  # imported, or drawn from another set
        return []
    return source["sources"] if source.get("kind") == "mix" else [source]


def _source(source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List a source's non-empty settings; for a hub dataset also its licence and whether its revision is pinned."""
    for name, value in source.items():
        if value not in (None, (), [], {}):
            shown = {k: v for k, v in value.items() if v} if isinstance(value, Mapping) else value
            yield name.replace("_", " "), _code(shown)
    if source.get("kind") == "hub":
        if not source.get("revision"):
            yield "revision", "not pinned: what the hub had when it was read"
        presets = (p for p in PRESETS.values() if p.licence and p.hub.get("path") == source.get("path"))
        yield "licence", next((f"{p.licence}, as its publisher states" for p in presets), "not known here")


def _counts(counts: Mapping[str, int]) -> list[str]:
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        "| | prompts |",
        "|---|---|",
        *[f"| {_code(name)} | {count:,} |" for name, count in rows[:LISTED]],
    ]
    return lines if len(rows) <= LISTED else [*lines, "", f"… and {len(rows) - LISTED:,} more"]


def _decontamination(overlap: Mapping[str, Any]) -> list[str]:
    action = {"remove": "dropped", "report": "kept"}.get(overlap["action"], "refused")
    sets = ", ".join(f"{_code(name)} {count:,}" for name, count in overlap["by_set"].items())
    lines = [
        f"{overlap['prompts']:,} prompts overlap ({overlap['ngram']} words in a row), {action}"
        f"{': ' + sets if sets else ''}. {overlap['ngrams_ignored_as_wording']:,} n-grams were ignored as wording."
    ]
    if overlap["examples"]:
        lines += ["", "| prompt | overlaps | by | words |", "|---|---|---|---|"]
    for e in overlap["examples"]:
        lines.append(
            f"| {_code(e['prompt_id'])} | {_code(e['set'] + ' ' + e['other'])} | {e['reason']} | {_code(e['words'])} |"
        )
    return lines


def _code(value: Any) -> str:
    """Format a value in code font: one line, without backticks that could end it or bars that could end its cell."""
    text = " ".join(str(value).split())
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return code(text)
