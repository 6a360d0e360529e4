"""Block-sparse: key blocks whose mean key agrees best with a row block's mean query."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import BlockChoice, Limits, Pattern, SelectRequest

__all__ = ["PUBLISHED_BLOCK", "BlockSparse"]

PUBLISHED_BLOCK = 64
"""Tokens in the blocks that the published numbers count."""


class BlockSparse(Pattern):
    """Keep, for each row block, the ``first`` best key blocks of 64 tokens (fewer, if larger).

    The blocks that hold the row block's own positions are always kept, so that no row loses its
    diagonal; a mean over a block that reaches past the row block is never ranked, so the choice for
    a row block depends on nothing after it.

    Source: MInference 1.0, section 3.2 and algorithm 2.
    """

    name = "block_sparse"
    config_name = "block_sparse"
    number = 3
    component = "blocks"
    needs_causal = False
    reads_summary = True

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 100)

    def limits(self, head: HeadPattern, block_q: int, block_k: int) -> Limits:
        # A row block may straddle one key block more than it has room for, and keeps all of its own.
        return Limits(blocks=max(_scaled(head.first, block_k), -(-block_q // block_k) + 1))

    def from_budget(self, budget: float, num_keys: int, block_q: int) -> HeadPattern:
        return HeadPattern(self.name, max(1, round(budget * num_keys / 2 / PUBLISHED_BLOCK)))

    def choose(self, request: SelectRequest) -> BlockChoice:
        return BlockChoice(
            torch.stack([_choose_head(request, s) for s in range(len(request.heads))], 1)
        )

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return min(1.0, 2 * (max(1, head.first) * PUBLISHED_BLOCK + block_q) / num_keys)


def _scaled(blocks: int, block_k: int) -> int:
    return max(1, -(-blocks * PUBLISHED_BLOCK // block_k))


def _choose_head(request: SelectRequest, slot: int) -> Tensor:
    """Blocks of one slot, bool [B, row blocks, key blocks]; one head at a time bounds the memory."""
    geometry = request.geometry
    head = request.heads[slot : slot + 1]
    groups = request.q.shape[1] // request.k.shape[1]
    queries = request.q.index_select(1, head)[:, 0]
    means = _block_means(queries, geometry.block_q)
    summary = request.summary.index_select(1, head // groups)[:, 0].float()
    scores = torch.matmul(means, summary.transpose(-1, -2)) * request.scale
    visible, own = block_relation(
        geometry, request.q.shape[2], request.k.shape[2], request.rows, request.key_mask
    )
    scores = torch.where(scores.isnan(), float("inf"), scores)
    scores = scores.masked_fill(own, float("inf")).masked_fill(~visible, float("-inf"))
    most = request.limits.blocks
    size = scores.shape[-1]
    count = size if most < 0 else min(most, size)
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


def block_relation(
    geometry: Geometry, num_q: int, num_k: int, rows: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which key blocks a row block can see at all, and which hold its own positions.

    Args:
        geometry, rows, key_mask: as in ``SelectRequest``.
    Returns:
        Two bool [B, row blocks, key blocks].
    """
    device = rows.device
    size_q, size_k = geometry.block_q, geometry.block_k
    first = torch.arange(geometry.num_row_blocks(num_q), device=device) * size_q
    position = first[None, :, None] + rows[:, 2, None, None]
    last = position + size_q - 1
    key = torch.arange(geometry.num_key_blocks(num_k), device=device) * size_k
    visible = torch.ones(
        rows.shape[0], first.shape[0], key.shape[0], dtype=torch.bool, device=device
    )
    if geometry.right >= 0:
        visible &= key <= last + geometry.right
    if geometry.left >= 0:
        visible &= key + size_k > position - geometry.left
    kv_start, kv_end = rows[:, 3, None, None], (rows[:, 3] + rows[:, 4])[:, None, None]
    visible &= (key + size_k > kv_start) & (key < kv_end)
    if key_mask is not None:
        padded = torch.nn.functional.pad(key_mask, (0, key.shape[0] * size_k - num_k))
        visible &= padded.view(rows.shape[0], 1, -1, size_k).any(-1)
    own = visible & (key + size_k > position) & (key <= last)
    return visible, own
