"""Low rank by recall: single keys in few directions, and as many blocks as hold a share of the mass."""

from __future__ import annotations

from sparse_compiler.patterns.base import BlockRule
from sparse_compiler.patterns.low_rank import COSTS_AS, LowRank, sketches

__all__ = ["LowRankRecall"]


class LowRankRecall(LowRank):
    """Keep ``first`` per mille of every row's mass, scored as ``low_rank`` scores it.

    A block of keys is taken to hold, for every row of the row block, 4 times what its best key holds
    for its best row, and at most all. Blocks go, the least first, as long as what goes adds up to no
    more than 1 - ``first`` / 1000; where all blocks together add up to less than 1, of that sum. What
    is always kept (see ``RowScored``) is never lost. ``second`` is the most key blocks of 64 keys that
    a row block keeps, the best of them; 0 lets this grow with the length. Where it cuts, the share is
    not reached.

    What is bounded: in no row do the best keys of the blocks that go hold more than a quarter of what
    may be lost, as far as 32 directions and the estimated normaliser (up to twice too large, too small
    where a broad row's samples miss its mass) know it. What is not: the rest of those blocks. A block
    of 64 keys can hold 64 times its best key, so that a row whose attention is broad, beside rows
    whose attention is not, can lose up to 16 times the share. The factor 64 would bound it, and keeps
    nearly everything; with 1 half the rows of some heads miss the share (docs/design/0016-estimators.md).
    The sum of blocks' largest masses over the rows errs to the safe side: no row has them all.

    Costs and misses what ``low_rank`` does.
    """

    name = "low_rank_recall"
    number = 11
    usual = 950
    widest = 1000
    is_share = True
    rule = BlockRule(number, every=32, operands=sketches, rank=COSTS_AS, recall=True)
