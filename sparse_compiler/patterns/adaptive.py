"""Adaptive: as many key blocks as hold a share of the mass that pooled queries and keys estimate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_compiler.patterns.base import WHOLE_BLOCKS, BlockChoice, SelectRequest
from sparse_compiler.patterns.listed import Listed
from sparse_compiler.patterns.ranking import CHUNK, first_blocks, keep_share, pooled_bias
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.summaries import means_of, visible_in_groups
from sparse_compiler.patterns.visible import row_intervals, visible_keys

__all__ = ["Adaptive", "pooled_mass"]


class Adaptive(Listed):
    """Keep the fewest key blocks that hold ``first`` per mille of a row block's estimated mass.

    The mass is a softmax over key blocks of (mean query of the row block) x (mean key of the block),
    each block weighted with the keys that it has. ``second`` is the most key blocks of 64 keys that
    a row block keeps; 0 lets this grow with the length. A row block's own blocks and the block of
    the first visible key are always kept, and count towards the share.

    Source: FlexPrefill (arXiv 2502.20766), the query-aware part of algorithms 2 and 4. There one
    threshold runs over the blocks of all rows, so that the choice for a row depends on later rows,
    and the mean of a diagonal block holds later keys. Here each row block has a share of its own, and
    under a causal mask no mean reaches past the row block: the choice depends on nothing after it.

    Costs 1/4096 of dense attention's score products with blocks of 64, and reads the keys twice.
    Misses what a mean of 64 rows or of 64 keys hides: a key that stands out alone, or a row that
    wants something else than its neighbours.
    """

    name = "adaptive"
    number = 6
    summary_keys = WHOLE_BLOCKS
    usual = 950
    widest = 1000
    is_share = True

    def choose(self, request: SelectRequest) -> BlockChoice:
        visible, own = request_relation(request)
        always = (own | first_blocks(request)) & visible
        kept = [
            keep_share(
                *(request, slot, request.first[slot], pooled_mass(request, slot, visible)),
                *(visible, always, own),
            )
            for slot in range(request.heads.shape[0])
        ]
        return BlockChoice(torch.stack(kept, 1))


def pooled_mass(request: SelectRequest, slot: int, visible: Tensor) -> Tensor:
    """Estimated share of each key block in the attention of a row block.

    Args:
        request: with a summary.
        slot: position in ``request.heads``.
        visible: as from ``block_relation``.
    Returns:
        float32 [B, row blocks, key blocks]; 0 where nothing is visible, inf where a NaN or inf makes
        the estimate none.
    """
    geometry = request.geometry
    head = request.heads[slot : slot + 1]
    kv_head = head // (request.q.shape[1] // request.k.shape[1])
    queries = _mean_queries(request, head)
    means = means_of(request, kv_head, geometry.block_k)[:, 0]
    counts = visible_in_groups(request, request.group)
    ratio = geometry.block_k // request.group
    counts = torch.nn.functional.pad(counts, (0, -counts.shape[1] % ratio))
    counts = counts.unflatten(1, (-1, ratio)).sum(-1)
    logits = torch.matmul(queries, means.transpose(-1, -2)) * request.scale
    weight = counts.float().log()[:, None].expand(logits.shape)
    if geometry.right == 0:
        place, last, count = _last_means(request, kv_head)
        logits.scatter_(2, place, (queries * last).sum(-1, keepdim=True) * request.scale)
        weight = weight.scatter(2, place, count.float().log())
    broken = ~logits.isfinite()
    if request.bias is not None:
        added = _bias(request, head)
        broken |= added.isnan() | (added == math.inf)
        weight = weight + added
    hidden = ~visible | broken
    mass = torch.softmax((logits + weight).masked_fill(hidden, -math.inf), dim=-1)
    # Of a row block that sees nothing, or nothing that can be estimated, softmax makes NaN.
    mass = torch.where(mass.isnan(), 0.0, mass)
    return mass.masked_fill(broken & visible, math.inf)


def _mean_queries(request: SelectRequest, head: Tensor) -> Tensor:
    """Mean of the rows of each row block that see a key, float32 [B, row blocks, D]; 0 of none."""
    geometry, num_q = request.geometry, request.q.shape[2]
    low, high = row_intervals(geometry, num_q, request.rows, request.bounds)
    real = (low <= high)[..., None]
    queries = torch.where(real, request.q.index_select(1, head)[:, 0].float(), 0.0)
    pad = (0, 0, 0, -num_q % geometry.block_q)
    total, count = (
        torch.nn.functional.pad(t, pad).unflatten(1, (-1, geometry.block_q)).sum(2)
        for t in (queries, real)
    )
    return total / count.clamp(min=1)


def _last_means(request: SelectRequest, kv_head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The key block of each row block's last position, without the keys after that position.

    Returns:
        its number int64 [B, row blocks, 1]; the mean of its visible keys, float32 [B, row blocks, D];
        how many they are, int64 [B, row blocks, 1].
    """
    geometry, num_k = request.geometry, request.k.shape[2]
    size_k = geometry.block_k
    row = torch.arange(1, geometry.num_row_blocks(request.q.shape[2]) + 1, device=request.q.device)
    last = row * geometry.block_q - 1 + request.rows[:, 2, None].long()
    place = (last // size_k).clamp(0, geometry.num_key_blocks(num_k) - 1)
    keys = request.k.index_select(1, kv_head)[:, 0]
    seen = visible_keys(request.rows, request.key_mask, num_k)
    inside = torch.arange(size_k, device=keys.device)
    means, counts = [], []
    step = max(1, CHUNK // (keys.shape[0] * size_k * keys.shape[2]))
    for end, block in zip(last.split(step, 1), place.split(step, 1), strict=True):
        key = (block[..., None] * size_k + inside).flatten(1)
        shown = (key <= end.repeat_interleave(size_k, 1)) & (key < num_k)
        key = key.clamp(max=num_k - 1)
        shown = shown & seen.gather(1, key)
        part = keys.gather(1, key[..., None].expand(-1, -1, keys.shape[2])).float()
        part = torch.where(shown[..., None], part, 0.0).unflatten(1, (-1, size_k)).sum(2)
        counts.append(shown.unflatten(1, (-1, size_k)).sum(2, keepdim=True))
        means.append(part / counts[-1].clamp(min=1))
    return place[..., None], torch.cat(means, 1), torch.cat(counts, 1)


def _bias(request: SelectRequest, head: Tensor) -> Tensor:
    """``pooled_bias`` of all row blocks, float32 [B, row blocks, key blocks]."""
    batch, size = request.q.shape[0], request.geometry.block_q
    rows = request.geometry.num_row_blocks(request.q.shape[2]) * size
    row = torch.arange(rows, device=request.q.device).expand(batch, -1)
    step = max(1, CHUNK // (batch * request.k.shape[2] * size)) * size
    return torch.cat([pooled_bias(request, head, part, size) for part in row.split(step, 1)], 1)
