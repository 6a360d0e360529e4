"""Row scores: every query row is scored by itself, and a key block counts for its best row.

Averages hide the one row and the one key that matter, and the last rows of a prompt know nothing of
questions that stand earlier (docs/design/0016-estimators.md). Patterns of this kind differ in what
a row is scored against (``Scored``); what follows from the scores is the same:

* a block's score for a row is that of its best group of keys, less the row's normaliser;
* the normaliser is the log of the sum of what sampled groups stand for and of the best group of
  each key block. The samples know how broad a row's attention is, the maxima know its peaks; where
  both see the same mass, the sum is at most twice too large;
* a block's score for a row block is the largest of its rows'.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.patterns.base import BlockChoice, BlockRule, Scored, SelectRequest
from sparse_compiler.patterns.listed import Listed
from sparse_compiler.patterns.ranking import edge_blocks, keep_best_blocks, wanted_for_share
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.summaries import visible_in_groups
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals

__all__ = ["MILLION", "RowScored", "broken_blocks", "keep_blocks", "score_blocks"]

MILLION = 1_000_000

#: The most logits that are looked at together.
_CHUNK = 1 << 24


class RowScored(Listed):
    """Keep key blocks with a group of keys that holds ``first`` millionths of some row's mass.

    ``second`` is the most key blocks of 64 keys that a row block keeps, the best of them; 0 lets this
    grow with the length. A row block's own blocks, the block of the first visible key and those
    where its rows' keys end are always kept.
    """

    # Of a budget, blocks are ranked and cut; a millionth lets nearly all of them through.
    widest = 1

    def choose(self, request: SelectRequest) -> BlockChoice:
        rule = self.rule
        assert isinstance(rule, BlockRule)
        relation, scored = request_relation(request), rule.operands(request)
        kept = [
            keep_blocks(
                *(request, slot, score_blocks(request, slot, scored, rule.every)),
                *relation,
                broken=broken_blocks(request, slot, scored),
                recall=rule.recall,
            )
            for slot in range(request.heads.shape[0])
        ]
        return BlockChoice(torch.stack(kept, 1))


def score_blocks(request: SelectRequest, slot: int, scored: Scored, every: int) -> Tensor:
    """Estimated log of the mass of each key block's best group for a row block's best row.

    Args:
        request: what rows see is taken from it.
        slot: position in ``request.heads``.
        scored: of all heads.
        every: as in ``BlockRule``.
    Returns:
        float32 [B, row blocks, key blocks]; -inf where no row sees a whole group.
    """
    geometry, num_q, group = request.geometry, request.q.shape[2], scored.group
    head = request.heads[slot : slot + 1]
    keys = scored.keys.index_select(1, head // (request.q.shape[1] // scored.keys.shape[1]))[:, 0]
    keys = keys.float().transpose(-1, -2)
    queries = scored.queries.index_select(1, head)[:, 0]
    low, high = row_intervals(geometry, num_q, request.rows, request.bounds)
    start = torch.arange(keys.shape[2], device=keys.device) * group
    # A group ends with its last key that padding leaves.
    end = torch.minimum(start + group, (request.rows[:, 3] + request.rows[:, 4]).long()[:, None])
    end = (end - 1).clamp(max=request.k.shape[2] - 1)[:, None]
    shown = (visible_in_groups(request, group) > 0)[:, None]
    size = geometry.block_q
    step = max(1, _CHUNK // (keys.shape[0] * keys.shape[2] * size)) * size
    parts = []
    for first in range(0, num_q, step):
        rows = slice(first, min(num_q, first + step))
        logits = torch.matmul(queries[:, rows].float(), keys) * scored.scale
        if request.bias is not None:
            logits = logits + _group_bias(request, head, rows, group)
        seen = (end >= low[:, rows, None]) & (end <= high[:, rows, None]) & shown
        logits = logits.masked_fill(~seen, -math.inf)
        parts.append(_of_rows(logits, geometry.block_k // group, size, every))
    return torch.cat(parts, 1)


def _of_rows(logits: Tensor, per_block: int, size: int, every: int) -> Tensor:
    """[B, row blocks, key blocks] of logits [B, R, groups]."""
    hidden = -math.inf
    pad = -logits.shape[2] % per_block
    blocks = torch.nn.functional.pad(logits, (0, pad), value=hidden).unflatten(2, (-1, per_block))
    best = blocks.amax(-1)
    every = min(every, per_block)
    samples = blocks[..., every // 2 :: every].flatten(2).logsumexp(-1) + math.log(every)
    normaliser = torch.logaddexp(samples, best.logsumexp(-1))
    score = torch.where(best == hidden, hidden, best - normaliser[..., None])
    score = torch.where(score.isnan(), math.inf, score)
    score = torch.nn.functional.pad(score, (0, 0, 0, -score.shape[1] % size), value=hidden)
    return score.unflatten(1, (-1, size)).amax(2)


def _group_bias(request: SelectRequest, head: Tensor, rows: slice, group: int) -> Tensor:
    """The largest bias of each group, float32 [B, R, groups]."""
    assert request.bias is not None
    batch, num_q, num_k = request.q.shape[0], request.q.shape[2], request.k.shape[2]
    row = torch.arange(rows.start, rows.stop, device=request.q.device).expand(batch, -1)
    bias = bias_of_rows(request.bias, head, row, num_q, num_k).float()
    bias = torch.nn.functional.pad(bias, (0, -num_k % group), value=-math.inf)
    return bias.unflatten(-1, (-1, group)).amax(-1)


def broken_blocks(request: SelectRequest, slot: int, scored: Scored) -> Tensor:
    """Key blocks that hold a NaN or inf, bool [B, 1, key blocks]; a score says nothing of them."""
    head = request.heads[slot : slot + 1]
    sharing = request.q.shape[1] // scored.broken.shape[1]
    broken = scored.broken.index_select(1, head // sharing)
    per_block = request.geometry.block_k // scored.group
    pad = -broken.shape[2] % per_block
    return torch.nn.functional.pad(broken, (0, pad)).unflatten(2, (-1, per_block)).any(-1)


def keep_blocks(
    request: SelectRequest,
    slot: int,
    scores: Tensor,
    visible: Tensor,
    own: Tensor,
    *,
    broken: Tensor | None = None,
    recall: bool = False,
) -> Tensor:
    """Blocks above the threshold, the best where there are too many; bool like ``scores``.

    Args:
        scores: float32 [B, row blocks, key blocks], logs of estimated mass.
        visible, own: as from ``block_relation``.
        broken: bool, kept wherever visible.
        recall: as in ``BlockRule``.
    """
    always = own | edge_blocks(request)
    always = (always if broken is None else always | broken) & visible
    first = request.first[slot]
    if recall:
        wanted = wanted_for_share(first, scores, visible, always)
    else:
        wanted = ((scores >= torch.log(first.clamp(min=1) / MILLION)) & visible) | always
    return keep_best_blocks(request, slot, scores, wanted, always, own)
