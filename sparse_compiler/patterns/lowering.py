"""From chosen columns, distances and blocks to the lists of the index; device-side, fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry

__all__ = ["compact", "lower_band", "lower_blocks"]


def compact(values: Tensor, keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Move the kept values to the front, in order.

    Args:
        values: int, broadcastable to ``keep``.
        keep: bool [..., X].
        capacity: length of the result; the caller guarantees that no more are kept.
    Returns:
        int32 [..., capacity] padded with 0, and int32 counts [...].
    """
    order = keep.cumsum(-1, dtype=torch.int32)
    # What is not kept goes to one extra place, which is cut off.
    place = torch.where(keep, order - 1, capacity).clamp(max=capacity)
    out = torch.zeros(*keep.shape[:-1], capacity + 1, dtype=torch.int32, device=keep.device)
    out.scatter_(-1, place.long(), values.to(torch.int32).expand(keep.shape))
    return out[..., :capacity].contiguous(), order[..., -1].clamp(max=capacity).contiguous()


def lower_band(
    columns: Tensor, distances: Tensor, geometry: Geometry, sizes: tuple[int, int, int]
) -> tuple[Tensor, ...]:
    """Tiles and columns of the band component.

    A kept distance o covers, in every row block, x = o + 1 .. o + M. Ranges are cut into tiles of N
    from their near end, so only the far tile of a range is partial.

    Args:
        columns: bool [B, S, Lk].  distances: bool [B, S, X].
        geometry: mask and blocking; the mask is causal (right = 0).
        sizes: capacities (F, E, C).
    Returns:
        full, num_full, edge, edge_len, num_edge, columns, num_columns, covered.
    """
    size_q, size_k = geometry.block_q, geometry.block_k
    num_full, num_edge, num_columns = sizes
    x = torch.arange(distances.shape[-1], device=distances.device, dtype=torch.int32)
    if geometry.left >= 0:
        distances = distances & (x <= geometry.left)
    covered = _dilate(distances, size_q)
    start = covered & ~torch.nn.functional.pad(covered, (1, -1))
    end = covered & ~torch.nn.functional.pad(covered, (-1, 1))
    begin = torch.cummax(torch.where(start, x, 0), dim=-1).values
    length = (x - begin) % size_k + 1
    tile = covered & ((length == size_k) | end)
    # The nearest key of a whole tile lies before the block's first row, and its farthest key inside
    # the window of the block's last row: no pair of it can be masked by position.
    whole = tile & (length == size_k) & (x >= size_q + size_k - 1)
    if geometry.left >= 0:
        whole &= x <= geometry.left + 1
    tested = tile & ~whole
    full, full_count = compact(x, whole, num_full)
    edge, edge_count = compact(x, tested, num_edge)
    edge_len, _ = compact(length, tested, num_edge)
    keys = torch.arange(columns.shape[-1], device=columns.device)
    column, column_count = compact(keys, columns, num_columns)
    return (
        full,
        full_count,
        edge,
        edge_len,
        edge_count,
        column,
        column_count,
        covered.to(torch.uint8).contiguous(),
    )


def _dilate(distances: Tensor, size_q: int) -> Tensor:
    """covered[x] = any distance o with x - M <= o <= x - 1 is kept; bool like ``distances``."""
    total = distances.cumsum(-1, dtype=torch.int32)
    before = torch.nn.functional.pad(total, (1, -1))
    if distances.shape[-1] <= size_q + 1:
        return before > 0
    earlier = torch.nn.functional.pad(total, (1 + size_q, -1 - size_q))
    return (before - earlier) > 0


def lower_blocks(blocks: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Block lists from bool [B, T, row blocks, key blocks]: (blocks, num_blocks)."""
    numbers = torch.arange(blocks.shape[-1], device=blocks.device)
    return compact(numbers, blocks, capacity)
