"""Dense: every pair that the mask allows; what a head gets that should not be sparse."""

from __future__ import annotations

import torch

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns.base import BandChoice, BandRule, Limits, Pattern, SelectRequest

__all__ = ["Dense"]


class Dense(Pattern):
    """All distances, so that a dense head can share a launch with sparse ones."""

    name = "dense"
    number = 0
    component = "band"
    rule = BandRule(number, "all")

    def default(self) -> HeadPattern:
        return HeadPattern(self.name)

    def limits(self, head: HeadPattern, block_q: int, block_k: int) -> Limits:
        return Limits(columns=0, distances=-1)

    def from_budget(self, budget: float, num_keys: int, block_q: int) -> HeadPattern:
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

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return 1.0
