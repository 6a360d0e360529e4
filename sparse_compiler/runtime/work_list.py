"""Launching the kernel that plans the work of each row block before ``attend``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compiler.codegen.spec import WorkListSpec
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.runtime.kernel_cache import KernelCache, load_kernels

__all__ = ["build_work_list", "has_holes"]


def has_holes(key_mask: Tensor, rows: Tensor) -> Tensor:
    """int32 [B], 1 where ``key_mask`` hides a key inside kv_start..kv_start+kv_len; no host sync."""
    key = torch.arange(key_mask.shape[1], device=key_mask.device)
    start, length = rows[:, 3:4], rows[:, 4:5]
    inside = (key >= start) & (key < start + length)
    return (inside & ~key_mask).any(dim=1).to(torch.int32)


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
) -> Tensor:
    """The work list, int32 [B, Hq, row blocks, spec.item_fields]; see work_list.py.jinja.

    Args:
        index, geometry, rows, key_mask: as ``Executor.attend``.
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
    operands += [row_blocks, heads, num_k, geometry.left, geometry.right]
    operands += [index.full.shape[1], index.blocks.shape[1], index.full.shape[2], lanes_size]
    operands += [index.columns.shape[2], index.blocks.shape[3]]
    grid = (batch * heads * -(-row_blocks // spec.lines),)
    load_kernels(cache, spec).plan[grid](*operands, num_warps=spec.num_warps)
    return items
