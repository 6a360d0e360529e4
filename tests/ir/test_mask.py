"""Band and MaskFact: what they hide, and how they say so."""

from __future__ import annotations

from itertools import product

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.ir.index import Geometry
from sparse_compiler.ir.mask import Band, MaskFact
from sparse_compiler.runtime.reference import allowed_pairs

sizes = st.integers(1, 9)
reach = st.none() | st.integers(0, 7)
bands = st.builds(Band, st.integers(-4, 12), reach, reach)


def by_definition(band: Band, num_q: int, num_k: int) -> torch.Tensor:
    """The docstring's inequality, pair by pair."""
    dense = torch.zeros(num_q, num_k, dtype=torch.bool)
    for i, j in product(range(num_q), range(num_k)):
        position = i + band.q_offset
        low = band.left is None or position - band.left <= j
        high = band.right is None or j <= position + band.right
        dense[i, j] = low and high
    return dense


@given(band=bands, num_q=sizes, num_k=sizes, batch=st.integers(1, 3))
def test_dense_is_the_inequality_of_the_definition(
    band: Band, num_q: int, num_k: int, batch: int
) -> None:
    dense = MaskFact(band).dense((batch, num_q, num_k))
    assert dense.dtype == torch.bool
    assert dense.shape == (batch, num_q, num_k)
    assert torch.equal(dense, by_definition(band, num_q, num_k).expand(batch, -1, -1))


@given(band=bands, num_q=sizes, num_k=sizes)
def test_band_agrees_with_the_oracle_of_the_executors(band: Band, num_q: int, num_k: int) -> None:
    left, right = (-1 if size is None else size for size in (band.left, band.right))
    geometry = Geometry(band.q_offset, left, right, 4, 2)
    assert torch.equal(
        MaskFact(band).dense((1, num_q, num_k)), allowed_pairs(1, num_q, num_k, geometry)
    )


@given(band=bands, num_q=sizes, num_k=sizes)
def test_full_means_that_nothing_is_hidden_at_any_size(band: Band, num_q: int, num_k: int) -> None:
    if band.full:
        assert by_definition(band, num_q, num_k).all()
    wide = by_definition(band, 40, 80)
    if wide.all():
        assert band.full


@given(band=bands)
def test_causal_means_that_no_row_sees_a_later_key(band: Band) -> None:
    dense = by_definition(band, 12, 40)
    position = torch.arange(12)[:, None] + band.q_offset
    later = torch.arange(40)[None] > position
    assert band.causal == (not (dense & later).any())


@given(band=bands, data=st.data(), as_bool=st.booleans())
def test_key_padding_hides_a_key_from_every_row(
    band: Band, data: st.DataObject, as_bool: bool
) -> None:
    batch, num_q, num_k = 2, 5, 7
    values = data.draw(st.lists(st.integers(0, 1), min_size=14, max_size=14))
    padding = torch.tensor(values).view(batch, num_k).bool()
    fact = MaskFact(band, "pad", as_bool)
    dense = fact.dense((batch, num_q, num_k), key_mask=padding)
    expected = by_definition(band, num_q, num_k)[None] & padding[:, None]
    assert torch.equal(dense, expected)
    assert not fact.trivial


def test_symbolic_sizes_are_evaluated() -> None:
    num_q, num_k, window = sympy.symbols("Lq Lk W", integer=True, positive=True)
    values = {num_q: 3, num_k: 8, window: 4}
    fact = MaskFact(Band(num_k - num_q, window - 1, 0))
    dense = fact.dense((1, 3, 8), size=lambda size: int(sympy.sympify(size).subs(values)))
    assert torch.equal(dense[0], by_definition(Band(5, 3, 0), 3, 8))


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (MaskFact(Band(0, None, None)), "full"),
        (MaskFact(Band(0, None, 0)), "causal"),
        (MaskFact(Band(4096, None, 0)), "causal+4096"),
        (MaskFact(Band(4096, 511, 0), "pad"), "causal+4096, window 512, key padding"),
        (MaskFact(Band(0, None, None), "pad"), "full, key padding"),
    ],
)
def test_describe_is_short_and_names_offset_window_and_padding(fact: MaskFact, text: str) -> None:
    assert fact.describe() == text


@given(band=bands, padded=st.booleans())
def test_describe_tells_different_bands_apart_and_shows_no_none(band: Band, padded: bool) -> None:
    text = MaskFact(band, "pad" if padded else None).describe()
    assert "None" not in text, text
    assert ("padding" in text) == padded
    if not band.full:
        assert text != MaskFact(Band(0, None, None), "pad" if padded else None).describe()


@given(band=bands)
def test_trivial_is_full_without_padding(band: Band) -> None:
    assert MaskFact(band).trivial == band.full
    assert not MaskFact(band, "pad").trivial


def test_facts_are_frozen_and_comparable() -> None:
    fact = MaskFact(Band(1, 2, 0))
    assert fact == MaskFact(Band(1, 2, 0))
    assert hash(fact) == hash(MaskFact(Band(1, 2, 0)))
    with pytest.raises(AttributeError):
        fact.band = Band(0, None, None)  # type: ignore[misc]
