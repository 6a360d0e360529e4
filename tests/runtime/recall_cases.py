"""Layers of heads that keep a share of the mass, and whether an executor's lists do."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from row_score_cases import Case, case_request, marked

from sparse_compiler.ir.index import automatic_blocks, capacity_blocks
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockRule, SelectRequest
from sparse_compiler.patterns.ranking import PEAKS, edge_blocks
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.row_scores import broken_blocks, score_blocks
from sparse_compiler.runtime.executor import Executor
from sparse_compiler.testing import parameters

#: Scores are kept in 16 bits, and added up in another order.
TOLERANCE = 0.03

RULE = registry.get("low_rank_recall").rule
assert isinstance(RULE, BlockRule)

recall_cases = st.builds(
    Case,
    seed=st.integers(0, 10_000),
    num_q=st.integers(1, 80),
    num_k=st.integers(1, 130),
    offset=st.integers(0, 90),
    left=st.sampled_from([-1, -1, 0, 50]),
    right=st.sampled_from([0, 0, -1, 20]),
    block_q=st.sampled_from([32, 64]),
    block_k=st.sampled_from([16, 32]),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    numbers=st.lists(
        st.tuples(st.sampled_from([1, 500, 800, 990, 1000]), st.sampled_from([0, 1, 3, 500])),
        min_size=1,
        max_size=2,
    ).map(tuple),
    padding=st.booleans(),
    name=st.just("low_rank_recall"),
    dim=st.sampled_from([16, 24, 32]),
    broken=st.sampled_from([0.0, 0.0, 0.0, math.nan, math.inf]),
)


def _alone(
    request: SelectRequest, rule: BlockRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Scores, blocks always kept, visible blocks and the bound of one slot's lists."""
    scored = rule.operands(request)
    scores = score_blocks(request, 0, scored, rule.every)
    visible, own = request_relation(request)
    always = (own | edge_blocks(request) | broken_blocks(request, 0, scored)) & visible
    geometry, num_k, second = request.geometry, request.k.shape[2], int(request.second[0])
    most = automatic_blocks(num_k, geometry.block_k)
    most = -(-second * 64 // geometry.block_k) if second else most
    return scores, always, visible, most


def assert_keeps_share(
    case: Case, executor: Executor, rule: BlockRule = RULE, blurred: float = TOLERANCE
) -> None:
    """What goes is the least by PyTorch's scores, and as much of it as may."""
    request, heads = case.request(), case.heads
    params = parameters(heads, causal=False).to(case.device)
    capacity = int(capacity_blocks(request.limits.blocks, case.num_k, case.block_k))
    found = executor.select_blocks(request, params, rule, capacity, len(heads))
    assert found is not None
    listed = marked(*found, case.geometry.num_key_blocks(case.num_k))
    for slot, head in enumerate(heads):
        scores, always, visible, most = _alone(case_request(request, slot, head), rule)
        kept = listed[:, slot]
        assert not (kept & ~visible).any()
        known = visible & (scores > -math.inf)
        mass = (scores.double().exp() * PEAKS).clamp(max=1.0).masked_fill(~known, 0.0)
        allowed = (1 - head.first / 1000) * mass.sum(-1).clamp(max=1.0)
        loose = known & ~always
        gone = loose & ~kept
        full = kept.sum(-1) >= torch.maximum(
            always.sum(-1), torch.tensor(most, device=case.device)
        ).clamp(max=capacity)
        # Unless the list is full, all that is always kept is there.
        assert (full[..., None] | kept | ~always).all(), case
        lost = (mass * gone).sum(-1)
        assert (full | (lost <= allowed * (1 + 2 * blurred) + 1e-6)).all(), case
        # What is kept is no less than what goes, and no more of it could go.
        least = scores.masked_fill(~(loose & kept), math.inf).amin(-1)
        highest = scores.masked_fill(~gone, -math.inf).amax(-1)
        assert (least >= highest - blurred).all(), case
        next_mass = (least.double().exp() * PEAKS).clamp(max=1.0)
        assert (full | (lost + next_mass >= allowed * (1 - 2 * blurred) - 1e-6)).all(), case
