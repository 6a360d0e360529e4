"""The probe in plain PyTorch: attention of a few rows, summed by column and by distance."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns.visible import bias_of_rows

__all__ = ["probe_torch"]


def probe_torch(
    q: Tensor,
    k: Tensor,
    heads: Tensor,
    first_row: Tensor,
    geometry: Geometry,
    *,
    scale: float,
    rows: Tensor,
    key_mask: Tensor | None,
    num_rows: int,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``Executor.probe``; one head at a time, so memory is num_rows x Lk per batch entry.

    No host synchronisation.
    """
    batch, num_q, num_k = q.shape[0], q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    device = q.device
    row = first_row[:, None] + torch.arange(num_rows, device=device)
    start, length, offset, kv_start, kv_len = (c[:, None].long() for c in rows.unbind(1))
    real = (row >= start) & (row < start + length) & (row >= 0) & (row < num_q)
    position = row + offset
    key = torch.arange(num_k, device=device)
    held = (key >= kv_start) & (key < kv_start + kv_len)
    if key_mask is not None:
        held &= key_mask
    seen = real[..., None] & held[:, None]
    if geometry.right >= 0:
        seen &= key <= position[..., None] + geometry.right
    if geometry.left >= 0:
        seen &= key >= position[..., None] - geometry.left
    taken = row.clamp(0, max(0, num_q - 1))
    if bounds is not None:
        limits = bounds.gather(1, taken[..., None].expand(-1, -1, 2))
        seen &= (key >= limits[..., :1]) & (key <= limits[..., 1:])
    probes = q.gather(2, taken[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    size = geometry.distance_size(num_q)
    columns, distances = [], []
    for slot in range(heads.shape[0]):
        head = heads[slot : slot + 1]
        queries = probes.index_select(1, head)[:, 0].float()
        keys = k.index_select(1, head // groups)[:, 0].float()
        scores = torch.matmul(queries, keys.transpose(-1, -2)) * scale
        shown = seen
        if bias is not None:
            added = bias_of_rows(bias, head, taken, num_q, num_k)
            shown, scores = seen & (added != float("-inf")), scores + added.float()
        weights = torch.softmax(scores.masked_fill(~shown, float("-inf")), dim=-1)
        # A row that sees nothing gives NaN by softmax and must count for nothing; a NaN score of a
        # row that sees something stays.
        weights = torch.where(shown, weights, 0.0)
        broken = ~keys.sum(-1).isfinite() & held
        columns.append(weights.sum(1).masked_fill(broken, float("inf")))
        distances.append(_diagonal_sums(weights, position[:, 0], size))
    if not columns:
        empty = torch.zeros(batch, 0, device=device)
        return empty[..., None].expand(-1, -1, num_k), empty[..., None].expand(-1, -1, size)
    return torch.stack(columns, 1), torch.stack(distances, 1)


def _diagonal_sums(weights: Tensor, first_position: Tensor, size: int) -> Tensor:
    """Sum over row + t, key j with first_position + t - j = distance: [B, R, Lk] -> [B, size]."""
    batch, num_rows, num_k = weights.shape
    width = num_k + num_rows
    # Row t of the reversed keys, shifted by t: pairs of equal distance share a column.
    sheared = weights.new_zeros(batch, num_rows * width)
    view = sheared.as_strided(
        (batch, num_rows, num_k), (num_rows * width, width + 1, 1), sheared.storage_offset()
    )
    view.copy_(weights.flip(-1))
    totals = sheared.view(batch, num_rows, width).sum(1)
    distance = torch.arange(size, device=weights.device)
    place = distance - (first_position[:, None] - num_k + 1)
    inside = (place >= 0) & (place < width)
    return torch.where(inside, totals.gather(1, place.clamp(0, width - 1)), 0.0)
