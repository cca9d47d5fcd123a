"""Gradient features of tiny models, and their comparison."""

import numpy as np
import torch

from cropi_core import Checkpoint, FeatureSettings, extract_gradients
from cropi_core.gradients.folding import Subset
from cropi_core.gradients.store import GradientStore
from data_schemas.gradients import Gradients, Objective, Projection
from data_schemas.runtime import Runtime

L_MAX = 12
EXACT = Projection(kind="none", dtype="float32")


def extract(tmp_path, policy, rollouts, name="g", objective=None, projection=EXACT, layout=None, **runtime):
    out = tmp_path / f"{name}.zarr"
    extract_gradients(
        policy=Checkpoint(policy, digest="d"),
        rollouts=rollouts,
        out=out,
        settings=FeatureSettings(
            objective or Objective(), projection, layout or Gradients(rows_per_shard=4, block_rows=2), L_MAX
        ),
        runtime=Runtime(**{"device": "cpu", "threads": 1, **runtime}),
    )
    return GradientStore.open(out)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def place_of(side, coordinate):
    return (coordinate + side.shifts[coordinate // side.size]) % side.size


def kept_of(sketch, block):
    """Return what S keeps of a flat gradient block, computed by its definition."""
    m, n = sketch.shape
    if sketch.kept is not None:
        return block[sketch.kept.numpy()]
    if isinstance(sketch.left, Subset):
        return block.reshape(m, n)[sketch.left.index][:, sketch.right.index].flatten()
    folded = np.zeros((sketch.left.size, sketch.right.size))
    for i in range(m):
        for j in range(n):
            row, column = place_of(sketch.left, i), place_of(sketch.right, j)
            sign = float(sketch.left.signs[i] * sketch.right.signs[j])
            folded[row, column] += sign * block[i * n + j]
    return folded.flatten()


def plain_kernel(q, k, v, query_bounds, key_bounds, most_q, most_k, *, scale, window_size, enable_gqa):
    """Compute what ``varlen_attn`` promises: each sequence causal, its last query aligned with its last key."""
    repeat, parts = q.shape[1] // k.shape[1], []
    assert window_size[1] == 0
    assert enable_gqa == (repeat > 1)
    assert (most_q, most_k) == (int(query_bounds.diff().max()), int(key_bounds.diff().max()))
    for i in range(len(query_bounds) - 1):
        queries = q[query_bounds[i] : query_bounds[i + 1]]
        keys, values = (x[key_bounds[i] : key_bounds[i + 1]].repeat_interleave(repeat, dim=1) for x in (k, v))
        back = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
        hidden = (back < 0) | ((back > window_size[0]) if window_size[0] >= 0 else False)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)
