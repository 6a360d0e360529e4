"""Which key blocks a row block can see at all, and which it must not lose."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.patterns.visible import row_intervals

__all__ = ["block_relation", "request_relation"]


def request_relation(request: SelectRequest) -> tuple[Tensor, Tensor]:
    """``block_relation`` of a request."""
    return block_relation(
        request.geometry,
        request.q.shape[2],
        request.k.shape[2],
        request.rows,
        request.key_mask,
        request.bounds,
    )


def block_relation(
    geometry: Geometry,
    num_q: int,
    num_k: int,
    rows: Tensor,
    key_mask: Tensor | None,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which key blocks a row block can see at all, and which hold its own positions.

    With ``bounds`` a row whose own position is hidden has the nearest key that it sees instead, so
    that a choice that keeps own blocks leaves no row without a key.

    Args:
        geometry, rows, key_mask, bounds: as in ``SelectRequest``.
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
    if bounds is None:
        return visible, visible & (key + size_k > position) & (key <= last)
    least, most, own = _between(geometry, num_q, key.shape[0], rows, bounds)
    visible &= (key + size_k > least) & (key <= most)
    return visible, visible & own


def _between(
    geometry: Geometry, num_q: int, num_blocks: int, rows: Tensor, bounds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """First and last key that any row of each row block sees, int64 [B, row blocks, 1], and the key
    blocks that hold its rows' own positions or the nearest that they see, bool."""
    size_q, size_k = geometry.block_q, geometry.block_k
    low, high = row_intervals(geometry, num_q, rows, bounds)
    position = torch.arange(num_q, device=rows.device) + rows[:, 2, None]
    empty = low > high
    nearest = torch.minimum(torch.maximum(position, low), high) // size_k

    def by_block(values: Tensor, nothing: int) -> Tensor:
        """[B, row blocks, block_q], ``nothing`` for rows that see nothing or do not exist."""
        filled = values.masked_fill(empty, nothing)
        filled = torch.nn.functional.pad(filled, (0, -num_q % size_q), value=nothing)
        return filled.view(rows.shape[0], -1, size_q)

    least = by_block(low, num_blocks * size_k).amin(-1, keepdim=True)
    most = by_block(high, -1).amax(-1, keepdim=True)
    place = by_block(nearest, num_blocks).clamp(0, num_blocks)
    own = torch.zeros(*place.shape[:2], num_blocks + 1, dtype=torch.bool, device=rows.device)
    return least, most, own.scatter_(2, place, True)[..., :num_blocks]
