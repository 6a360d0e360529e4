"""Small models and attention calls for the tests of the search."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compiler.demo.model import RetrieverConfig, RetrieverModel
from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.observe import AttentionCall
from sparse_compiler.runtime.reference import allowed_pairs, attend_pairs

TOKENS = 1024


def small_model(layers: int = 2, seed: int = 0) -> RetrieverModel:
    """Four heads of size 16, two key heads."""
    torch.manual_seed(seed)
    config = RetrieverConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return RetrieverModel(config).eval().requires_grad_(False)


def prompt(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (tokens,), generator=draw)


class _Planted(nn.Module):
    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(t, requires_grad=False) for t in (q, k, v))

    def forward(self, hidden: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            self.q + 0 * hidden, self.k + 0 * hidden, self.v + 0 * hidden, is_causal=True
        )
        return hidden + out.sum()


class PlantedModel(nn.Module):
    """One layer whose three heads look near by, at a few keys, and at blocks of their own kind."""

    def __init__(self, tokens: int = TOKENS) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        place = torch.arange(tokens)
        angle = place[:, None] / torch.tensor([40.0, 90.0, 200.0, 450.0])
        near = torch.cat([angle.cos(), angle.sin()], -1).repeat(1, 2)
        columns = torch.zeros(tokens, 16)
        columns[torch.randperm(tokens, generator=draw)[:24], 0] = 4.0
        asks = torch.zeros(tokens, 16)
        asks[:, 0] = 12.0
        kind = torch.randint(0, 16, (tokens // 64,), generator=draw).repeat_interleave(64)
        kinds = F.one_hot(kind, 16).float()
        q = torch.stack([near * 8, asks, kinds * 30])[None]
        k = torch.stack([near * 8, columns, kinds])[None]
        v = torch.randn(1, 3, tokens, 16, generator=draw)
        self.layers = nn.ModuleList([_Planted(q, k, v)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = input_ids.float().mean() * torch.ones(1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def attention_call(
    *,
    num_q: int = 192,
    num_k: int = 192,
    heads: int = 4,
    kv_heads: int = 2,
    left: int = -1,
    right: int = 0,
    softcap: float = 0.0,
    **operands: Any,
) -> AttentionCall:
    """A dense call as the observer sees it; its result comes from the oracle."""
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(1, heads, num_q, 16, generator=draw)
    k = torch.randn(1, kv_heads, num_k, 16, generator=draw)
    v = torch.randn(1, kv_heads, num_k, 16, generator=draw)
    offset = num_k - num_q
    geometry = Geometry(offset, left, right, 64, 64)
    rows = torch.tensor([[0, num_q, offset, 0, num_k]], dtype=torch.int32)
    given = {"key_mask": None, "bounds": None, "bias": None, "sinks": None, **operands}
    pairs = allowed_pairs(
        *(1, num_q, num_k, geometry),
        rows=rows,
        key_mask=given["key_mask"],
        bounds=given["bounds"],
    )
    out, lse = attend_pairs(
        *(q, k, v, pairs[:, None]),
        scale=0.25,
        softcap=softcap,
        bias=given["bias"],
        sinks=given["sinks"],
    )
    banded = right == 0 and given["bounds"] is None
    more = {"banded": banded, "executor": "cpu", "out": out, "lse": lse, "softcap": softcap}
    return AttentionCall(
        params=None, q=q, k=k, v=v, geometry=geometry, scale=0.25, rows=rows, **given, **more
    )
