"""Choices as key blocks, for masks that show keys on both sides of a row.

Diagonals are numbered by addresses: pair (i, j) lies on diagonal ``j - i + Lq - 1``, so that all of
them have a number from 0 to Lq + Lk - 2 whatever the offset of a batch entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals

__all__ = ["blocks_of", "local_blocks", "sink_blocks", "spread_probe", "spread_rows"]

#: The most elements of one index tensor: 128 MB of int64.
_CHUNK = 1 << 24


def sink_blocks(request: SelectRequest, count: Tensor) -> Tensor:
    """Key blocks that hold one of the first ``count`` keys that a row may see.

    First means first of the row's interval of ``bounds``, such as its document, or of the batch
    entry's keys; a window cuts sinks rather than move them.

    Args:
        count: int64 [1].
    Returns:
        bool [B, row blocks or 1, key blocks].
    """
    geometry = request.geometry
    size_q, size_k = geometry.block_q, geometry.block_k
    blocks = geometry.num_key_blocks(request.k.shape[2])
    first = request.rows[:, 3].long()[:, None]
    if request.bounds is None:
        start = torch.arange(blocks, device=first.device) * size_k
        first = first[..., None]
        return (start + size_k > first) & (start < first + count)
    low = torch.maximum(request.bounds[..., 0].long(), first)
    some = (request.bounds[..., 1].long() >= low) & (count > 0)
    # One more where a row's sinks begin and one less past their end: sums are rows that want them.
    ends = [low // size_k, (low + count - 1) // size_k + 1]
    change = torch.zeros(
        *(low.shape[0], geometry.num_row_blocks(low.shape[1]), blocks + 1),
        dtype=torch.int32,
        device=low.device,
    )
    for place, step in zip(ends, (1, -1), strict=True):
        pad = (0, -low.shape[1] % size_q)
        steps = torch.nn.functional.pad(some.to(torch.int32) * step, pad)
        places = torch.nn.functional.pad(place.clamp(0, blocks), pad)
        change.scatter_add_(2, *(t.unflatten(1, (-1, size_q)) for t in (places, steps)))
    return change.cumsum(-1)[..., :blocks] > 0


def local_blocks(request: SelectRequest, count: Tensor) -> Tensor:
    """Key blocks with a key less than ``count`` from a row's position, on either side.

    Args:
        count: int64 [T].
    Returns:
        bool [B, T, row blocks, key blocks].
    """
    geometry = request.geometry
    device = request.rows.device
    row = torch.arange(geometry.num_row_blocks(request.q.shape[2]), device=device)
    key = torch.arange(geometry.num_key_blocks(request.k.shape[2]), device=device)
    first = (row * geometry.block_q + request.rows[:, 2].long()[:, None])[:, None, :, None]
    start = key * geometry.block_k
    reach = count[:, None, None] - 1
    last = first + geometry.block_q - 1
    return (start + geometry.block_k > first - reach) & (start <= last + reach)


def blocks_of(request: SelectRequest, columns: Tensor, diagonals: Tensor) -> Tensor:
    """Key blocks that hold a kept column, or a kept diagonal of one of the row block's rows.

    Args:
        columns: bool [B, Lk].  diagonals: bool [B, Lq + Lk - 1].
    Returns:
        bool [B, row blocks, key blocks].
    """
    geometry = request.geometry
    num_q, num_k = request.q.shape[2], request.k.shape[2]
    size_q, size_k = geometry.block_q, geometry.block_k
    row = torch.arange(geometry.num_row_blocks(num_q), device=columns.device) * size_q
    key = torch.arange(geometry.num_key_blocks(num_k), device=columns.device) * size_k
    total = torch.nn.functional.pad(diagonals.cumsum(-1, dtype=torch.int32), (1, 0))
    held = []
    for part in row.split(max(1, _CHUNK // (columns.shape[0] * key.shape[0]))):
        nearest = key - (part + size_q).clamp(max=num_q)[:, None] + num_q
        farthest = (key + size_k).clamp(max=num_k) - 1 - part[:, None] + num_q - 1
        held.append(total[:, farthest + 1] > total[:, nearest])
    padded = torch.nn.functional.pad(columns, (0, key.shape[0] * size_k - num_k))
    return torch.cat(held, 1) | padded.view(columns.shape[0], 1, -1, size_k).any(-1)


def spread_rows(request: SelectRequest, count: int) -> Tensor:
    """Addresses of ``count`` rows spread evenly over each batch entry's rows, int64 [B, count].

    Where rows and keys are the same tokens, rows that are padding are left out.
    """
    rows = request.rows.long()
    num_q, num_k = request.q.shape[2], request.k.shape[2]
    start, stop = rows[:, 0], rows[:, 0] + rows[:, 1]
    if num_q + request.geometry.q_offset == num_k:
        real_start = torch.maximum(start, rows[:, 3] - rows[:, 2])
        real_stop = torch.minimum(stop, rows[:, 3] + rows[:, 4] - rows[:, 2])
        some = real_start < real_stop
        start, stop = torch.where(some, real_start, start), torch.where(some, real_stop, stop)
    step = torch.arange(count, device=rows.device)
    spread = start[:, None] + step * (stop - start - 1)[:, None] // max(1, count - 1)
    return spread.clamp(0, num_q - 1)


def spread_probe(request: SelectRequest, slot: int, row: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some rows of one slot's head, summed by column and by diagonal.

    Args:
        row: int64 [B, R], from ``spread_rows``.
    Returns:
        float32 [B, Lk] and [B, Lq + Lk - 1]; +inf at a visible key that holds a NaN or inf.
    """
    q, k = request.q, request.k
    num_q, num_k = q.shape[2], k.shape[2]
    head = request.heads[slot : slot + 1]
    queries = q.index_select(1, head)[:, 0]
    queries = queries.gather(1, row[..., None].expand(-1, -1, q.shape[3])).float()
    keys = k.index_select(1, head // (q.shape[1] // k.shape[1]))[:, 0].float()
    scores = torch.matmul(queries, keys.transpose(-1, -2)) * request.scale
    low, high = row_intervals(request.geometry, num_q, request.rows, request.bounds)
    low, high = (t.gather(1, row)[..., None] for t in (low, high))
    key = torch.arange(num_k, device=q.device)
    seen = (key >= low) & (key <= high)
    if request.key_mask is not None:
        seen &= request.key_mask[:, None]
    if request.bias is not None:
        added = bias_of_rows(request.bias, head, row, num_q, num_k)
        seen &= added != float("-inf")
        scores += added
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    # A row that sees nothing gives NaN by softmax; a NaN score of a row that sees something stays.
    weights = torch.where(seen, weights, 0.0)
    broken = ~keys.sum(-1).isfinite() & seen.any(1)
    return weights.sum(1).masked_fill(broken, float("inf")), _diagonal_sums(weights, row, num_q)


def _diagonal_sums(weights: Tensor, row: Tensor, num_q: int) -> Tensor:
    """Sums of [B, R, Lk] over pairs of equal ``key - row``: [B, Lq + Lk - 1].

    Gathered rather than scattered, so that the order of the sum is the same every time.
    """
    batch, num_rows, num_k = weights.shape
    size = num_q + num_k - 1
    diagonal = torch.arange(size, device=weights.device) - (num_q - 1)
    total = weights.new_zeros(batch, size)
    step = max(1, _CHUNK // (batch * size))
    for first in range(0, num_rows, step):
        key = diagonal + row[:, first : first + step, None]
        inside = (key >= 0) & (key < num_k)
        part = weights[:, first : first + step].gather(2, key.clamp(0, num_k - 1))
        total += torch.where(inside, part, 0.0).sum(1)
    return total
