"""Key groups: every query row is scored against the means of small groups of neighbouring keys.

Averages hide the one row and the one key that matter: a mean over 64 queries or 64 keys finds no
needle, and the last rows of a prompt know nothing of questions that stand earlier. So rows are
scored one by one, against means of few keys, and a key block counts as much as its best group does
for the best of the rows that share a list (docs/design/0016-estimators.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.ir.index import automatic_blocks
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import (
    AUTOMATIC,
    BlockChoice,
    BlockRule,
    Limits,
    Pattern,
    SelectRequest,
)
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.summaries import means_of, visible_in_groups
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals

__all__ = ["MILLION", "KeyGroups", "keep_groups", "score_groups"]

MILLION = 1_000_000

#: The most logits that are looked at together.
_CHUNK = 1 << 24


class KeyGroups(Pattern):
    """Keep key blocks that hold a group of 8 keys with ``first`` millionths of a row's mass.

    The mass of a group for a row is estimated as the softmax over all groups' means that the row
    sees as a whole; the row's normaliser is estimated from every fourth group. ``second`` is the
    most key blocks of 64 keys that a row block keeps, the best of them; 0 lets this grow with the
    length. A row block's own blocks and the block of the first visible key are always kept.

    Costs 1/8 of dense attention's score products for the maxima and 1/32 for the normalisers. Misses
    keys whose logit a mean of 8 hides, and, with a soft cap, overestimates peaks: the cap is not
    seen here. Under a causal mask the choice for a row block depends on nothing after it.
    """

    name = "key_groups"
    number = 4
    component = "blocks"
    needs_causal = False
    summary_keys = 8
    rule = BlockRule(number, sample=4)

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 5000, 0)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        return Limits(blocks=limit_blocks(head.second, block_q, block_k))

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # Blocks are ranked and cut at the budget; the threshold lets no more than its share through.
        seen = num_keys / 2 if causal else num_keys
        return HeadPattern(self.name, 1, max(2, round(budget * seen / PUBLISHED_BLOCK)))

    def choose(self, request: SelectRequest) -> BlockChoice:
        relation = request_relation(request)
        slots = range(request.heads.shape[0])
        kept = [
            keep_groups(request, s, score_groups(request, s, self.rule.sample), *relation)
            for s in slots
        ]
        return BlockChoice(torch.stack(kept, 1))

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        most = head.second or automatic_blocks(num_keys, PUBLISHED_BLOCK)
        return min(1.0, 2 * (most * PUBLISHED_BLOCK + block_q) / num_keys)


def limit_blocks(second: int, block_q: int, block_k: int) -> int:
    """The bound of a row block's list: ``second`` blocks of 64 keys, or what grows with the length."""
    # Its own blocks and that of the first key are kept in any case.
    least = -(-block_q // block_k) + 2
    if second == 0:
        return AUTOMATIC - least
    return max(least, -(-second * PUBLISHED_BLOCK // block_k))


def score_groups(request: SelectRequest, slot: int, sample: int) -> Tensor:
    """Estimated log of the mass of each key block's best group for a row block's best row.

    Args:
        request: with a summary.
        slot: position in ``request.heads``.
        sample: a row's normaliser is estimated from every ``sample``-th group.
    Returns:
        float32 [B, row blocks, key blocks]; -inf where no row sees a whole group; NaN counts as inf.
    """
    geometry, num_q, num_k = request.geometry, request.q.shape[2], request.k.shape[2]
    head = request.heads[slot : slot + 1]
    kv_head = head // (request.q.shape[1] // request.k.shape[1])
    means = means_of(request, kv_head, request.group)
    counts = visible_in_groups(request, request.group)
    low, high = row_intervals(geometry, num_q, request.rows, request.bounds)
    end = torch.arange(1, means.shape[1] + 1, device=means.device) * request.group - 1
    end = end.clamp(max=num_k - 1)
    queries = request.q.index_select(1, head)[:, 0]
    size = geometry.block_q
    step = max(1, _CHUNK // (means.shape[0] * means.shape[1] * size)) * size
    parts = []
    for first in range(0, num_q, step):
        rows = slice(first, min(num_q, first + step))
        logits = torch.matmul(queries[:, rows].float(), means.transpose(-1, -2)) * request.scale
        if request.bias is not None:
            logits = logits + _group_bias(request, head, rows)
        seen = (end >= low[:, rows, None]) & (end <= high[:, rows, None]) & (counts > 0)[:, None]
        logits = torch.where(logits.isnan(), math.inf, logits).masked_fill(~seen, -math.inf)
        parts.append(_block_scores(logits, geometry.block_k // request.group, size, sample))
    return torch.cat(parts, 1)


def _block_scores(logits: Tensor, per_block: int, size: int, sample: int) -> Tensor:
    """[B, row blocks, key blocks] of logits [B, R, groups]."""
    normaliser = logits[..., sample // 2 :: sample].logsumexp(-1) + math.log(sample)
    hidden = -math.inf
    pad = -logits.shape[2] % per_block
    best = torch.nn.functional.pad(logits, (0, pad), value=hidden).unflatten(2, (-1, per_block))
    best = best.amax(-1)
    # A row of which no sampled group was seen keeps all that it sees.
    score = torch.where(best == hidden, hidden, best - normaliser[..., None])
    score = torch.where(score.isnan(), math.inf, score)
    score = torch.nn.functional.pad(score, (0, 0, 0, -score.shape[1] % size), value=hidden)
    return score.unflatten(1, (-1, size)).amax(2)


def _group_bias(request: SelectRequest, head: Tensor, rows: slice) -> Tensor:
    """The largest bias of each group, float32 [B, R, groups]."""
    assert request.bias is not None
    batch, num_q, num_k = request.q.shape[0], request.q.shape[2], request.k.shape[2]
    row = torch.arange(rows.start, rows.stop, device=request.q.device).expand(batch, -1)
    bias = bias_of_rows(request.bias, head, row, num_q, num_k).float()
    pad = -num_k % request.group
    bias = torch.nn.functional.pad(bias, (0, pad), value=-math.inf)
    return bias.unflatten(-1, (-1, request.group)).amax(-1)


def keep_groups(
    request: SelectRequest, slot: int, scores: Tensor, visible: Tensor, own: Tensor
) -> Tensor:
    """Blocks above the threshold, the best where there are too many; bool like ``scores``.

    Args:
        scores: float32 [B, row blocks, key blocks].
        visible, own: as from ``block_relation``.
    """
    always = (own | _edges(request)) & visible
    threshold = torch.log(request.first[slot].clamp(min=1) / MILLION)
    wanted = ((scores >= threshold) & visible) | always
    ranked = scores.masked_fill(always, math.inf).masked_fill(~wanted, -math.inf)
    size, block_k = scores.shape[-1], request.geometry.block_k
    automatic = min(size, automatic_blocks(request.k.shape[2], block_k))
    asked = -(-request.first.new_tensor(PUBLISHED_BLOCK) * request.second[slot] // block_k)
    most = torch.where(request.second[slot] > 0, asked, automatic)
    most = torch.maximum(most, always.sum(-1, keepdim=True))
    limit = request.limits.blocks
    count = size if limit == -1 else min(size, capacity_blocks(limit, request.k.shape[2], block_k))
    found = torch.topk(ranked, count, dim=-1, sorted=True).indices
    rank = torch.arange(count, device=scores.device)
    best = torch.zeros_like(wanted).scatter_(-1, found, (rank < most).expand(found.shape))
    return best & wanted


def _edges(request: SelectRequest) -> Tensor:
    """Blocks of the first visible key and of each row's last one, bool [B, row blocks, key blocks].

    A group that reaches past what a row sees is never scored for it; its block is kept instead.
    """
    raise NotImplementedError
