"""The estimators of key blocks, and selections that the tests make with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from pattern_cases import hidden_keys

from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import Limits, SelectRequest
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs
from sparse_compiler.runtime.select import default_rows
from sparse_compiler.testing import random_qkv, sparse_attention

GROUPS = HeadPattern("key_groups", 30_000, 2)
TRI = HeadPattern("tri_shape", 20, 10)
ADAPTIVE = HeadPattern("adaptive", 800, 2)
MEANS = HeadPattern("key_means", 30_000, 2)
ANTI = HeadPattern("antidiagonal", 700, 2)
SWITCH = HeadPattern("switching", 300, 2)
ALL = (GROUPS, TRI, ADAPTIVE, MEANS, ANTI, SWITCH)
ESTIMATED = (GROUPS, ADAPTIVE, MEANS, ANTI, SWITCH)
SMALL = Geometry(0, -1, 0, 32, 16)
CAUSAL = (GROUPS, TRI, ADAPTIVE, MEANS, ANTI)
"""Those whose choice for a row block depends on no contents after it."""


def named(head: HeadPattern) -> str:
    return head.name


@dataclass(frozen=True)
class Call:
    """One selection; every head has a block slot."""

    heads: tuple[HeadPattern, ...]
    num_q: int = 300
    num_k: int = 300
    geometry: Geometry = SMALL
    seed: int = 0
    batch: int = 1
    hidden: tuple[int, int, int] = (0, 0, 0)
    documents: int = 0
    budget: float = -1.0

    def qkv(self, strength: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=len(self.heads),
            num_q=self.num_q,
            num_k=self.num_k,
            dim=16,
            strength=strength,
        )

    def empty(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv()
        return torch.zeros_like(q), torch.zeros_like(k), v

    def key_mask(self) -> torch.Tensor | None:
        return hidden_keys(self.batch, self.num_k, self.hidden)

    def bounds(self) -> torch.Tensor | None:
        """Rows share ``documents`` spans of the keys in order."""
        if not self.documents:
            return None
        size = -(-self.num_k // self.documents)
        low = torch.arange(self.num_q) * self.num_k // self.num_q // size * size
        return torch.stack([low, low + size - 1], -1).int()[None].expand(self.batch, -1, -1)

    def index(self, *qkv: torch.Tensor, **options: object) -> AttentionIndex:
        return sparse_attention(
            *(qkv or self.qkv()),
            self.heads,
            self.geometry,
            budget=self.budget,
            **{"key_mask": self.key_mask(), "bounds": self.bounds()} | options,  # type: ignore[arg-type]
        )[2]

    def covered(self, *qkv: torch.Tensor, **options: object) -> torch.Tensor:
        """int32 [B, H, Lq, Lk]."""
        return covered_pairs(self.index(*qkv, **options), self.geometry, self.num_q, self.num_k)

    def allowed(self) -> torch.Tensor:
        """bool [B, 1, Lq, Lk]."""
        return allowed_pairs(
            *(self.batch, self.num_q, self.num_k, self.geometry),
            key_mask=self.key_mask(),
            bounds=self.bounds(),
        )[:, None]

    def request(self) -> SelectRequest:
        """What the laws need of it: masks and sizes."""
        q, k, _ = self.qkv()
        heads = torch.arange(len(self.heads))
        rows = default_rows(
            *(self.batch, self.num_q, self.num_k, self.geometry.q_offset, self.key_mask()),
            torch.device("cpu"),
        )
        second = torch.tensor([head.second for head in self.heads])
        return SelectRequest(
            *(q, k, k[:, :, :0], heads, heads, second, self.geometry, rows, self.key_mask()),
            scale=0.25,
            limits=Limits(blocks=-1),
            probe=lambda *_: (heads, heads),
            bounds=self.bounds(),
        )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    num_q = draw(st.sampled_from([2, 33, 90, 130]))
    offset = draw(st.sampled_from([0, 0, 1, 30, 64]))
    geometry = Geometry(
        offset,
        draw(st.sampled_from([-1, -1, 0, 40])),
        draw(st.sampled_from([0, -1, 5])),
        draw(st.sampled_from([32, 64])),
        draw(st.sampled_from([16, 32, 64])),
    )
    # Keys after the last row: a static cache whose end is not filled yet.
    num_k = num_q + offset + draw(st.sampled_from([0, 0, 9, 70]))
    hidden = draw(st.sampled_from([(0, 0, 0), (0, 0, 0), (7, 0, 0), (0, 12, 0), (3, 3, 2)]))
    chosen = draw(st.lists(st.sampled_from(ALL), min_size=2, max_size=2, unique=True))
    numbers = draw(st.sampled_from([(0, 0), (1, 1), (500, 2), (20_000, 1), (900, 0)]))
    return Call(
        tuple(replace(head, first=numbers[0], second=numbers[1]) for head in chosen),
        num_q,
        num_k,
        geometry,
        draw(st.integers(0, 10**6)),
        draw(st.integers(1, 2)),
        tuple(min(n, max(0, num_k - 1) // 2) for n in hidden),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.sampled_from([-1.0, -1.0, -1.0, 0.3])),
    )
