"""What patterns that list key blocks for each row block have in common: their numbers and bounds."""

from __future__ import annotations

import math

from sparse_compiler.ir.index import AUTOMATIC
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import Limits, Pattern
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.ranking import budget_blocks, density_of_blocks

__all__ = ["RECALL_BLOCKS", "Listed", "limit_blocks"]

RECALL_BLOCKS = 512
"""Blocks of 64 keys that a row block lists at the most where a share of the mass is asked for: all of
32K keys. The bound that grows with the length would cut before the share is reached."""


class Listed(Pattern):
    """A pattern whose ``first`` says which key blocks matter and whose ``second`` how many there may be.

    ``second`` counts blocks of 64 keys for each row block; 0 lets their number grow with the length.

    Attributes:
        usual: ``first`` of a head about which nothing is known.
        widest: ``first`` that leaves it to the number of blocks where to stop.
        is_share: ``first`` is per mille of the estimated mass that is kept.
    """

    component = "blocks"
    needs_causal = False
    usual: int
    widest: int
    is_share: bool = False

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, self.usual, 0)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        return Limits(blocks=limit_blocks(head.second, block_q, block_k, causal))

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        return HeadPattern(self.name, self.widest, budget_blocks(budget, num_keys, causal))

    def from_recall(self, recall: float) -> HeadPattern | None:
        if not self.is_share:
            return None
        # Upwards to whole per mille, but not for the last bit of a binary fraction.
        share = min(1000, math.ceil(recall * 1000 - 1e-6))
        return HeadPattern(self.name, share, RECALL_BLOCKS)

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return density_of_blocks(head.second, num_keys, block_q)


def limit_blocks(second: int, block_q: int, block_k: int, causal: bool = True) -> int:
    """The bound of a row block's list: ``second`` blocks of 64 keys, or what grows with the length."""
    # Its own blocks and those of the first key and of where its rows' keys end are kept in any case.
    least = (1 if causal else 2) * -(-block_q // block_k) + 3
    if second == 0:
        return AUTOMATIC - least
    return max(least, -(-second * PUBLISHED_BLOCK // block_k))
