"""A prompt in chunks: equal to one call at budget=1.0, answers kept below, graphs bounded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from chunked_prefill import chunks, prefill
from transformers import DynamicCache, StaticCache

import sparse_compiler
from sparse_compiler import models
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt, score_answers

TOKENS, CHUNK = 4096, 1024
GRAPHS = {"dynamic": 3, "static": 2}


def make_cache(kind: str, model: Any, room: int = TOKENS + 64) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=room)


def compiled_retriever(**options: Any) -> tuple[Any, Any]:
    model: Any = load_retriever(torch.float32, source="transformers")
    options = {"inner": "eager", "min_tokens": 0, **options}
    return model, torch.compile(model, backend="minference", options=options)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.filterwarnings("ignore:minference keeps attention")
def test_chunks_equal_one_call_at_full_budget(kind: str) -> None:
    model, compiled = compiled_retriever(budget=1.0)
    with torch.inference_mode():
        prompts = [make_prompt(2048, seed=seed, records=32) for seed in range(2)]
        expected = model(input_ids=prompts[0].tokens[None]).logits
        cache = make_cache(kind, model)
        logits = prefill(compiled, prompts[0].tokens[None], cache, 512)
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=2e-3)
        assert len(models.graphs_of(compiled)) == GRAPHS[kind]
        # Another prompt finds everything compiled.
        again = prefill(compiled, prompts[1].tokens[None], make_cache(kind, model), 512)
    assert score_answers(again, prompts[1]).all()
    assert len(models.graphs_of(compiled)) == GRAPHS[kind]
    assert {layer.mean_density for layer in sparse_compiler.stats(compiled)} == {1.0}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.filterwarnings("ignore:minference keeps attention")
def test_sparse_chunks_keep_the_answers(kind: str) -> None:
    model, compiled = compiled_retriever()
    with torch.inference_mode():
        for seed in range(2):
            prompt = make_prompt(TOKENS, seed=seed, records=64)
            logits = prefill(compiled, prompt.tokens[None], make_cache(kind, model), CHUNK)
            assert score_answers(logits, prompt).all()
    newest = {layer.layer: layer for layer in sparse_compiler.stats(compiled)}.values()
    assert len(newest) == 4
    assert max(layer.mean_density for layer in newest) < 0.5


@pytest.mark.parametrize(
    "kind",
    [
        "dynamic",
        "static",
    ],
)
@pytest.mark.filterwarnings("ignore:minference keeps attention")
def test_every_layer_of_every_chunk_is_rewritten(kind: str) -> None:
    model, compiled = compiled_retriever()
    tokens = torch.randint(0, 256, (1, 1024))
    with torch.inference_mode():
        prefill(compiled, tokens, make_cache(kind, model, 1088), 256)
    graphs = models.graphs_of(compiled)
    assert len(graphs) == GRAPHS[kind]
    sites = [site for graph in graphs for site in graph.report.sites]
    assert [site.code for site in sites if site.decision != "rewritten"] == []


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.filterwarnings("ignore:minference keeps attention")
def test_graphs_stay_bounded_over_many_lengths(kind: str) -> None:
    """Prompts of many lengths, each with another remainder, in many chunks."""
    model, compiled = compiled_retriever(budget=1.0)
    counts = []
    with torch.inference_mode():
        for tokens in (1024, 1100, 1333, 700, 900):
            ids = torch.randint(0, 256, (1, tokens))
            logits = prefill(compiled, ids, make_cache(kind, model, 1600), 256)
            torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=2e-3, rtol=2e-3)
            counts.append(len(models.graphs_of(compiled)))
    assert counts[-1] == counts[2]
    assert counts[-1] <= GRAPHS[kind] + 2


def test_remainder_comes_first() -> None:
    assert list(chunks(10, 4)) == [(0, 2), (2, 6), (6, 10)]
    assert list(chunks(8, 4)) == [(0, 4), (4, 8)]
    assert list(chunks(3, 4)) == [(0, 3)]
    with pytest.raises(ValueError, match="at least one token"):
        list(chunks(3, 0))
