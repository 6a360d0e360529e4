"""What PyTorch offers for the same attention: cuDNN, FlashAttention, and FlexAttention with block masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from inputs import pack_blocks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparse_compiler.errors import ShapeMismatch
from sparse_compiler.ir.index import AttentionIndex, Geometry

__all__ = ["FLEX_BLOCK", "BlockLists", "cover_index", "dense_flex", "dense_sdpa", "sparse_flex"]

FLEX_BLOCK = 128
"""FlexAttention's own block size, for masks that are not given as blocks."""

Call = Callable[[], Tensor]


def dense_sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Causal attention by one backend of PyTorch's scaled-dot-product attention."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )

    return call


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


@cache
def _compiled_flex() -> Callable[..., Any]:
    # Static: each length gets the kernel that it would have as a user's only length. Past the limit
    # flex_attention would silently run unfused, with all N² scores.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def _whole_blocks(num_tokens: int, blocks: tuple[int, int]) -> None:
    if num_tokens % blocks[0] or num_tokens % blocks[1]:
        raise ShapeMismatch(
            "the number of tokens",
            f"a multiple of the blocks {blocks} for FlexAttention",
            num_tokens,
            where="peers",
        )


def dense_flex(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Causal FlexAttention: whole blocks below the diagonal, its mask on the diagonal's blocks."""
    _whole_blocks(q.shape[2], (FLEX_BLOCK, FLEX_BLOCK))
    count = q.shape[2] // FLEX_BLOCK
    number = torch.arange(count, dtype=torch.int32, device=q.device)
    # Built from lists: create_block_mask would evaluate all N² pairs.
    mask = BlockMask.from_kv_blocks(
        torch.ones(1, 1, count, dtype=torch.int32, device=q.device),
        number.view(1, 1, count, 1),
        number.view(1, 1, count),
        number.expand(1, 1, count, count).contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_causal,
        seq_lengths=(q.shape[2], q.shape[2]),
        compute_q_blocks=False,
    )
    flex = _compiled_flex()
    return lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)


@dataclass(frozen=True)
class BlockLists:
    """A causal block mask for FlexAttention.

    Args:
        blocks: rows and keys of a block.
        partial, num_partial: int32 [1, Hq, row blocks, K] and counts; the causal test is made.
        full, num_full: the same for blocks without a test.
        density: computed over allowed pairs.
    """

    blocks: tuple[int, int]
    partial: Tensor
    num_partial: Tensor
    full: Tensor
    num_full: Tensor
    density: float


def _lists(
    masks: Callable[[int], Tensor], heads: int, num_tokens: int, blocks: tuple[int, int]
) -> BlockLists:
    """Split a block mask, head -> bool [row blocks, key blocks] of visible blocks, at the diagonal."""
    size_q, size_k = blocks
    device = masks(0).device
    row = torch.arange(num_tokens // size_q, device=device)[:, None] * size_q
    key = torch.arange(num_tokens // size_k, device=device) * size_k
    cut = key + size_k - 1 > row
    partial, num_partial = pack_blocks(lambda head: masks(head) & cut, heads)
    full, num_full = pack_blocks(lambda head: masks(head) & ~cut, heads)
    # Pairs of a cut block: row r of it sees min(r - key + 1, N) keys.
    inside = torch.arange(size_q, device=device)[:, None, None] + row - key + 1
    seen = inside.clamp(0, size_k).sum(0) * cut
    pairs = sum(int((seen * masks(head)).sum()) for head in range(heads))
    pairs += int(num_full.sum()) * size_q * size_k
    allowed = heads * num_tokens * (num_tokens + 1) / 2
    return BlockLists(blocks, partial, num_partial, full, num_full, pairs / allowed)


def cover_index(index: AttentionIndex, geometry: Geometry, num_tokens: int) -> BlockLists:
    """The blocks of an index of block heads as they are; else the 128 x 128 blocks it touches.

    Args:
        index, geometry: batch 1, causal from the first key.
        num_tokens: a multiple of the blocks.
    Raises:
        ShapeMismatch: it is not, or a row block is neither a multiple nor a divisor of 128.
    """
    heads = index.slots.shape[0]
    slots = index.slots.tolist()
    if all(band < 0 for band, _ in slots):
        blocks = (geometry.block_q, geometry.block_k)
        _whole_blocks(num_tokens, blocks)
        columns = num_tokens // geometry.block_k
        return _lists(
            lambda head: _listed(index, slots[head][1], columns), heads, num_tokens, blocks
        )
    _whole_blocks(num_tokens, (FLEX_BLOCK, FLEX_BLOCK))
    if FLEX_BLOCK % geometry.block_q and geometry.block_q % FLEX_BLOCK:
        raise ShapeMismatch("block_q", "a multiple or divisor of 128", geometry.block_q)

    def touched(head: int) -> Tensor:
        band, listed = slots[head]
        count = num_tokens // FLEX_BLOCK
        blocks = geometry.num_row_blocks(num_tokens)
        mask = torch.zeros(blocks, count, dtype=torch.bool, device=index.slots.device)
        if band >= 0:
            mask |= _band_blocks(index, band, geometry.block_q, count, blocks)
        if listed >= 0:
            keys = _listed(index, listed, geometry.num_key_blocks(num_tokens))
            mask |= _resized(keys.T, geometry.block_k, count).T
        mask = _resized(mask, geometry.block_q, count)
        return mask & torch.ones_like(mask).tril()

    return _lists(touched, heads, num_tokens, (FLEX_BLOCK, FLEX_BLOCK))


def _listed(index: AttentionIndex, slot: int, columns: int) -> Tensor:
    """bool [row blocks, key blocks] of one block slot."""
    lists, counts = index.blocks[0, slot].long(), index.num_blocks[0, slot]
    inside = torch.arange(lists.shape[1], device=lists.device) < counts[:, None]
    mask = torch.zeros(lists.shape[0], columns + 1, dtype=torch.bool, device=lists.device)
    return mask.scatter_(1, torch.where(inside, lists, columns), True)[:, :columns]


def _band_blocks(index: AttentionIndex, slot: int, size_q: int, count: int, blocks: int) -> Tensor:
    """Key blocks of 128 in which a row block's band or columns lie, bool [blocks, count]."""
    covered = index.covered[0, slot]
    device = covered.device
    end = (torch.arange(blocks, device=device)[:, None] + 1) * size_q
    first = torch.arange(count, device=device) * FLEX_BLOCK
    total = torch.nn.functional.pad(covered.cumsum(0, dtype=torch.int32), (1, 0))
    # Keys first .. first + 127 have the distances end - first - 127 .. end - first.
    far = (end - first).clamp(0, covered.shape[0] - 1)
    near = (end - first - FLEX_BLOCK).clamp(0, covered.shape[0] - 1)
    mask = total[far + 1] > total[near + 1]
    columns = index.columns[0, slot, : int(index.num_columns[0, slot])].long()
    heavy = torch.zeros(count, dtype=torch.bool, device=device)
    heavy[columns // FLEX_BLOCK] = True
    return mask | (heavy & (first < end))


def _resized(mask: Tensor, size: int, count: int) -> Tensor:
    """Rows of blocks of ``size`` to ``count`` rows of blocks of 128; a block is kept if any part is."""
    if size >= FLEX_BLOCK:
        return mask.repeat_interleave(size // FLEX_BLOCK, dim=0)[:count]
    parts = FLEX_BLOCK // size
    return (
        torch.nn.functional.pad(mask, (0, 0, 0, count * parts - len(mask)))
        .view(count, parts, -1)
        .any(1)
    )


def sparse_flex(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> Call:
    """FlexAttention over a block mask; the mask is not built anew by the call."""
    mask = BlockMask.from_kv_blocks(
        lists.num_partial,
        lists.partial,
        lists.num_full,
        lists.full,
        BLOCK_SIZE=lists.blocks,
        mask_mod=_causal,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    # Its own tiles must divide the mask's blocks; where they do, its choice is left alone.
    options = {
        name: size
        for name, size in zip(("BLOCK_M", "BLOCK_N"), lists.blocks, strict=True)
        if size < FLEX_BLOCK
    }
    flex = _compiled_flex()
    return lambda: flex(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options or None)
