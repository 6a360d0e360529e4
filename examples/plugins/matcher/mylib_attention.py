"""A matcher: a library's own fused attention operator, read as an attention.

The operator keeps tokens before heads, [B, L, H, D], and lets several query heads share one of K and V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparse_compiler.plugins import (
    AttentionForm,
    argument,
    broadcast,
    calls,
    fix_sizes,
    floor_divide,
    matcher,
    shared_axes,
)


@torch.library.custom_op("mylib::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v for q [B, Lq, H, D], k and v [B, Lk, Hkv, D]; row i sees keys <= i."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@matcher
def read_attention(node: fx.Node, tensors) -> AttentionForm | None:
    """The operator's meaning: which element of q, k, v and the result stands at (b, h, i, j)."""
    if not calls(node, attention):
        return None
    q, k, v = (argument(node, place, name) for place, name in enumerate("qkv"))
    for operand in (q, k, v):
        fix_sizes(operand, 2, 3)  # heads and head sizes are constants, also under dynamic shapes
    batch, rows, heads, dim = tensors.shape(q)
    _, keys, kv_heads, value_dim = tensors.shape(v)
    axes = shared_axes(tensors, (batch, heads, rows, keys, dim, value_dim))
    group = floor_divide(axes.head, heads / kv_heads)
    return AttentionForm(
        axes=axes,
        query=broadcast(q, (axes.batch, axes.query, axes.head, axes.dim), tensors),
        key=broadcast(k, (axes.batch, axes.key, group, axes.dim), tensors),
        value=broadcast(v, (axes.batch, axes.key, group, axes.value_dim), tensors),
        output=broadcast(node, (axes.batch, axes.query, axes.head, axes.value_dim), tensors),
        is_causal=bool(argument(node, 3, "causal")),
        spelling="mylib::attention",
    )
