"""Executors against dense attention and against the oracle; the Triton one is tested elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from executor_cases import (
    A_SHAPE,
    BLOCKS,
    DENSE,
    EXECUTORS,
    PARTIAL_EVERYTHING,
    SLASH,
    Case,
    cases,
    poisoned_memory,
    truth,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry
from sparse_compiler.runtime.executor import Problem
from sparse_compiler.runtime.reference import attend_pairs, covered_pairs
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.testing import (
    assert_close,
    assert_lse_close,
    random_index,
    random_qkv,
    sparse_attention,
    tolerance,
)

# ---- budget 1 is dense -------------------------------------------------------------------------


@given(case=cases)
@example(case=PARTIAL_EVERYTHING)
@example(case=replace(PARTIAL_EVERYTHING, executor="reference"))
@example(case=Case(padding="nothing visible", batch=2))
def test_budget_one_equals_dense(case: Case) -> None:
    q, k, v = case.qkv()
    expected, expected_lse = truth(q, k, v, case.allowed(), case.scale)
    with poisoned_memory():
        out, lse = case.run(q, k, v)
    assert out.dtype == case.dtype
    assert out.shape == expected.shape
    assert_close(out, expected, length=case.num_k)
    assert_lse_close(lse, expected_lse, length=case.num_k)


@given(case=cases, budget=st.sampled_from([-1.0, 0.5]))
@example(case=Case(), budget=-1.0)
@example(case=Case(left=20, padding="left"), budget=-1.0)
def test_below_min_tokens_the_operators_are_dense(case: Case, budget: float) -> None:
    q, k, v = case.qkv()
    expected, expected_lse = truth(q, k, v, case.allowed(), case.scale)
    with poisoned_memory():
        out, lse = case.run(q, k, v, budget=budget, min_tokens=10**6)
    assert_close(out, expected, length=case.num_k)
    assert_lse_close(lse, expected_lse, length=case.num_k)


@given(
    case=cases,
    right=st.sampled_from([-1, 0, 7, 100]),
    min_tokens=st.sampled_from([0, 10**6]),
)
def test_budget_one_equals_dense_for_masks_that_see_later_keys(
    case: Case, right: int, min_tokens: int
) -> None:
    case = replace(case, right=right, heads=(BLOCKS,) * 4)
    q, k, v = case.qkv()
    expected, expected_lse = truth(q, k, v, case.allowed(), case.scale)
    out, lse = case.run(q, k, v, min_tokens=min_tokens)
    assert_close(out, expected, length=case.num_k)
    assert_lse_close(lse, expected_lse, length=case.num_k)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 30.0])
def test_any_scale_is_honoured(executor: str, scale: float) -> None:
    case = Case(executor=executor, num_q=80, offset=10, dim=16)
    q, k, v = case.qkv()
    expected, expected_lse = truth(q, k, v, case.allowed(), scale)
    out, lse, _ = sparse_attention(
        *(q, k, v, case.heads, case.geometry), executor=executor, scale=scale, budget=1.0
    )
    # Scores of a few thousand lose digits in float32 before the softmax.
    size = max(1.0, float((q.abs().amax() * k.abs().amax()) * 16 * abs(scale)) / 20)
    torch.testing.assert_close(
        out.double(), expected, rtol=0, atol=size * tolerance(torch.float32, case.num_k)
    )
    assert torch.isfinite(lse).all()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_every_grouping_of_heads_reads_its_own_keys(executor: str, kv_heads: int) -> None:
    case = Case(heads=(SLASH, BLOCKS, DENSE) * 2, kv_heads=kv_heads, executor=executor)
    q, k, v = case.qkv()
    out, _ = case.run(q, k, v)
    assert_close(out, truth(q, k, v, case.allowed(), case.scale)[0], length=case.num_k)


# ---- any index equals the oracle ---------------------------------------------------------------


def random_rows(seed: int, batch: int, num_q: int, num_k: int, offset: int) -> torch.Tensor:
    """Some rows and keys of each batch entry, offsets up to the geometry's."""
    draw = torch.Generator().manual_seed(seed)

    def pick(most: int) -> int:
        return int(torch.randint(0, most + 1, (1,), generator=draw))

    rows = []
    for _ in range(batch):
        start, key = pick(num_q), pick(num_k)
        rows.append([start, pick(num_q - start), pick(offset), key, pick(num_k - key)])
    return torch.tensor(rows, dtype=torch.int32)


@given(
    case=cases,
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    kinds=st.lists(st.sampled_from(["band", "blocks", "none"]), min_size=4, max_size=4),
    explicit=st.booleans(),
    right=st.sampled_from([0, 0, 0, -1, 5]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
)
@example(
    case=PARTIAL_EVERYTHING, share=0.3, kinds=["band"] * 4, explicit=True, right=0, softcap=0.0
)
@example(case=Case(), share=0.0, kinds=["none"] * 4, explicit=False, right=0, softcap=0.0)
def test_executors_compute_exactly_what_the_index_covers(
    case: Case, share: float, kinds: list[str], explicit: bool, right: int, softcap: float
) -> None:
    # A band is for causal masks only.
    case = replace(case, right=0 if "band" in kinds else right)
    executor = executor_for(case.executor, "cpu")
    assume(not executor.obstacles(problem_of(case, softcap)))
    q, k, v = case.qkv()
    sizes = (case.num_q, case.num_k)
    index = random_index(
        case.seed,
        case.geometry,
        batch=case.batch,
        num_q=case.num_q,
        num_k=case.num_k,
        kinds=kinds,
        share=share,
    )
    if explicit:
        rows = random_rows(case.seed, case.batch, *sizes, case.offset)
    else:
        rows = torch.tensor([[0, case.num_q, case.offset, 0, case.num_k]] * case.batch).int()
    covered = covered_pairs(index, case.geometry, *sizes, rows=rows)
    assert covered.max() <= 1
    pairs = (covered > 0) & case.allowed(rows)[:, None]
    expected, expected_lse = attend_pairs(
        *(q.double(), k.double(), v.double(), pairs), scale=case.scale, softcap=softcap
    )
    with poisoned_memory():
        out, lse = executor.attend(
            *(q, k, v, index, case.geometry),
            scale=case.scale,
            softcap=softcap,
            rows=rows,
            key_mask=case.key_mask(),
        )
    assert_close(out, expected, length=case.num_k)
    assert_lse_close(lse, expected_lse, length=case.num_k)
    empty = ~pairs.any(-1)
    assert (out[empty] == 0).all()
    assert (lse[empty] == float("-inf")).all()


def problem_of(case: Case, softcap: float = 0.0) -> Problem:
    groups = len(case.heads) // case.kv_heads
    return Problem("cpu", case.dtype, case.dim, case.value_dim, groups, softcap)


@given(
    seed=st.integers(0, 10**6),
    shapes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    softcap=st.sampled_from([0.0, 3.0]),
)
def test_the_oracle_itself_equals_torch(
    seed: int, shapes: tuple[int, int, int], softcap: float
) -> None:
    batch, num_q, num_k = shapes
    q, k, v = random_qkv(
        seed, batch=batch, heads=4, kv_heads=2, num_q=num_q, num_k=num_k, dim=8, value_dim=5
    )
    pairs = torch.rand(batch, 4, num_q, num_k) < 0.6
    out, lse = attend_pairs(q, k, v, pairs, scale=0.3, softcap=softcap)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)).double() * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~pairs, float("-inf"))
    expected = scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(2, 1).double()
    assert_close(out, expected, length=num_k)
    assert_lse_close(lse, scores.logsumexp(-1), length=num_k)


@given(case=cases, share=st.sampled_from([0.1, 0.5]), at=st.integers(0, 149))
def test_no_key_after_a_rows_position_changes_its_output(case: Case, share: float, at: int) -> None:
    """For a given index: bits, not tolerances."""
    at = min(at, case.num_q - 1)
    executor = executor_for(case.executor, "cpu")
    kinds = ("band", "blocks", "band", "blocks")
    sizes = {"batch": case.batch, "num_q": case.num_q, "num_k": case.num_k}
    index = random_index(case.seed, case.geometry, **sizes, kinds=kinds, share=share)
    rows = torch.tensor([[0, case.num_q, case.offset, 0, case.num_k]] * case.batch).int()
    q, k, v = case.qkv()

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return executor.attend(
            *(q, k, v, index, case.geometry),
            scale=case.scale,
            softcap=0.0,
            rows=rows,
            key_mask=case.key_mask(),
        )

    before = attend()
    k[:, :, at + case.offset + 1 :] = 100.0
    v[:, :, at + case.offset + 1 :] = -1000.0
    after = attend()
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[:, :, : at + 1], second[:, :, : at + 1])


@given(case=cases, budget=st.sampled_from([-1.0, 0.5, 1.0]))
def test_hidden_keys_change_nothing(case: Case, budget: float) -> None:
    assume(case.padding != "none")
    q, k, v = case.qkv()
    mask = case.key_mask()
    assert mask is not None
    before = case.run(q, k, v, budget=budget)
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, 50.0), v.masked_fill(hidden, -1000.0)
    after = case.run(q, k, v, budget=budget)
    for first, second in zip(before, after, strict=True):
        assert_close(first, second, length=case.num_k, dtype=case.dtype)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_explicit_rows_are_positions_of_each_batch_entry(executor: str) -> None:
    """q_start, q_len, q_offset, kv_start, kv_len; everything outside is 0 and -inf."""
    case = Case(batch=4, num_q=90, offset=60, executor=executor)
    q, k, v = case.qkv()
    rows = torch.tensor(
        [[0, 90, 60, 0, 150], [20, 50, 60, 33, 77], [0, 0, 60, 0, 150], [5, 85, 10, 15, 85]]
    ).int()
    for budget in (1.0, -1.0):
        with poisoned_memory():
            out, lse = case.run(q, k, v, rows=rows, budget=budget)
        for b, (start, length, _, _, kv_len) in enumerate(rows.tolist()):
            outside = torch.ones(90, dtype=torch.bool)
            outside[start : start + length] = kv_len == 0
            assert (out[b, :, outside] == 0).all()
            assert (lse[b, :, outside] == float("-inf")).all()
    expected, expected_lse = truth(q, k, v, case.allowed(rows), case.scale)
    out, lse = case.run(q, k, v, rows=rows)
    assert_close(out, expected, length=150)
    assert_lse_close(lse, expected_lse, length=150)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_of_a_short_entry_equal_the_entry_cut_out(executor: str) -> None:
    """Sparse, not only dense: an entry inside a larger batch chooses what it would alone."""
    heads = (A_SHAPE, SLASH)
    q, k, v = random_qkv(2, batch=2, heads=2, kv_heads=1, num_q=256, num_k=256, dim=16)
    rows = torch.tensor([[0, 256, 0, 0, 256], [0, 192, 0, 0, 192]]).int()
    geometry = Geometry(0, -1, 0, 64, 32)
    out, lse, _ = sparse_attention(q, k, v, heads, geometry, executor=executor, rows=rows)
    alone = sparse_attention(
        *(t[1:, :, :192] for t in (q, k, v)), heads, geometry, executor=executor
    )
    assert_close(out[1:, :, :192], alone[0], length=192)
    assert_lse_close(lse[1:, :, :192], alone[1], length=192)
