"""Patterns that score every row: what broken rows, subclasses and autocast must not do."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from row_score_cases import Case, case_request, in_eight

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import BlockChoice, SelectRequest
from sparse_compiler.patterns.block_sparse import BlockSparse
from sparse_compiler.patterns.low_rank import RANK, LowRank, projections, sketches
from sparse_compiler.patterns.relation import request_relation
from sparse_compiler.patterns.row_scores import keep_blocks, score_blocks
from sparse_compiler.runtime.select import _block_rule, summarize
from sparse_compiler.testing import sparse_attention


@pytest.mark.parametrize("name", ["low_rank", "key_groups", "key_means"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_does_not_choose_for_its_neighbours(name: str, value: float) -> None:
    case = Case(
        seed=0, num_q=512, num_k=512, dim=48, name=name, block_q=64, groups=1, numbers=((9000, 2),)
    )
    request = case.request()
    # A group of keys in block 5 that all rows of the last row block look for.
    k, q = request.k.clone(), request.q.clone()
    k[:, :, 80:96] = k[:, :, 80:81]
    q[:, :, 448:] = 3 * k[:, :, 80:81]
    group = registry.summary_group([case.pattern], case.block_k)
    summary = summarize(k, request.rows, None, group or case.block_k)
    request = replace(request, q=q, k=k, summary=summary)
    asked = case_request(request, 0, case.heads[0])
    assert case.pattern.choose(asked).blocks[0, 0, 7, 5]
    q = q.clone()
    q[:, :, 500, 3] = value
    # Eight blocks have room: five are always kept, and not any three of the others.
    assert case.pattern.choose(replace(asked, q=q)).blocks[0, 0, 7, 5]


def test_directions_are_those_of_rows_that_are_no_padding() -> None:
    case = Case(seed=1, num_q=400, num_k=400, dim=48, name="low_rank")
    request = case.request()
    mask = torch.ones(1, 400, dtype=torch.bool)
    mask[:, :300] = False
    rows = torch.tensor([[300, 100, 0, 300, 100]], dtype=torch.int32)
    padded = replace(request, key_mask=mask, rows=rows)
    loud = request.q.clone()
    loud[:, :, :300] = 100 * torch.randn_like(loud[:, :, :300])
    for quiet, noisy in zip(projections(padded), projections(replace(padded, q=loud)), strict=True):
        torch.testing.assert_close(quiet, noisy)


def test_query_heads_of_one_key_head_have_directions_of_their_own() -> None:
    """Two heads that each look at 32 numbers of 64, the other half for the other head."""
    case = Case(seed=2, num_q=300, num_k=300, dim=64, name="low_rank", groups=2)
    request = case.request()
    q = request.q.clone()
    q[:, 0, :, 32:] = 0
    q[:, 1, :, :32] = 0
    request = replace(request, q=q)
    scored = sketches(request)
    assert scored.keys.shape == (1, 2, 300, RANK)
    assert scored.broken.shape == (1, 2, 300)
    keys = request.k.repeat_interleave(2, 1)
    keys = keys - keys.mean(2, keepdim=True)
    want = q @ keys.transpose(-1, -2)
    got = scored.queries @ scored.keys.transpose(-1, -2)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_eight_bits_hardly_change_what_is_listed(seed: int) -> None:
    case = Case(seed, 1024, 1024, dim=64, name="low_rank", block_q=64, block_k=64, groups=2)
    request = case.request()
    request = replace(request, scale=0.25)
    for slot, head in enumerate(replace(case, numbers=((7000, 6),)).heads):
        asked = case_request(request, slot, head)
        relation = request_relation(asked)
        exact, rounded = (score_blocks(asked, 0, of(asked), 32) for of in (sketches, in_eight))
        kept, listed = (keep_blocks(asked, 0, s, *relation) for s in (exact, rounded))
        strong = kept & (exact > math.log(0.1))
        assert strong.sum() > 20
        assert (listed & strong).sum() >= 0.9 * strong.sum()
        assert (exact - rounded)[strong].abs().mean() < 0.15


class _Own(LowRank):
    name = "row_scores_of_its_own"
    number = 1951

    def choose(self, request: SelectRequest) -> BlockChoice:
        return super().choose(request)


class _Renamed(LowRank):
    name = "row_scores_renamed"
    number = 1952


def test_kernels_take_a_subclass_under_its_own_number_and_not_its_own_choice() -> None:
    rule = _block_rule(_Renamed())
    assert rule is not None
    assert rule.number == 1952
    assert _block_rule(_Own()) is None


def test_the_attribute_of_the_earlier_interface_is_refused() -> None:
    class Old(BlockSparse):
        name = "row_scores_old"
        number = 1953
        reads_summary = True

    with pytest.raises(PatternInvalid, match="summary_keys"):
        registry.register(Old())


@pytest.mark.parametrize("name", ["low_rank", "key_groups"])
def test_autocast_does_not_reach_into_the_operators(name: str) -> None:
    q, k, v = (torch.randn(1, 2, 128, 32) for _ in "qkv")
    heads, geometry = [HeadPattern(name, 5000, 0)] * 2, Geometry(0, -1, 0, 32, 32)
    want = sparse_attention(q, k, v, heads, geometry)
    with torch.autocast("cpu", torch.bfloat16):
        got = sparse_attention(q, k, v, heads, geometry)
    torch.testing.assert_close(got[0], want[0])
