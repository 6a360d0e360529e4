"""Key means: every query row is scored against the mean of each key block."""

from __future__ import annotations

from sparse_compiler.patterns.base import WHOLE_BLOCKS, BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.key_groups import of_means
from sparse_compiler.patterns.row_scores import RowScored

__all__ = ["KeyMeans", "of_block_means"]


def of_block_means(request: SelectRequest) -> Scored:
    """``of_means`` of whole key blocks, whatever groups other patterns read."""
    return of_means(request, request.geometry.block_k)


class KeyMeans(RowScored):
    """Keep key blocks whose mean holds ``first`` millionths of some row's estimated mass.

    ``key_groups`` with whole blocks in place of groups of 8 keys: each row of a row block is scored by
    itself, against the blocks that it sees to their end. See ``RowScored`` for ``second`` and what
    is always kept. There is one mean in a block, sample and maximum at once, so that the normaliser
    counts each twice: ``first`` is half of a share of the softmax over block means.

    Source: block means as in SpargeAttn (arXiv 2502.18137) and single rows as in Quest (arXiv
    2406.10774), where bounds are scored in place of means.

    Costs 1/64 of dense attention's score products with blocks of 64, an eighth of ``key_groups``.
    Misses a key that stands out alone among 64. The block that a row sees in part takes no share of
    its softmax, so that the others' weights are too large where most of the mass is local. A soft
    cap is not seen. Under a causal mask the choice for a row block depends on nothing after it.
    """

    name = "key_means"
    number = 7
    summary_keys = WHOLE_BLOCKS
    usual = 5000
    rule = BlockRule(number, every=1, operands=of_block_means, group=WHOLE_BLOCKS)
