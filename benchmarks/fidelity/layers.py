"""Per layer: how much of dense attention's weight the kept keys hold, and the error of the output.

The operator ``attend`` is watched while a compiled model runs: the model is not touched, and nothing is
compiled again. Dense attention is computed from the same q, k and v for some rows only, one head at a
time. So an error here is that of this layer alone; what earlier layers did to q, k and v is in them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compiler import ops
from sparse_compiler.ir.index import INDEX_FIELDS, AttentionIndex, Geometry
from sparse_compiler.patterns.visible import bias_of_rows, row_intervals
from sparse_compiler.runtime import dispatch

__all__ = ["LAST_ROWS", "SPREAD_ROWS", "LayerSample", "kept_keys", "sample_layer", "watched"]

SPREAD_ROWS = 48
LAST_ROWS = 16


@dataclass(frozen=True)
class LayerSample:
    """Shares of one call of one site.

    Args:
        recall: mean of heads, rows spread over the prompt;  least_recall: of the worst head.
        last_recall: mean of heads, the last rows.
        error: relative, Frobenius norm over all sampled rows and heads.
    """

    recall: float
    least_recall: float
    last_recall: float
    error: float


@contextmanager
def watched() -> Iterator[dict[int, LayerSample]]:
    """Sample every call of ``attend``; yields what was found, by site number, newest call last.

    Calls answered by dense attention (no index was built) are left out.
    """
    found: dict[int, LayerSample] = {}
    signature = inspect.signature(dispatch.attend)

    def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = dispatch.attend(*args, **kwargs)
        call = signature.bind(*args, **kwargs).arguments
        # An index that was not built has no entries at all.
        if call["slots"].numel() and call["q"].numel() and call["k"].numel():
            found[call["site"]] = sample_layer(call, result[0])
        return result

    ops.set_implementation("attend", attend)
    try:
        yield found
    finally:
        ops.set_implementation("attend", dispatch.attend)


def sample_layer(call: dict[str, Any], out: Tensor) -> LayerSample:
    """Compare one call with dense attention on sampled rows of its first batch entry.

    Args:
        call: arguments of ``dispatch.attend`` by name.
        out: what it returned, [B, Hq, Lq, Dv].
    """
    q, k, v = (call[name][0] for name in "qkv")
    index = AttentionIndex(*(call[name] for name in INDEX_FIELDS))
    geometry = Geometry(
        *(call[name] for name in ("q_offset", "left", "right", "block_q", "block_k"))
    )
    num_q, num_k, heads = q.shape[1], k.shape[1], q.shape[0]
    row, spread = _rows(num_q, q.device)
    band = _band_rows(call, num_q, num_k, q.device)
    seen = _seen(call, geometry, band, row, num_k)
    recall, last, wrong, size = [], [], 0.0, 0.0
    for head in range(heads):
        group = head * k.shape[0] // heads
        product = q[head, row].float() @ k[group].float().T
        weights = _weights(call, product, head, row, seen)
        kept = kept_keys(index, geometry, int(band[0, 2]), head, row, num_k)
        total = weights.sum(-1)
        share = torch.where(kept, weights, 0.0).sum(-1) / total.clamp(min=1e-30)
        some = total > 0
        recall.append(_mean(share[:spread], some[:spread]))
        last.append(_mean(share[spread:], some[spread:]))
        dense = weights @ v[group].float()
        wrong += float((out[0, head, row].float() - dense).square().sum())
        size += float(dense.square().sum())
    mean, last_mean = (float(torch.stack(part).mean()) for part in (recall, last))
    worst = float(torch.stack(recall).min())
    return LayerSample(mean, worst, last_mean, (wrong / size) ** 0.5 if size else 0.0)


def _mean(share: Tensor, some: Tensor) -> Tensor:
    """Mean over rows that see a key; 1 where there are none."""
    if not bool(some.any()):
        return share.new_ones(())
    return share[some].mean()


def _rows(num_q: int, device: torch.device) -> tuple[Tensor, int]:
    """Addresses of rows spread evenly, then of the last ones; and how many are spread."""
    spread = min(SPREAD_ROWS, num_q)
    places = torch.arange(spread, device=device) * (num_q - 1) // max(1, spread - 1)
    last = torch.arange(max(0, num_q - LAST_ROWS), num_q, device=device)
    return torch.cat([places, last]), spread


def _band_rows(call: dict[str, Any], num_q: int, num_k: int, device: torch.device) -> Tensor:
    """``rows`` of the first batch entry, int32 [1, 5]."""
    if call["rows"] is not None:
        return call["rows"][:1]
    return torch.tensor([[0, num_q, call["q_offset"], 0, num_k]], dtype=torch.int32, device=device)


def _seen(
    call: dict[str, Any], geometry: Geometry, band: Tensor, row: Tensor, num_k: int
) -> Tensor:
    """Pairs that the mask shows, bool [R, Lk]; a bias may hide more."""
    bounds = None if call["bounds"] is None else call["bounds"][:1]
    low, high = row_intervals(geometry, call["q"].shape[2], band, bounds)
    key = torch.arange(num_k, device=row.device)
    seen = (key >= low[0, row, None]) & (key <= high[0, row, None])
    return seen if call["key_mask"] is None else seen & call["key_mask"][0]


def _weights(call: dict[str, Any], product: Tensor, head: int, row: Tensor, seen: Tensor) -> Tensor:
    """Dense attention weights of one head's rows, float32 [R, Lk]; 0 in rows that see nothing."""
    logits = product * call["scale"]
    if call["softcap"]:
        logits = call["softcap"] * torch.tanh(logits / call["softcap"])
    if call["bias"] is not None:
        place = torch.tensor([head], device=row.device)
        num_q, num_k = call["q"].shape[2], call["k"].shape[2]
        logits = logits + bias_of_rows(call["bias"], place, row[None], num_q, num_k)[0].float()
    logits = logits.masked_fill(~seen, float("-inf"))
    if call["sinks"] is not None:
        sink = call["sinks"][head].float().expand(row.shape[0], 1)
        logits = torch.cat([logits, sink], 1)
    return torch.softmax(logits, -1).nan_to_num(0.0)[:, : seen.shape[1]]


def kept_keys(
    index: AttentionIndex, geometry: Geometry, q_offset: int, head: int, row: Tensor, num_k: int
) -> Tensor:
    """Keys that the index gives to some rows of one head of the first batch entry, before the mask.

    Args:
        q_offset: position of row 0.
        row: int64 [R], addresses.
    Returns:
        bool [R, Lk].
    """
    band, listed = (int(slot) for slot in index.slots[head])
    key = torch.arange(num_k, device=row.device)
    block = row // geometry.block_q
    if band >= 0:
        covered = index.covered[0, band]
        distance = q_offset + (block[:, None] + 1) * geometry.block_q - key
        inside = (distance > 0) & (distance < covered.shape[0])
        kept = covered[distance.clamp(0, covered.shape[0] - 1)].bool() & inside
        kept[:, index.columns[0, band, : int(index.num_columns[0, band])].long()] = True
        return kept
    lists, count = index.blocks[0, listed, block].long(), index.num_blocks[0, listed, block]
    most = geometry.num_key_blocks(num_k)
    real = torch.arange(lists.shape[1], device=row.device) < count[:, None]
    held = torch.zeros(row.shape[0], most + 1, dtype=torch.bool, device=row.device)
    held.scatter_(1, torch.where(real, lists, most), True)
    return held[:, key // geometry.block_k]
