"""Means of larger groups of keys from those of smaller ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.patterns.base import SelectRequest
from sparse_compiler.patterns.visible import visible_keys

__all__ = ["all_means", "means_of", "visible_in_groups"]


def visible_in_groups(request: SelectRequest, group: int) -> Tensor:
    """Number of keys of each group that padding leaves visible, int64 [B, ceil(Lk / group)]."""
    visible = visible_keys(request.rows, request.key_mask, request.k.shape[2], group)
    return visible.view(visible.shape[0], -1, group).sum(-1)


def means_of(request: SelectRequest, kv_head: Tensor, group: int) -> Tensor:
    """Means of ``group`` keys of one key head, float32 [B, ceil(Lk / group), D]; 0 of none.

    Args:
        request: whose ``summary`` has groups of a size that divides ``group``.
        kv_head: int64 [1].
    """
    means = request.summary.index_select(1, kv_head)[:, 0].float()
    if group == request.group:
        return means
    counts = visible_in_groups(request, request.group)
    ratio = group // request.group
    pad = -means.shape[1] % ratio
    means = torch.nn.functional.pad(means, (0, 0, 0, pad)).unflatten(1, (-1, ratio))
    counts = torch.nn.functional.pad(counts, (0, pad)).unflatten(1, (-1, ratio))[..., None]
    return (means * counts).sum(2) / counts.sum(2).clamp(min=1)


def all_means(request: SelectRequest, group: int) -> Tensor:
    """``means_of`` all key heads, float32 [B, Hkv, ceil(Lk / group), D]."""
    heads = torch.arange(request.k.shape[1], device=request.k.device).split(1)
    return torch.stack([means_of(request, head, group) for head in heads], 1)
