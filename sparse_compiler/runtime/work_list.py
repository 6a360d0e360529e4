"""Launching the kernel that plans the work of each row block before ``attend``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.spec import WorkListSpec
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels

__all__ = ["bound_spans", "build_work_list", "has_holes"]


def has_holes(key_mask: Tensor, rows: Tensor) -> Tensor:
    """int32 [B], 1 where ``key_mask`` hides a key inside kv_start..kv_start+kv_len; no host sync."""
    key = torch.arange(key_mask.shape[1], device=key_mask.device)
    start, length = rows[:, 3:4], rows[:, 4:5]
    inside = (key >= start) & (key < start + length)
    return (inside & ~key_mask).any(dim=1).to(torch.int32)


def bound_spans(bounds: Tensor, rows: Tensor, geometry: Geometry, num_k: int) -> Tensor:
    """Keys that some row, and that every row, of a row block sees by ``bounds``; no host sync.

    Args:
        bounds: int32 [B, Lq, 2], first and last key of each row, both included.
        rows: int32 [B, 5] as in ``ops``; rows outside q_start..q_start+q_len count for nothing.
    Returns:
        int32 [B, row blocks, 4]: some row's keys [0, 1), every row's keys [2, 3), between 0 and
        num_k. A block with a row that sees nothing has no key that every row sees.
    """
    batch, num_q = bounds.shape[:2]
    blocks, size = geometry.num_row_blocks(num_q), geometry.block_q
    row = torch.arange(num_q, device=bounds.device)
    real = (row >= rows[:, 0:1]) & (row < rows[:, 0:1] + rows[:, 1:2])
    low, end = bounds[..., 0].clamp(0, num_k), bounds[..., 1].clamp(-1, num_k - 1) + 1
    sees = low < end
    spans = [
        torch.where(real & sees, low, num_k),
        torch.where(real & sees, end, 0),
        torch.where(real, torch.where(sees, low, num_k), 0),
        torch.where(real, torch.where(sees, end, 0), num_k),
    ]
    padding = (0, blocks * size - num_q)
    found = []
    for place, span in enumerate(spans):
        least = place in (0, 3)
        padded = torch.nn.functional.pad(span, padding, value=num_k if least else 0)
        lines = padded.view(batch, blocks, size)
        found.append(lines.amin(-1) if least else lines.amax(-1))
    return torch.stack(found, -1).to(torch.int32)


def build_work_list(
    cache: KernelCache,
    spec: WorkListSpec,
    index: AttentionIndex,
    geometry: Geometry,
    num_q: int,
    num_k: int,
    *,
    rows: Tensor,
    key_mask: Tensor | None,
    lanes: tuple[Tensor, Tensor] | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    """The work list, int32 [B, Hq, row blocks, spec.item_fields]; see work_list.py.jinja.

    Args:
        index, geometry, rows, key_mask, bounds: as ``Executor.attend``.
        lanes: single keys of the band's edges [B, S, lanes_size] and their counts [B, S]; needed
            where the spec has a band.
    """
    batch, heads = rows.shape[0], index.slots.shape[0]
    row_blocks = geometry.num_row_blocks(num_q)
    shape = (batch, heads, row_blocks, spec.item_fields)
    items = torch.empty(shape, dtype=torch.int32, device=rows.device)
    operands: list[Any] = [items, rows, index.slots]
    lanes_size = 0
    if spec.has_band:
        assert lanes is not None
        lanes_size = lanes[0].shape[2]
        operands += [index.full, index.num_full, *lanes, index.columns, index.num_columns]
    if spec.has_blocks:
        operands += [index.blocks, index.num_blocks]
    if spec.key_mask:
        assert key_mask is not None
        operands.append(has_holes(key_mask, rows))
    if spec.bounds:
        assert bounds is not None
        operands.append(bound_spans(bounds, rows, geometry, num_k))
    operands += [row_blocks, heads, num_k, geometry.left, geometry.right]
    operands += [index.full.shape[1], index.blocks.shape[1], index.full.shape[2], lanes_size]
    operands += [index.columns.shape[2], index.blocks.shape[3]]
    grid = (batch * heads * -(-row_blocks // spec.lines),)
    load_kernels(cache, spec).plan[grid](*operands, num_warps=spec.num_warps)
    return items
