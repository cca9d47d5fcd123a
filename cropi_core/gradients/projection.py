"""The projection φ = P·S·∇J: S reduces the gradient, P is a sparse Johnson-Lindenstrauss transform.

P adds each number that S keeps, with a random sign, to one of k buckets (a count sketch; Charikar, Chen, Farach-Colton
2002; Weinberger et al. 2009), scaled so that E‖φ‖² = ‖∇J‖². Bucket, sign, and the effect of S on a coordinate are
64-bit counter-based functions of (seed, parameter name, coordinate) and of nothing else.

Three forms of S for a weight of shape (m, n), all at density p; δ is the gradient of the layer's output, a its input:
    uniform    a random subset of the coordinates; the full gradient of the layer is formed once per prompt.
    factored   a random subset R of the rows times a random subset C of the columns: only δ[:, R]ᵀ a[:, C] is formed.
    folded     rows and columns are summed in groups with random signs, F δ and F' a, and only (Fδ)ᵀ (F'a) is formed:
               as small as `factored`, but no coordinate is dropped, so the few large rows and columns of language
               models do no harm (docs/background/precision.md).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cropi_core.errors import ProjectionError
from cropi_core.gradients.folding import Fold, Side, Subset
from cropi_core.random_bits import below, key64, random64
from data_schemas import Projection

PIECE = 1 << 20
"""Coordinates whose random bits are drawn together: all bits of a 1.5B model's output layer would take 7 GB."""


@dataclass(frozen=True)
class ParameterSketch:
    """The projection of one parameter of shape (m, n); a vector is (m, 1).

    Attributes:
        name: The parameter's name in the model.
        shape: (m, n).
        offset: First column of ``out`` that it writes; 0 except for ``projection.kind=none``.
        k: Number of buckets; 0 if the gradient is stored unprojected.
        cells: (kept,) int32: bucket of each kept number, plus k if its sign is negative.
        left: Reduction of the m rows; None for ``uniform`` and for ``kind=none``.
        right: Reduction of the n columns; None for ``uniform`` and for ``kind=none``.
        kept: (kept,) kept flat coordinates, sorted; None except for ``uniform``.
        scale: Makes ‖φ‖² unbiased: sqrt(m·n / kept) if coordinates are dropped, 1 if they are folded.
        metric: (m, n) float32 factor of each coordinate, applied first; None for 1.
    """

    name: str
    shape: tuple[int, int]
    offset: int
    k: int
    cells: Tensor
    left: Side | None
    right: Side | None
    kept: Tensor | None
    scale: float
    metric: Tensor | None = None

    @property
    def coverage(self) -> float:
        """Number of kept numbers as a share of the parameter's coordinates."""
        return 1.0 if self.k == 0 else self.cells.numel() / (self.shape[0] * self.shape[1])

    def reduce_left(self, x: Tensor) -> Tensor:
        """Reduce (tokens, m) to the part that :meth:`add_outer` needs."""
        return x if self.left is None or self.metric is not None else self.left.reduce(x)

    def reduce_right(self, x: Tensor) -> Tensor:
        """Reduce (tokens, n) to the part that :meth:`add_outer` needs."""
        return x if self.right is None or self.metric is not None else self.right.reduce(x)

    def add_outer(self, left: Tensor, right: Tensor, bounds: list[int], out: Tensor) -> None:
        """Add the sketch of Σ_t left_t rightᵀ_t over the tokens of every prompt.

        Args:
            left: :meth:`reduce_left` of (tokens, m); for a linear layer, the gradient of its output.
            right: :meth:`reduce_right` of (tokens, n); for a linear layer, its input.
            bounds: Start of each prompt's tokens, and the end of the last prompt's.
            out: (prompts, width) float32 accumulators, see :func:`fold`.
        """
        left, right = left.float(), right.float()
        for p, (begin, end) in enumerate(pairwise(bounds)):
            self.add_block(left[begin:end].T @ right[begin:end], out[p])

    def add_block(self, block: Tensor, out: Tensor) -> None:
        """Add the sketch of one prompt's gradient.

        Args:
            block: Σ_t left_t rightᵀ_t over the prompt's tokens, of :meth:`reduce_left` and :meth:`reduce_right`.
            out: (width,) accumulators of the prompt.
        """
        if self.metric is not None:
            block = self._reduce_block(block * self.metric)
        block = block.flatten()
        if self.kept is not None:
            block = block.index_select(0, self.kept)
        self._add(block, out)

    def add_rows(self, indices: Tensor, values: Tensor, bounds: list[int], out: Tensor) -> None:
        """Add the sketch of Σ_t e_{index_t} valueᵀ_t over the tokens of every prompt: an embedding's gradient.

        Args:
            indices: (tokens,) row numbers, the token ids.
            values: (tokens, n) gradients of the embedded tokens.
            bounds: Start of each prompt's tokens, and the end of the last prompt's.
            out: (prompts, width) accumulators.
        """
        for p, (begin, end) in enumerate(pairwise(bounds)):
            unique, inverse = indices[begin:end].unique(return_inverse=True)
            summed = torch.zeros(len(unique), values.shape[1], device=values.device)
            summed.index_add_(0, inverse, values[begin:end].float())
            if self.metric is not None:
                summed *= self.metric[unique]
            self._add_some_rows(unique, summed, out[p])

    def add_vector(self, values: Tensor, out: Tensor) -> None:
        """Add the sketch of a vector parameter's gradient.

        Args:
            values: (prompts, m).
            out: (prompts, width) accumulators.
        """
        values = values.float() if self.metric is None else values.float() * self.metric[:, 0]
        values = values if self.left is None else self.left.reduce(values)
        for p in range(values.shape[0]):
            self._add(values[p] if self.kept is None else values[p].index_select(0, self.kept), out[p])

    def _reduce_block(self, block: Tensor) -> Tensor:
        """Reduce a whole gradient (m, n); without a metric, its two factors are reduced instead."""
        if self.left is None or self.right is None:
            return block
        return self.left.reduce(self.right.reduce(block).T).T

    def _add(self, block: Tensor, out: Tensor) -> None:
        """Add (kept,) numbers to one prompt's buckets."""
        if self.k == 0:
            out[self.offset : self.offset + len(block)] += block
        else:  # one-dimensional: the buckets stay in the cache
            out.index_add_(0, self.cells, block, alpha=self.scale)

    def _add_some_rows(self, rows: Tensor, values: Tensor, out: Tensor) -> None:
        """Add (u, n) gradients of ``rows`` (u,); all other rows are zero."""
        n = self.shape[1]
        if self.k == 0:
            out[self.offset : self.offset + self.shape[0] * n].view(-1, n).index_add_(0, rows, values)
        elif self.left is not None and self.right is not None:
            present, place, signs = self.left.find(rows)
            block = self.right.reduce(values[present]) * signs[:, None]
            cells = self.cells.view(self.left.size, self.right.size)[place]
            out.index_add_(0, cells.flatten(), block.flatten(), alpha=self.scale)
        else:
            assert self.kept is not None
            begin = torch.searchsorted(self.kept, rows * n)
            count = torch.searchsorted(self.kept, (rows + 1) * n) - begin
            which = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), count)
            within = torch.arange(len(which), device=rows.device) - (count.cumsum(0) - count)[which]
            place = begin[which] + within
            picked = values[which, self.kept[place] - rows[which] * n]
            out.index_add_(0, self.cells[place], picked, alpha=self.scale)


def fold(out: Tensor, projection: Projection) -> Tensor:
    """Turn accumulators (prompts, 2k) into features (prompts, k): positive buckets minus negative ones."""
    if projection.kind == "none":
        return out
    return out[:, : projection.k] - out[:, projection.k :]


def width(sketches: dict[str, ParameterSketch], projection: Projection) -> int:
    """Return the number of columns of an accumulator."""
    if projection.kind == "none":
        return sum(math.prod(s.shape) for s in sketches.values())
    return 2 * projection.k


def dimension(sketches: dict[str, ParameterSketch], projection: Projection) -> int:
    """Return the dimension of a feature."""
    return projection.k if projection.kind == "sjlt" else width(sketches, projection)


def build_sketches(
    shapes: dict[str, tuple[int, ...]],
    projection: Projection,
    device: torch.device,
    metric: Mapping[str, Tensor] | None = None,
) -> dict[str, ParameterSketch]:
    """Plan the projection of every parameter.

    Args:
        shapes: Shape of each parameter that trains, by name; one or two dimensions.
        projection: The settings.
        device: Device of the indices; their values do not depend on it.
        metric: Factors of each parameter's coordinates, by name and in the parameter's shape; None for 1.

    Raises:
        ProjectionError: A parameter has more than two dimensions, or the metric belongs to other parameters.
    """
    _check_metric(shapes, metric)
    sketches, offset = {}, 0
    for name, shape in shapes.items():
        if not 1 <= len(shape) <= 2:
            raise ProjectionError(
                f"parameter {name} has shape {shape}, and only vectors and matrices are supported (not the stacked "
                "experts of a mixture of experts). Freeze the parameter to exclude it"
            )
        m, n = shape[0], shape[1] if len(shape) == 2 else 1
        sketch = _sketch(name, m, n, offset, projection, device)
        sketches[name] = replace(sketch, metric=metric[name].view(m, n)) if metric else sketch
        offset += m * n if projection.kind == "none" else 0
    return sketches


def _check_metric(shapes: dict[str, tuple[int, ...]], metric: Mapping[str, Tensor] | None) -> None:
    """Compare the parameters of a metric with those that train.

    Raises:
        ProjectionError: The parameters differ; the message names one.
    """
    if metric is None:
        return
    moments = {name: tuple(values.shape) for name, values in metric.items()}
    differing = sorted(n for n in moments.keys() | shapes.keys() if moments.get(n) != shapes.get(n))
    if differing:
        name = differing[0]
        raise ProjectionError(
            f"the second moments belong to other parameters than those that train: {len(differing)} differ, such as "
            f"{name} (shape {moments.get(name)} in the moments, {shapes.get(name)} in the policy). Train the policy "
            "again with training.second_moments=true, or set projection.preconditioner=none"
        )


def _sketch(
    name: str, m: int, n: int, offset: int, projection: Projection, device: torch.device
) -> ParameterSketch:
    """Plan the projection of one parameter."""
    if projection.kind == "none":
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return ParameterSketch(name, (m, n), offset, 0, empty, None, None, None, 1.0)
    left = right = kept = None
    if projection.form == "uniform":
        kept = flat = _smallest(key64("subset", projection.seed, name), m * n, projection.density, device)
    elif projection.form == "factored":
        left, right = _subsets(name, m, n, projection, device)
        flat = (left.index[:, None] * n + right.index[None, :]).flatten()
    else:
        left, right = folds(name, m, n, projection, device)
        flat = torch.arange(left.size * right.size, device=device)
    cells = torch.empty(len(flat), dtype=torch.int32, device=device)
    for begin in range(0, len(flat), PIECE):
        part = slice(begin, begin + PIECE)
        cells[part] = _cells(name, flat[part], projection)
    scale = 1.0 if projection.form == "folded" else math.sqrt(m * n / flat.numel())
    return ParameterSketch(name, (m, n), 0, projection.k, cells, left, right, kept, scale)


def _cells(name: str, flat: Tensor, projection: Projection) -> Tensor:
    """Return the buckets of flat coordinates, plus k where the sign is negative, int32."""
    bits = random64(key64("sjlt", projection.seed, name), flat)
    # The lowest bit is the sign, the upper 32 the bucket: they never overlap.
    return (below(bits, projection.k) + (bits & 1) * projection.k).to(torch.int32)


def _smallest(key: int, size: int, share: float, device: torch.device) -> Tensor:
    """Choose round(share·size) of ``size`` numbers, at least one: those with the smallest random bits; sorted."""
    count = max(1, round(share * size))
    if count == size:
        return torch.arange(size, device=device)
    threshold = _order_statistic(key, size, count, device)
    indices, filled = torch.empty(count, dtype=torch.long, device=device), 0
    for begin, bits in _bit_blocks(key, size, device):
        chosen = (bits <= threshold).nonzero()[:, 0]
        indices[filled : filled + len(chosen)] = chosen.add_(begin)
        filled += len(chosen)
    return indices


def _bit_blocks(key: int, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield the random bits of 0..size in pieces, each with its first coordinate."""
    for begin in range(0, size, PIECE):
        yield begin, random64(key, torch.arange(begin, min(begin + PIECE, size), device=device))


def _order_statistic(key: int, size: int, count: int, device: torch.device) -> Tensor:
    """Return the ``count``-th smallest of the random bits of 0..size, without all of them in memory.

    The bits of different coordinates differ, because they are a permutation of the counters. Those in a narrow range
    around the expected value are sorted, and those below it are counted; a range that misses is widened.
    """
    margin = 8 * math.sqrt(count)
    while True:
        low, high = (_quantile((count + sign * margin) / size) for sign in (-1, 1))
        near, smaller = [], torch.zeros((), dtype=torch.long, device=device)
        for _, bits in _bit_blocks(key, size, device):
            near.append(bits[(bits >= low) & (bits <= high)])
            smaller += (bits < low).sum()
        within, place = torch.cat(near), count - int(smaller)
        if 1 <= place <= len(within):
            return within.kthvalue(place).values
        margin *= 4


def _quantile(share: float) -> int:
    """Return the number below which a share of all signed 64-bit numbers lies."""
    return min(max(int(share * 2.0**64), 0), 2**64 - 1) - 2**63


def _subsets(
    name: str, m: int, n: int, projection: Projection, device: torch.device
) -> tuple[Subset, Subset]:
    """Choose |R| ≈ m√p rows, and the number of columns that brings |R||C| closest to p·m·n."""
    p = projection.density
    rows = min(m, max(1, round(m * p if n == 1 else m * math.sqrt(p))))
    columns = min(n, max(1, round(p * m * n / rows)))
    rows = min(m, max(1, round(p * m * n / columns)))  # compensates for the rounding of a short side
    seed = projection.seed
    return (
        Subset(_smallest(key64("rows", seed, name), m, rows / m, device)),
        Subset(_smallest(key64("columns", seed, name), n, columns / n, device)),
    )


def folds(name: str, m: int, n: int, projection: Projection, device: torch.device) -> tuple[Fold, Fold]:
    """Draw the folds of both sides."""
    left, right = folded_sizes(m, n, projection)
    keys = [key64(purpose, projection.seed, name) for purpose in ("fold rows", "fold columns")]
    return Fold.make(keys[0], m, left, device), Fold.make(keys[1], n, right, device)


def folded_sizes(m: int, n: int, projection: Projection) -> tuple[int, int]:
    """Return the folded size of each side: √p of it, but at least ``min_side``; a vector is not folded.

    The error of a fold depends on the number of places and not on their share, so short sides keep a larger share.
    """
    if n == 1:
        return m, 1
    left, right = (max(projection.min_side, round(side * math.sqrt(projection.density))) for side in (m, n))
    return min(m, left), min(n, right)
