"""Generation, key-value caches, and tensors that are written to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_calls import EXACT, LENGTH, Capture, block_and_input, check, sdpa, square
from backend_models import build, ids
from torch import Tensor, nn

import sparse_compiler
from sparse_compiler.errors import OptionInvalid
from sparse_compiler.explanation import report_of
from sparse_compiler.testing import assert_close

transformers = pytest.importorskip("transformers")


def generated(model: nn.Module, prompt: Tensor, **kwargs: Any) -> Tensor:
    return model.generate(prompt, max_new_tokens=5, do_sample=False, **kwargs)


def test_compiled_generate_equals_dense_and_can_be_undone() -> None:
    model, prompt = build("llama"), ids()
    expected = generated(model, prompt)
    original = model.forward
    same = sparse_compiler.compile(model, min_tokens=0, inner="eager", budget=1.0)
    assert same is model
    assert torch.equal(generated(model, prompt), expected)
    assert report_of(model).rewritten == 2
    # Decode never reaches the compiler: one graph, the prefill's.
    assert len(report_of(model).reports) == 1
    with pytest.raises(OptionInvalid, match="already"):
        sparse_compiler.compile(model)
    sparse_compiler.restore(model)
    assert model.forward == original
    assert "forward" not in model.__dict__
    assert torch.equal(generated(model, prompt), expected)
    assert sparse_compiler.restore(model) is model


def test_compiled_generate_of_a_left_padded_batch_equals_dense() -> None:
    model, prompt = build("mistral"), ids()
    attention = torch.ones_like(prompt)
    attention[0, :30] = 0
    expected = generated(model, prompt, attention_mask=attention)
    sparse_compiler.compile(model, min_tokens=0, inner="eager", budget=1.0)
    assert torch.equal(generated(model, prompt, attention_mask=attention), expected)
    assert report_of(model).rewritten >= 2
    sparse_compiler.restore(model)


def test_restore_gives_back_a_forward_of_the_instance() -> None:
    model, x = block_and_input()
    calls = []

    def own(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return 2 * x

    model.forward = own
    sparse_compiler.compile(model, inner="eager")
    sparse_compiler.restore(model)
    assert model.forward is own


def test_compile_refuses_wrong_options_before_it_changes_the_model() -> None:
    model, _ = block_and_input()
    with pytest.raises(OptionInvalid, match="budgte"):
        sparse_compiler.compile(model, budgte=1.0)
    assert "forward" not in model.__dict__


def test_a_dynamic_cache_is_filled_as_without_the_backend() -> None:
    model, tokens = build("llama"), ids()
    caches = []
    outs = []
    for backend in ("eager", Capture(**EXACT)):
        torch.compiler.reset()
        cache = transformers.DynamicCache(config=model.config)
        compiled = torch.compile(model, backend=backend)
        outs.append(compiled(tokens, past_key_values=cache, use_cache=True).logits)
        # A second chunk: fewer rows than keys.
        outs.append(compiled(ids(seed=2), past_key_values=cache, use_cache=True).logits)
        caches.append(cache)
    assert backend.rewritten == 4
    for got, want in zip(outs[2:], outs[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(caches[1].layers, caches[0].layers, strict=True):
        assert got.keys.shape[2] == 2 * LENGTH
        torch.testing.assert_close(got.keys, want.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)


def test_a_static_cache_is_filled_as_without_the_backend() -> None:
    model = build("llama")
    caches, outs = [], []
    for backend in ("eager", Capture(fallback="silent", **EXACT)):
        torch.compiler.reset()
        cache = transformers.StaticCache(config=model.config, max_cache_len=2 * LENGTH + 10)
        compiled = torch.compile(model, backend=backend)
        for chunk in range(2):
            position = torch.arange(LENGTH) + chunk * LENGTH
            out = compiled(
                ids(seed=chunk),
                past_key_values=cache,
                position_ids=position[None],
                use_cache=True,
            )
            outs.append(out.logits)
        caches.append(cache)
    for got, want in zip(outs[2:], outs[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for got, want in zip(caches[1].layers, caches[0].layers, strict=True):
        assert want.keys.abs().sum() > 0
        torch.testing.assert_close(got.keys, want.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4)


def test_writes_into_an_input_happen_though_attention_is_rewritten() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, store: Tensor, counter: Tensor) -> Tensor:
        store.index_copy_(2, torch.arange(LENGTH), k)
        counter.add_(1)
        return sdpa(q, store[:, :, :LENGTH], v, is_causal=True)

    q, k, v = square()
    stores = [torch.zeros(2, 4, 120, 16) for _ in range(2)]
    counters = [torch.zeros(()) for _ in range(2)]
    expected = function(q, k, v, stores[0], counters[0])
    capture = Capture(**EXACT)
    out = torch.compile(function, backend=capture)(q, k, v, stores[1], counters[1])
    assert capture.rewritten == 1
    assert_close(out, expected, length=LENGTH)
    assert torch.equal(stores[0], stores[1])
    assert counters[1] == 1


def test_q_changed_in_place_after_attention_does_not_change_its_result() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.clone()
        out = sdpa(q, k, v, is_causal=True)
        q.mul_(0)
        k = k + 1
        return out + q + k.sum() * 0

    check(function, *square(), rewritten=True)
