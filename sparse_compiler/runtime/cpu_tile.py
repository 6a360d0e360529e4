"""Attention of one row block on gathered keys: PyTorch's fused CPU kernel, or plain operations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend_tile", "bias_tile"]


def bias_tile(bias: Tensor, head: int, begin: int, stop: int, keys: Tensor, num_q: int) -> Tensor:
    """The bias of rows begin .. stop - 1 of one head at some keys, [stop - begin or 1, n].

    Args:
        bias: of one batch entry: [Hq or 1, Lq or 1, Lk], or a table by distance [Hq or 1, X].
        keys: int64 [n], key addresses.
        num_q: Lq.
    """
    mine = bias[head if bias.shape[0] > 1 else 0]
    if mine.dim() == 2:
        rows = mine[begin:stop] if mine.shape[0] > 1 else mine
        return rows.index_select(1, keys)
    rows = torch.arange(begin, stop)[:, None]
    return mine[keys - rows + (num_q - 1)]


def attend_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of q [L, D] on k [n, D], v [n, D].

    Args:
        seen: bool [L, n], the pairs to compute; None is all.
        bias: [L or 1, n], added to the logits after the soft cap; None is 0.
        causal: row i sees keys 0..i alone; L = n, without soft cap, ``seen`` or bias.
    Returns:
        out [L, D] in q.dtype and lse [L], in float32 (or float64 for float64 inputs); 0 and -inf
        where a row sees nothing.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias is not None:
        # The kernel takes a mask of another dtype than float32 for q's own, unchecked.
        bias = bias.to(wide)
        if seen is not None:
            bias = bias.masked_fill(~seen, float("-inf"))
    elif seen is not None:
        dtype = wide if softcap else q.dtype
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    if softcap:
        return _plain(q.to(wide), k.to(wide), v.to(wide), scale, softcap, bias, q.dtype)
    return _flash(q, k, v, scale, bias, causal)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The fused kernel knows no soft cap; the tile's scores are small enough to be kept."""
    scores = (q @ k.mT).mul_(scale / softcap).tanh_().mul_(softcap)
    if bias is not None:
        # A hidden score is -inf whatever it was, NaN included.
        scores = torch.where(bias == float("-inf"), float("-inf"), scores + bias)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[:, None]).exp_()
    return (weights @ v).to(dtype), lse


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused CPU attention; bias [L or 1, n] may hold -inf."""
    mask = None if bias is None else bias.expand(q.shape[0], -1)[None, None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None, None], k[None, None], v[None, None], 0.0, causal, attn_mask=mask, scale=scale
    )
    out, lse = out[0, 0], lse.view(-1)
    if bias is not None:
        # amax, since any() over bool is not vectorised on the CPU.
        empty = bias.amax(-1) == float("-inf")
        out = out.masked_fill(empty[:, None], 0.0)
        lse = lse.masked_fill(empty, float("-inf"))
    return out, lse
