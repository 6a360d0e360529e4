"""Means of larger groups of keys from those of smaller ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.patterns.visible import visible_keys

__all__ = ["means_of", "visible_in_groups"]


def visible_in_groups(request: SelectRequest, group: int) -> Tensor:
    """Number of keys of each group that padding leaves visible, int64 [B, ceil(Lk / group)]."""
    visible = visible_keys(request.rows, request.key_mask, request.k.shape[2], group)
    return visible.view(visible.shape[0], -1, group).sum(-1)


def means_of(request: SelectRequest, kv_heads: Tensor | None, group: int) -> Tensor:
    """Means of ``group`` keys of some key heads, float32 [B, X, ceil(Lk / group), D]; 0 of none.

    Args:
        request: whose ``summary`` has groups of a size that divides ``group``.
        kv_heads: int64 [X]; None for all.
    """
    means = request.summary if kv_heads is None else request.summary.index_select(1, kv_heads)
    means = means.float()
    if group == request.group:
        return means
    counts = visible_in_groups(request, request.group)
    ratio = group // request.group
    pad = -means.shape[2] % ratio
    means = torch.nn.functional.pad(means, (0, 0, 0, pad)).unflatten(2, (-1, ratio))
    counts = torch.nn.functional.pad(counts, (0, pad)).unflatten(1, (-1, ratio))[:, None, ..., None]
    return (means * counts).sum(3) / counts.sum(3).clamp(min=1)
