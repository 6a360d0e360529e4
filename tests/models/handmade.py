"""Attention written by hand, once for each spelling that people use; none comes from a library.

Every module maps x [B, L, HIDDEN] (and for some a mask of ones and zeros [B, L]) to [B, L, HIDDEN].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from shrink import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, WINDOW
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

__all__ = ["MODULES", "Attention"]

Core = Callable[..., Tensor]
_MIN = torch.finfo(torch.float32).min
_SCALE = HEAD_DIM**-0.5


def causal(q: Tensor, k: Tensor) -> Tensor:
    """Boolean [Lq, Lk], True where a key is visible; the last query sees every key."""
    lq, lk = q.shape[-2], k.shape[-2]
    return torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)


class Attention(nn.Module):
    """Projections, heads, ``core`` and the output projection, twice with a residual each.

    Args:
        core: ``(q [B, H, L, D], k, v [B, Hkv, L, D], module) -> [B, H, L, Dv]``; with ``masked`` it
            gets the mask [B, L] as another argument.
        kv_heads: heads of k and v.
        masked: ``forward`` takes a mask.
    """

    def __init__(self, core: Core, kv_heads: int = HEADS, masked: bool = False) -> None:
        super().__init__()
        self.core, self.masked = core, masked
        self.layers = nn.ModuleList(_Layer(kv_heads) for _ in range(2))
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.table = nn.Embedding(32, HEADS)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            q, k, v = layer.split(x)
            extra = (attention_mask,) if self.masked else ()
            heads = self.core(q, k, v, self, *extra)
            x = x + layer.out(heads.transpose(1, 2).reshape(*x.shape[:2], -1))
        return x


class _Layer(nn.Module):
    """Projections of one layer, and heads out of them."""

    kv_heads: int

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * kv_heads) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN)

    def split(self, x: Tensor) -> list[Tensor]:
        parts = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (-1, HEAD_DIM))
        return list(parts.transpose(1, 2).split([HEADS, self.kv_heads, self.kv_heads], 1))


def matmul(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD_DIM)
    scores = scores.masked_fill(~causal(q, k), float("-inf"))
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def at_sign_added_mask(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    scores = (q * _SCALE) @ k.mT + torch.where(causal(q, k), 0.0, _MIN)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def where_filled(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    scores = torch.where(causal(q, k), q @ k.transpose(2, 3) * _SCALE, -1e9)
    return F.dropout(scores.softmax(-1), 0.1, training=False) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * _SCALE
    scores = scores.masked_fill(~causal(q, k), _MIN)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_grouped(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    grouped = q.unflatten(1, (KV_HEADS, HEADS // KV_HEADS))
    scores = torch.einsum("bkgid,bkjd->bkgij", grouped, k) * _SCALE
    scores = scores.masked_fill(~causal(q, k), _MIN)
    return torch.einsum("bkgij,bkjd->bkgid", scores.softmax(-1), v).flatten(1, 2)


def bmm(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    q3, k3, v3 = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.bmm(q3 * _SCALE, k3.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v3).view_as(q)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    mask = torch.where(causal(q, k), 0.0, _MIN).expand(q.shape[0] * HEADS, -1, -1)
    q3, k3, v3 = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(mask, q3, k3.transpose(1, 2), beta=1.0, alpha=_SCALE)
    return torch.bmm(F.softmax(scores, dim=-1), v3).view_as(q)


def softcap(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    scores = torch.tanh(q @ k.mT * _SCALE / 5.0) * 5.0
    return scores.masked_fill(~causal(q, k), _MIN).softmax(-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor, module: nn.Module) -> Tensor:
    scores = (q @ k.mT * _SCALE).masked_fill(~causal(q, k), _MIN)
    column = module.sinks[None, :, None, None].expand(*scores.shape[:3], 1)  # type: ignore[index]
    scores = torch.cat([scores, column], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=q.device)
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    bias = slopes[:, None, None] * distance
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~causal(q, k), _MIN)[None])


def relative_table(q: Tensor, k: Tensor, v: Tensor, module: nn.Module) -> Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    bias = module.table(distance.clamp(-16, 15) + 16).permute(2, 0, 1)[None]  # type: ignore[operator]
    return (q @ k.mT * _SCALE + bias).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def chunked_heads(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    parts = zip(q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True) for p in parts], 1)


def repeated(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def expanded(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    def repeat(t: Tensor) -> Tensor:
        return t[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2)

    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)


def latent(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    """Dqk != Dv and one rotary part of k for all heads."""
    shared = k[:, :1, :, :8].expand(-1, HEADS, -1, -1)
    query, key = torch.cat([q, q[..., :8]], -1), torch.cat([k, shared], -1)
    return F.scaled_dot_product_attention(query, key, v, is_causal=True)


def two_sided_window(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    distance = torch.arange(k.shape[2])[None, :] - torch.arange(q.shape[2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=distance.abs() <= WINDOW // 2)


def chunked(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=(keys <= rows) & (rows // WINDOW == keys // WINDOW)
    )


def prefix(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    visible = causal(q, k) | (torch.arange(k.shape[2]) < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def padded(q: Tensor, k: Tensor, v: Tensor, _: nn.Module, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())


def padded_causal(q: Tensor, k: Tensor, v: Tensor, _: nn.Module, mask: Tensor) -> Tensor:
    hidden = (1.0 - mask[:, None, None, :].to(q.dtype)) * _MIN
    scores = q @ k.mT * _SCALE + torch.where(causal(q, k), 0.0, _MIN) + hidden
    return scores.softmax(-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor, _: nn.Module, mask: Tensor) -> Tensor:
    """The mask's running sum, cut into pieces, stands for document numbers."""
    documents = mask.cumsum(-1) // WINDOW
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same & causal(q, k))


def flex(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    block_mask = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=str(q.device)
    )
    return flex_attention(q, k, v, block_mask=block_mask)  # type: ignore[return-value]


def flex_bias(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.1 * (j - i))  # type: ignore[return-value]


def top_k(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    """A mask made from the data: nobody can prove it, so it must be declined."""
    scores = (q @ k.mT * _SCALE).masked_fill(~causal(q, k), _MIN)
    threshold = scores.topk(WINDOW // 2, dim=-1).values[..., -1:]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q, k) & (scores >= threshold))


def weights_used(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    """The probabilities themselves are read: they must stay."""
    weights = (q @ k.mT * _SCALE).masked_fill(~causal(q, k), _MIN).softmax(-1)
    return weights @ v + weights.max(dim=-1, keepdim=True).values


def softmax_of_rows(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    """Looks like attention; the softmax runs over the queries."""
    return (q @ k.mT * _SCALE).softmax(dim=-2) @ v


def with_log_n(q: Tensor, k: Tensor, v: Tensor, _: nn.Module) -> Tensor:
    """A scale for each row."""
    rows = torch.arange(1, q.shape[2] + 1, dtype=q.dtype)[:, None]
    return F.scaled_dot_product_attention(q * rows.log1p(), k, v, is_causal=True)


class Multihead(nn.Module):
    """``nn.MultiheadAttention``; its forward is ``F.multi_head_attention_forward``."""

    masked = True

    def __init__(self, need_weights: bool, is_causal: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.need_weights, self.is_causal = need_weights, is_causal

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None
        if self.is_causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        hidden = None if attention_mask is None else attention_mask == 0
        output, weights = self.attention(
            x, x, x, attn_mask=mask, key_padding_mask=hidden, need_weights=self.need_weights
        )
        return output if weights is None else output + weights.amax(-1, keepdim=True)


class MultiheadFunction(nn.Module):
    """``F.multi_head_attention_forward`` called directly, [L, B, HIDDEN] inside."""

    masked = False

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        output, _ = F.multi_head_attention_forward(
            x, x, x, HIDDEN, HEADS, self.proj.weight, self.proj.bias, None, None, False, 0.0,
            self.out.weight, self.out.bias, training=False, need_weights=False,
        )  # fmt: skip
        return output.transpose(0, 1)


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, whose eval mode may take a fused path."""

    masked = True

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 96, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = None if attention_mask is None else attention_mask == 0
        return self.encoder(x, src_key_padding_mask=hidden)


def exported(core: Core) -> nn.Module:
    """A module made by ``torch.export``: its graph holds ATen operators."""
    module = Attention(core).eval()
    length = torch.export.Dim("length", min=2, max=512)
    x = torch.randn(1, 43, HIDDEN)
    program = torch.export.export(module, (), {"x": x}, dynamic_shapes={"x": {1: length}})
    return program.module()


def _plain(core: Core, **options: int) -> Callable[[], nn.Module]:
    return lambda: Attention(core, **options)  # type: ignore[arg-type]


MODULES: dict[str, Callable[[], nn.Module]] = {
    **{
        core.__name__: _plain(core)
        for core in (matmul, at_sign_added_mask, where_filled, einsum, bmm, baddbmm, softcap, sinks)
    },
    **{
        core.__name__: _plain(core)
        for core in (
            alibi,
            relative_table,
            chunked_heads,
            latent,
            two_sided_window,
            chunked,
            prefix,
        )
    },
    **{
        core.__name__: _plain(core)
        for core in (flex, flex_bias, top_k, weights_used, softmax_of_rows, with_log_n)
    },
    **{
        core.__name__: _plain(core, kv_heads=KV_HEADS)
        for core in (einsum_grouped, repeated, expanded)
    },
    **{core.__name__: _plain(core, masked=True) for core in (padded, padded_causal, packed)},
    "multihead": lambda: Multihead(False, False),
    "multihead_causal": lambda: Multihead(False, True),
    "multihead_weights": lambda: Multihead(True, True),
    "multihead_function": MultiheadFunction,
    "transformer_encoder": Encoder,
    "exported_matmul": lambda: exported(matmul),
    "exported_sdpa": lambda: exported(sdpa),
}
