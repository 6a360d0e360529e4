"""Bounds and biases for ``index_cases``, and attention with them written out in plain PyTorch.

Shares no code with the package but the two functions that list pairs.
"""

from __future__ import annotations

import torch
from index_cases import Case, Inputs
from torch import Tensor

from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs

BOUNDS = ("documents", "chunks", "prefix", "ragged")
BIASES = ("key", "key_heads", "expanded", "row", "full", "permuted", "table", "one_table", "least")


def make_bounds(case: Case, kind: str) -> Tensor | None:
    """int32 [B or 1, Lq, 2], first and last key of each row.

    Args:
        kind: "documents" (packed, other lengths in each batch entry), "chunks" (of 24 positions),
            "prefix" (the first third is seen by all, the rest up to the row itself), "ragged" (any
            interval: empty ones, ones that leave the keys) or "" for None.
    """
    position = torch.arange(case.num_q) + case.num_k - case.num_q
    generator = torch.Generator().manual_seed(case.seed + 1)
    if not kind:
        return None
    if kind == "documents":
        found = []
        for b in range(case.batch):
            picked = torch.randperm(case.num_k - 1, generator=generator)[: 3 + b] + 1
            starts = torch.cat([torch.zeros(1, dtype=torch.int64), picked.sort().values])
            ends = torch.cat([starts[1:], torch.tensor([case.num_k])]) - 1
            document = torch.searchsorted(starts, position, right=True) - 1
            found.append(torch.stack([starts[document], ends[document]], -1))
        return torch.stack(found).int()
    if kind == "chunks":
        low, high = position // 24 * 24, position // 24 * 24 + 23
    elif kind == "prefix":
        low, high = torch.zeros_like(position), position.clamp(min=case.num_k // 3)
    else:
        low = torch.randint(-9, case.num_k, position.shape, generator=generator)
        high = low + torch.randint(-5, case.num_k, position.shape, generator=generator)
        high[::7] = 2**31 - 1
        high[case.num_q // 2 : case.num_q // 2 + case.block_q] = -1
    return torch.stack([low, high], -1)[None].int()


def make_bias(case: Case, kind: str, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """A bias of one of ``BIASES``; some entries are -inf, and with "least" whole rows are finfo.min."""
    batch, heads, num_q, num_k = case.batch, case.heads, case.num_q, case.num_k
    shapes = {
        "key": (batch, 1, 1, num_k),
        "key_heads": (1, heads, 1, num_k),
        "expanded": (batch, 1, 1, num_k),
        "row": (batch, 1, num_q, num_k),
        "full": (batch, heads, num_q, num_k),
        "permuted": (1, num_q, num_k, heads),
        "table": (heads, num_q + num_k - 1),
        "one_table": (1, num_q + num_k - 1),
        "least": (1, 1, num_q, num_k),
    }
    if not kind:
        return None
    generator = torch.Generator().manual_seed(case.seed + 2)
    bias = torch.randn(shapes[kind], generator=generator).mul(2).to(dtype)
    bias[torch.rand(bias.shape, generator=generator) < 0.1] = float("-inf")
    if kind == "expanded":
        return bias.expand(batch, heads, num_q, num_k)
    if kind == "permuted":
        return bias.permute(0, 3, 1, 2)
    if kind == "least":
        bias[:, :, ::5] = torch.finfo(dtype).min
        bias[:, :, 1::5] = float("-inf")
    return bias


def by_pair(case: Case, bias: Tensor) -> Tensor:
    """``bias`` for each pair, float64, broadcastable to [B, Hq, Lq, Lk]."""
    if bias.ndim == 4:
        return bias.double()
    query, key = torch.arange(case.num_q)[:, None], torch.arange(case.num_k)[None, :]
    return bias.double()[:, key - query + case.num_q - 1]


def attend_plain(
    case: Case,
    inputs: Inputs,
    k: Tensor,
    v: Tensor,
    bounds: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 over the pairs of the case's index, k and v taken as given."""
    geometry, num_q, num_k = case.geometry, case.num_q, case.num_k
    seen = allowed_pairs(
        case.batch, num_q, num_k, geometry, rows=inputs.rows, key_mask=inputs.key_mask
    )[:, None]
    seen = seen & (covered_pairs(inputs.index, geometry, num_q, num_k, rows=inputs.rows) > 0)
    if bounds is not None:
        key = torch.arange(num_k)
        seen = seen & ((key >= bounds[..., :1]) & (key <= bounds[..., 1:]))[:, None]
    groups = case.heads // case.kv_heads
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    logits = inputs.q.double() @ keys.transpose(-1, -2) * case.scale
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    if bias is not None:
        logits = logits + by_pair(case, bias)
    logits = logits.masked_fill(~seen, float("-inf"))
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    weights = torch.where(empty, 0.0, logits.softmax(-1))
    return weights @ values, logits.logsumexp(-1)
