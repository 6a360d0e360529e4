"""Dense: every pair that the mask allows; what a head gets that should not be sparse."""

from __future__ import annotations

import torch

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import (
    BandChoice,
    BandRule,
    BlockChoice,
    Limits,
    Pattern,
    SelectRequest,
)
from sparse_compiler.patterns.relation import request_relation

__all__ = ["Dense"]


class Dense(Pattern):
    """All distances, so that a dense head can share a launch with sparse ones."""

    name = "dense"
    number = 0
    component = "band"
    needs_causal = False
    rule = BandRule(number, "all")

    def default(self) -> HeadPattern:
        return HeadPattern(self.name)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        return Limits(columns=0, distances=-1, blocks=0 if causal else -1)

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        return self.default()

    def choose(self, request: SelectRequest) -> BandChoice:
        batch, _, num_q, _ = request.q.shape
        shape = (batch, request.heads.shape[0])
        device = request.q.device
        return BandChoice(
            columns=torch.zeros(*shape, request.k.shape[2], dtype=torch.bool, device=device),
            distances=torch.ones(
                *shape, request.geometry.distance_size(num_q), dtype=torch.bool, device=device
            ),
        )

    def choose_two_sided(self, request: SelectRequest) -> BlockChoice:
        visible, _ = request_relation(request)
        return BlockChoice(visible[:, None].expand(-1, request.heads.shape[0], -1, -1))

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return 1.0
