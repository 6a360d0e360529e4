"""The search charges patterns that score every row for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_compiler.ir.pattern import HeadPattern
from sparse_compiler.ir.shape import SiteShape
from sparse_compiler.search.costs import cost_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LAYER = SiteShape(1, 32, 8, 131072, 131072, 128, 128, dtype="bfloat16", causal=True)


def test_scoring_costs_what_it_took_on_an_h200() -> None:
    results = json.loads((RESULTS / "attention_low_rank_h200.json").read_text())["results"]
    (row,) = (row for row in results if row["tokens"] == LAYER.num_k)
    model = cost_model("triton", "NVIDIA H200")
    scored, grouped, ranked = (
        model.share(LAYER, HeadPattern(name, 5000, 0), 0.05, (64, 64))
        for name in ("low_rank", "key_groups", "block_sparse")
    )
    assert (scored - ranked) * row["cudnn_ms"] == pytest.approx(row["select_ms"], rel=0.15)
    assert grouped == pytest.approx(scored), "as much arithmetic, at D 128"


def test_scoring_costs_what_the_devices_constants_say() -> None:
    model, head = cost_model("triton", "NVIDIA H200"), HeadPattern("low_rank", 5000, 0)
    constants = model.constants
    assert constants is not None
    dear = replace(model, constants=replace(constants, score=2 * constants.score))
    shares = [m.share(LAYER, head, 0.05, (64, 64)) for m in (model, dear)]
    more = constants.score * 2 * 16 * LAYER.allowed_pairs / 1e12
    assert (shares[1] - shares[0]) * 238 == pytest.approx(more, rel=0.05)


def test_without_constants_scoring_is_slower_than_products() -> None:
    """Executors that nobody measured: low_rank does 1/16 of the arithmetic of D 128."""
    model = cost_model("cpu", None)
    scored, ranked = (
        model.share(LAYER, HeadPattern(name, 5000, 0), 0.05, (64, 64))
        for name in ("low_rank", "block_sparse")
    )
    assert 1 / 16 < scored - ranked < 8 / 16
