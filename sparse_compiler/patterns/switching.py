"""Switching: each head asks its last rows whether pooled means describe it, or columns and diagonals.

By design the question is put to the last rows of the prompt, and where columns and diagonals win they
are those of the last rows: the choice for an early row depends on later ones, as in vertical-slash.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.patterns.adaptive import pooled_mass
from sparse_compiler.patterns.base import WHOLE_BLOCKS, BlockChoice, SelectRequest
from sparse_compiler.patterns.block_sparse import PUBLISHED_BLOCK
from sparse_compiler.patterns.listed import Listed
from sparse_compiler.patterns.ranking import (
    CHUNK,
    first_blocks,
    keep_best_blocks,
    keep_share,
    pooled_bias,
    real_rows,
)
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.summaries import means_of, visible_in_groups
from sparse_compiler.patterns.two_sided import spread_probe, spread_rows
from sparse_compiler.patterns.visible import row_intervals

__all__ = ["PROBE_ROWS", "SHARE", "Switching", "SwitchingRecall", "divergence"]

PROBE_ROWS = 64
SHARE = 950
"""Per mille of the mass that either way of choosing keeps."""

#: Divergence up to which means describe the last rows, per mille.
_APART = 100
#: Shares of a mass are summed as integers of this unit, so that no order of the sum shows.
_WHOLE = 1 << 40


class Switching(Listed):
    """Choose as ``adaptive`` does where pooled means describe the last rows, else by their columns.

    The attention of the last 64 rows over key blocks is compared with its estimate from their mean
    query and the blocks' mean keys. Where the square root of the Jensen-Shannon divergence (natural
    logarithms, so at most 0.833) is below ``first`` per mille, the head keeps what ``adaptive`` keeps
    at 950 per mille. Else it keeps the fewest key blocks and the fewest bins of 64 diagonals that
    each hold 950 per mille of the last rows' attention, as blocks of each row block. ``second`` is
    the most key blocks of 64 keys that a row block keeps, the best of them; 0 lets this grow with the
    length. A row block's own blocks and the block of the first visible key are always kept.

    Source: FlexPrefill (arXiv 2502.20766), algorithms 1 to 4; its least number of blocks is left
    out, and each row block has a share of its own, as ``adaptive`` says. Under a mask that shows
    later keys the probe is 64 rows spread over all of them.

    Costs what ``adaptive`` costs and 64 rows of dense attention; both choices are made, since only
    the device knows which one counts. The choice for a row depends on the last rows, causal mask or
    not. Misses, as columns and diagonals, what only earlier rows want; as pooled means, what means
    hide.
    """

    name = "switching"
    number = 9
    summary_keys = WHOLE_BLOCKS
    # Of a budget, a cap alone: a head whose mass sits in fewer blocks keeps fewer.
    usual = widest = _APART

    def choose(self, request: SelectRequest) -> BlockChoice:
        visible, own = request_relation(request)
        always = (own | first_blocks(request)) & visible
        share, apart = request.first, torch.full_like(request.first, _APART)
        if not self.is_share:
            share, apart = torch.full_like(request.first, SHARE), request.first
        row = _probe_rows(request)
        kept = []
        for slot in range(request.heads.shape[0]):
            columns, diagonals = spread_probe(request, slot, row)
            mass = pooled_mass(request, slot, visible)
            pooled = keep_share(request, slot, share[slot], mass, visible, always, own)
            scores = _slash_scores(request, columns, diagonals, share[slot])
            wanted = ((scores > 0) & visible) | always
            slash = keep_best_blocks(request, slot, scores, wanted, always, own)
            seen = _by_block(request, columns)
            agrees = divergence(_estimate(request, slot, row), seen) < apart[slot] / 1000
            kept.append(torch.where(agrees[:, None, None], pooled, slash))
        return BlockChoice(torch.stack(kept, 1))


class SwitchingRecall(Switching):
    """``switching`` with ``first`` per mille of the mass to keep, in place of 950.

    The question to the last rows is that of ``switching`` with its usual number, 100. See there for
    ``second``, what is always kept, costs and what is missed.
    """

    name = "switching_recall"
    number = 12
    usual = SHARE
    widest = 1000
    is_share = True


def _probe_rows(request: SelectRequest) -> Tensor:
    """Addresses of the rows that are asked, int64 [B, 64]; the first real one again for missing ones."""
    if request.geometry.right != 0:
        return spread_rows(request, PROBE_ROWS)
    start, stop = real_rows(request)
    row = stop[:, None] - PROBE_ROWS + torch.arange(PROBE_ROWS, device=stop.device)
    return torch.maximum(row, start[:, None]).clamp(0, request.q.shape[2] - 1)


def divergence(estimated: Tensor, seen: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, natural logarithms, of [B, X] and [B, X]: [B].

    Both are scaled to a sum of 1; what is not finite counts as 0.
    """
    parts = []
    for values in (estimated, seen):
        finite = torch.where(values.isfinite(), values, 0.0)
        parts.append(finite / finite.sum(-1, keepdim=True).clamp(min=1e-30))
    middle = ((parts[0] + parts[1]) / 2).clamp(min=1e-30)
    first, second = (torch.xlogy(part, part / middle).sum(-1) for part in parts)
    return ((first + second) / 2).clamp(min=0.0).sqrt()


def _by_block(request: SelectRequest, columns: Tensor) -> Tensor:
    """Sums of [B, Lk] over key blocks, [B, key blocks]."""
    size = request.geometry.block_k
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % size))
    return padded.unflatten(1, (-1, size)).sum(-1)


def _estimate(request: SelectRequest, slot: int, row: Tensor) -> Tensor:
    """Attention of some rows over key blocks from means alone, float32 [B, key blocks].

    Args:
        row: int64 [B, R], addresses of rows.
    """
    size_k, num_q = request.geometry.block_k, request.q.shape[2]
    head = request.heads[slot : slot + 1]
    low, high = row_intervals(request.geometry, num_q, request.rows, request.bounds)
    low, high = low.gather(1, row), high.gather(1, row)
    real = (low <= high)[..., None]
    queries = request.q.index_select(1, head)[:, 0]
    queries = queries.gather(1, row[..., None].expand(-1, -1, queries.shape[2])).float()
    query = torch.where(real, queries, 0.0).sum(1) / real.sum(1).clamp(min=1)
    kv_head = head // (request.q.shape[1] // request.k.shape[1])
    means = means_of(request, kv_head, size_k)[:, 0]
    counts = _by_block_groups(request)
    start = torch.arange(means.shape[1], device=means.device) * size_k
    visible = (start + size_k > low[..., None]) & (start <= high[..., None]) & real
    weight = counts.float().log()
    if request.bias is not None:
        weight = weight + pooled_bias(request, head, row, row.shape[1])[:, 0]
    logits = torch.matmul(means, query[..., None])[..., 0] * request.scale + weight
    hidden = ~visible.any(1) | ~logits.isfinite()
    return torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1)


def _by_block_groups(request: SelectRequest) -> Tensor:
    """Keys of each key block that padding leaves visible, int64 [B, key blocks]."""
    ratio = request.geometry.block_k // request.group
    counts = visible_in_groups(request, request.group)
    counts = torch.nn.functional.pad(counts, (0, -counts.shape[1] % ratio))
    return counts.unflatten(1, (-1, ratio)).sum(-1)


def _slash_scores(
    request: SelectRequest, columns: Tensor, diagonals: Tensor, share: Tensor
) -> Tensor:
    """Mass of the kept columns and diagonals that each block holds: [B, row blocks, key blocks].

    Args:
        columns: [B, Lk].  diagonals: [B, Lq + Lk - 1].  As from ``spread_probe``.
        share: int64, per mille of either that is kept.
    Returns:
        float32, 0 where nothing is kept, inf where a key holds a NaN or inf.
    """
    geometry, num_q, num_k = request.geometry, request.q.shape[2], request.k.shape[2]
    size_q, size_k = geometry.block_q, geometry.block_k
    broken = _by_block(request, columns == math.inf) > 0
    blocks = _by_block(request, _finite(columns))
    vertical = torch.where(_covering(blocks, share), _parts(blocks), 0)[:, None]
    fine = _parts(_finite(diagonals))
    pad = (0, -fine.shape[1] % PUBLISHED_BLOCK)
    bins = torch.nn.functional.pad(_finite(diagonals), pad).unflatten(1, (-1, PUBLISHED_BLOCK))
    held = _covering(bins.sum(-1), share).repeat_interleave(PUBLISHED_BLOCK, 1)[:, : fine.shape[1]]
    total = torch.nn.functional.pad(torch.where(held, fine, 0).cumsum(-1), (1, 0))
    row = torch.arange(geometry.num_row_blocks(num_q), device=columns.device) * size_q
    key = torch.arange(blocks.shape[1], device=columns.device) * size_k
    scores = []
    for part in row.split(max(1, CHUNK // (columns.shape[0] * key.shape[0]))):
        # The diagonals between a row block's last row with a block's first key and the reverse.
        nearest = key - (part + size_q).clamp(max=num_q)[:, None] + num_q
        farthest = (key + size_k).clamp(max=num_k) - 1 - part[:, None] + num_q - 1
        scores.append((total[:, farthest + 1] - total[:, nearest] + vertical).float())
    return torch.cat(scores, 1).masked_fill(broken[:, None], math.inf)


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0)


def _parts(mass: Tensor) -> Tensor:
    """Shares of [B, X], as integers, so that the order of a sum does not show."""
    total = mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (mass / total * _WHOLE).long()


def _covering(mass: Tensor, share: Tensor) -> Tensor:
    """The fewest of [B, X] that hold ``share`` per mille of their sum, bool."""
    parts = _parts(mass)
    order = torch.sort(parts, dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    kept = (before < _WHOLE // 1000 * share) & (order.values > 0)
    return torch.zeros_like(kept).scatter_(-1, order.indices, kept)
