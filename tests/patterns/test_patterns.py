"""What every pattern promises about its index, its numbers and its name."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pattern_cases import (
    A_SHAPE,
    BLOCKS,
    DENSE,
    SLASH,
    WINDOW_SMALLER_THAN_BLOCKS,
    Call,
    calls,
    heads,
)

from sparse_compiler.errors import PatternInvalid
from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.patterns import registry
from sparse_compiler.patterns.base import Limits
from sparse_compiler.patterns.policy import AUTO_OTHER, uniform
from sparse_compiler.runtime import recorder
from sparse_compiler.runtime.reference import covered_pairs
from sparse_compiler.runtime.select import default_rows
from sparse_compiler.testing import random_qkv, sparse_attention


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
