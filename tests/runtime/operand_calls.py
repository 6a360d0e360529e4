"""Attentions with every operand there is, and the same attentions written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from executor_cases import BLOCKS, DENSE, EXECUTORS, SLASH
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.reference import covered_pairs
from sparse_compiler.testing import assert_close, assert_lse_close, random_qkv, sparse_attention

NOTHING = float("-inf")
A_SHAPE = HeadPattern("a_shape", 4, 12)
MIXES = ((A_SHAPE, SLASH, BLOCKS, DENSE), (SLASH,) * 4, (A_SHAPE,) * 4, (DENSE, BLOCKS) * 2)
BOUNDS = ("none", "packed", "packed causal", "chunks", "prefix", "random", "nothing")
BIASES = (
    *("none", "full", "one head", "one batch entry", "keys", "keys of heads", "one for all"),
    *("table", "table of heads"),
)


@dataclass(frozen=True)
class Case:
    """One attention with every operand there is; row i has position offset + i."""

    seed: int = 0
    batch: int = 2
    heads: tuple[HeadPattern, ...] = MIXES[0]
    kv_heads: int = 2
    num_q: int = 150
    offset: int = 0
    dim: int = 16
    value_dim: int = 24
    dtype: torch.dtype = torch.float32
    left: int = -1
    right: int = 0
    block_q: int = 64
    block_k: int = 32
    padding: bool = False
    bounds: str = "none"
    bias: str = "none"
    bias_dtype: torch.dtype = torch.float32
    hiding: bool = False
    sinks: bool = False
    softcap: float = 0.0
    executor: str = "cpu"

    @property
    def num_k(self) -> int:
        return self.num_q + self.offset

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.offset, self.left, self.right, self.block_q, self.block_k)

    def draw(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = {"num_q": self.num_q, "num_k": self.num_k}
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=4,
            kv_heads=self.kv_heads,
            dim=self.dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            **sizes,
        )

    def key_mask(self) -> torch.Tensor | None:
        if not self.padding:
            return None
        mask = torch.ones(self.batch, self.num_k, dtype=torch.bool)
        mask[0, : self.num_k // 5] = False
        mask[-1, 3::7] = False
        return mask

    def bounds_tensor(self) -> torch.Tensor | None:
        """int32 [B or 1, Lq, 2]."""
        num_q, num_k, position = self.num_q, self.num_k, torch.arange(self.num_q) + self.offset
        if self.bounds == "none":
            return None
        if self.bounds == "random":
            ends = torch.randint(-2, num_k + 2, (self.batch, num_q, 2), generator=self.draw())
            return ends.int()
        low = torch.zeros(num_q, dtype=torch.int64)
        high = torch.full((num_q,), num_k - 1)
        if self.bounds.startswith("packed"):
            cuts = torch.tensor([0, num_k // 5, num_k // 2, num_k // 2 + 9, num_k])
            document = torch.searchsorted(cuts, position, right=True) - 1
            low, high = cuts[document], cuts[(document + 1).clamp(max=4)] - 1
            high = torch.minimum(high, position) if self.bounds == "packed causal" else high
        elif self.bounds == "chunks":
            low = position // 37 * 37
            high = low + 36
        elif self.bounds == "prefix":
            high = torch.maximum(position, torch.tensor(num_k // 3))
        elif self.bounds == "nothing":
            low[::3], high[::3] = 5, 4
        return torch.stack([low, high], -1).int()[None]

    def bias_tensor(self) -> torch.Tensor | None:
        shapes = {
            "full": (self.batch, 4, self.num_q, self.num_k),
            "one head": (self.batch, 1, self.num_q, self.num_k),
            "one batch entry": (1, 4, self.num_q, self.num_k),
            "keys": (self.batch, 1, 1, self.num_k),
            "keys of heads": (1, 4, 1, self.num_k),
            "one for all": (1, 1, self.num_q, self.num_k),
            "table": (1, self.num_q + self.num_k - 1),
            "table of heads": (4, self.num_q + self.num_k - 1),
        }
        if self.bias == "none":
            return None
        draw = self.draw()
        bias = 2 * torch.randn(shapes[self.bias], generator=draw)
        if self.hiding:
            bias[torch.rand(bias.shape, generator=draw) < 0.3] = NOTHING
        return bias.to(self.bias_dtype)

    def sink_tensor(self) -> torch.Tensor | None:
        return torch.tensor([0.5, -1.0, NOTHING, 4.0]) if self.sinks else None

    def allowed(self) -> torch.Tensor:
        """Pairs that the mask allows, bool [B, 1, Lq, Lk], in other words than the oracle's."""
        query, key = torch.arange(self.num_q)[:, None], torch.arange(self.num_k)[None]
        distance = key - query - self.offset
        mask = torch.ones(self.batch, self.num_q, self.num_k, dtype=torch.bool)
        mask &= distance <= self.right if self.right >= 0 else mask
        mask &= -distance <= self.left if self.left >= 0 else mask
        padding, bounds = self.key_mask(), self.bounds_tensor()
        if padding is not None:
            mask &= padding[:, None]
        if bounds is not None:
            mask &= (bounds[..., 0, None] <= key) & (key <= bounds[..., 1, None])
        return mask[:, None]

    def truth(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) in float64 with everything materialised."""
        k, v = (t.double().repeat_interleave(4 // self.kv_heads, 1) for t in (k, v))
        logits = q.double() @ k.mT * self.dim**-0.5
        if self.softcap:
            logits = self.softcap * (logits / self.softcap).tanh()
        bias = self.bias_tensor()
        if bias is not None and bias.dim() == 4:
            logits = logits + bias.double()
        elif bias is not None:
            for i in range(self.num_q):
                first = self.num_q - 1 - i
                logits[:, :, i] += bias.double()[:, first : first + self.num_k]
        logits = logits.masked_fill(~pairs, NOTHING)
        sinks = self.sink_tensor()
        extra = torch.full((4,), NOTHING) if sinks is None else sinks
        extra = extra.double()[:, None, None].expand(self.batch, -1, self.num_q, 1)
        lse = torch.cat([logits, extra], -1).logsumexp(-1)
        weights = torch.where(logits == NOTHING, 0.0, (logits - lse[..., None]).exp())
        return weights @ v, lse

    def run(
        self, *qkv: torch.Tensor, budget: float = 1.0, min_tokens: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(out, lse, pairs that the index covers bool [B, Hq, Lq, Lk])."""
        out, lse, index = sparse_attention(
            *(*qkv, self.heads, self.geometry),
            executor=self.executor,
            softcap=self.softcap,
            budget=budget,
            min_tokens=min_tokens,
            key_mask=self.key_mask(),
            bounds=self.bounds_tensor(),
            bias=self.bias_tensor(),
            sinks=self.sink_tensor(),
        )
        return out, lse, covered_pairs(index, self.geometry, self.num_q, self.num_k)

    def check(
        self,
        result: tuple[torch.Tensor, torch.Tensor],
        expected: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        # What dispatch does with a sink, it does in float32.
        dtype = torch.float32 if self.sinks and self.dtype == torch.float64 else self.dtype
        assert result[0].dtype == self.dtype
        assert_close(result[0], expected[0], length=self.num_k, dtype=dtype)
        assert_lse_close(result[1], expected[1], length=self.num_k)


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    heads=st.sampled_from(MIXES),
    kv_heads=st.sampled_from([1, 2, 4]),
    num_q=st.sampled_from([2, 31, 65, 150]),
    offset=st.sampled_from([0, 0, 1, 40]),
    dim=st.sampled_from([16, 64]),
    value_dim=st.sampled_from([16, 24, 96]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    left=st.sampled_from([-1, -1, 0, 20]),
    right=st.sampled_from([0, 0, -1, 7]),
    block_q=st.sampled_from([32, 64, 256]),
    block_k=st.sampled_from([16, 64]),
    padding=st.booleans(),
    bounds=st.sampled_from(BOUNDS),
    bias=st.sampled_from(BIASES),
    bias_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    hiding=st.booleans(),
    sinks=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 4.0]),
    executor=st.sampled_from(EXECUTORS),
)
EVERYTHING = Case(
    left=60, right=45, padding=True, bounds="packed", bias="full", hiding=True, sinks=True
)
