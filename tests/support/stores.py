"""Artifacts published in a store for tests, and edits of their manifests."""

import json

from cropi_core.artifacts.keys import content_digest, file_entries
from cropi_core.curriculum.execution import provenance
from data_schemas.records import Manifest
from data_schemas.steps import artifact_key


def publish(
    store, files=None, kind="prompts", settings=None, inputs=None, summary=None, step=None, seconds=0
):
    """Publish an artifact like a step does."""
    key = artifact_key(kind, 1, settings or {}, inputs or {})
    work = store.workspace(key)
    for name, text in (files or {"data/a.txt": "one", "b.txt": "two"}).items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    entries = file_entries(work)
    manifest = Manifest(
        kind=kind,
        key=key,
        digest=content_digest(entries),
        step=step or kind,
        inputs=inputs or {},
        settings=settings or {},
        files=entries,
        summary=summary or {},
        seconds=seconds,
        device="",
        **provenance(),
    )
    return store.publish(manifest)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
