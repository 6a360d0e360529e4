"""Small pictures of one head: where its attention lies, and what a pattern keeps of it."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals
from sparse_compiler.runtime.observe import AttentionCall

__all__ = ["CELLS", "DECADES", "attention_map", "kept_map"]

CELLS = 128
"""Rows and columns of a map, or fewer where there are fewer tokens."""
DECADES = 6
"""A map's darkest cells are this many powers of ten below the brightest."""
_ROWS_PER_CELL = 16
_CHUNK = 1 << 24


def attention_map(call: AttentionCall, head: int) -> bytes:
    """Mass of cells of one head of batch entry 0 on a logarithmic scale: the number of rows, then
    uint8 row by row.

    Up to 16 rows of each cell are looked at. 255 is the largest mass of any cell per row and key, 1
    is 1e-6 of it or less, 0 a cell with none. Sinks do not count.

    Args:
        head: of ``call``.
    """
    num_q, num_k = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    row_edges, key_cell = _edges(num_q, device), _cells(num_k, device)
    bounds = None if call.bounds is None else call.bounds.expand(call.q.shape[0], -1, -1)
    low, high = (t[0] for t in row_intervals(call.geometry, num_q, call.rows, bounds))
    keys = call.k[0, head * call.k.shape[1] // call.q.shape[1]].float()
    mass = torch.zeros(len(row_edges) - 1, int(key_cell[-1]) + 1, device=device)
    step = max(1, _CHUNK // num_k // _ROWS_PER_CELL)
    samples = [_spread(a, b) for a, b in pairwise(row_edges)]
    for first in range(0, len(samples), step):
        part = samples[first : first + step]
        row = torch.tensor([r for rows in part for r in rows], device=device)
        weights = _weights(call, head, row, keys, (low[row], high[row]))
        pooled = torch.zeros(len(row), mass.shape[1], device=device)
        pooled.index_add_(1, key_cell, weights)
        cell = torch.tensor([c for c, rows in enumerate(part) for _ in rows], device=device)
        share = torch.tensor([1 / len(rows) for rows in part for _ in rows], device=device)
        mass.index_add_(0, first + cell, pooled * share[:, None])
    mass /= torch.bincount(key_cell, minlength=mass.shape[1])
    scaled = 1 + torch.log10(mass / mass.max().clamp(min=1e-38)).clamp(min=-DECADES) / DECADES
    levels = torch.where(mass > 0, (1 + 254 * scaled).round(), 0.0)
    return _packed(levels)


def _packed(levels: Tensor) -> bytes:
    return bytes([levels.shape[0]]) + levels.to(torch.uint8).cpu().numpy().tobytes()


def _weights(
    call: AttentionCall, head: int, row: Tensor, keys: Tensor, interval: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention of some rows, float32 [R, Lk]; 0 for rows that see nothing."""
    num_q, num_k = call.q.shape[2], call.k.shape[2]
    scores = call.q[0, head, row].float() @ keys.T * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    key = torch.arange(num_k, device=row.device)
    seen = (key >= interval[0][:, None]) & (key <= interval[1][:, None])
    if call.key_mask is not None:
        seen &= call.key_mask[0]
    if call.bias is not None:
        place = torch.tensor([head], device=row.device)
        bias = call.bias[:1] if call.bias.dim() == 4 else call.bias
        scores = scores + bias_of_rows(bias, place, row[None], num_q, num_k)[0].float()
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
    return torch.nan_to_num(torch.where(seen, weights, 0.0))


def _edges(size: int, device: torch.device) -> list[int]:
    cells = min(CELLS, size)
    return [cell * size // cells for cell in range(cells + 1)]


def _cells(size: int, device: torch.device) -> Tensor:
    """The cell of each place, int64 [size]."""
    starts = torch.tensor(_edges(size, device)[1:-1], device=device, dtype=torch.int64)
    return torch.searchsorted(starts, torch.arange(size, device=device), right=True)


def _spread(start: int, stop: int) -> list[int]:
    count = min(_ROWS_PER_CELL, stop - start)
    return [start + (2 * n + 1) * (stop - start) // (2 * count) for n in range(count)]


def kept_map(index: AttentionIndex, geometry: Geometry, call: AttentionCall, head: int) -> bytes:
    """Share of each cell's keys that an index lists for the cell's rows, 255 for all; as above.

    What the mask hides of a listed block counts as kept.

    Args:
        index: whose heads are those of ``call``.
        geometry: of the index.
    """
    num_q, num_k = call.q.shape[2], call.k.shape[2]
    device = call.q.device
    key_cell, edges = _cells(num_k, device), _edges(num_q, device)
    band, listed = index.slots[head].tolist()
    key = torch.arange(num_k, device=device)
    column = torch.zeros(num_k, dtype=torch.bool, device=device)
    if band >= 0:
        column[index.columns[0, band, : int(index.num_columns[0, band])].long()] = True
    offset = int(call.rows[0, 2])
    maps = []
    for start, stop in pairwise(edges):
        m = (start + stop) // 2 // geometry.block_q
        end = offset + (m + 1) * geometry.block_q
        if band >= 0:
            covered = index.covered[0, band].bool()
            distance = end - key
            inside = (distance > 0) & (distance < covered.shape[0])
            held = covered[distance.clamp(0, covered.shape[0] - 1)] & inside
            held |= column & (distance > 0)
        else:
            blocks = index.blocks[0, listed, m, : int(index.num_blocks[0, listed, m])].long()
            chosen = torch.zeros(geometry.num_key_blocks(num_k), dtype=torch.bool, device=device)
            chosen[blocks] = True
            held = chosen[key // geometry.block_k]
        pooled = torch.zeros(int(key_cell[-1]) + 1, device=device)
        maps.append(pooled.index_add_(0, key_cell, held.float()))
    share = torch.stack(maps) / torch.bincount(key_cell)
    return _packed((share * 255).round())
