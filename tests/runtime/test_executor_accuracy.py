"""What executors promise below budget 1, for prompts in chunks, and for numbers that are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from executor_cases import BLOCKS, EXECUTORS, SLASH, Case, cases, dense_by_selection, truth
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.reference import covered_pairs
from sparse_compiler.testing import (
    Layout,
    assert_close,
    assert_lse_close,
    sparse_attention,
    tolerance,
)

# ---- accuracy ----------------------------------------------------------------------------------


@given(case=cases)
@example(case=Case(num_q=150, executor="reference"))
def test_error_is_bounded_by_the_missed_mass(case: Case) -> None:
    """|o_sparse - o_dense| <= 2 m max|v| + twice dense's own error in this dtype, row by row.

    Split a row's keys into kept and missed ones with dense probability 1 - m and m, and let a and
    b be the means of v over them, weighted by these probabilities and normalised. Then
    o_dense = (1 - m) a + m b, and sparse attention renormalises over the kept keys: o_sparse = a.
    So o_dense - o_sparse = m (b - a), and each mean is at most max|v| in size.
    """
    case = replace(case, num_q=max(case.num_q, 64))
    q, k, v = case.qkv()
    scale, allowed = case.scale, case.allowed()[:, None]
    out, _, index = sparse_attention(
        *(q, k, v, case.heads, case.geometry), executor=case.executor, key_mask=case.key_mask()
    )
    kept = (covered_pairs(index, case.geometry, case.num_q, case.num_k) > 0) & allowed
    dense, dense_lse = truth(q, k, v, allowed, scale)
    _, kept_lse = truth(q, k, v, kept, scale)
    # Empty rows, -inf - -inf, miss nothing.
    missed = (1 - torch.exp(kept_lse - dense_lse)).nan_to_num(0.0).clamp(min=0)
    groups = len(case.heads) // case.kv_heads
    plain = F.scaled_dot_product_attention(
        *(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)),
        attn_mask=allowed,
        scale=scale,
    )
    rows = allowed.any(-1).expand(dense.shape[:3])
    own = (plain.double() - dense)[rows].abs().max() if rows.any() else torch.tensor(0.0)
    error = (out.double() - dense).abs().amax(-1)
    # Float32 sums in another order than torch's, and rounding the result, are no error of ours.
    bound = 2 * missed * v.double().abs().max() + 2 * own + tolerance(torch.float32, case.num_k)
    bound = bound + torch.finfo(case.dtype).eps / 2 * dense.abs().amax(-1)
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits_twice(executor: str, dtype: torch.dtype) -> None:
    case = Case(num_q=150, batch=2, dtype=dtype, executor=executor, padding="left")
    q, k, v = case.qkv()
    for budget in (-1.0, 0.4, 1.0):
        first, second = (case.run(q, k, v, budget=budget) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("layout", ["tokens_first", "gaps", "reversed_heads"])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_strides_change_no_result(executor: str, layout: Layout) -> None:
    case = Case(num_q=120, batch=2, executor=executor)
    plain = case.run(budget=-1.0)
    strided = replace(case, layout=layout).run(budget=-1.0)
    assert_close(strided[0], plain[0], length=case.num_k)
    assert_lse_close(strided[1], plain[1], length=case.num_k)


# ---- chunks and later rows ---------------------------------------------------------------------


@given(
    case=cases,
    chunk=st.sampled_from([7, 32, 64, 100]),
    budget=st.just(1.0),
)
def test_at_budget_one_prefill_in_chunks_changes_nothing(
    case: Case, chunk: int, budget: float
) -> None:
    case = replace(case, offset=0, padding="none")
    q, k, v = case.qkv()
    whole, whole_lse = case.run(q, k, v, budget=budget)
    for start in range(0, case.num_q, chunk):
        stop = min(start + chunk, case.num_q)
        part = replace(case, num_q=stop - start, offset=start)
        out, lse = part.run(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], budget=budget)
        assert_close(out, whole[:, :, start:stop], length=case.num_k)
        assert_lse_close(lse, whole_lse[:, :, start:stop], length=case.num_k)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_at_budget_one_later_rows_change_no_earlier_output(executor: str) -> None:
    case = Case(num_q=150, executor=executor)
    q, k, v = case.qkv()
    before = case.run(q, k, v)
    q[:, :, 90:], k[:, :, 90:], v[:, :, 90:] = 10.0, -10.0, 100.0
    after = case.run(q, k, v)
    assert_close(after[0][:, :, :90], before[0][:, :, :90], length=90)
    assert_lse_close(after[1][:, :, :90], before[1][:, :, :90], length=90)


def _one_key_that_matters(wanted_by_last: bool) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.zeros(1, 1, 400, 16), torch.zeros(1, 1, 400, 16), torch.zeros(1, 1, 400, 8)
    q[..., 0], k[:, :, 60, 0], v[:, :, 60] = 20.0, 20.0, 1.0
    if not wanted_by_last:
        q[:, :, -64:, 0] = -20.0
    return q, k, v


@pytest.mark.parametrize("executor", EXECUTORS)
def test_below_budget_one_later_rows_may_change_earlier_ones(executor: str) -> None:
    """The limit of estimating from the last rows, shown so that nobody takes it for a bug."""
    heads, geometry = (HeadPattern("vertical_slash", 31, 100),), Geometry(0, -1, 0, 32, 16)
    outs = [
        sparse_attention(*_one_key_that_matters(wanted), heads, geometry, executor=executor)[0]
        for wanted in (True, False)
    ]
    row = outs[0][0, 0, 250], outs[1][0, 0, 250]
    assert_close(row[0], torch.ones(8), length=400)
    assert_close(row[1], torch.zeros(8), length=400)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_below_budget_one_chunks_may_change_results(executor: str) -> None:
    heads, geometry = (HeadPattern("vertical_slash", 31, 100),), Geometry(0, -1, 0, 32, 16)
    q, k, v = _one_key_that_matters(wanted_by_last=False)
    whole = sparse_attention(q, k, v, heads, geometry, executor=executor)[0]
    first = sparse_attention(
        *(t[:, :, :256] for t in (q, k, v)), heads, geometry, executor=executor
    )[0]
    # The first chunk asks for itself and finds key 60; the whole prompt's last rows do not.
    assert_close(first[0, 0, 250], torch.ones(8), length=400)
    assert_close(whole[0, 0, 250], torch.zeros(8), length=400)


# ---- numbers that are none ---------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("left", [-1, 40])
def test_nan_and_inf_show_where_dense_shows_them_and_nowhere_else(
    executor: str, value: float, which: str, left: int
) -> None:
    """Rows that see the bad number are bad; rows that do not are at most as bad as torch's own.

    torch adds -inf to hidden scores and multiplies hidden values by 0, which both leave NaN.
    """
    case = Case(num_q=100, offset=30, left=left, executor=executor)
    q, k, v = case.qkv()
    {"q": q[:, 1, 41], "k": k[:, 1, 77], "v": v[:, 1, 77]}[which][..., 3] = value
    out, _ = case.run(q, k, v)
    pairs = case.allowed()
    plain = F.scaled_dot_product_attention(
        *(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), attn_mask=pairs[:, None]
    )
    bad, dense_bad = ~torch.isfinite(out), ~torch.isfinite(plain)
    assert not (bad & ~dense_bad).any()
    if which == "v":
        expected = torch.zeros_like(bad)
        expected[:, 2:, :, 3] = pairs[:, None, :, 77]
    else:
        expected = ~torch.isfinite(dense_by_selection(q, k, v, pairs, case.scale))
    assert not (expected & ~bad).any()
    assert expected.any()
    good = ~(bad | expected)
    exact = dense_by_selection(q, k, v.nan_to_num(0.0, 0.0, 0.0), pairs, case.scale)
    assert_close(out[good], exact[good], length=case.num_k)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("pattern", [SLASH, BLOCKS], ids=lambda head: head.name)
def test_a_nan_key_is_never_skipped_silently(executor: str, pattern: HeadPattern) -> None:
    """Whoever sees the key in dense attention gets NaN there; an estimate must not hide it."""
    case = Case(heads=(pattern,), kv_heads=1, num_q=400, dim=16, block_q=32, executor=executor)
    q, k, v = case.qkv()
    k[:, :, 150] = float("nan")
    out, _ = case.run(q, k, v, budget=-1.0)
    assert out[0, 0, 150:].isnan().all(-1).all()
    assert not out[0, 0, :150].isnan().any()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_huge_scores_do_not_overflow(executor: str) -> None:
    case = Case(executor=executor)
    q, k, v = case.qkv()
    q, k = 300 * q, 300 * k
    out, lse = case.run(q, k, v)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    assert out.abs().max() <= v.abs().max() * 1.0001
