"""Executors against dense attention and against the oracle; the Triton one is tested elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sparse_compiler.errors import (
    ExecutorUnavailable,
    ShapeMismatch,
    SparseCompilerError,
    TensorInvalid,
)
from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.runtime.executor import Executor, Problem
from sparse_compiler.runtime.merge import merge
from sparse_compiler.runtime.reference import allowed_pairs, attend_pairs, covered_pairs
from sparse_compiler.runtime.registry import executor_for, executor_names
from sparse_compiler.testing import (
    Layout,
    assert_close,
    assert_lse_close,
    random_index,
    random_qkv,
    sparse_attention,
    tolerance,
)

EXECUTORS = ("reference", "cpu")
A_SHAPE = HeadPattern("a_shape", 4, 30)
SLASH = HeadPattern("vertical_slash", 34, 104)
BLOCKS = HeadPattern("block_sparse", 1)
DENSE = HeadPattern("dense")
MIXES = (
    (A_SHAPE, SLASH, BLOCKS, DENSE),
    (SLASH,) * 4,
    (BLOCKS,) * 4,
    (A_SHAPE,) * 4,
    (DENSE, BLOCKS, BLOCKS, A_SHAPE),
)


@dataclass(frozen=True)
class Case:
    """One attention; row i has position num_k - num_q + i unless ``rows`` says otherwise."""

    seed: int = 0
    batch: int = 1
    heads: tuple[HeadPattern, ...] = MIXES[0]
    kv_heads: int = 2
    num_q: int = 100
    offset: int = 0
    dim: int = 32
    value_dim: int = 32
    dtype: torch.dtype = torch.float32
    layout: Layout = "contiguous"
    left: int = -1
    right: int = 0
    block_q: int = 64
    block_k: int = 32
    padding: str = "none"
    executor: str = "cpu"

    @property
    def num_k(self) -> int:
        return self.num_q + self.offset

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.offset, self.left, self.right, self.block_q, self.block_k)

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return random_qkv(
            self.seed,
            batch=self.batch,
            heads=len(self.heads),
            kv_heads=self.kv_heads,
            num_q=self.num_q,
            num_k=self.num_k,
            dim=self.dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            layout=self.layout,
        )

    def key_mask(self) -> torch.Tensor | None:
        if self.padding == "none":
            return None
        mask = torch.ones(self.batch, self.num_k, dtype=torch.bool)
        for b in range(self.batch):
            cut = (5 + 9 * b) % max(1, self.num_k // 2)
            if self.padding == "left":
                mask[b, :cut] = False
            elif self.padding == "right":
                mask[b, self.num_k - cut :] = False
            elif self.padding == "holes":
                mask[b, b + 1 :: 3] = False
            elif self.padding == "nothing visible" and b == 0:
                mask[b] = False
        return mask

    def allowed(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        return allowed_pairs(
            *(self.batch, self.num_q, self.num_k, self.geometry),
            rows=rows,
            key_mask=self.key_mask(),
        )

    def run(
        self,
        *qkv: torch.Tensor,
        budget: float = 1.0,
        rows: torch.Tensor | None = None,
        min_tokens: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return sparse_attention(
            *(qkv or self.qkv()),
            self.heads,
            self.geometry,
            executor=self.executor,
            budget=budget,
            rows=rows,
            key_mask=self.key_mask(),
            min_tokens=min_tokens,
        )[:2]


def truth(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own attention in float64, 0 and -inf where a row sees nothing; pairs [B, Lq, Lk]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(groups, 1) for t in (k, v))
    pairs = pairs[:, None] if pairs.dim() == 3 else pairs
    empty = ~pairs.any(-1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale)
    lse = (q @ k.mT * scale).masked_fill(~pairs, float("-inf")).logsumexp(-1)
    return out.masked_fill(empty[..., None], 0.0), lse


def dense_by_selection(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: torch.Tensor, scale: float
) -> torch.Tensor:
    """Dense attention in which a hidden score is -inf whatever it was; torch adds -inf, NaN too."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(t.double().repeat_interleave(groups, 1) for t in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~pairs[:, None], float("-inf"))
    return scores.softmax(-1) @ v


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


cases = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    heads=st.sampled_from(MIXES),
    kv_heads=st.sampled_from([1, 2, 4]),
    num_q=st.sampled_from([2, 31, 64, 65, 128, 150]),
    offset=st.sampled_from([0, 0, 1, 40, 64]),
    dim=st.sampled_from([16, 32, 64, 80, 128, 256]),
    value_dim=st.sampled_from([16, 32, 64, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    layout=st.sampled_from(["contiguous", "tokens_first", "gaps", "reversed_heads"]),
    left=st.sampled_from([-1, -1, 0, 10, 70]),
    block_q=st.sampled_from([32, 64, 256]),
    block_k=st.sampled_from([16, 32, 64]),
    padding=st.sampled_from(["none", "none", "left", "right", "holes", "nothing visible"]),
    executor=st.sampled_from(EXECUTORS),
)
PARTIAL_EVERYTHING = Case(
    batch=2, num_q=131, offset=37, dim=80, value_dim=48, left=50, padding="holes", layout="gaps"
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


# ---- merging -----------------------------------------------------------------------------------

NOTHING = float("-inf")
LSES = (NOTHING, -1e30, -1000.0, -3.0, 0.0, 2.5, 1000.0, 1e30)


def part(lse: float, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's result over some keys; a row without keys holds 0."""
    out = torch.full((1, 3), 0.0 if lse == NOTHING else value)
    return out, torch.tensor([lse])


@pytest.mark.parametrize("first", LSES)
@pytest.mark.parametrize("second", LSES)
def test_merge_is_right_for_every_order_of_empty_and_extreme_rows(
    first: float, second: float
) -> None:
    a, b = part(first, 1.0), part(second, 3.0)
    out, lse = merge(*a, *b)
    exact = torch.tensor([first, second], dtype=torch.float64)
    expected_lse = exact.logsumexp(0) if exact.max() > NOTHING else exact[0]
    weights = exact.softmax(0).nan_to_num(0.0)
    expected = weights[0] * a[0].double() + weights[1] * b[0].double()
    assert out.dtype == torch.float32
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse[None], rtol=1e-6, atol=1e-6)
    swapped = merge(*b, *a)
    assert torch.equal(out, swapped[0])
    assert torch.equal(lse, swapped[1])


@given(
    seed=st.integers(0, 10**6),
    empty=st.lists(st.booleans(), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_merge_is_associative_up_to_rounding(
    seed: int, empty: list[bool], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for nothing in empty:
        out = torch.randn(2, 4, 5, generator=draw).to(dtype)
        lse = 4 * torch.randn(2, 4, generator=draw)
        # Some rows of every part see nothing, and all rows of some parts.
        none = (torch.rand(2, 4, generator=draw) < 0.3) | nothing
        parts.append((out.masked_fill(none[..., None], 0), lse.masked_fill(none, NOTHING)))
    results = []
    for a, b, c in permutations(parts):
        results.append(merge(*merge(*a, *b), *c))
        results.append(merge(*a, *merge(*b, *c)))
    for out, lse in results[1:]:
        assert_close(out, results[0][0], length=8, dtype=torch.float32)
        assert_lse_close(lse, results[0][1], length=8)


@given(
    seed=st.integers(0, 10**6),
    pieces=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_merged_parts_equal_attention_over_all_keys(
    seed: int, pieces: int, dtype: torch.dtype
) -> None:
    q, k, v = random_qkv(seed, batch=2, heads=4, kv_heads=2, num_q=9, num_k=40, dim=8, dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    pairs = torch.rand(2, 4, 9, 40, generator=draw) < 0.7
    owner = torch.randint(pieces, (40,), generator=draw)
    whole = attend_pairs(q, k, v, pairs, scale=0.4)
    out, lse = attend_pairs(q, k, v, torch.zeros_like(pairs), scale=0.4)
    for piece in range(pieces):
        out, lse = merge(out, lse, *attend_pairs(q, k, v, pairs & (owner == piece), scale=0.4))
    assert out.dtype == dtype
    # Each merge rounds its result to the dtype once more.
    torch.testing.assert_close(
        out.double(), whole[0].double(), rtol=0, atol=4 * pieces * tolerance(dtype, 40)
    )
    assert_lse_close(lse, whole[1], length=40)


@pytest.mark.parametrize("nan_first", [True, False])
@pytest.mark.parametrize("other", [NOTHING, 0.0])
def test_merge_keeps_the_nan_of_an_operand_that_holds_keys(nan_first: bool, other: float) -> None:
    for broken in ((float("nan"), 1.0), (1.0, float("nan"))):
        bad = torch.full((1, 3), broken[0]), torch.tensor([broken[1]])
        pair = (bad, part(other, 1.0)) if nan_first else (part(other, 1.0), bad)
        assert merge(*pair[0], *pair[1])[0].isnan().all()


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("budget", [-1.0, 1.0])
@pytest.mark.parametrize("min_tokens", [0, 10**6])
@pytest.mark.parametrize(("num_q", "num_k"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_keys_give_nothing_or_a_clear_error(
    executor: str, budget: float, min_tokens: int, num_q: int, num_k: int
) -> None:
    q, k, v = (
        torch.randn(1, 2, num_q, 16),
        torch.randn(1, 1, num_k, 16),
        torch.randn(1, 1, num_k, 8),
    )
    geometry = Geometry(max(0, num_k - num_q), -1, 0, 64, 32)
    try:
        out, lse, _ = sparse_attention(
            *(q, k, v, (SLASH, BLOCKS), geometry),
            executor=executor,
            budget=budget,
            min_tokens=min_tokens,
        )
    except SparseCompilerError:
        return
    assert torch.equal(out, torch.zeros(1, 2, num_q, 8))
    assert torch.equal(lse, torch.full((1, 2, num_q), NOTHING))


def _broken(name: str) -> dict[str, torch.Tensor]:
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    mask = torch.ones(2, 40, dtype=torch.bool)
    good = {"q": q, "k": k, "v": v, "key_mask": mask}
    bad = {
        "rank of q": {"q": q[0]},
        "rank of k": {"k": k[0]},
        "batch of k": {"k": k[:1], "v": v[:1], "key_mask": mask[:1]},
        "head size of k": {"k": k[..., :8]},
        "heads": {"k": torch.cat([k, k[:, :1]], 1), "v": torch.cat([v, v[:, :1]], 1)},
        "more key heads than query heads": {"k": k.repeat(1, 4, 1, 1), "v": v.repeat(1, 4, 1, 1)},
        "no key heads": {"k": k[:, :0], "v": v[:, :0]},
        "heads of v": {"v": v[:, :1]},
        "length of v": {"v": v[:, :, :39]},
        "length of key_mask": {"key_mask": mask[:, :39]},
        "batch of key_mask": {"key_mask": mask[:1]},
        "rank of key_mask": {"key_mask": mask[:, None]},
        "dtype of key_mask": {"key_mask": mask.long()},
        "integer tensors": {"q": q.long(), "k": k.long(), "v": v.long()},
        "dtype of k": {"k": k.half()},
        "dtype of v": {"v": v.double()},
    }
    return good | bad[name]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("rank of q", ShapeMismatch),
        ("rank of k", ShapeMismatch),
        ("batch of k", ShapeMismatch),
        ("head size of k", ShapeMismatch),
        ("heads", ShapeMismatch),
        ("more key heads than query heads", ShapeMismatch),
        ("no key heads", ShapeMismatch),
        ("heads of v", ShapeMismatch),
        ("length of v", ShapeMismatch),
        ("length of key_mask", ShapeMismatch),
        ("batch of key_mask", ShapeMismatch),
        ("rank of key_mask", ShapeMismatch),
        ("dtype of key_mask", SparseCompilerError),
        ("integer tensors", TensorInvalid),
        ("dtype of k", TensorInvalid),
        ("dtype of v", TensorInvalid),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_the_reason(
    executor: str, name: str, error: type[SparseCompilerError]
) -> None:
    broken = _broken(name)
    with pytest.raises(error) as caught:
        sparse_attention(
            *(broken["q"], broken["k"], broken["v"]),
            (SLASH, SLASH, BLOCKS, BLOCKS),
            Geometry(0, -1, 0, 64, 32),
            executor=executor,
            key_mask=broken["key_mask"],
        )
    subject = name.split(" of ")[-1].split()[-1]
    assert subject in str(caught.value) or name in ("integer tensors", "no key heads")


@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (2, 5, 1)])
def test_rows_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    case = Case(batch=2)
    with pytest.raises(SparseCompilerError):
        case.run(rows=torch.zeros(shape, dtype=torch.int32))


def test_rows_of_a_wrong_dtype_are_refused() -> None:
    case = Case(batch=1)
    with pytest.raises(SparseCompilerError):
        case.run(rows=torch.tensor([[0.0, 100.0, 0.0, 0.0, 100.0]]))


def test_parameters_for_another_number_of_heads_are_refused() -> None:
    q, k, v = Case().qkv()
    with pytest.raises(ShapeMismatch, match="head"):
        sparse_attention(q, k, v, (SLASH,) * 3, Case().geometry)


def test_an_executor_that_does_not_exist_is_refused_with_the_names_that_do() -> None:
    with pytest.raises(ExecutorUnavailable, match="reference"):
        executor_for("gpu", "cpu")
    with pytest.raises(ExecutorUnavailable, match="reference"):
        replace(Case(), executor="gpu").run()


def test_auto_is_the_cpu_executor_on_the_cpu() -> None:
    assert executor_for("auto", "cpu") is executor_for("cpu", "cpu")
    assert executor_names()[0] == "auto"
    assert set(executor_names()) >= {"auto", "cpu", "reference", "triton"}


@pytest.mark.parametrize("name", EXECUTORS)
def test_an_executor_names_every_obstacle_and_refuses_rather_than_falls_back(name: str) -> None:
    executor = executor_for(name, "cpu")
    assert isinstance(executor, Executor)
    assert executor.name == name
    assert not executor.obstacles(Problem("cpu", torch.float32, 64, 64, 4))
    if executor.obstacles(Problem("cpu", torch.float32, 64, 64, 4, softcap=30.0)):
        with pytest.raises(ExecutorUnavailable, match="cap"):
            sparse_attention(
                *Case().qkv(), Case().heads, Case().geometry, executor=name, softcap=30.0
            )
    if name == "cpu":
        assert executor.obstacles(Problem("cuda", torch.float32, 64, 64, 4))


# ---- the CPU executor's workers ----------------------------------------------------------------


def test_the_cpu_executor_leaves_torchs_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(Case(num_q=300, block_q=64).run(budget=-1.0)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_close(other, results[0], length=300)


def test_the_cpu_executor_serves_several_threads_at_once() -> None:
    case = Case(num_q=200)
    inputs = [replace(case, seed=seed).qkv() for seed in range(6)]
    expected = [case.run(*qkv) for qkv in inputs]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(lambda qkv: case.run(*qkv), inputs), expected, strict=True):
            assert_close(got[0], want[0], length=200)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_grad_modes_of_the_caller_hold_in_the_workers(executor: str, mode: type) -> None:
    case = Case(executor=executor)
    q, k, v = (t.requires_grad_() for t in case.qkv())
    with mode():
        out, lse = case.run(q, k, v)
    assert not out.requires_grad
    assert not lse.requires_grad


def test_a_forked_child_does_not_wait_for_its_parents_workers() -> None:
    code = (
        "import os, signal, torch\n"
        "from sparse_compiler.runtime.cpu_executor import _WORKERS\n"
        "torch.set_num_threads(2)\n"
        "_WORKERS.run(lambda item: None, 4)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    done = []\n"
        "    _WORKERS.run(done.append, 4)\n"
        "    os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
