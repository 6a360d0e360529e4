"""Block-sparse: key blocks whose mean key agrees best with a row block's mean query."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry, capacity_blocks
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import (
    WHOLE_BLOCKS,
    BlockChoice,
    Limits,
    Pattern,
    SelectRequest,
)
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.summaries import means_of

__all__ = ["PUBLISHED_BLOCK", "BlockSparse"]

PUBLISHED_BLOCK = 64
"""Tokens in the blocks that the published numbers count."""

#: The most elements of a bias that are looked at together.
_CHUNK = 1 << 24


class BlockSparse(Pattern):
    """Keep, for each row block, the ``first`` best key blocks of 64 tokens (fewer, if larger).

    The blocks that hold the row block's own positions are always kept, so that no row loses its
    diagonal; a mean over a block that reaches past the row block is never ranked, so under a causal
    mask the choice for a row block depends on nothing after it. A bias is added at the blocks'
    resolution.

    Source: MInference 1.0, section 3.2 and algorithm 2.
    """

    name = "block_sparse"
    config_name = "block_sparse"
    number = 3
    component = "blocks"
    needs_causal = False
    summary_keys = WHOLE_BLOCKS

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 100)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        # A row block may straddle one key block more than it has room for, and keeps all of its own.
        return Limits(blocks=max(_scaled(head.first, block_k), -(-block_q // block_k) + 1))

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # A row of a causal mask sees half of the keys.
        seen = num_keys / 2 if causal else num_keys
        return HeadPattern(self.name, max(1, round(budget * seen / PUBLISHED_BLOCK)))

    def choose(self, request: SelectRequest) -> BlockChoice:
        relation = request_relation(request)
        slots = range(len(request.heads))
        return BlockChoice(torch.stack([_choose_head(request, s, *relation) for s in slots], 1))

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return min(1.0, 2 * (max(1, head.first) * PUBLISHED_BLOCK + block_q) / num_keys)


def _scaled(blocks: int, block_k: int) -> int:
    return max(1, -(-blocks * PUBLISHED_BLOCK // block_k))


def _choose_head(request: SelectRequest, slot: int, visible: Tensor, own: Tensor) -> Tensor:
    """Blocks of one slot, bool [B, row blocks, key blocks]; one head at a time bounds the memory.

    ``visible`` and ``own`` as from ``block_relation``.
    """
    geometry = request.geometry
    head = request.heads[slot : slot + 1]
    groups = request.q.shape[1] // request.k.shape[1]
    queries = request.q.index_select(1, head)[:, 0]
    means = _block_means(queries, geometry.block_q)
    summary = means_of(request, head // groups, geometry.block_k)[:, 0]
    scores = torch.matmul(means, summary.transpose(-1, -2)) * request.scale
    if request.bias is not None:
        scores = scores + _block_bias(request.bias, head, geometry, request.q.shape[2])
    scores = torch.where(scores.isnan(), float("inf"), scores)
    scores = scores.masked_fill(own, float("inf")).masked_fill(~visible, float("-inf"))
    count = capacity_blocks(request.limits.blocks, request.k.shape[2], geometry.block_k)
    found = torch.topk(scores, count, dim=-1, sorted=True).indices
    wanted = -(-request.first[slot] * PUBLISHED_BLOCK // geometry.block_k)
    # A row block always keeps its own blocks, even beyond the number wanted.
    kept = torch.maximum(wanted.clamp(min=1), own.sum(-1, keepdim=True))
    rank = torch.arange(count, device=scores.device)
    chosen = torch.zeros_like(visible).scatter_(-1, found, (rank < kept).expand(found.shape))
    return chosen & visible


def _block_means(queries: Tensor, block_q: int) -> Tensor:
    """Mean of each row block of [B, Lq, D], float32 [B, row blocks, D]."""
    batch, num_q, dim = queries.shape
    blocks = -(-num_q // block_q)
    padded = torch.nn.functional.pad(queries.float(), (0, 0, 0, blocks * block_q - num_q))
    sizes = torch.full((blocks,), block_q, device=queries.device)
    sizes[-1] = num_q - (blocks - 1) * block_q
    return padded.view(batch, blocks, block_q, dim).sum(2) / sizes[:, None]


def _block_bias(bias: Tensor, head: Tensor, geometry: Geometry, num_q: int) -> Tensor:
    """The bias of one head between blocks, float32 [B or 1, row blocks or 1, key blocks].

    Of a table by distance the value at the blocks' centres, else the mean over a block's pairs that
    the bias does not hide; -inf where it hides all of them.

    Args:
        bias: of rank 4 or 2, as in ``ops``.
        head: int64 [1].
    """
    size_q, size_k = geometry.block_q, geometry.block_k
    if bias.dim() == 2:
        table = bias.index_select(0, head if bias.shape[0] > 1 else torch.zeros_like(head))[0]
        num_k = table.shape[0] - num_q + 1
        row = torch.arange(geometry.num_row_blocks(num_q), device=bias.device) * size_q
        key = torch.arange(geometry.num_key_blocks(num_k), device=bias.device) * size_k
        row, key = (
            (row + size_q // 2).clamp(max=num_q - 1),
            (key + size_k // 2).clamp(max=num_k - 1),
        )
        return table[key - row[:, None] + (num_q - 1)].float()[None]
    if bias.shape[2] == 1:
        return _pooled(_of_head(bias, head), 1, size_k)
    step = max(1, _CHUNK // (bias.shape[0] * bias.shape[3] * size_q)) * size_q
    parts = [
        _pooled(_of_head(bias[:, :, first : first + step], head), size_q, size_k)
        for first in range(0, num_q, step)
    ]
    return torch.cat(parts, 1)


def _of_head(bias: Tensor, head: Tensor) -> Tensor:
    """[B or 1, L, Lk] of one head of a bias of rank 4."""
    return (bias.index_select(1, head) if bias.shape[1] > 1 else bias)[:, 0]


def _pooled(bias: Tensor, size_q: int, size_k: int) -> Tensor:
    """Means over blocks of [B, L, Lk] without what is -inf; float32 [B, row blocks, key blocks]."""
    batch, num_q, num_k = bias.shape
    hidden = float("-inf")
    pad = (0, -num_k % size_k, 0, -num_q % size_q)
    padded = torch.nn.functional.pad(bias.float(), pad, value=hidden)
    tiles = padded.view(batch, -1, size_q, padded.shape[2] // size_k, size_k)
    shown = tiles != hidden
    count = shown.sum((2, 4))
    total = torch.where(shown, tiles, 0.0).sum((2, 4))
    return torch.where(count > 0, total / count.clamp(min=1), hidden)
