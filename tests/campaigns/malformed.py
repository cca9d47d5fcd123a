"""Malformed and hostile input: configurations, overrides, tables, logs, checkpoints, records of a root, texts.

A case is a block of inputs, drawn from its number. Each input is read as a command reads it. It may be accepted or end
with one error of cropi; a traceback, a hang, a file outside the root that was read or changed, and a text that keeps
its control characters or tags are failures.

    python -m tests.campaigns.malformed --count 20000 --root /data/malformed
"""

import json
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

from cropi_core.artifacts.layout import MANIFEST
from cropi_core.artifacts.store import Store
from cropi_core.config import changed_config, load_config
from cropi_core.errors import CropiError
from cropi_core.importing.artifacts import export_artifact
from cropi_core.importing.log_formats import read_log
from cropi_core.markdown import code, escaped, markdown_table
from cropi_core.policy.checkpoint import checkpoint_files, tree_digest
from cropi_core.report.page import environment
from cropi_core.runs.records import list_runs, load_run
from cropi_core.visible import for_terminal, json_text
from tests.campaigns.ledger import Case, main
from tests.campaigns.roots import finished
from tests.cropi_core.importing import test_fuzz_readers as readers
from tests.support.tiny import settings, tiny

BLOCK = 200
"""Inputs of a case."""
HOSTILE = (
    *("!!python/object/apply:os.system ['true']", "&a [*a, *a]", "{{7*7}}", "${HOME}", "~/../../etc/passwd"),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "\x00",
        "\ud83d",
        "9" * 400,
        "-1",
        "1e999",
        ".nan",
    ),
    *(
        "[" * 2000,
        "{a: " * 300,
        "'",
        '"',
        "\\",
        "%",
        "\x1b[2J",
        "<script>alert(1)</script>",
        "null",
        "yes",
        "0x7f",
    ),
)
ATTACKS = (
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</style><script>1</script>",
        "<svg/onload=1>",
    ),
    *(
        "[a](javascript:alert(1))",
        "![x](http://x/y)",
        "`code` | cell\n| new row",
        "<!--",
        "]]>",
        "&lt;script&gt;",
    ),
    *(
        "\x1b]0;title\x07",
        "\x1b[31mred",
        "\x9b2J",
        "\u202eabc",
        "a\rb",
        "\x08\x08",
        "=cmd|' /C calc'!A0",
        "\x00",
    ),
    *('" onmouseover="alert(1)', "' onload='1", "{{ 7*7 }}", "{% raw %}", "\udc80", "a" * 3000),
)
OUTSIDE = "kept outside the root"


def noise(draw: random.Random, text: str) -> str:
    """Change a text at a few places: cut, repeat, replace, put in something hostile."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        match draw.randrange(4):
            case 0:
                text = text[:at] + text[at + draw.randint(1, 30) :]
            case 1:
                text = text[:at] + draw.choice(HOSTILE) + text[at:]
            case 2:
                text = text[:at] + chr(draw.choice([*range(128), 0x202E, 0xD800, 0x1F600])) + text[at + 1 :]
            case _:
                text = text[:at] + text[draw.randrange(at + 1) : at] + text[at:]
    return text


def replaced(draw: random.Random, value: Any) -> Any:
    """Replace, remove or add one value anywhere in a JSON value."""
    value = json.loads(json.dumps(value))
    path = draw.choice([p for p in readers.places(value) if p])
    holder = value
    for part in path[:-1]:
        holder = holder[part]
    odd = draw.choice([*HOSTILE, None, True, 10**400, -1, 1.5, [], {}, [[]], {"a": {"b": []}}])
    match draw.randrange(3):
        case 0 if isinstance(holder, dict):
            del holder[path[-1]]
        case 1 if isinstance(holder, dict):
            holder[draw.choice(HOSTILE)[:50]] = odd
        case _:
            holder[path[-1]] = odd
    return value


def block(number: int, name: str, read: Callable[[random.Random], None]) -> dict[str, Any]:
    """Read the inputs of a case; collect those that end neither accepted nor with an error of cropi."""
    accepted, refused, failures = 0, 0, []
    for index in range(BLOCK):
        draw = random.Random(f"{name}-{number}-{index}")
        try:
            read(draw)
            accepted += 1
        except CropiError as error:
            for_terminal(error).encode()
            refused += 1
        except Exception:
            failures.append({"input": index, "traceback": traceback.format_exc()[-1500:]})
    told = {"inputs": BLOCK, "accepted": accepted, "refused": refused, "failures": failures[:3]}
    return {"ok": not failures, "found": "traceback" if failures else "read or refused", **told}


def configuration(root: Path, draw: random.Random) -> None:
    """Read a damaged configuration."""
    path = root / "config.yaml"
    data = settings()
    if draw.random() < 0.5:
        data = replaced(draw, data)
    text = yaml.safe_dump(data)
    path.write_bytes((text if draw.random() < 0.4 else noise(draw, text)).encode("utf-8", "surrogatepass"))
    load_config(str(path))


def override(root: Path, draw: random.Random) -> None:
    """Apply a damaged override."""
    known = [
        "training.steps=4",
        "scores.metric=dot",
        "pin.scores@1=best",
        "data.pool.families={a: 1}",
        "stages=2",
    ]
    changed_config(tiny(), [noise(draw, draw.choice(known)) for _ in range(draw.randint(1, 3))])


def table(root: Path, number: int) -> dict[str, Any]:
    """Read damaged tables and logs, by the strategies of the readers' tests."""
    kinds = ["t.jsonl", "t.json", "t.csv", "t.parquet", *readers.LOGS]
    kind, seen = kinds[number % len(kinds)], 0
    folder = root / "tables"
    folder.mkdir(exist_ok=True)
    if kind == "t.parquet":
        readers.pq.write_table(readers.pa.Table.from_pylist(readers.ROLLOUTS), folder / kind)
        strategy: Any = readers.damaged((folder / kind).read_bytes())
    elif kind in readers.LOGS:
        strategy = readers.mutated(readers.LOGS[kind])
    else:
        whole = readers.text_of(readers.ROWS, lines=kind == "t.jsonl")
        strategy = st.one_of(readers.damaged(whole), readers.mutated(readers.ROWS))

    @hypothesis.seed(number)
    @hypothesis.settings(
        max_examples=BLOCK,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def check(drawn: Any) -> None:
        nonlocal seen
        seen += 1
        lines = kind not in ("t.json",)
        path = folder / (kind if kind.startswith("t.") else "train_rollouts.jsonl")
        path.write_bytes(drawn if isinstance(drawn, bytes) else readers.text_of(drawn, lines=lines))
        if kind in readers.LOGS:
            readers.tried(lambda: read_log(path, kind, drop=seen % 2 == 0))
        else:
            readers.read_tables(path)

    try:
        check()
    except Exception:
        return {
            "ok": False,
            "inputs": seen,
            "found": "traceback",
            "traceback": traceback.format_exc()[-2500:],
        }
    return {"ok": True, "inputs": seen, "kind": kind, "found": "read or refused"}


def checkpoint(root: Path, draw: random.Random) -> None:
    """Check a damaged checkpoint: settings, tokenizer, index and weights; links and names that lead outside."""
    copy = root / "checkpoint"
    if not copy.exists():
        source = min((finished(root) / "policy").glob("*/checkpoint/config.json")).parent
        shutil.copytree(source, copy)
        shutil.copytree(copy, root / "checkpoint-whole")
    whole = root / "checkpoint-whole"
    name = draw.choice(
        sorted(p.name for p in whole.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    )
    data = (whole / name).read_bytes()
    path = copy / name
    made = []
    try:
        match draw.randrange(4):
            case 0:
                path.unlink()
                path.symlink_to(draw.choice(["/etc/passwd", "../../outside", "../../../etc/hostname", name]))
            case 1:
                index = {"weight_map": {"a": draw.choice(HOSTILE), "b": "../../outside/secret"}}
                made.append(copy / "model.safetensors.index.json")
                made[0].write_text(json.dumps(index), encoding="utf-8")
            case 2 if name.endswith(".json") and len(data) < 200_000:
                path.write_text(json.dumps(replaced(draw, json.loads(data))), encoding="utf-8")
            case _:
                head = bytearray(data[:4096])
                for _ in range(draw.randint(1, 8)):
                    head[draw.randrange(len(head))] = draw.randrange(256)
                path.write_bytes(bytes(head) + data[4096:])
        checkpoint_files(copy)
        tree_digest(copy)
    finally:
        for extra in made:
            extra.unlink()
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def foreign_root(root: Path, draw: random.Random) -> None:
    """Read a root whose records, manifests, tags and artifacts a stranger has written."""
    target, outside = root / "foreign" / "root", root / "foreign" / "outside"
    if not target.exists():
        shutil.copytree(finished(root), target)
        outside.mkdir()
        (outside / "secret").write_text(OUTSIDE, encoding="utf-8")
    store = Store(target)
    keys = sorted(p.parent.name for p in target.glob("*/*/" + MANIFEST))
    key = draw.choice(keys)
    (manifest,) = target.glob(f"*/{key}/{MANIFEST}")
    (record,) = target.glob("runs/*.json")
    tags = target / "tags.json"
    link = manifest.parent / draw.choice(["link", "a.parquet"])
    path = draw.choice([manifest, record, tags])
    before = path.read_bytes() if path.exists() else None
    raw = {"x": key} if before is None else json.loads(before)
    try:
        match draw.randrange(4):
            case 0:
                link.symlink_to(
                    draw.choice([outside, outside / "secret", Path("../../../outside/secret"), Path("/")])
                )
            case 1 if path == manifest:
                raw["files"][0]["path"] = draw.choice(
                    ["../../../outside/secret", str(outside / "secret"), "..", "a/../../b"]
                )
                path.write_text(json.dumps(raw), encoding="utf-8")
            case 2:
                path.write_text(noise(draw, json.dumps(raw)), encoding="utf-8", errors="surrogatepass")
            case _:
                path.write_text(json.dumps(replaced(draw, raw)), encoding="utf-8")
        _used(store, key, root / "foreign" / "exported", draw)
    finally:
        link.unlink(missing_ok=True)
        if before is None:
            tags.unlink(missing_ok=True)
        else:
            path.write_bytes(before)
        shutil.rmtree(root / "foreign" / "exported", ignore_errors=True)
        assert [p.name for p in outside.iterdir()] == ["secret"], "a file was written outside of the root"
        assert (outside / "secret").read_text(encoding="utf-8") == OUTSIDE


def _used(store: Store, key: str, out: Path, draw: random.Random) -> None:
    """Use a root as the commands do; the content of the file outside must not be exported."""
    for use in (
        lambda: store.faults(key),
        lambda: store.manifest(key),
        lambda: [load_run(store, run) for run in list_runs(store)],
        store.tags,
        lambda: store.resolve(draw.choice([key, "x", *HOSTILE])),
        lambda: export_artifact(store, key, out),
    ):
        try:
            use()
        except CropiError as error:
            str(error).encode()
    for path in out.rglob("*") if out.exists() else ():
        assert not path.is_symlink(), path
        assert not path.is_file() or OUTSIDE.encode() not in path.read_bytes(), path


class Tags(HTMLParser):
    """The tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


TEMPLATE = '<p title="{{ a }}">{{ a|line }}</p><pre>{{ a|block }}</pre><td>{{ a|name }}</td>'


def text(root: Path, draw: random.Random) -> None:
    """Show an attacking text in the terminal, in JSON, in Markdown and in HTML."""
    attack = "".join(draw.choice([*ATTACKS, "word ", "\n"]) for _ in range(draw.randint(1, 6)))
    if draw.random() < 0.02:  # a line of a megabyte: pages show its beginning
        attack *= 1 + (1 << 20) // (len(attack) or 1)
        assert len(escaped(attack)) + len(code(attack)) < 40_000
    assert not any(ord(sign) < 32 for sign in escaped(attack) + code(attack))
    shown = for_terminal(attack)
    assert not any((ord(sign) < 32 and sign not in "\n\t") or 127 <= ord(sign) < 160 for sign in shown), shown
    shown.encode()
    json.loads(json_text({"a": attack}))
    rows = markdown_table(("a", "b"), [(code(attack), "x")]).splitlines()
    assert len(rows) == 3, rows
    tags = Tags()
    tags.feed(environment().from_string(TEMPLATE).render(a=attack))
    assert [tag for tag, _ in tags.found if tag in ("script", "img", "svg")] == [], tags.found
    assert all(set(names) <= {"title", "class"} for _, names in tags.found), tags.found


READERS = {
    "configuration": configuration,
    "override": override,
    "checkpoint": checkpoint,
    "root": foreign_root,
    "text": text,
}


def campaign(count: int, root: Path) -> Iterator[Case]:
    """Return the cases: blocks of inputs, in turn of each kind; half of them are tables and logs."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range((count + BLOCK - 1) // BLOCK):
        if number % 2:
            yield f"table:{number}", lambda n=number: table(root, n // 2)
        else:
            name = list(READERS)[number // 2 % len(READERS)]
            reader = READERS[name]
            yield (
                f"{name}:{number}",
                lambda n=number, k=name, r=reader: block(n, k, lambda draw: r(root, draw)),
            )


if __name__ == "__main__":
    sys.exit(main("malformed and hostile input", 20000, campaign))
