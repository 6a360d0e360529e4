"""The search charges patterns that score every row for it."""

from __future__ import annotations

import pytest

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.search.costs import cost_model

LAYER = SiteShape(1, 32, 8, 131072, 131072, 128, 128, dtype="bfloat16", causal=True)


@pytest.mark.parametrize(("name", "select_ms"), [("low_rank", 43.1), ("key_groups", 39.5)])
def test_scoring_costs_what_it_took_on_an_h200(name: str, select_ms: float) -> None:
    model = cost_model("triton", "NVIDIA H200")
    scored = model.share(LAYER, HeadPattern(name, 5000, 0), 0.05, (64, 64))
    ranked = model.share(LAYER, HeadPattern("block_sparse", 100, 0), 0.05, (64, 64))
    assert (scored - ranked) * 238 == pytest.approx(select_ms, rel=0.15)
