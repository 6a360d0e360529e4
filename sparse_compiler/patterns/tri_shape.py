"""Tri-shape: first keys, a local window, and the last rows dense; nothing is estimated."""

from __future__ import annotations

import torch

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import BlockChoice, Limits, Pattern, SelectRequest
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.ranking import real_rows
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.two_sided import local_blocks, sink_blocks

__all__ = ["TriShape"]


class TriShape(Pattern):
    """Keep the first 128 visible keys, ``first`` nearest keys, and all keys of ``second`` last rows.

    Both numbers are tokens; whole blocks are kept, so that every row of a row block that holds one of
    the last rows is dense. Rows of padding are no last rows. Under a mask that shows later keys the
    local window reaches as far to both sides.

    Source: tri-shape of SCBench (arXiv 2412.10319), which adds the last rows to MInference's A-shape.

    Costs no estimate. Misses whatever lies between the first keys and the window of a row that is
    not among the last ones; what the last rows read there was not computed from all that those rows
    could see. No contents decide; under a causal mask the choice for a row block depends on what
    comes after it only by where the prompt ends. The lists of all row blocks are as long as those of
    the last ones: the index takes 4 bytes for each pair of a row block and a key block.
    """

    name = "tri_shape"
    number = 5
    component = "blocks"
    needs_causal = False

    #: First visible keys that are always kept, and last rows that a budget pays for.
    sinks = 128
    last_rows = 100

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 3968, self.last_rows)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        # Dense rows list every block, and between bounds each row has first keys of its own.
        return Limits(blocks=-1)

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # Tokens for an average row, which pays the last rows one by one; each end of the window
        # costs half a row block and half a key block on top.
        tokens = round(budget * (num_keys / 2 if causal else num_keys))
        last = min(self.last_rows, tokens // 4)
        rest = tokens - self.sinks - last
        sides = 1 if causal else 2
        return HeadPattern(
            self.name, max(1, rest // sides - (block_q + PUBLISHED_BLOCK) // 2), last
        )

    def choose(self, request: SelectRequest) -> BlockChoice:
        visible, own = request_relation(request)
        geometry = request.geometry
        first = torch.full_like(request.heads[:1], self.sinks)
        sinks = (sink_blocks(request, first) | own)[:, None]
        local = local_blocks(request, request.first.clamp(min=1))
        _, stop = real_rows(request)
        row = torch.arange(visible.shape[1], device=visible.device) * geometry.block_q
        stop, start = stop[:, None, None], stop[:, None, None] - request.second[:, None]
        last = (row < stop) & (row + geometry.block_q > start) & (start < stop)
        return BlockChoice((local | sinks | last[..., None]) & visible[:, None])

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        # Sinks and window end with a block each, and the last rows begin with a row block.
        window = head.first + block_q + PUBLISHED_BLOCK
        last = head.second + 2 * block_q if head.second else 0
        return min(1.0, 2 * (self.sinks + PUBLISHED_BLOCK + window + last) / num_keys)
