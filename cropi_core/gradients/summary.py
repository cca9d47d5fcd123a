"""The summary of a gradient store, for the manifest of its artifact."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cropi_core.gradients.groups import OK
from cropi_core.gradients.store import GradientStore
from data_schemas import STATUSES


def summarise(store: GradientStore, attributes: dict[str, Any], samples: Mapping[str, int]) -> dict[str, Any]:
    """Count and average the store's columns for the manifest; ``samples`` counts the completions of each prompt."""
    status = store.column("status")
    ok = status == OK

    def median(name: str) -> float | None:
        values = store.column(name)[ok]
        return float(np.median(values)) if len(values) else None

    def mean(name: str) -> float | None:
        return float(np.nanmean(store.column(name)[ok])) if ok.any() else None

    # Groups differ in size if the pool was sampled in passes.
    sizes = np.array([samples[str(name)] for name in store.column("prompt_id")[ok]])
    return {
        "prompts": store.n,
        "k": store.k,
        "status": {name: int((status == i).sum()) for i, name in enumerate(STATUSES)},
        "tokens": int(store.column("tokens").sum()),
        "median_norm": median("norm"),
        "median_ess": median("ess"),
        "median_ess_share": float(np.median(store.column("ess")[ok] / sizes)) if ok.any() else None,
        "kl": mean("kl"),
        "kl_k1": mean("kl_k1"),
        "max_ratio": float(np.nanmax(store.column("max_ratio")[ok])) if ok.any() else None,
        "mean_clip_fraction": mean("clip_fraction"),
        "median_entropy": median("entropy"),
        "coverage": attributes["coverage"],
        "parameters": attributes["parameters"],
        "left_out": attributes["left_out"],
    }
