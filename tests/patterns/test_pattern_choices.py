"""What each pattern promises about its choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import Call

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.testing import random_qkv, sparse_attention

# ---- A-shape -----------------------------------------------------------------------------------


@given(
    sink=st.integers(0, 50),
    local=st.integers(0, 80),
    offset=st.sampled_from([0, 17]),
    padding=st.sampled_from([0, 11]),
)
def test_a_shape_keeps_the_first_visible_keys_and_the_last_distances(
    sink: int, local: int, offset: int, padding: int
) -> None:
    head = HeadPattern("a_shape", sink, local)
    geometry = Geometry(offset, -1, 0, 32, 16)
    call = Call((head,), geometry, 120, 120 + offset, hidden=(padding, 0, 0))
    key = torch.arange(call.num_k)[None]
    wanted = (key >= padding) & (key < padding + sink) | (call.distance() < local)
    assert not (wanted & call.allowed() & (call.covered(call.index()) == 0)).any()


@given(sink=st.integers(0, 50), local=st.integers(1, 80))
def test_a_shape_covers_at_most_a_row_block_more_than_it_was_asked(sink: int, local: int) -> None:
    call = Call((HeadPattern("a_shape", sink, local),), Geometry(0, -1, 0, 32, 16), 160, 160)
    key = torch.arange(call.num_k)[None]
    most = (key < sink) | (call.distance() < local + 32)
    assert not ((call.covered(call.index()) > 0) & call.allowed() & ~most).any()


# ---- vertical-slash ----------------------------------------------------------------------------


def probe_by_definition(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, distance: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column and distance sums of the last 64 rows' attention in float64, batch 1, one head."""
    scores = (q[0, 0].double() @ k[0, 0].double().T) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1)
    weights = weights.nan_to_num(0.0)[-64:]
    sums = torch.zeros(size, dtype=torch.float64)
    sums.index_add_(0, distance[-64:].clamp(min=0).flatten(), weights.flatten())
    return weights.sum(0), sums


@given(
    seed=st.integers(0, 10**6),
    first=st.sampled_from([30, 33, 60]),
    second=st.sampled_from([100, 104, 140]),
    num_q=st.sampled_from([40, 64, 200, 260]),
    offset=st.sampled_from([0, 45]),
    left=st.sampled_from([-1, -1, 170]),
    padding=st.sampled_from([0, 0, 13]),
)
def test_vertical_slash_keeps_the_best_columns_and_distances_of_the_last_rows(
    seed: int, first: int, second: int, num_q: int, offset: int, left: int, padding: int
) -> None:
    head = HeadPattern("vertical_slash", first, second)
    geometry = Geometry(offset, left, 0, 32, 16)
    call = Call((head,), geometry, num_q, num_q + offset, seed, hidden=(padding, 0, 0))
    q, k, v = call.qkv()
    index, allowed, distance = call.index(q, k, v), call.allowed()[0, 0], call.distance()
    columns, distances = probe_by_definition(q, k, allowed, distance, call.num_k)
    columns[padding : padding + 30] = torch.inf
    distances[:100] = torch.inf
    key = torch.arange(call.num_k)
    covered = call.covered(index)[0, 0] > 0
    for scores, most, pairs in (
        (columns, first, lambda best: (key == best)[None]),
        (distances, second, lambda best: distance == best),
    ):
        ranked = scores.sort(descending=True)
        # Clear winners only: ties within rounding may fall either way.
        bar = ranked.values[most] if most < len(scores) else torch.tensor(0.0)
        for best in ranked.indices[ranked.values > 1.001 * bar + 1e-6].tolist():
            assert not (pairs(best) & allowed & ~covered).any(), best


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 1), (30, 100), (10, 500), (300, 5)])
def test_vertical_slash_always_keeps_thirty_columns_and_a_hundred_distances(
    first: int, second: int
) -> None:
    head = HeadPattern("vertical_slash", first, second)
    call = Call((head,), Geometry(0, -1, 0, 32, 16), 300, 300, hidden=(9, 0, 0))
    key = torch.arange(call.num_k)[None]
    forced = (key >= 9) & (key < 39) | (call.distance() < 100)
    index = call.index()
    assert not (forced & call.allowed() & (call.covered(index) == 0)).any()
    assert int(index.num_columns.max()) <= max(30, first)


def test_vertical_slash_counts_the_forced_ones_towards_its_numbers() -> None:
    call = Call((HeadPattern("vertical_slash", 40, 120),), Geometry(0, -1, 0, 32, 16), 400, 400)
    index = call.index()
    assert int(index.num_columns) <= 40
    # 20 single distances beside the 100 nearest, each spread over a row block at most.
    assert int(index.covered.sum()) <= (100 + 32) + 20 * 32


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_vertical_slash_chooses(side: str) -> None:
    pad, length = 64, 256
    geometry = Geometry(0, -1, 0, 32, 16)
    q, k, v = random_qkv(5, heads=1, num_q=length, num_k=length, dim=16)
    head = (HeadPattern("vertical_slash", 50, 120),)
    plain = sparse_attention(q, k, v, head, geometry)[2]
    ends = (pad, 0) if side == "left" else (0, pad)
    # Padding tokens are real embeddings: their rows must not vote.
    padded = [torch.nn.functional.pad(t, (0, 0, *ends), value=3.0) for t in (q, k, v)]
    mask = torch.nn.functional.pad(torch.ones(1, length, dtype=torch.bool), ends)
    shift = ends[0]
    start = torch.tensor([[shift, length, 0, shift, length]], dtype=torch.int32)
    for rows in (start, None):
        index = sparse_attention(*padded, head, geometry, key_mask=mask, rows=rows)[2]
        count = int(plain.num_columns)
        assert int(index.num_columns) == count
        assert torch.equal(index.columns[0, 0, :count] - shift, plain.columns[0, 0, :count])
        # Padding on the right adds row blocks, hence distances that no real pair has.
        size = plain.covered.shape[-1]
        assert torch.equal(index.covered[..., :size], plain.covered)


# ---- block-sparse ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    first=st.integers(0, 4),
    block_q=st.sampled_from([32, 64, 128]),
    offset=st.sampled_from([0, 64, 100]),
    padding=st.sampled_from([0, 0, 70]),
)
def test_block_sparse_keeps_the_best_earlier_blocks_and_its_own(
    seed: int, first: int, block_q: int, offset: int, padding: int
) -> None:
    geometry = Geometry(offset, -1, 0, block_q, 64)
    head = HeadPattern("block_sparse", first)
    call = Call((head,), geometry, 330, 330 + offset, seed, hidden=(padding, 0, 0))
    q, k, v = call.qkv()
    covered = (call.covered(call.index(q, k, v))[0, 0] > 0) & call.allowed()[0, 0]
    for m in range(geometry.num_row_blocks(call.num_q)):
        rows = slice(m * block_q, min((m + 1) * block_q, call.num_q))
        start, end = m * block_q + offset, (m + 1) * block_q + offset
        query = q[0, 0, rows].double().mean(0)
        scores = {}
        for n in range(geometry.num_key_blocks(call.num_k)):
            keys = k[0, 0, max(n * 64, padding) : (n + 1) * 64].double()
            own = n * 64 < end and (n + 1) * 64 > start
            listed = covered[rows, n * 64 : (n + 1) * 64].any()
            if own:
                assert listed or not call.allowed()[0, 0, rows, n * 64 : (n + 1) * 64].any()
            elif (n + 1) * 64 <= start and len(keys):
                scores[n] = (float(query @ keys.mean(0)), bool(listed))
        ranked = sorted(scores.values(), reverse=True)
        kept = [listed for _, listed in ranked]
        gaps = [a[0] - b[0] for a, b in pairwise(ranked)]
        # The kept ones are a prefix of the ranking, wherever the ranking is clear.
        for place, gap in enumerate(gaps):
            if gap > 1e-4:
                assert kept[place] or not any(kept[place + 1 :]), (m, ranked)
        assert sum(kept) <= first


def test_block_sparse_keeps_as_many_blocks_as_asked_where_there_are_so_many() -> None:
    call = Call((HeadPattern("block_sparse", 3),), Geometry(0, -1, 0, 64, 64), 640, 640)
    counts = call.index().num_blocks[0, 0]
    assert counts.tolist() == [min(m + 1, 3) for m in range(10)]


def test_block_sparse_of_larger_blocks_keeps_as_many_tokens() -> None:
    """The published number counts blocks of 64 tokens."""
    small = Call((HeadPattern("block_sparse", 4),), Geometry(0, -1, 0, 64, 64), 1024, 1024)
    large = replace(small, geometry=Geometry(0, -1, 0, 128, 128))
    assert int(small.index().num_blocks[0, 0, -1]) == 4
    assert int(large.index().num_blocks[0, 0, -1]) == 2


def test_block_sparse_without_causality_ranks_keys_on_both_sides() -> None:
    geometry = Geometry(0, -1, -1, 32, 64)
    call = Call((HeadPattern("block_sparse", 2),), geometry, 256, 256)
    q, k, v = call.qkv()
    q, k = 0.01 * q, 0.01 * k
    q[..., 0], k[:, :, 192:, 0] = 5.0, 5.0
    covered = call.covered(call.index(q, k, v))[0, 0] > 0
    assert covered[0, 192:].all()
    assert covered[0, :64].all()
    assert not covered[0, 64:192].any()
