"""Bounds, biases, sinks and soft caps, on one side and on both, against attention written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from operand_calls import (
    A_SHAPE,
    BIASES,
    BLOCKS,
    BOUNDS,
    DENSE,
    EVERYTHING,
    EXECUTORS,
    NOTHING,
    SLASH,
    Case,
    cases,
)

from sparse_compiler.errors import PatternInvalid, ShapeMismatch, SparseCompilerError, TensorInvalid
from sparse_compiler.ir.index import Geometry
from sparse_compiler.patterns import block_sparse, registry, two_sided
from sparse_compiler.patterns.base import Pattern
from sparse_compiler.runtime import recorder
from sparse_compiler.runtime.merge import with_sinks
from sparse_compiler.runtime.probe import probe_torch
from sparse_compiler.runtime.reference import allowed_pairs, covered_pairs
from sparse_compiler.runtime.registry import executor_for
from sparse_compiler.runtime.select import default_rows
from sparse_compiler.testing import (
    assert_close,
    assert_lse_close,
    random_index,
    random_qkv,
    sparse_attention,
)


@given(case=cases, min_tokens=st.sampled_from([0, 0, 10**6]))
@example(case=EVERYTHING, min_tokens=0)
@example(case=replace(EVERYTHING, softcap=4.0, bias="table of heads"), min_tokens=10**6)
def test_budget_one_equals_attention_written_out(case: Case, min_tokens: int) -> None:
    q, k, v = case.qkv()
    out, lse, covered = case.run(q, k, v, min_tokens=min_tokens)
    case.check((out, lse), case.truth(q, k, v, case.allowed()))
    if min_tokens == 0:
        assert covered.max() <= 1
        assert not (case.allowed() & (covered == 0)).any()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("right", [0, -1])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("bias", ["none", "keys", "table"])
def test_every_kind_of_bounds_on_both_sides(
    executor: str, right: int, bounds: str, bias: str
) -> None:
    case = Case(executor=executor, right=right, bounds=bounds, bias=bias, offset=10)
    q, k, v = case.qkv()
    case.check(case.run(q, k, v)[:2], case.truth(q, k, v, case.allowed()))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_form_of_bias(executor: str, bias: str, dtype: torch.dtype) -> None:
    for hiding in (False, True):
        case = Case(executor=executor, bias=bias, hiding=hiding, dtype=dtype, offset=5)
        q, k, v = case.qkv()
        case.check(case.run(q, k, v)[:2], case.truth(q, k, v, case.allowed()))


@given(case=cases, budget=st.sampled_from([-1.0, -1.0, 0.4]))
@example(case=EVERYTHING, budget=-1.0)
@example(case=replace(EVERYTHING, heads=(SLASH,) * 4, bias="table"), budget=-1.0)
def test_sparse_equals_attention_over_the_pairs_of_its_index(case: Case, budget: float) -> None:
    q, k, v = case.qkv()
    out, lse, covered = case.run(q, k, v, budget=budget)
    assert covered.max() <= 1
    case.check((out, lse), case.truth(q, k, v, case.allowed() & (covered > 0)))


@given(case=cases, share=st.sampled_from([0.05, 0.3]), ragged=st.booleans())
def test_executors_compute_what_a_random_index_covers(
    case: Case, share: float, ragged: bool
) -> None:
    kinds = ("band", "blocks", "none", "band") if case.right == 0 else ("blocks",) * 4
    case = replace(case, sinks=False)
    q, k, v = case.qkv()
    sizes = {"batch": case.batch, "num_q": case.num_q, "num_k": case.num_k}
    index = random_index(case.seed, case.geometry, **sizes, kinds=kinds, share=share)
    rows = torch.tensor([[0, case.num_q, case.offset, 0, case.num_k]] * case.batch).int()
    if ragged:
        rows[0] = torch.tensor([case.num_q // 4, case.num_q // 2, 0, 1, case.num_k // 2])
    bounds = case.bounds_tensor()
    result = executor_for(case.executor, "cpu").attend(
        *(q, k, v, index, case.geometry),
        scale=case.dim**-0.5,
        softcap=case.softcap,
        rows=rows,
        key_mask=case.key_mask(),
        bounds=None if bounds is None else bounds.expand(case.batch, -1, -1),
        bias=case.bias_tensor(),
    )
    pairs = covered_pairs(index, case.geometry, case.num_q, case.num_k, rows=rows) > 0
    pairs &= allowed_pairs(
        *(case.batch, case.num_q, case.num_k, case.geometry),
        rows=rows,
        key_mask=case.key_mask(),
        bounds=bounds,
    )[:, None]
    case.check(result, case.truth(q, k, v, pairs))


def test_a_bias_that_is_broadcast_by_strides_equals_the_materialised_one() -> None:
    case = Case(bias="keys of heads", right=-1)
    q, k, v = case.qkv()
    bias = case.bias_tensor()
    assert bias is not None
    wide = bias.expand(2, 4, case.num_q, case.num_k)
    for executor in EXECUTORS:
        results = [
            sparse_attention(
                *(q, k, v, (DENSE,) * 4, case.geometry), executor=executor, bias=form, budget=1.0
            )[0]
            for form in (bias, wide, wide.contiguous())
        ]
        for other in results[1:]:
            assert_close(other, results[0], length=case.num_k)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_causal_document_equals_the_document_alone(executor: str) -> None:
    """Packed documents, and the same bounds with and without what causality says already."""
    q, k, v = random_qkv(4, heads=4, kv_heads=2, num_q=300, num_k=300, dim=16)
    row = torch.arange(300)
    low = torch.where(row < 130, 0, 130)
    high = torch.where(row < 130, 129, 299)
    geometry = Geometry(0, -1, 0, 64, 32)
    alone = [
        sparse_attention(*(t[:, :, part] for t in (q, k, v)), (DENSE,) * 4, geometry, budget=1.0)
        for part in (slice(0, 130), slice(130, 300))
    ]
    for last in (high, torch.minimum(high, row)):
        bounds = torch.stack([low, last], -1).int()[None]
        out, lse, _ = sparse_attention(
            q, k, v, (A_SHAPE, DENSE) * 2, geometry, executor=executor, bounds=bounds, budget=1.0
        )
        assert_close(out, torch.cat([alone[0][0], alone[1][0]], 2), length=300)
        assert_lse_close(lse, torch.cat([alone[0][1], alone[1][1]], 2), length=300)


# ---- sinks -------------------------------------------------------------------------------------


LOGITS = (NOTHING, -1e30, -200.0, 0.0, 3.0, 200.0, 1e30)


@pytest.mark.parametrize("sink", LOGITS)
@pytest.mark.parametrize("lse", LOGITS)
def test_sinks_are_right_for_empty_and_extreme_rows(lse: float, sink: float) -> None:
    out = torch.full((1, 1, 1, 3), 0.0 if lse == NOTHING else 2.0)
    scaled, total = with_sinks(out, torch.full((1, 1, 1), lse), torch.tensor([sink]))
    both = torch.tensor([lse, sink], dtype=torch.float64)
    share = both.softmax(0).nan_to_num(0.0)[0]
    torch.testing.assert_close(scaled.double(), share * out.double(), rtol=1e-6, atol=1e-7)
    expected = both.logsumexp(0).reshape(1, 1, 1)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_nan_is_not_hidden_by_a_sink() -> None:
    nan = float("nan")
    for out, lse, sink in ((nan, 0.0, 1.0), (1.0, nan, 1.0), (1.0, 0.0, nan)):
        scaled, _ = with_sinks(
            torch.full((1, 1, 1, 2), out), torch.full((1, 1, 1), lse), torch.tensor([sink])
        )
        assert scaled.isnan().all()


# ---- the estimators ----------------------------------------------------------------------------


@given(
    case=cases.map(lambda case: replace(case, softcap=0.0, sinks=False, dtype=torch.float32)),
    num_rows=st.sampled_from([7, 64]),
)
def test_the_probe_honours_bounds_and_bias(case: Case, num_rows: int) -> None:
    q, k, v = case.qkv()
    bounds, mask = case.bounds_tensor(), case.key_mask()
    rows = default_rows(case.batch, case.num_q, case.num_k, case.offset, mask, torch.device("cpu"))
    first = torch.full((case.batch,), case.num_q - num_rows)
    heads = torch.tensor([3, 0])
    columns, distances = probe_torch(
        *(q, k, heads, first, case.geometry),
        scale=case.dim**-0.5,
        rows=rows,
        key_mask=mask,
        num_rows=num_rows,
        bounds=None if bounds is None else bounds.expand(case.batch, -1, -1),
        bias=case.bias_tensor(),
    )
    # The attention of values that are one-hot is the weights.
    eye = torch.eye(case.num_k).expand(case.batch, case.kv_heads, -1, -1)
    weights = case.truth(q, k, eye, case.allowed())[0][:, heads, max(0, case.num_q - num_rows) :]
    torch.testing.assert_close(columns.double(), weights.sum(2), rtol=1e-4, atol=1e-5)
    position = torch.arange(case.num_q)[max(0, case.num_q - num_rows) :, None] + case.offset
    distance = position - torch.arange(case.num_k)
    for x in (0, 1, 17):
        if x < distances.shape[-1]:
            expected = (weights * (distance == x)).sum((2, 3))
            torch.testing.assert_close(distances[..., x].double(), expected, rtol=1e-4, atol=1e-5)


def test_chunks_of_the_estimators_and_of_the_statistics_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(right=-1, bounds="packed", bias="full", hiding=True, heads=(SLASH, BLOCKS) * 2)
    q, k, v = case.qkv()
    bounds = case.bounds_tensor()
    assert bounds is not None
    rows = default_rows(2, case.num_q, case.num_k, 0, None, torch.device("cpu"))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        _, _, index = sparse_attention(
            q, k, v, case.heads, case.geometry, bounds=bounds, bias=case.bias_tensor()
        )
        share = recorder.density(index, case.geometry, rows, case.num_q, case.num_k, bounds)
        return covered_pairs(index, case.geometry, case.num_q, case.num_k), share

    before = run()
    for module in (two_sided, block_sparse, recorder):
        monkeypatch.setattr(module, "_CHUNK", 1000)
    after = run()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@given(case=cases, as_blocks=st.booleans())
@example(case=EVERYTHING, as_blocks=True)
def test_density_counts_pairs_between_bounds(case: Case, as_blocks: bool) -> None:
    case = replace(case, batch=1, padding=False, bounds=case.bounds.replace("none", "packed"))
    q, k, v = case.qkv()
    bounds, sizes = case.bounds_tensor(), (case.num_q, case.num_k)
    assert bounds is not None
    _, _, index = sparse_attention(
        *(q, k, v, case.heads, case.geometry), bounds=bounds, causal=False if as_blocks else None
    )
    rows = default_rows(1, *sizes, case.offset, None, torch.device("cpu"))
    density = recorder.density(index, case.geometry, rows, *sizes, bounds)
    allowed = case.allowed()
    covered = covered_pairs(index, case.geometry, *sizes) > 0
    exact = (covered & allowed).sum((0, 2, 3)) / allowed.sum().clamp(min=1)
    torch.testing.assert_close(density, exact, rtol=1e-5, atol=1e-6)


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operands", "error", "subject"),
    [
        ({"bounds": torch.zeros(1, 40, 2)}, TensorInvalid, "bounds"),
        ({"bounds": torch.zeros(1, 40, 2, dtype=torch.int64)}, TensorInvalid, "bounds"),
        ({"bounds": torch.zeros(3, 40, 2, dtype=torch.int32)}, ShapeMismatch, "bounds"),
        ({"bounds": torch.zeros(1, 39, 2, dtype=torch.int32)}, ShapeMismatch, "bounds"),
        ({"bounds": torch.zeros(40, 2, dtype=torch.int32)}, ShapeMismatch, "bounds"),
        ({"bias": torch.zeros(1, 1, 40, 50).int()}, TensorInvalid, "bias"),
        ({"bias": torch.zeros(1, 1, 40, 50).bool()}, TensorInvalid, "bias"),
        ({"bias": torch.zeros(1, 1, 40, 1)}, ShapeMismatch, "bias"),
        ({"bias": torch.zeros(1, 3, 40, 50)}, ShapeMismatch, "bias"),
        ({"bias": torch.zeros(40, 50)}, ShapeMismatch, "bias"),
        ({"bias": torch.zeros(1, 40, 50)}, ShapeMismatch, "bias"),
        ({"bias": torch.zeros(4, 90)}, ShapeMismatch, "bias"),
        ({"bias": torch.zeros(89)}, ShapeMismatch, "bias"),
        ({"sinks": torch.zeros(2)}, ShapeMismatch, "sinks"),
        ({"sinks": torch.zeros(4, 1)}, ShapeMismatch, "sinks"),
        ({"sinks": torch.zeros(4).int()}, TensorInvalid, "sinks"),
    ],
)
@pytest.mark.parametrize("min_tokens", [0, 10**6])
def test_operands_that_do_not_fit_are_refused_with_the_reason(
    operands: dict[str, torch.Tensor],
    error: type[SparseCompilerError],
    subject: str,
    min_tokens: int,
) -> None:
    q, k, v = random_qkv(0, batch=2, heads=4, num_q=40, num_k=50, dim=16)
    with pytest.raises(error, match=subject):
        sparse_attention(
            *(q, k, v, (SLASH,) * 4, Geometry(10, -1, 0, 64, 32)),
            min_tokens=min_tokens,
            **operands,  # type: ignore[arg-type]
        )


def test_operands_of_calls_without_keys_or_rows() -> None:
    sinks = torch.tensor([1.0, NOTHING])
    for num_q, num_k in ((5, 0), (0, 5)):
        q, k = torch.randn(1, 2, num_q, 16), torch.randn(1, 1, num_k, 16)
        out, lse, _ = sparse_attention(
            *(q, k, k, (SLASH, BLOCKS), Geometry(0, -1, -1, 64, 32)),
            sinks=sinks,
            bounds=torch.zeros(1, num_q, 2, dtype=torch.int32),
        )
        assert torch.equal(out, torch.zeros(1, 2, num_q, 16))
        assert torch.equal(lse, sinks[:, None].expand(1, 2, num_q))


def test_the_band_is_refused_under_a_mask_that_is_not_causal() -> None:
    q, k, v = Case().qkv()
    with pytest.raises(PatternInvalid, match="causal"):
        sparse_attention(q, k, v, (SLASH,) * 4, Geometry(0, -1, -1, 64, 32), causal=True)


def test_a_pattern_without_a_choice_on_both_sides_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    slash = registry.get("vertical_slash")
    monkeypatch.setattr(type(slash), "choose_two_sided", Pattern.choose_two_sided)
    q, k, v = Case().qkv()
    with pytest.raises(PatternInvalid, match="vertical_slash"):
        sparse_attention(q, k, v, (SLASH,) * 4, Geometry(0, -1, -1, 64, 32))
