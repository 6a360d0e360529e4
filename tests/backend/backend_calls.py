"""The backend as the tests call it: what it is given, what it made of it, and the comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparse_compiler
from sparse_compiler.backend import minference
from sparse_compiler.testing import assert_close, random_qkv

LENGTH = 90
ATTEND = torch.ops.sparse_compiler.attend.default
EXACT = {"budget": 1.0}


class Capture:
    """The backend under test; keeps every graph as it left the passes."""

    def __init__(self, **options: Any) -> None:
        self.options = {"min_tokens": 0, "inner": "eager"} | options
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = minference(gm, inputs, options=self.options)
        self.graphs.append(gm)
        return run

    def count(self, target: Any) -> int:
        return sum(n.target == target for gm in self.graphs for n in gm.graph.nodes)

    @property
    def rewritten(self) -> int:
        return self.count(ATTEND)

    @property
    def dense(self) -> int:
        return self.count(F.scaled_dot_product_attention)

    def masks(self, num_q: int, num_k: int) -> list[str]:
        """Nodes that hold a tensor [..., Lq, Lk] without heads' values: masks left in the graph."""
        found = []
        for gm in self.graphs:
            for node in gm.graph.nodes:
                value = node.meta.get("example_value")
                if isinstance(value, Tensor) and tuple(value.shape[-2:]) == (num_q, num_k):
                    found.append(node.name)
        return found


class Block(nn.Module):
    """Grouped-query attention as people write it."""

    def __init__(self, grouping: str, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> None:
        super().__init__()
        self.grouping, self.heads, self.kv_heads, self.dim = grouping, heads, kv_heads, dim
        self.q = nn.Linear(48, heads * dim)
        self.k = nn.Linear(48, kv_heads * dim)
        self.v = nn.Linear(48, kv_heads * dim)
        self.o = nn.Linear(heads * dim, 48)
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k, v = (
            layer(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
            for layer in (self.k, self.v)
        )
        groups = self.heads // self.kv_heads
        keywords: dict[str, Any] = {}
        if self.grouping == "enable_gqa":
            keywords["enable_gqa"] = True
        elif self.grouping == "repeat_interleave":
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        elif self.grouping == "expand":
            shape = (batch, self.kv_heads, groups, length, self.dim)
            k, v = (t[:, :, None].expand(shape).flatten(1, 2) for t in (k, v))
        elif self.grouping == "tiled":
            # Not grouping: query head h reads key head h % Hkv.
            k, v = (t.repeat(1, groups, 1, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout, is_causal=True, **keywords
        )
        return x + self.o(out.transpose(1, 2).reshape(batch, length, -1))


NUM_Q, NUM_K = 70, 101


def qkv(num_q: int = NUM_Q, num_k: int = NUM_K, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 4, "dim": 16} | changes
    return random_qkv(0, num_q=num_q, num_k=num_k, **sizes)


def square(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv(LENGTH, LENGTH, **changes)


def check(
    function: Callable[..., Tensor], *args: Tensor, rewritten: bool | None, **options: Any
) -> Capture:
    """Compile ``function``, compare with running it plainly, and count what was rewritten."""
    expected = function(*args)
    capture = Capture(**{"fallback": "silent"} | EXACT | options)
    out = torch.compile(function, backend=capture)(*args)
    # Rows that see nothing: torch's kernels differ among themselves (0 or NaN).
    expected = expected.nan_to_num(0.0)
    assert_close(out.nan_to_num(0.0), expected, length=args[1].shape[2])
    if rewritten is not None and capture.rewritten != int(rewritten):
        raise AssertionError([(s.code, s.reason) for s in capture_sites(function, args, capture)])
    return capture


def capture_sites(function: Callable[..., Tensor], args: Any, capture: Capture) -> list[Any]:
    return sparse_compiler.explain(function, args, options=capture.options).sites


sdpa = F.scaled_dot_product_attention


def block_and_input(length: int = LENGTH) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    return Block("enable_gqa"), torch.randn(2, length, 48)


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "minference" in str(w.message)]


def refuse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


class Masked(nn.Module):
    """Two attentions whose mask is data."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = sdpa(self.proj(q), k, v, attn_mask=mask)
        return sdpa(out, k, v, attn_mask=mask)


def masked_inputs(length: int = LENGTH) -> tuple[Tensor, ...]:
    return (*qkv(length, length), torch.ones(length, length, dtype=torch.bool).tril())
