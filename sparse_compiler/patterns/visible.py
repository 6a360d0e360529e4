"""What single rows may see, and what is added to their logits; for estimators and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry

__all__ = ["bias_of_rows", "row_intervals", "visible_keys"]


def visible_keys(rows: Tensor, key_mask: Tensor | None, num_k: int, multiple: int = 1) -> Tensor:
    """Which keys any row may see by padding alone, bool [B, Lk rounded up to ``multiple``].

    Args:
        rows: int32 [B, 5];  key_mask: bool [B, Lk] or None; as in ``ops``.
    """
    size = -(-num_k // multiple) * multiple
    key = torch.arange(size, device=rows.device)
    start, length = rows[:, 3, None], rows[:, 4, None]
    visible = (key >= start) & (key < (start + length).clamp(max=num_k))
    if key_mask is None:
        return visible
    return visible & torch.nn.functional.pad(key_mask, (0, size - num_k))


def row_intervals(
    geometry: Geometry, num_q: int, rows: Tensor, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """First and last key that each row may see, before ``key_mask``; low > high where it sees none.

    Args:
        geometry: band of the mask.
        num_q: Lq.
        rows: int32 [B, 5];  bounds: int32 [B, Lq, 2] or None; as in ``ops``.
    Returns:
        low, high: int64 [B, Lq], key addresses, inclusive.
    """
    row = torch.arange(num_q, device=rows.device)
    start, length, offset, kv_start, kv_len = rows.long()[:, :, None].unbind(1)
    position = row + offset
    low, high = kv_start.expand_as(position), (kv_start + kv_len - 1).expand_as(position)
    if geometry.left >= 0:
        low = torch.maximum(low, position - geometry.left)
    if geometry.right >= 0:
        high = torch.minimum(high, position + geometry.right)
    if bounds is not None:
        low = torch.maximum(low, bounds[..., 0].long())
        high = torch.minimum(high, bounds[..., 1].long())
    real = (row >= start) & (row < start + length)
    return low, torch.where(real, high, low - 1)


def bias_of_rows(bias: Tensor, head: Tensor, row: Tensor, num_q: int, num_k: int) -> Tensor:
    """What is added to the logits of some rows of one head.

    Args:
        bias: of rank 4 or 2, as in ``ops``.
        head: int64 [1], a query head.
        row: int64 [B, R], addresses of rows, all within 0..Lq - 1.
        num_q, num_k: Lq and Lk.
    Returns:
        [B, R, Lk] in the dtype of ``bias``. No host synchronisation.
    """
    if bias.dim() == 2:
        table = bias.index_select(0, head if bias.shape[0] > 1 else torch.zeros_like(head))[0]
        return table[torch.arange(num_k, device=row.device) - row[..., None] + (num_q - 1)]
    entry = torch.arange(row.shape[0], device=row.device)[:, None]
    places = [
        place if size > 1 else torch.zeros_like(place)
        for place, size in zip((entry, head[:, None], row), bias.shape, strict=False)
    ]
    return bias[places[0], places[1], places[2]]
