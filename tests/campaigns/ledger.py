"""The cases of a campaign: executed once each, written line by line, so that a stopped campaign resumes.

A case is a name and a function that returns its outcome. ``ok`` of the outcome decides; everything else is for people.
"""

import argparse
import json
import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[], dict[str, Any]]]


class Ledger:
    """Outcomes of cases by name, in a JSONL file; the last line may be torn by a kill and is then repeated."""

    def __init__(self, path: Path) -> None:
        self.path, self.outcomes = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        if len(whole) != len(lines):
            path.write_bytes(b"".join(whole))
        for line in whole:
            outcome = json.loads(line)
            self.outcomes[outcome["case"]] = outcome

    def run(self, cases: Iterable[Case]) -> dict[str, Any]:
        """Execute the cases that have no outcome; return the summary."""
        for name, execute in cases:
            if name not in self.outcomes:
                start = time.monotonic()
                try:
                    told = execute()
                except Exception:  # a fault of cropi that ends the case must not end the campaign
                    told = {"ok": False, "found": "traceback", "traceback": traceback.format_exc()[-3000:]}
                outcome = {"case": name, **told, "seconds": round(time.monotonic() - start, 3)}
                with self.path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(outcome, default=str) + "\n")
                self.outcomes[name] = outcome
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Count the outcomes by group, the part of a name before the first colon; list those that are not ok."""
        groups = Counter(name.partition(":")[0] for name in self.outcomes)
        failed = [outcome for outcome in self.outcomes.values() if not outcome["ok"]]
        found = Counter(str(outcome.get("found")) for outcome in self.outcomes.values())
        return {
            "cases": len(self.outcomes),
            "failed": len(failed),
            "groups": dict(sorted(groups.items())),
            "found": dict(found.most_common(40)),
            "seconds": round(sum(outcome["seconds"] for outcome in self.outcomes.values()), 1),
            "failures": failed[:50],
        }


def main(description: str, count: int, campaign: Callable[[int, Path], Iterable[Case]]) -> int:
    """Run a campaign from the command line: ``--count``, ``--root`` to resume in, ``--out`` for the summary.

    Args:
        description: What the campaign does.
        count: Default number of cases.
        campaign: Returns the cases; receives their number and the root.

    Returns:
        1 if a case failed.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", "--kills", "--cases", type=int, default=count, dest="count")
    parser.add_argument(
        "--root", type=Path, required=True, help="Directory of the campaign; the same one resumes it."
    )
    parser.add_argument("--out", type=Path, help="JSON file of the summary; default: ROOT/summary.json.")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    root = given.root.resolve()
    ledger = Ledger(root / "cases.jsonl")
    summary = ledger.run(campaign(given.count, root))
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    text = json.dumps({"campaign": description, **summary, "machine": machine}, indent=1)
    (given.out or root / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if summary["failed"] else 0
