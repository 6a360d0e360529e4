"""Joining attention over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge", "with_sinks"]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets.

    Args:
        out_a, out_b: [..., L, Dv], each normalised over its own keys, 0 where a row had no key.
        lse_a, lse_b: float32 [..., L], natural logarithm, -inf where a row had no key.
    Returns:
        (out, lse); rows without a key in either give (0, -inf). Commutative, and associative up to
        rounding.
    Source: FlashAttention-2, section 3.1.
    """
    top = torch.maximum(lse_a, lse_b)
    safe = torch.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
    total = weight_a + weight_b
    # Normalised by their own sum, so that a rounded lse cannot make them add up to anything but 1.
    share = torch.where(total == 0, 1.0, total)
    out = out_a * (weight_a / share)[..., None] + out_b * (weight_b / share)[..., None]
    return out.to(out_a.dtype), safe + torch.log(total)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose softmax has one more logit a head, which has no value.

    Args:
        out, lse: as in ``merge``, of shapes [B, Hq, L, Dv] and [B, Hq, L].
        sinks: floating [Hq]; -inf is no sink.
    Returns:
        (out, lse): rows without a key keep 0 and take the sink as lse.
    """
    sink = sinks.float()[:, None]
    share = torch.sigmoid(lse - sink)
    # -inf - -inf: neither a key nor a sink.
    share = torch.where((lse == float("-inf")) & (sink == float("-inf")), 0.0, share)
    # Written in out's dtype at once: a product in float32 would take up to twice the room.
    scaled = torch.mul(out, share[..., None], out=torch.empty_like(out))
    return scaled, torch.logaddexp(lse, sink)
