"""Weights of 8 bits under the backend; skipped where torchao is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("torchao", reason="torchao is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from quantized_weights import quantized

import sparse_compiler
from sparse_compiler import models
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt, score_answers


@pytest.mark.parametrize("budget", [1.0, None])
def test_quantised_model_compiles_and_answers(budget: float | None) -> None:
    model = quantized(load_retriever(torch.float32, source="transformers"))
    projection: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(projection.weight).__module__.startswith("torchao")
    options = {"inner": "eager", "min_tokens": 0, "budget": budget}
    compiled: Any = torch.compile(model, backend="minference", options=options)
    prompt = make_prompt(4096, records=64)
    with torch.inference_mode():
        dense = model(input_ids=prompt.tokens[None]).logits
        logits = compiled(input_ids=prompt.tokens[None]).logits
    assert score_answers(dense, prompt).all()
    assert score_answers(logits, prompt).all()
    if budget == 1.0:
        torch.testing.assert_close(logits, dense, atol=2e-3, rtol=2e-3)
    sites = [site for graph in models.graphs_of(compiled) for site in graph.report.sites]
    assert [site.decision for site in sites] == ["rewritten"] * 4
    assert len(sparse_compiler.stats(compiled)) == 4
