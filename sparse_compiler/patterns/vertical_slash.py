"""Vertical-slash: columns and diagonals that the last rows of the prompt look at.

By design the choice for *every* row is made from the last 64 rows: a column that only an early row
needs is missed, and an early row's output depends (through the choice alone) on later rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import (
    BandChoice,
    BandRule,
    BlockChoice,
    Limits,
    Pattern,
    SelectRequest,
)
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.two_sided import blocks_of, sink_blocks, spread_probe, spread_rows

__all__ = [
    "FORCED_COLUMNS",
    "FORCED_DIAGONALS",
    "FORCED_DISTANCES",
    "PROBE_ROWS",
    "VerticalSlash",
]

PROBE_ROWS = 64
FORCED_COLUMNS = 30
FORCED_DISTANCES = 100
FORCED_DIAGONALS = 2 * FORCED_DISTANCES - 1
"""The nearest distances of both sides; the own position is one of each."""


class VerticalSlash(Pattern):
    """Keep the ``first`` best columns and the ``second`` best distances of the last 64 rows.

    The first 30 visible columns and the nearest 100 distances are always kept and count towards the
    two numbers. Under a mask that shows later keys the probe is 64 rows spread over all of them,
    diagonals lie on both sides, and a row block keeps the key blocks that hold what it would keep.
    Source: MInference 1.0, section 3.2 and algorithm 1.
    """

    name = "vertical_slash"
    config_name = "vertical_and_slash"
    number = 2
    component = "band"
    needs_causal = False
    rule = BandRule(number, "best", PROBE_ROWS, FORCED_COLUMNS, FORCED_DISTANCES)

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 1000, 6096)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        columns, distances = max(head.first, FORCED_COLUMNS), head.second
        if causal:
            return Limits(columns, max(distances, FORCED_DISTANCES))
        return Limits(columns, max(distances, FORCED_DIAGONALS), blocks=-1)

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # Half for columns, half for distances. The average row sees half of a column's or scattered
        # distance's reach, so that N of them would make the whole mask; a scattered distance covers
        # block_q of its neighbours too. The local part is paid first.
        if not causal:
            return self._from_budget_two_sided(budget, num_keys, block_q)
        local = 2 * (FORCED_DISTANCES + block_q) / num_keys
        half = max(0.0, budget - local) / 2 * num_keys
        columns = max(FORCED_COLUMNS, round(half))
        return HeadPattern(self.name, columns, FORCED_DISTANCES + round(half / block_q))

    def _from_budget_two_sided(self, budget: float, num_keys: int, block_q: int) -> HeadPattern:
        # Whole key blocks are kept: a scattered column costs each row one, and a scattered diagonal
        # its row block and one.
        block = PUBLISHED_BLOCK
        local = (FORCED_DIAGONALS + block_q + FORCED_COLUMNS + 2 * block) / num_keys
        half = max(0.0, budget - local) / 2 * num_keys
        columns = FORCED_COLUMNS + round(half / block)
        return HeadPattern(self.name, columns, FORCED_DIAGONALS + round(half / (block + block_q)))

    def choose(self, request: SelectRequest) -> BandChoice:
        rows = request.rows.long()
        last = torch.minimum(rows[:, 0] + rows[:, 1], rows[:, 3] + rows[:, 4] - rows[:, 2])
        columns, distances = request.probe(request.heads, last - PROBE_ROWS, PROBE_ROWS)
        keys = torch.arange(columns.shape[-1], device=columns.device)
        kv_start = rows[:, 3, None, None]
        forced = (keys >= kv_start) & (keys < kv_start + FORCED_COLUMNS)
        steps = torch.arange(distances.shape[-1], device=distances.device)
        limits = request.limits
        return BandChoice(
            columns=request.keep_best(
                columns.masked_fill(forced, float("inf")),
                request.first.clamp(min=FORCED_COLUMNS),
                limits.columns,
            ),
            distances=request.keep_best(
                distances.masked_fill(steps < FORCED_DISTANCES, float("inf")),
                request.second.clamp(min=FORCED_DISTANCES),
                limits.distances,
            ),
        )

    def choose_two_sided(self, request: SelectRequest) -> BlockChoice:
        visible, own = request_relation(request)
        row = spread_rows(request, PROBE_ROWS)
        first = torch.full_like(request.heads[:1], FORCED_COLUMNS)
        always = (sink_blocks(request, first) & visible) | own
        kept = [
            blocks_of(request, *_best(request, slot, row)) & visible | always
            for slot in range(request.heads.shape[0])
        ]
        return BlockChoice(torch.stack(kept, 1))

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        # Isolated distances cover a whole row block each: the worst case counts block_q for each.
        scattered = max(0, head.second - FORCED_DISTANCES) * block_q
        local = FORCED_DISTANCES + block_q
        columns = max(head.first, FORCED_COLUMNS)
        return min(1.0, 2 * (columns + local + scattered) / num_keys)


def _best(request: SelectRequest, slot: int, row: Tensor) -> tuple[Tensor, Tensor]:
    """Best columns bool [B, Lk] and diagonals bool [B, Lq + Lk - 1] of one slot."""
    columns, diagonals = spread_probe(request, slot, row)
    rows, num_q = request.rows.long(), request.q.shape[2]
    key = torch.arange(columns.shape[-1], device=columns.device)
    kv_start = rows[:, 3, None]
    forced = (key >= kv_start) & (key < kv_start + FORCED_COLUMNS)
    diagonal = torch.arange(diagonals.shape[-1], device=columns.device)
    distance = (diagonal - (num_q - 1) - rows[:, 2, None]).abs()
    kept = [
        request.keep_best(
            scores.masked_fill(always, float("inf"))[:, None],
            wanted[slot : slot + 1].clamp(min=least),
            most,
        )[:, 0]
        for scores, always, wanted, least, most in (
            (columns, forced, request.first, FORCED_COLUMNS, request.limits.columns),
            (
                diagonals,
                distance < FORCED_DISTANCES,
                request.second,
                FORCED_DIAGONALS,
                request.limits.distances,
            ),
        )
    ]
    return kept[0], kept[1]
