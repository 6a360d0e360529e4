"""How much work attention over a pattern's index is, before there is an index.

The patterns' own limits and density say how many columns, distances and blocks a head keeps; a
``Clustering`` says how they lie, which depends on the model and the prompt and can be replaced by a
measured density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import sympy

from sparse_compiler.codegen import library
from sparse_compiler.codegen.cost import Amounts
from sparse_compiler.codegen.rules import Rule, TileWork, derive_rules, tile_work
from sparse_compiler.codegen.spec import power_of_two
from sparse_compiler.ir.index import capacity_blocks
from sparse_compiler.ir.monoid import substituted
from sparse_compiler.ir.pattern import HeadPattern, LayerPatterns
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule

__all__ = [
    "Clustering",
    "Covered",
    "Scoring",
    "amounts_dense",
    "amounts_scoring",
    "amounts_sparse",
    "cover",
    "heads_of",
    "key_rule",
    "scoring",
]

_DENSE_BLOCK = 128
"""Rows and keys of a tile of the dense kernels."""
_MATRIX_COST = {"float16": 1.0, "bfloat16": 1.0, "float32": 6.0, "float64": 50.0}
"""Time of a matrix product against 16-bit inputs. float32 is three TF32 products at half the rate;
no executor takes float64 where matrix units count."""
_FAR = 2**40


@dataclass(frozen=True)
class Clustering:
    """How what a head keeps lies together.

    Args:
        run: scattered distances come in runs of this many neighbours, on average.
        reach: share of the rows that a scattered distance serves: 1 if distances are small against
            the prompt, 0.5 if any distance is as likely as another. 26 and 1 reproduce the
            densities of ``benchmarks/attention.py`` at two block sizes and three lengths.
        overlap: share of a row block's key blocks that the next 64 rows keep too.
    """

    run: float = 26.0
    reach: float = 1.0
    overlap: float = 0.8


@dataclass(frozen=True)
class Covered:
    """Pairs of one head at one row block size; M pairs for each key that a row block lists.

    Args:
        wanted: pairs if row blocks had one row.
        whole: pairs in contiguous whole tiles.
        edge: pairs at keys of ranges' ends, gathered singly.
        columns: pairs at columns, gathered and tested; also where the band covers them already.
        blocks: pairs in listed blocks.
        doubled: of the columns, those that the band covers: worked at, not counted.
    """

    wanted: float
    whole: float = 0.0
    edge: float = 0.0
    columns: float = 0.0
    blocks: float = 0.0
    doubled: float = 0.0

    @property
    def total(self) -> float:
        """Pairs worked at."""
        return self.whole + self.edge + self.columns + self.blocks

    @property
    def counted(self) -> float:
        """Distinct pairs, the numerator of density."""
        return self.total - self.doubled

    def scaled(self, factor: float) -> Covered:
        return Covered(*(factor * value for value in vars(self).values()))


@dataclass(frozen=True)
class Scoring:
    """Work of the patterns that score every row by itself (``BlockRule``), over all heads.

    Args:
        heads: query heads that do.
        rows: (row, head) pairs, over the batch.
        flops: arithmetic, in that of 16-bit products.
    """

    heads: int = 0
    rows: float = 0.0
    flops: float = 0.0


def scoring(pattern: HeadPattern | LayerPatterns, shape: SiteShape, block_k: int) -> Scoring:
    """What scoring rows takes, by the rules of the patterns."""
    heads, flops = 0, 0.0
    for head, count in heads_of(pattern, shape.heads):
        rule = registry.get(head.name).rule
        if isinstance(rule, BlockRule):
            heads += count
            pairs = shape.allowed_pairs * count / shape.heads
            flops += rule.flops(pairs, shape.head_dim, block_k) * _MATRIX_COST[shape.dtype]
    return Scoring(heads, float(shape.batch * heads * shape.num_q), flops)


def heads_of(
    pattern: HeadPattern | LayerPatterns, heads: int
) -> tuple[tuple[HeadPattern, int], ...]:
    """Distinct head patterns with the number of heads that follow each."""
    if isinstance(pattern, HeadPattern):
        return ((pattern, heads),)
    counts: dict[HeadPattern, int] = {}
    for head in pattern.heads:
        counts[head] = counts.get(head, 0) + 1
    return tuple(counts.items())


def _scattered(head: HeadPattern, block_k: int) -> float:
    """Distances that may lie alone: each costs a row block of keys, which its density shows."""
    found = registry.get(head.name)
    gain = found.density(head, _FAR, 2 * block_k) - found.density(head, _FAR, block_k)
    return max(0.0, gain * _FAR / 2 / block_k - 1)


def cover(
    head: HeadPattern, shape: SiteShape, block_q: int, block_k: int, clustering: Clustering
) -> Covered:
    """Expected pairs of one head of one batch entry.

    Scattered runs fall on each other and on the local window with the chance that they meet there
    (coverage 1 - exp(-y) of what is left, y being the sum of all lengths over the room).
    """
    allowed = shape.allowed_pairs / shape.batch / shape.heads
    pattern = registry.get(head.name)
    if head.name == "dense":
        return Covered(wanted=allowed, blocks=allowed)
    limits = pattern.limits(head, block_q, block_k)
    visible = allowed / shape.num_q
    if isinstance(pattern.rule, BlockRule):
        # What row blocks may list, as the pattern says it, of causal pairs; most prompts fill it.
        keys = pattern.density(head, shape.num_k, block_q) * (shape.num_k + 1) / 2
        blocks = allowed * min(1.0, keys / visible)
        return Covered(wanted=blocks, blocks=blocks)
    if pattern.component == "blocks":
        blocks = capacity_blocks(limits.blocks, shape.num_k, block_k)
        if limits.blocks == -1:  # a few long lists may ask for no bound
            blocks = math.ceil(pattern.density(head, shape.num_k, block_q) * visible / block_k)
        return _cover_blocks(blocks, block_q, block_k, visible, shape, clustering)
    distances = limits.distances if limits.distances >= 0 else shape.num_k
    columns = min(limits.columns if limits.columns >= 0 else shape.num_k, shape.num_k)
    scattered = min(_scattered(head, block_k), distances)
    local = distances - scattered
    runs = scattered / clustering.run

    def band(rows: int) -> tuple[float, float, float]:
        """Pairs of the local window, of scattered runs, and a run's length, for row blocks."""
        near = _window(local + rows - 1, shape)
        length = clustering.run + rows - 1
        crowd = clustering.reach * runs * length * shape.num_q / allowed
        return near, (allowed - near) * -math.expm1(-crowd), length

    near, far, length = band(block_q)
    # The ends of a run: half a tile on average, the whole of a short one. The diagonal is tested.
    end = min(1.0, block_k / 2 / length)
    diagonal = min(near, shape.num_q * (block_q + block_k / 2))
    share = columns / shape.num_k
    singles = share * allowed
    near_one, far_one, _ = band(1)
    wanted = near_one + far_one + share * (allowed - near_one - far_one)
    return Covered(
        wanted=min(wanted, allowed),
        whole=near - diagonal + far * (1 - end),
        edge=diagonal + far * end,
        columns=singles,
        doubled=singles * min(1.0, (near + far) / allowed),
    )


def _window(keys: float, shape: SiteShape) -> float:
    """Pairs of rows with their nearest ``keys`` keys."""
    if not shape.causal:
        return min(keys, shape.num_k) * shape.num_q
    # The first rows see fewer: row i has num_k - num_q + 1 + i keys.
    missing = max(0.0, keys - (shape.num_k - shape.num_q + 1))
    short = min(missing, shape.num_q)
    return keys * shape.num_q - short * missing + short * (short - 1) / 2


def _cover_blocks(
    count: int,
    block_q: int,
    block_k: int,
    visible: float,
    shape: SiteShape,
    clustering: Clustering,
) -> Covered:
    keys = count * block_k if count >= 0 else shape.num_k
    # More rows take the union of what 64 rows each would take.
    wider = max(0.0, math.log2(block_q / 64)) if block_q > 64 else 0.0
    union = keys * (2 - clustering.overlap) ** wider
    rows = shape.num_q
    saturated = visible * 2 * -math.expm1(-union / (2 * visible))
    own = rows * (block_q + block_k) / 2
    return Covered(
        wanted=rows * visible * 2 * -math.expm1(-keys / (2 * visible)),
        blocks=min(rows * saturated + own, rows * visible + own),
    )


@cache
def key_rule() -> Rule:
    """The rule behind every candidate: single keys gathered into a dense tile of M x N pairs."""
    letters = {"m": "M", "n": "N", "d": "D", "e": "Dv"}
    extents = {axis: library.size(name) for axis, name in letters.items()}
    rules = derive_rules(library.attention(), extents, sparse="K")
    (along_keys,) = (rule for rule in rules if rule.axis.axis == "n")
    return along_keys


@cache
def _tile_work() -> TileWork:
    return tile_work(key_rule(), "n")


def _tile(shape: SiteShape, block_q: int, block_k: int) -> dict[str, float]:
    """flops, exponents and bytes of one dense tile, padded as the kernels pad it."""
    work = _tile_work()
    sizes: dict[sympy.Basic, int] = {
        library.size("M"): block_q,
        library.size("N"): block_k,
        library.size("D"): power_of_two(shape.head_dim),
        library.size("Dv"): power_of_two(shape.value_dim),
    }
    flops = float(substituted(work.flops, sizes)) * _MATRIX_COST[shape.dtype]
    return {
        "flops": flops,
        "exponents": float(substituted(work.exponents, sizes)),
        "streamed": float(substituted(work.streamed, sizes)) * shape.element_size,
    }


def _fixed(shape: SiteShape, block_q: int) -> dict[str, float]:
    """Programs, bytes that pass once, and bytes that the programs of one key head share."""
    width = shape.head_dim + shape.value_dim
    queries = shape.batch * shape.heads * shape.num_q
    keys = shape.batch * shape.kv_heads * shape.num_k
    return {
        "programs": shape.batch * shape.heads * math.ceil(shape.num_q / block_q),
        "distinct": float((queries + keys) * width * shape.element_size),
        "working_set": float(shape.num_k * width * shape.element_size),
    }


def amounts_dense(shape: SiteShape) -> Amounts:
    """Dense attention, with the diagonal's half tiles."""
    tile = _tile(shape, _DENSE_BLOCK, _DENSE_BLOCK)
    pairs = shape.allowed_pairs
    diagonal = shape.batch * shape.heads * shape.num_q * _DENSE_BLOCK / 2 if shape.causal else 0
    area = _DENSE_BLOCK * _DENSE_BLOCK
    return Amounts(
        tiles=(pairs + diagonal) / area, asked=pairs / area, **tile, **_fixed(shape, _DENSE_BLOCK)
    )


def amounts_scoring(scored: Scoring) -> Amounts:
    """Building an index by scoring rows, without attention."""
    nothing = dict.fromkeys(("tiles", "asked", "flops", "exponents", "streamed", "launches"), 0.0)
    return Amounts(
        **nothing, has_index=1.0, scored=scored.flops, scored_rows=scored.rows, has_scores=1.0
    )


def amounts_sparse(
    shape: SiteShape,
    covered: Covered,
    block_q: int,
    block_k: int,
    *,
    ranked: float = 0.0,
    launches: float = 4.0,
    parts: float = 0.0,
    scored: Scoring | None = None,
) -> Amounts:
    """Sparse attention over an index.

    Args:
        covered: pairs of all heads and batch entries together.
        ranked: (row block, key block, head) triples that selection ranks.
        parts: bytes of partial results of split rows.
        scored: work of scoring rows; None is nothing. Other heads' keys are scanned.
    """
    scored = scored or Scoring()
    area = block_q * block_k
    fixed = _fixed(shape, block_q)
    # Row blocks that run together are neighbours, and a band's keys lie at the same distances from
    # each: what is in flight fits the L2 cache. Blocks may lie anywhere.
    fixed["working_set"] *= covered.blocks / max(covered.total, 1.0)
    return Amounts(
        tiles=covered.total / area,
        asked=min(covered.wanted, covered.total) / area,
        **_tile(shape, block_q, block_k),
        **fixed,
        gathered=(covered.edge + covered.columns) / block_q,
        tested=covered.columns / block_q,
        launches=launches,
        parts=parts,
        index_keys=shape.batch * (shape.heads - scored.heads) * shape.num_k,
        index_pairs=ranked,
        has_index=1.0,
        scored=scored.flops,
        scored_rows=scored.rows,
        has_scores=1.0 if scored.heads else 0.0,
    )
