"""Selections that the tests of the patterns make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs
from sparse_compiler.testing import random_qkv, sparse_attention

A_SHAPE = HeadPattern("a_shape", 5, 20)
SLASH = HeadPattern("vertical_slash", 36, 110)
BLOCKS = HeadPattern("block_sparse", 1)
DENSE = HeadPattern("dense")


def hidden_keys(batch: int, num_k: int, hidden: tuple[int, int, int]) -> torch.Tensor | None:
    """Padding on the left, on the right, and every n-th key, in every second batch entry."""
    left, right, step = hidden
    if not any(hidden):
        return None
    mask = torch.ones(batch, num_k, dtype=torch.bool)
    for b in range(batch - 1, -1, -2):
        mask[b, :left] = False
        mask[b, num_k - right :] = False
        if step:
            mask[b, ::step] = False
    return mask


@dataclass(frozen=True)
class Call:
    """One selection; positions of the rows are ``q_offset + i``."""

    heads: tuple[HeadPattern, ...]
    geometry: Geometry
    num_q: int
    num_k: int
    seed: int = 0
    batch: int = 1
    kv_heads: int = 1
    hidden: tuple[int, int, int] = (0, 0, 0)
    budget: float = -1.0
    strength: float = 2.0

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=len(self.heads),
            kv_heads=self.kv_heads if len(self.heads) % self.kv_heads == 0 else 1,
            num_q=self.num_q,
            num_k=self.num_k,
            dim=16,
            strength=self.strength,
        )

    def key_mask(self) -> torch.Tensor | None:
        return hidden_keys(self.batch, self.num_k, self.hidden)

    def index(self, *qkv: torch.Tensor) -> AttentionIndex:
        return sparse_attention(
            *(qkv or self.qkv()),
            self.heads,
            self.geometry,
            budget=self.budget,
            key_mask=self.key_mask(),
        )[2]

    def covered(self, index: AttentionIndex) -> torch.Tensor:
        return covered_pairs(index, self.geometry, self.num_q, self.num_k)

    def allowed(self) -> torch.Tensor:
        return allowed_pairs(
            self.batch, self.num_q, self.num_k, self.geometry, key_mask=self.key_mask()
        )[:, None]

    def distance(self) -> torch.Tensor:
        position = torch.arange(self.num_q)[:, None] + self.geometry.q_offset
        return position - torch.arange(self.num_k)[None]


heads = st.one_of(
    st.builds(HeadPattern, st.just("a_shape"), st.integers(0, 40), st.integers(0, 60)),
    st.builds(HeadPattern, st.just("vertical_slash"), st.integers(0, 120), st.integers(0, 200)),
    st.builds(HeadPattern, st.just("block_sparse"), st.integers(0, 6)),
    st.just(DENSE),
)


@st.composite
def calls(draw: st.DrawFn, right: int | None = 0, budget: float | None = None) -> Call:
    # One row is decode, which stays dense.
    num_q = draw(st.sampled_from([2, 3, 33, 64, 90, 150]))
    offset = draw(st.sampled_from([0, 0, 1, 30, 64]))
    # Keys after the last row: a static cache whose end is not filled yet.
    num_k = num_q + offset + draw(st.sampled_from([0, 0, 0, 9, 70]))
    geometry = Geometry(
        offset,
        draw(st.sampled_from([-1, -1, 0, 15, 40, 64])),
        0 if right == 0 else draw(st.sampled_from([-1, 0, 5])),
        draw(st.sampled_from([32, 64])),
        draw(st.sampled_from([16, 32, 64])),
    )
    hidden = draw(st.sampled_from([(0, 0, 0), (0, 0, 0), (7, 0, 0), (0, 12, 0), (3, 3, 2)]))
    chosen = draw(st.lists(heads, min_size=1, max_size=3))
    share = draw(st.sampled_from([-1.0, -1.0, 0.1, 0.5])) if budget is None else budget
    return Call(
        tuple(chosen),
        geometry,
        num_q,
        num_k,
        draw(st.integers(0, 10**6)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        tuple(min(n, max(0, num_k - 1) // 2) for n in hidden),
        share,
        draw(st.sampled_from([0.0, 2.0])),
    )


WINDOW_SMALLER_THAN_BLOCKS = Call((SLASH, BLOCKS, A_SHAPE), Geometry(30, 15, 0, 64, 16), 90, 120)
