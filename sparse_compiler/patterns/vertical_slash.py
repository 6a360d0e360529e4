"""Vertical-slash: columns and diagonals that the last rows of the prompt look at.

By design the choice for *every* row is made from the last 64 rows: a column that only an early row
needs is missed, and an early row's output depends (through the choice alone) on later rows.
"""

from __future__ import annotations

import torch

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import BandChoice, BandRule, Limits, Pattern, SelectRequest

__all__ = ["FORCED_COLUMNS", "FORCED_DISTANCES", "PROBE_ROWS", "VerticalSlash"]

PROBE_ROWS = 64
FORCED_COLUMNS = 30
FORCED_DISTANCES = 100


class VerticalSlash(Pattern):
    """Keep the ``first`` best columns and the ``second`` best distances of the last 64 rows.

    The first 30 visible columns and the nearest 100 distances are always kept and count towards the
    two numbers.
    Source: MInference 1.0, section 3.2 and algorithm 1.
    """

    name = "vertical_slash"
    config_name = "vertical_and_slash"
    number = 2
    component = "band"
    rule = BandRule(number, "best", PROBE_ROWS, FORCED_COLUMNS, FORCED_DISTANCES)

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 1000, 6096)

    def limits(self, head: HeadPattern, block_q: int, block_k: int) -> Limits:
        return Limits(
            columns=max(head.first, FORCED_COLUMNS), distances=max(head.second, FORCED_DISTANCES)
        )

    def from_budget(self, budget: float, num_keys: int, block_q: int) -> HeadPattern:
        # Half for columns, half for distances. The average row sees half of a column's or scattered
        # distance's reach, so that N of them would make the whole mask; a scattered distance covers
        # block_q of its neighbours too. The local part is paid first.
        local = 2 * (FORCED_DISTANCES + block_q) / num_keys
        half = max(0.0, budget - local) / 2 * num_keys
        columns = max(FORCED_COLUMNS, round(half))
        return HeadPattern(self.name, columns, FORCED_DISTANCES + round(half / block_q))

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

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        # Isolated distances cover a whole row block each: the worst case counts block_q for each.
        scattered = max(0, head.second - FORCED_DISTANCES) * block_q
        local = FORCED_DISTANCES + block_q
        columns = max(head.first, FORCED_COLUMNS)
        return min(1.0, 2 * (columns + local + scattered) / num_keys)
