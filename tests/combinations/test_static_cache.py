"""Sparse prefill into a static cache, dense decode from it: as with a dynamic one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from static_cache import generate
from transformers import DynamicCache, StaticCache

import sparse_compiler
from sparse_compiler import models
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt

TOKENS, STEPS = 2048, 4


@pytest.mark.parametrize("budget", [1.0, None])
def test_static_and_dynamic_caches_agree(budget: float | None) -> None:
    model: Any = load_retriever(torch.float32, source="transformers")
    text = make_prompt(TOKENS, records=32).tokens[None]
    prompt, answer = text[:, :-5], text[:, -5:-1]
    with torch.inference_mode():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        expected, dense = generate(model, prompt, caches[0], STEPS)
        sparse_compiler.compile(model, inner="eager", min_tokens=0, budget=budget)
        tokens, rows = generate(model, prompt, caches[1], STEPS)
        static = StaticCache(config=model.config, max_cache_len=TOKENS + 256)
        again, others = generate(model, prompt, static, STEPS)
    assert torch.equal(expected, answer)
    assert torch.equal(tokens, answer)
    assert torch.equal(again, answer)
    torch.testing.assert_close(others, rows, atol=2e-3, rtol=2e-3)
    if budget == 1.0:
        torch.testing.assert_close(others, dense, atol=2e-3, rtol=2e-3)
    sites = [site for graph in models.graphs_of(model) for site in graph.report.sites]
    assert len(sites) == 8  # a graph for each kind of cache, none for decode
    assert {site.decision for site in sites} == {"rewritten"}
    for one, other in zip(*by_cache(model), strict=True):
        assert (one.num_q, other.num_k) == (TOKENS - 5, TOKENS + 256)
        assert one.density == pytest.approx(other.density, abs=0.02)


def by_cache(model: Any) -> tuple[list[Any], list[Any]]:
    """The layers' statistics with a dynamic and with a static cache."""
    found = sparse_compiler.stats(model)
    longest = max(layer.num_k for layer in found)
    return (
        [layer for layer in found if layer.num_k < longest],
        [layer for layer in found if layer.num_k == longest],
    )


def test_generate_agrees_over_both_caches() -> None:
    """transformers' own loop: prefill sparse, decode dense, whichever cache it makes."""
    model: Any = load_retriever(torch.float32, source="transformers")
    text = make_prompt(2048, records=32, seed=1).tokens[None]
    prompt, answer = text[:, :-5], text[:, -5:-1]
    sparse_compiler.compile(model, inner="eager", min_tokens=0)
    for kind in ("dynamic", "static"):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=STEPS,
            do_sample=False,
            cache_implementation=kind,
            pad_token_id=0,
        )
        assert torch.equal(out[:, prompt.shape[1] :], answer), kind
    assert sparse_compiler.stats(model)
