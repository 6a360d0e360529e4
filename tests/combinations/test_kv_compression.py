"""Sparse prefill, a compressed cache, dense decode: the answers of the window stay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from kv_compression import compress, decode, kept_keys, observed, window_attention
from transformers import DynamicCache, StaticCache

import sparse_compiler
from sparse_compiler.demo.checkpoint import load_retriever
from sparse_compiler.demo.records import make_prompt

TOKENS = 4096
OPTIONS = {"inner": "eager", "min_tokens": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return load_retriever(torch.float32, source="transformers")


def prefilled(model: Any, call: Any, prompt: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    cache = DynamicCache(config=model.config)
    return cache, call(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def test_answers_survive_compression_after_sparse_prefill(model: Any) -> None:
    compiled: Any = torch.compile(model, backend="minference", options=OPTIONS)
    size = TOKENS - 5
    with torch.inference_mode():
        for seed in range(4):
            text = make_prompt(TOKENS, seed=seed, records=64).tokens[None]
            prompt, answer = text[:, :size], text[:, size : size + 4]
            whole, logits = prefilled(model, compiled, prompt)
            assert torch.equal(decode(model, whole, logits, size, 4), answer)
            cache, _ = prefilled(model, compiled, prompt)
            small, logits = compress(model, prompt, cache, capacity=512)
            assert small.get_seq_length() == 512
            assert torch.equal(decode(model, small, logits, size, 4), answer)
            assert small.get_seq_length() == 512 + 3
    layers = sparse_compiler.stats(compiled)
    assert len(layers) == 4
    assert max(layer.mean_density for layer in layers) < 0.5


def test_the_window_is_what_asks(model: Any) -> None:
    """A record that the window does not ask for is lost: what is kept follows the question."""
    text = make_prompt(TOKENS, seed=0, records=64).tokens[None]
    size = TOKENS - 5
    question = text[:, -16:-5].clone()
    with torch.inference_mode():
        prompt = text[:, : TOKENS - 64 - 64]  # neither questions nor, mostly, records
        answers = []
        for capacity in (256, TOKENS):
            cache, _ = prefilled(model, model, prompt)
            small, _ = compress(model, prompt, cache, capacity=capacity)
            first = prompt.shape[1]
            where = torch.arange(first, first + question.shape[1])[None]
            logits = model(input_ids=question, position_ids=where, past_key_values=small).logits[
                :, -1
            ]
            answers.append(decode(model, small, logits, first + question.shape[1], 4))
    answer = text[:, size : size + 4]
    assert not torch.equal(answers[0], answer)
    assert torch.equal(answers[1], answer)


def test_keeping_everything_changes_nothing(model: Any) -> None:
    text = make_prompt(1024, seed=1, records=16).tokens[None]
    with torch.inference_mode():
        whole, expected = prefilled(model, model, text)
        cache, _ = prefilled(model, model, text)
        small, logits = compress(model, text, cache, capacity=4096)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    layers: Any = zip(small.layers, whole.layers, strict=True)
    for mine, own in layers:
        torch.testing.assert_close(mine.keys, own.keys, atol=1e-4, rtol=1e-4)


def test_observation_is_the_attention_of_the_window(model: Any) -> None:
    """Against transformers' own attention weights, layer by layer; and it leaves no trace."""
    tokens = torch.randint(0, 256, (2, 48))
    before = model.config._attn_implementation
    with torch.inference_mode():
        with observed(model) as scores:
            model(input_ids=tokens)
        assert model.config._attn_implementation == before
        model.set_attn_implementation("eager")
        weights = model(input_ids=tokens, output_attentions=True).attentions
        model.set_attn_implementation(before)
    for layer, weight in enumerate(weights):
        expected = weight.unflatten(1, (2, -1)).sum((2, 3))
        torch.testing.assert_close(scores[layer], expected, atol=1e-4, rtol=1e-4)


def test_window_attention_is_causal_against_the_end() -> None:
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8)
    scores = window_attention(q, k, None)
    assert scores.shape == (1, 2, 10)
    torch.testing.assert_close(scores.sum(-1), torch.full((1, 2), 6.0))  # 3 rows, 2 heads each
    later = k.clone()
    later[:, :, -1] = 100.0  # seen by the last row only
    last = window_attention(q[:, :, :2], later[:, :, :9], None)
    torch.testing.assert_close(last, window_attention(q[:, :, :2], k[:, :, :9], None))


def test_kept_keys_are_the_best_with_their_neighbours_and_the_window() -> None:
    scores = torch.zeros(1, 1, 32)
    scores[..., 7] = 2.0
    scores[..., 20] = 1.0
    scores[..., 31] = 9.0  # in the window: kept anyway, and no neighbour's maximum
    kept = kept_keys(scores, capacity=10, window=4, pool=3)
    assert kept.tolist() == [[[6, 7, 8, 19, 20, 21, 28, 29, 30, 31]]]


@pytest.mark.parametrize("given", [{"capacity": 64}, {"capacity": 128, "pool": 4}])
def test_sizes_that_do_not_fit_are_refused(model: Any, given: dict[str, int]) -> None:
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    with torch.inference_mode():
        cache, _ = prefilled(model, model, tokens)
        with pytest.raises(ValueError, match="odd pool"):
            compress(model, tokens, cache, **given)


def test_other_caches_are_refused(model: Any) -> None:
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    static = StaticCache(config=model.config, max_cache_len=512)
    empty = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=static)
        with pytest.raises(ValueError, match="plain dynamic layers"):
            compress(model, tokens, static, capacity=128)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="holds 0 tokens"):
            compress(model, tokens, empty, capacity=128)
