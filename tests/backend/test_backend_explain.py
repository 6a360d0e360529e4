"""What ``explain`` and ``stats`` say about compiled models."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from backend_calls import (
    EXACT,
    LENGTH,
    Block,
    Capture,
    Masked,
    block_and_input,
    masked_inputs,
    warned,
)
from backend_models import build, ids

import sparse_compiler
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.explanation import report_of


def test_explain_shows_sites_graphs_and_passes() -> None:
    model = build("llama")
    explanation = sparse_compiler.explain(model, (ids(),), options={"min_tokens": 0})
    assert explanation.rewritten == 2
    assert [s.layer for s in explanation.sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    for site in explanation.sites:
        assert site.shapes["query"] == f"[2, 4, {LENGTH}, 16]"
        assert site.shapes["key"] == f"[2, 2, {LENGTH}, 16]"
        assert site.mask == "causal"
        assert ".py:" in site.source
    [graphs] = explanation.graphs
    names = [report.name for report in explanation.reports[0].passes]
    assert list(graphs) == names
    assert names[-2:] == ["rewrite_sparse", "forget_flex"]
    assert "sparse_compiler.attend" in graphs["rewrite_sparse"]
    assert "scaled_dot_product_attention" not in graphs["rewrite_sparse"]
    assert "scaled_dot_product_attention" in graphs["find_attention"]
    assert isinstance(explanation.kernels, list)
    data = json.loads(explanation.to_json())
    assert [site["decision"] for site in data[0]["sites"]] == ["rewritten"] * 2
    assert json.loads(explanation.to_json(indent=None)) == data
    text = str(explanation)
    assert "model.layers.0.self_attn" in text
    assert "rewritten" in text


def test_explain_leaves_warnings_and_errors_to_the_report() -> None:
    result: list[Any] = []
    texts = warned(
        lambda: result.extend(
            sparse_compiler.explain(
                Masked(), masked_inputs(), options={"min_tokens": 0, "fallback": fallback}
            )
            for fallback in ("warn", "error")
        )
    )
    assert texts == []
    for explanation in result:
        assert [site.code for site in explanation.sites] == ["MASK_INPUT"] * 2
        assert "MASK_INPUT" in str(explanation)


def test_explain_does_not_disturb_what_is_compiled() -> None:
    model, x = block_and_input()
    capture = Capture(**EXACT)
    compiled = torch.compile(model, backend=capture)
    before = compiled(x)
    explanation = sparse_compiler.explain(compiled, (x,), options={"min_tokens": 0})
    assert explanation.rewritten == 1
    assert torch.equal(compiled(x), before)
    assert len(capture.graphs) == 1


def test_explain_refuses_wrong_options() -> None:
    model, x = block_and_input()
    with pytest.raises(OptionInvalid, match="budgte"):
        sparse_compiler.explain(model, (x,), options={"budgte": 1.0})


def test_stats_are_of_the_newest_call_of_each_site() -> None:
    model, x = block_and_input(256)
    compiled = torch.compile(
        model, backend=Capture(pattern={"*": {"*": ("a_shape", 16, 32)}}), dynamic=True
    )
    assert sparse_compiler.stats(model) == []
    for length in (256, 128):
        # Contiguous: Dynamo compiles again for other strides.
        compiled(x[:, :length].contiguous())
        [stats] = sparse_compiler.stats(model)
        assert (stats.num_q, stats.num_k) == (length, length)
        assert len(stats.density) == 4
        assert all(0 < share <= 1 for share in stats.density)
        assert stats.mean_density == pytest.approx(sum(stats.density) / 4)
        assert stats.index_ms >= 0
    assert sparse_compiler.stats(compiled) == sparse_compiler.stats(model)


def test_two_models_do_not_mix_their_reports_and_statistics() -> None:
    models = [Block("enable_gqa"), Block("enable_gqa")]
    x = torch.randn(1, LENGTH, 48)
    for model in models:
        torch.compile(model, backend=Capture())(x)
    for model in models:
        assert len(report_of(model).sites) == 1
        assert len(sparse_compiler.stats(model)) == 1
    assert report_of(Block("enable_gqa")).reports == ()


def test_the_passes_take_a_small_share_of_compiling() -> None:
    model = build("llama")
    start = time.perf_counter()
    explanation = sparse_compiler.explain(model, (ids(),), options={"min_tokens": 0})
    whole = time.perf_counter() - start
    spent = sum(stage.seconds for stage in explanation.reports[0].passes)
    # An eager inner compiler costs a tenth of Inductor: 5 % of that is 50 % of this.
    assert spent < 0.5 * whole
