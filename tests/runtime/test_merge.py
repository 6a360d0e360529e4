"""Results over parts of the keys, merged: any order, empty parts, extreme numbers."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from executor_cases import NOTHING
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.runtime.merge import merge
from sparse_compiler.runtime.reference import attend_pairs
from sparse_compiler.testing import assert_close, assert_lse_close, random_qkv, tolerance

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
