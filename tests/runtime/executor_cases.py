"""Attentions for the executors, and the same attentions by torch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.reference import allowed_pairs
from sparse_compiler.testing import Layout, random_qkv, sparse_attention

EXECUTORS = ("reference", "cpu")
A_SHAPE = HeadPattern("a_shape", 4, 30)
SLASH = HeadPattern("vertical_slash", 34, 104)
BLOCKS = HeadPattern("block_sparse", 1)
DENSE = HeadPattern("dense")
MIXES = (
    (A_SHAPE, SLASH, BLOCKS, DENSE),
    (SLASH,) * 4,
    (BLOCKS,) * 4,
    (A_SHAPE,) * 4,
    (DENSE, BLOCKS, BLOCKS, A_SHAPE),
)


@dataclass(frozen=True)
class Case:
    """One attention; row i has position num_k - num_q + i unless ``rows`` says otherwise."""

    seed: int = 0
    batch: int = 1
    heads: tuple[HeadPattern, ...] = MIXES[0]
    kv_heads: int = 2
    num_q: int = 100
    offset: int = 0
    dim: int = 32
    value_dim: int = 32
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    left: int = -1
    right: int = 0
    block_q: int = 64
    block_k: int = 32
    padding: str = "none"
    executor: str = "cpu"

    @property
    def num_k(self) -> int:
        return self.num_q + self.offset

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.offset, self.left, self.right, self.block_q, self.block_k)

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=len(self.heads),
            kv_heads=self.kv_heads,
            num_q=self.num_q,
            num_k=self.num_k,
            dim=self.dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            layout=self.layout,
        )

    def key_mask(self) -> torch.Tensor | None:
        if self.padding == "none":
            return None
        mask = torch.ones(self.batch, self.num_k, dtype=torch.bool)
        for b in range(self.batch):
            cut = (5 + 9 * b) % max(1, self.num_k // 2)
            if self.padding == "left":
                mask[b, :cut] = False
            elif self.padding == "right":
                mask[b, self.num_k - cut :] = False
            elif self.padding == "holes":
                mask[b, b + 1 :: 3] = False
            elif self.padding == "nothing visible" and b == 0:
                mask[b] = False
        return mask

    def allowed(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        return allowed_pairs(
            *(self.batch, self.num_q, self.num_k, self.geometry),
            rows=rows,
            key_mask=self.key_mask(),
        )

    def run(
        self,
        *qkv: torch.Tensor,
        budget: float = 1.0,
        rows: torch.Tensor | None = None,
        min_tokens: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_attention(
            *(qkv or self.qkv()),
            self.heads,
            self.geometry,
            executor=self.executor,
            budget=budget,
            rows=rows,
            key_mask=self.key_mask(),
            min_tokens=min_tokens,
        )[:2]


def truth(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own attention in float64, 0 and -inf where a row sees nothing; pairs [B, Lq, Lk]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(groups, 1) for t in (k, v))
    pairs = pairs[:, None] if pairs.dim() == 3 else pairs
    empty = ~pairs.any(-1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale)
    lse = (q @ k.mT * scale).masked_fill(~pairs, float("-inf")).logsumexp(-1)
    return out.masked_fill(empty[..., None], 0.0), lse


def dense_by_selection(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor, scale: float
) -> torch.Tensor:
    """Dense attention in which a hidden score is -inf whatever it was; torch adds -inf, NaN too."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~pairs[:, None], float("-inf"))
    return scores.softmax(-1) @ v


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    heads=st.sampled_from(MIXES),
    kv_heads=st.sampled_from([1, 2, 4]),
    num_q=st.sampled_from([2, 31, 64, 65, 128, 150]),
    offset=st.sampled_from([0, 0, 1, 40, 64]),
    dim=st.sampled_from([16, 32, 64, 80, 128, 256]),
    value_dim=st.sampled_from([16, 32, 64, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["contiguous", "tokens_first", "gaps", "reversed_heads"]),
    left=st.sampled_from([-1, -1, 0, 10, 70]),
    block_q=st.sampled_from([32, 64, 256]),
    block_k=st.sampled_from([16, 32, 64]),
    padding=st.sampled_from(["none", "none", "left", "right", "holes", "nothing visible"]),
    executor=st.sampled_from(EXECUTORS),
)
PARTIAL_EVERYTHING = Case(
    batch=2, num_q=131, offset=37, dim=80, value_dim=48, left=50, padding="holes", layout="gaps"
)

NOTHING = float("-inf")
