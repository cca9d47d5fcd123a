"""Sets of prompts that overlap."""

import json

from cropi_core.artifacts.store import Store
from data_schemas.config import Config
from tests.support.tiny import settings as tiny_settings

LONG = "a farmer counts his sheep before he goes to bed and finds that three are gone since noon"


def row(text, number=0):
    return {"prompt_id": f"p{number}", "messages": [{"role": "user", "content": text}]}


def rows(*texts):
    return [row(text, i) for i, text in enumerate(texts)]


def write(path, texts):
    lines = [json.dumps({"question": text, "answer": "1"}) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"kind": "file", "path": str(path), "columns": {}}


def sets_of(tmp_path, action, ngram=13):
    data = {
        "pool": write(tmp_path / "pool.jsonl", ["fine", f"first {LONG}", "fine too", f"Then: {LONG} again"]),
        "validation": {"val": write(tmp_path / "val.jsonl", ["to choose", LONG + " twice"])},
        "test": {"held": write(tmp_path / "test.jsonl", [LONG + "."])},
        "decontaminate": {"action": action, "ngram": ngram},
    }
    return Config.model_validate(tiny_settings() | {"data": data})


def prompts_of(config, root):
    """Run only the steps that produce prompts."""
    from cropi_core.curriculum.execution import run_step
    from cropi_core.curriculum.run import Run
    from cropi_core.curriculum.start import prompt_sets

    store = Store(root)
    store.prepare()
    sets, _ = prompt_sets(Run(config, store, lambda spec: run_step(spec, store), print))
    return store, sets
