"""Patterns and budgets by option, for all heads and for some."""

from __future__ import annotations

import pytest
import torch
from backend_calls import (
    EXACT,
    LENGTH,
    Capture,
    block_and_input,
    capture_sites,
    check,
    sdpa,
    square,
)
from backend_models import build, ids
from torch import Tensor

import sparse_compiler
from sparse_compiler.explanation import report_of
from sparse_compiler.testing import assert_close


@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse", "auto"])
@pytest.mark.parametrize("executor", ["cpu", "reference", "auto"])
def test_every_pattern_and_executor_is_equal_at_budget_one(pattern: str, executor: str) -> None:
    model, x = block_and_input()
    capture = Capture(pattern=pattern, executor=executor, **EXACT)
    assert_close(torch.compile(model, backend=capture)(x), model(x), length=LENGTH)
    assert capture.rewritten == 1


def test_a_table_gives_layers_and_heads_their_patterns() -> None:
    model = build("llama")
    table = {
        0: {"*": ("a_shape", 4, 16), 2: ("vertical_slash", 30, 100)},
        "*": {0: ("block_sparse", 1, 0), "*": ("dense", 0, 0)},
    }
    # Row blocks of 64, so that 90 rows have something to leave out.
    capture = Capture(pattern=table, executor="reference")
    torch.compile(model, backend=capture)(ids())
    one, two = report_of(model).sites
    assert "a_shape" in one.pattern
    assert "vertical_slash" in one.pattern
    assert "block_sparse" in two.pattern
    assert "dense" in two.pattern
    numbers = [s.mean_density for s in sparse_compiler.stats(model)]
    assert len(numbers) == 2
    assert 0 < numbers[0] < 1
    [report] = sparse_compiler.stats(model)[1:]
    assert report.density[1:] == pytest.approx([1.0] * 3, abs=1e-6)


def test_a_pattern_in_a_table_without_numbers_has_its_own() -> None:
    texts = []
    for pattern in ("a_shape", {"*": "a_shape"}, [{"*": ("a_shape",)}] * 2):
        explanation = sparse_compiler.explain(
            build("llama"), (ids(),), options={"min_tokens": 0, "pattern": pattern}
        )
        texts.append([site.pattern for site in explanation.sites])
    assert texts == [texts[0]] * 3
    assert "-1" not in texts[0][0]


def test_a_layer_that_a_list_does_not_have_is_declined() -> None:
    model = build("llama")
    capture = Capture(pattern=[{"*": ("a_shape", 4, 16)}], fallback="silent")
    torch.compile(model, backend=capture)(ids())
    one, two = report_of(model).sites
    assert one.decision == "rewritten"
    assert (two.decision, two.code) == ("declined", "LAYER_MISSING")


def test_an_unknown_layer_gets_the_policy_and_a_note() -> None:
    table = {0: {"*": ("a_shape", 4, 16)}, 1: {"*": ("dense", 0, 0)}}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True)

    capture = check(function, *square(), rewritten=True, pattern=table)
    [site] = capture_sites(function, square(), capture)
    assert site.pattern.startswith("4 x vertical_slash")
    assert [note.code for note in site.notes] == ["LAYER_UNKNOWN"]


def test_a_budget_sets_the_density_that_stats_shows() -> None:
    model, x = block_and_input(512)
    densities = []
    for budget in (0.2, 0.6, 1.0):
        torch.compiler.reset()
        capture = Capture(budget=budget, pattern="a_shape", executor="reference")
        compiled = torch.compile(model, backend=capture)
        compiled(x)
        densities.append(sparse_compiler.stats(compiled)[-1].mean_density)
    assert densities == sorted(densities)
    assert densities[0] < 0.5
    assert densities[-1] == pytest.approx(1.0, abs=1e-6)
