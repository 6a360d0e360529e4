"""A-shape: the first keys and a local window; nothing is estimated."""

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
from sparse_compiler.patterns.two_sided import local_blocks, sink_blocks

__all__ = ["AShape"]


class AShape(Pattern):
    """Keep the first ``first`` (sink) visible keys and the last ``second`` (local) distances.

    Under a mask that shows later keys the local window reaches as far to both sides.

    Source: MInference 1.0, section 3.1; StreamingLLM.
    """

    name = "a_shape"
    config_name = "stream_llm"
    number = 1
    component = "band"
    needs_causal = False
    rule = BandRule(number, "nearest")

    def default(self) -> HeadPattern:
        return HeadPattern(self.name, 128, 3968)

    def limits(self, head: HeadPattern, block_q: int, block_k: int, causal: bool = True) -> Limits:
        return Limits(columns=head.first, distances=head.second, blocks=0 if causal else -1)

    def from_budget(
        self, budget: float, num_keys: int, block_q: int, causal: bool = True
    ) -> HeadPattern:
        # A row of a causal mask sees half of the keys; of another all, with a window on both sides.
        tokens = max(1, round(budget * num_keys / 2 if causal else budget * num_keys))
        sink = min(128, tokens // 4)
        local = tokens - sink
        return HeadPattern(self.name, sink, max(1, local if causal else (local + 1) // 2))

    def choose(self, request: SelectRequest) -> BandChoice:
        device = request.q.device
        batch, _, num_q, _ = request.q.shape
        keys = torch.arange(request.k.shape[2], device=device)
        kv_start = request.rows[:, 3].long()[:, None, None]
        sink = request.first[None, :, None]
        columns = (keys >= kv_start) & (keys < kv_start + sink)
        distance = torch.arange(request.geometry.distance_size(num_q), device=device)
        local = distance < request.second[:, None].clamp(min=1)
        return BandChoice(columns, local.expand(batch, -1, -1))

    def choose_two_sided(self, request: SelectRequest) -> BlockChoice:
        visible, own = request_relation(request)
        first, slots = request.first, range(request.heads.shape[0])
        sinks = [(sink_blocks(request, first[s : s + 1]) & visible) | own for s in slots]
        local = local_blocks(request, request.second.clamp(min=1)) & visible[:, None]
        return BlockChoice(torch.stack(sinks, 1) | local)

    def density(self, head: HeadPattern, num_keys: int, block_q: int) -> float:
        return min(1.0, 2 * (head.first + head.second + block_q) / num_keys)
