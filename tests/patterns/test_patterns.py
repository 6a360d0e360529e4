"""What every pattern promises about its index, and what each one promises about its choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.ir.index import AttentionIndex, Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits
from sparse_compiler.patterns.policy import AUTO_OTHER, uniform
from sparse_compiler.runtime import recorder
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs
from sparse_compiler.runtime.select import default_rows
from sparse_compiler.testing import random_qkv, sparse_attention

A_SHAPE = HeadPattern("a_shape", 5, 20)
SLASH = HeadPattern("vertical_slash", 36, 110)
BLOCKS = HeadPattern("block_sparse", 1)
DENSE = HeadPattern("dense")


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
        """Padding on the left, on the right, and every n-th key, in every second batch entry."""
        left, right, step = self.hidden
        if not any(self.hidden):
            return None
        mask = torch.ones(self.batch, self.num_k, dtype=torch.bool)
        for b in range(self.batch - 1, -1, -2):
            mask[b, :left] = False
            mask[b, self.num_k - right :] = False
            if step:
                mask[b, ::step] = False
        return mask

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


@given(call=calls(right=None))
@example(call=WINDOW_SMALLER_THAN_BLOCKS)
def test_no_pattern_covers_a_pair_twice(call: Call) -> None:
    assert call.covered(call.index()).max() <= 1


@given(call=calls(right=None))
@example(call=WINDOW_SMALLER_THAN_BLOCKS)
def test_every_row_keeps_its_own_position(call: Call) -> None:
    own = (call.distance() == 0) & call.allowed()
    assert not (own & (call.covered(call.index()) == 0)).any()


@given(call=calls(right=None))
@example(call=WINDOW_SMALLER_THAN_BLOCKS)
def test_counts_fit_the_capacities(call: Call) -> None:
    index = call.index()
    for name in ("full", "edge", "columns", "blocks"):
        counts = getattr(index, f"num_{name}")
        if counts.numel():
            assert int(counts.min()) >= 0
            assert int(counts.max()) <= getattr(index, name).shape[-1], name


@given(call=calls(right=None, budget=1.0))
@example(call=replace(WINDOW_SMALLER_THAN_BLOCKS, budget=1.0))
def test_budget_one_covers_every_allowed_pair_once(call: Call) -> None:
    covered = call.covered(call.index())
    assert covered.max() <= 1
    assert not (call.allowed() & (covered == 0)).any()


@given(call=calls(right=None))
def test_lists_ascend_and_full_tiles_are_cut_by_no_test(call: Call) -> None:
    index, geometry = call.index(), call.geometry
    for name in ("full", "edge", "columns", "blocks"):
        values, counts = getattr(index, name), getattr(index, f"num_{name}")
        flat = values.reshape(counts.numel(), values.shape[-1])
        for row, count in zip(flat, counts.flatten().tolist(), strict=True):
            assert (row[:count].diff() > 0).all(), name
    ends = [(m + 1) * geometry.block_q for m in range(geometry.num_row_blocks(call.num_q))]
    rows = index.full.flatten(0, 1)
    for row, count in zip(rows, index.num_full.flatten().tolist(), strict=True):
        for x in row[:count].tolist():
            for end in ends:
                position = torch.arange(end - geometry.block_q, end)[:, None]
                key = torch.arange(end - x, end - x + geometry.block_k)[None]
                assert (key <= position).all()
                assert geometry.left < 0 or (key >= position - geometry.left).all()


@given(call=calls(right=None))
def test_nothing_past_the_counts_is_read(call: Call) -> None:
    index = call.index()
    clean = call.covered(index)
    for name in ("full", "edge", "columns", "blocks"):
        values, counts = getattr(index, name), getattr(index, f"num_{name}")
        past = torch.arange(values.shape[-1]) >= counts[..., None]
        values.masked_fill_(past, 3)
    assert torch.equal(call.covered(index), clean)


@given(call=calls(right=None))
def test_density_is_the_exact_share_where_all_row_blocks_are_counted(call: Call) -> None:
    call = replace(call, hidden=(*call.hidden[:2], 0), batch=1)
    index, allowed = call.index(), call.allowed()
    if not allowed.any():
        return
    sizes = (call.num_q, call.num_k)
    rows = default_rows(1, *sizes, call.geometry.q_offset, call.key_mask(), torch.device("cpu"))
    exact = ((call.covered(index) > 0) & allowed).sum((0, 2, 3)) / allowed.sum()
    density = recorder.density(index, call.geometry, rows, *sizes)
    assert density.shape == (len(call.heads),)
    torch.testing.assert_close(density, exact, rtol=1e-5, atol=1e-6)


def test_density_counts_the_rows_that_exist_in_a_partial_last_block() -> None:
    call = Call((A_SHAPE, BLOCKS), Geometry(0, -1, 0, 64, 16), 70, 70)
    index, allowed = call.index(), call.allowed()
    rows = torch.tensor([[0, 70, 0, 0, 70]], dtype=torch.int32)
    exact = ((call.covered(index) > 0) & allowed).sum((0, 2, 3)) / allowed.sum()
    torch.testing.assert_close(recorder.density(index, call.geometry, rows, 70, 70), exact)


@given(call=calls())
def test_a_batch_entry_chooses_as_if_it_were_alone(call: Call) -> None:
    call = replace(call, batch=2)
    q, k, v = call.qkv()
    mask = call.key_mask()
    together = call.covered(call.index(q, k, v))
    for b in range(2):
        alone = sparse_attention(
            *(t[b : b + 1] for t in (q, k, v)),
            call.heads,
            call.geometry,
            budget=call.budget,
            key_mask=None if mask is None else mask[b : b + 1],
        )[2]
        assert torch.equal(call.covered(alone)[0], together[b])


@pytest.mark.parametrize("head", [A_SHAPE, SLASH, BLOCKS, DENSE], ids=lambda head: head.name)
def test_a_head_chooses_the_same_whatever_its_neighbours_do(head: HeadPattern) -> None:
    geometry = Geometry(30, -1, 0, 32, 16)
    q, k, v = random_qkv(3, heads=4, kv_heads=2, num_q=130, num_k=160, dim=16)
    single = sparse_attention(q[:, 2:3], k[:, 1:2], v[:, 1:2], (head,), geometry)[2]
    mixed = sparse_attention(q, k, v, (SLASH, DENSE, head, BLOCKS), geometry)[2]
    expected = covered_pairs(single, geometry, 130, 160)[:, 0]
    assert torch.equal(covered_pairs(mixed, geometry, 130, 160)[:, 2], expected)


# ---- what depends on what ----------------------------------------------------------------------


@given(
    head=st.sampled_from([A_SHAPE, BLOCKS, replace(BLOCKS, first=2), DENSE]),
    seed=st.integers(0, 10**6),
    offset=st.sampled_from([0, 5, 32, 100]),
    block=st.integers(1, 3),
    block_k=st.sampled_from([16, 32, 64]),
    left=st.sampled_from([-1, 60]),
    hidden=st.sampled_from([(0, 0, 0), (9, 0, 0)]),
)
def test_a_row_block_of_a_causal_pattern_depends_on_nothing_after_it(
    head: HeadPattern,
    seed: int,
    offset: int,
    block: int,
    block_k: int,
    left: int,
    hidden: tuple[int, int, int],
) -> None:
    geometry = Geometry(offset, left, 0, 32, block_k)
    call = Call((head,), geometry, 140, 140 + offset, seed, hidden=hidden)
    q, k, v = call.qkv()
    before = call.covered(call.index(q, k, v))
    last = block * 32
    q[:, :, last:] = 100 * torch.randn_like(q[:, :, last:])
    k[:, :, last + offset :] = 100 * torch.randn_like(k[:, :, last + offset :])
    after = call.covered(call.index(q, k, v))
    visible = call.allowed()
    assert torch.equal((before * visible)[:, :, :last], (after * visible)[:, :, :last])


@given(head=st.sampled_from([A_SHAPE, BLOCKS, DENSE]), seed=st.integers(0, 10**6))
def test_a_longer_prompt_keeps_the_lists_of_its_first_row_blocks(
    head: HeadPattern, seed: int
) -> None:
    geometry = Geometry(0, -1, 0, 32, 16)
    long = Call((head,), geometry, 160, 160, seed)
    short = replace(long, num_q=96, num_k=96)
    q, k, v = long.qkv()
    first = short.covered(short.index(*(t[:, :, :96] for t in (q, k, v))))
    whole = long.covered(long.index(q, k, v))
    causal = short.allowed()
    assert torch.equal((whole[:, :, :96, :96] * causal), first * causal)


def test_vertical_slash_looks_at_the_last_rows_by_design() -> None:
    """Early rows change with later ones: the column that only the last rows want is everyone's."""
    call = Call((replace(SLASH, first=31, second=100),), Geometry(0, -1, 0, 32, 16), 300, 300)
    q, k, v = (torch.zeros_like(t) for t in call.qkv())
    q[..., 0] = 10.0
    k[:, :, 60, 0] = 10.0
    wanted = call.covered(call.index(q, k, v))
    q[:, :, -64:, 0] = -10.0
    unwanted = call.covered(call.index(q, k, v))
    # Rows 200.. are more than 100 distances and a row block away from key 60.
    assert (wanted[0, 0, 200:230, 60] == 1).all()
    assert (unwanted[0, 0, 200:230, 60] == 0).all()


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


# ---- numbers -----------------------------------------------------------------------------------


def exact_density(head: HeadPattern, length: int, block_q: int, block_k: int) -> float:
    geometry = Geometry(0, -1, 0, block_q, block_k)
    call = Call((head,), geometry, length, length, seed=1)
    rows = torch.tensor([[0, length, 0, 0, length]], dtype=torch.int32)
    return float(recorder.density(call.index(), geometry, rows, length, length)[0])


@given(head=heads, length=st.sampled_from([128, 512, 1024]), block_q=st.sampled_from([32, 64]))
def test_expected_density_is_an_upper_bound(head: HeadPattern, length: int, block_q: int) -> None:
    bound = registry.get(head.name).density(head, length, block_q)
    assert 0 <= bound <= 1 + 1e-6
    assert exact_density(head, length, block_q, 64) <= bound + 1e-5


@pytest.mark.parametrize("name", ["a_shape", "vertical_slash", "block_sparse"])
@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_numbers_from_a_budget_come_near_it(name: str, budget: float) -> None:
    head = registry.get(name).from_budget(budget, 2048, 64)
    assert head.name == name
    assert 0.5 * budget <= exact_density(head, 2048, 64, 64) <= 1.5 * budget


@pytest.mark.parametrize("name", ["a_shape", "vertical_slash", "block_sparse", "dense"])
def test_a_larger_budget_never_asks_for_less(name: str) -> None:
    pattern = registry.get(name)
    for length in (1, 64, 1000, 100_000):
        numbers = [pattern.from_budget(b / 20, length, 64) for b in range(1, 21)]
        for less, more in pairwise(numbers):
            assert less.first <= more.first, (length, less, more)
            assert less.second <= more.second, (length, less, more)


@given(first=st.tuples(*[st.integers(-1, 9)] * 3), second=st.tuples(*[st.integers(-1, 9)] * 3))
def test_joined_limits_serve_both(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    joined = Limits(*first).join(Limits(*second))
    assert joined == Limits(*second).join(Limits(*first))
    for got, a, b in zip(
        (joined.columns, joined.distances, joined.blocks), first, second, strict=True
    ):
        assert got == (-1 if -1 in (a, b) else max(a, b))


# ---- registry and policy -----------------------------------------------------------------------


def test_the_papers_three_patterns_and_dense_exist_under_their_published_names() -> None:
    assert set(registry.names()) >= {"a_shape", "vertical_slash", "block_sparse", "dense"}
    published = {"vertical_and_slash": "vertical_slash", "stream_llm": "a_shape"}
    for name, own in (published | {"block_sparse": "block_sparse"}).items():
        pattern = registry.by_config_name(name)
        assert pattern is not None
        assert pattern.name == own
        assert registry.by_number(pattern.number) is pattern
    assert registry.by_config_name("vertical_slash") is None


def test_an_unknown_pattern_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(PatternInvalid, match="vertical_slash"):
        registry.get("vertical_slahs")


def test_a_taken_name_or_number_is_refused() -> None:
    taken = registry.get("a_shape")

    class Other(type(taken)):  # type: ignore[misc]
        name = "other_pattern"

    class Same(type(taken)):  # type: ignore[misc]
        number = 999_999

    for pattern in (Other(), Same()):
        with pytest.raises(PatternInvalid):
            registry.register(pattern)
    assert registry.get("a_shape") is taken
    assert "other_pattern" not in registry.names()


@pytest.mark.parametrize("causal", [True, False])
def test_the_policy_gives_each_head_a_pattern_that_fits_the_mask(causal: bool) -> None:
    auto = HeadPattern("vertical_slash", 7, 70)
    found = uniform("auto", 3, causal=causal, auto=auto)
    assert found == [auto if causal else AUTO_OTHER] * 3
    for head in uniform("auto", 2, causal=False, auto=auto):
        assert not registry.get(head.name).needs_causal
        assert registry.get(head.name).component_for(causal=False) == "blocks"
    assert uniform("a_shape", 2, causal=True, auto=auto) == [registry.get("a_shape").default()] * 2
