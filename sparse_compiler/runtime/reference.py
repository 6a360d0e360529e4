"""The oracle: slow, obvious, in the widest type; fast code never imports it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compiler.ir.index import AttentionIndex, Geometry

__all__ = ["allowed_pairs", "attend_pairs", "attend_reference", "covered_pairs", "pair_bias"]


def allowed_pairs(
    batch: int,
    num_q: int,
    num_k: int,
    geometry: Geometry,
    *,
    rows: Tensor | None = None,
    key_mask: Tensor | None = None,
    bounds: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Pairs that the mask allows, bool [B, Lq, Lk]; ``rows``, ``key_mask``, ``bounds`` as in ``ops``."""
    query = torch.arange(num_q, device=device)[None, :, None]
    key = torch.arange(num_k, device=device)[None, None, :]
    mask = torch.ones(batch, num_q, num_k, dtype=torch.bool, device=device)
    position = query + geometry.q_offset
    if rows is not None:
        start, length, offset, kv_start, kv_len = (
            column[:, None, None].long() for column in rows.unbind(1)
        )
        position = query + offset
        mask &= (query >= start) & (query < start + length)
        mask &= (key >= kv_start) & (key < kv_start + kv_len)
    if geometry.left >= 0:
        mask &= key >= position - geometry.left
    if geometry.right >= 0:
        mask &= key <= position + geometry.right
    if key_mask is not None:
        mask &= key_mask[:, None, :]
    if bounds is not None:
        mask &= (key >= bounds[..., :1]) & (key <= bounds[..., 1:])
    return mask


def pair_bias(bias: Tensor, num_q: int, num_k: int) -> Tensor:
    """What is added to each logit, broadcastable to [B, Hq, Lq, Lk], from either form of ``bias``."""
    if bias.dim() == 4:
        return bias
    query = torch.arange(num_q, device=bias.device)[:, None]
    key = torch.arange(num_k, device=bias.device)[None, :]
    return bias[:, key - query + num_q - 1][None]


def covered_pairs(
    index: AttentionIndex,
    geometry: Geometry,
    num_q: int,
    num_k: int,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """How often the index covers each pair before the mask is applied, int32 [B, Hq, Lq, Lk].

    The law that every index must keep is that no entry exceeds 1. ``rows`` as in ``ops``: where
    given, its q_offset takes the place of the geometry's.
    """
    batch = index.full.shape[0]
    num_heads, size_q, size_k = index.slots.shape[0], geometry.block_q, geometry.block_k
    count = torch.zeros(batch, num_heads, num_q, num_k, dtype=torch.int32)
    lists = [tensor.cpu().tolist() for tensor in index.tensors()]
    full, num_full, edge, edge_len, num_edge, columns, num_columns, covered, *rest = lists
    blocks, num_blocks, slots = rest
    for b in range(batch):
        offset = geometry.q_offset if rows is None else int(rows[b, 2])
        for h in range(num_heads):
            band, listed = slots[h]
            for m in range(geometry.num_row_blocks(num_q)):
                part = count[b, h, m * size_q : (m + 1) * size_q]
                end = offset + (m + 1) * size_q
                if band >= 0:
                    for x in full[b][band][: num_full[b][band]]:
                        part[:, max(0, end - x) : max(0, end - x + size_k)] += 1
                    for t in range(num_edge[b][band]):
                        first = end - edge[b][band][t]
                        part[:, max(0, first) : max(0, first + edge_len[b][band][t])] += 1
                    for j in columns[b][band][: num_columns[b][band]]:
                        if j >= end or not covered[b][band][end - j]:
                            part[:, j] += 1
                if listed >= 0:
                    for n in blocks[b][listed][m][: num_blocks[b][listed][m]]:
                        part[:, n * size_k : (n + 1) * size_k] += 1
    return count


def attend_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the listed pairs.

    Args:
        q: [B, Hq, Lq, D].  k, v: [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]; Hq % Hkv == 0.
        pairs: bool, broadcastable to [B, Hq, Lq, Lk].
        scale: multiplies q @ kᵀ before the soft cap, the bias and the softmax.
        bias, sinks: as in ``sparse_compiler.ops``.
    Returns:
        out [B, Hq, Lq, Dv] in q.dtype, 0 where a row has no pair; lse [B, Hq, Lq] float32, natural
        logarithm, -inf (or the sink) there. Computed in float32, or float64 for float64 inputs.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[1] // k.shape[1]
    keys, values = (t.to(wide).repeat_interleave(groups, dim=1) for t in (k, v))
    scores = (q.to(wide) @ keys.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + pair_bias(bias, q.shape[2], k.shape[2]).to(wide)
    scores = scores.masked_fill(~pairs, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(wide)[:, None])
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    return (weights @ values).to(q.dtype), lse.float()


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: AttentionIndex,
    geometry: Geometry,
    *,
    scale: float,
    softcap: float = 0.0,
    rows: Tensor | None = None,
    key_mask: Tensor | None = None,
    bounds: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that ``index`` lists and the mask allows.

    Args:
        q, k, v: as in ``attend_pairs``.
        index, geometry: coverage and mask; positions in tokens.
        rows, key_mask, bounds, bias: as in ``sparse_compiler.ops``.
    Returns:
        (out, lse) as ``attend_pairs``.
    Source: PIT section 3.1; FlashAttention-2 algorithm 1.
    """
    num_q, num_k = q.shape[2], k.shape[2]
    pairs = covered_pairs(index, geometry, num_q, num_k, rows=rows).to(q.device) > 0
    allowed = allowed_pairs(
        *(q.shape[0], num_q, num_k, geometry),
        rows=rows,
        key_mask=key_mask,
        bounds=bounds,
        device=q.device,
    )
    pairs &= allowed[:, None]
    return attend_pairs(q, k, v, pairs, scale=scale, softcap=softcap, bias=bias)
