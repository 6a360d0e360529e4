"""Statistics: pairs are counted in closed form."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.runtime.recorder import _pairs_up_to

numbers = st.integers(-20, 60)
lengths = st.integers(0, 20)


@given(start=numbers, size=lengths, low=numbers, rows=lengths)
def test_pairs_are_those_that_enumeration_finds(start: int, size: int, low: int, rows: int) -> None:
    ends = (torch.tensor(n) for n in (start, start + size, low, low + rows))
    wanted = sum(u <= p for u in range(start, start + size) for p in range(low, low + rows))
    assert _pairs_up_to(*ends).item() == wanted
