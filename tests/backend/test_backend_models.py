"""Real and hand-written models: every attention is rewritten, and the results are equal."""

from __future__ import annotations

import pytest
import torch
from backend_calls import EXACT, LENGTH, Block, Capture
from backend_models import build, first, ids, plainly_compiled
from torch import nn

from sparse_compiler.explanation import report_of

# ---- real models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("llama", "causal"),
        ("mistral", "causal, window 20"),
        ("qwen3", "causal"),
        ("gemma2", "causal, window 20"),
        ("gpt2", "causal"),
        ("bert", "full"),
        ("vit", "full"),
    ],
)
def test_every_attention_of_a_model_is_rewritten_and_equal_at_budget_one(
    name: str, mask: str
) -> None:
    model = build(name)
    inputs = torch.randn(2, 3, 64, 64) if name == "vit" else ids()
    length = 65 if name == "vit" else LENGTH
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(inputs))
    assert (capture.rewritten, capture.dense) == (2, 0)
    assert capture.masks(length, length) == []
    expected = plainly_compiled(model, inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    sites = report_of(model).sites
    assert [site.decision for site in sites] == ["rewritten"] * 2
    assert sites[0].mask == mask
    assert all(site.layer for site in sites)
    pattern = "block_sparse" if name in ("bert", "vit") else "vertical_slash"
    assert all(pattern in site.pattern for site in sites)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_left_padded_batch_is_equal_on_its_real_tokens(name: str) -> None:
    model, tokens = build(name), ids()
    attention = torch.ones_like(tokens)
    attention[1, :37] = 0
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(tokens, attention_mask=attention))
    assert capture.rewritten == 2
    assert capture.masks(LENGTH, LENGTH) == []
    expected = first(model(tokens, attention_mask=attention))
    real = attention.bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)
    # What the padding says must not matter.
    tokens[1, :37] = 5
    other = first(torch.compile(model, backend=capture)(tokens, attention_mask=attention))
    torch.testing.assert_close(other[real], out[real], rtol=1e-4, atol=1e-4)


def test_a_padded_bidirectional_batch_is_equal_on_its_real_tokens() -> None:
    model, tokens = build("bert"), ids()
    attention = torch.ones_like(tokens)
    attention[0, 60:] = 0
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(tokens, attention_mask=attention))
    assert capture.rewritten == 2
    expected = first(model(tokens, attention_mask=attention))
    real = attention.bool()
    torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)


def test_one_dynamic_graph_serves_several_lengths() -> None:
    model, capture = build("llama"), Capture(**EXACT)
    compiled = torch.compile(model, backend=capture, dynamic=True)
    for length in (90, 64, 131, 40):
        out = first(compiled(ids(1, length)))
        torch.testing.assert_close(out, first(model(ids(1, length))), rtol=1e-4, atol=1e-4)
    assert len(capture.graphs) == 1
    assert capture.rewritten == 2


def test_a_dynamic_padded_graph_serves_several_batches_and_lengths() -> None:
    model, capture = build("mistral"), Capture(**EXACT)
    compiled = torch.compile(model, backend=capture, dynamic=True)
    for batch, length in ((2, 90), (3, 61)):
        tokens = ids(batch, length)
        attention = torch.ones_like(tokens)
        attention[1, : length // 3] = 0
        out = first(compiled(tokens, attention_mask=attention))
        expected = first(model(tokens, attention_mask=attention))
        real = attention.bool()
        torch.testing.assert_close(out[real], expected[real], rtol=1e-4, atol=1e-4)
    assert len(capture.graphs) == 1
    assert capture.rewritten == 2


def test_low_precision_models_keep_their_dtype_and_stay_close() -> None:
    model = build("llama").bfloat16()
    capture = Capture(**EXACT)
    out = first(torch.compile(model, backend=capture)(ids()))
    assert out.dtype == torch.bfloat16
    assert capture.rewritten == 2
    wide = first(build("llama").double()(ids()))
    own = (first(model(ids())).double() - wide).abs().max()
    assert (out.double() - wide).abs().max() <= 2 * own


def test_eager_attention_of_a_model_is_equal_whether_found_or_not() -> None:
    model = build("llama", attn_implementation="eager")
    capture = Capture(fallback="silent", **EXACT)
    out = first(torch.compile(model, backend=capture)(ids()))
    torch.testing.assert_close(out, first(model(ids())), rtol=1e-4, atol=1e-4)


# ---- hand-written models -----------------------------------------------------------------------


@pytest.mark.parametrize("grouping", ["enable_gqa", "repeat_interleave", "expand", "tiled"])
def test_grouped_heads_are_seen_through_and_equal(grouping: str) -> None:
    model, x = Block(grouping), torch.randn(2, LENGTH, 48)
    capture = Capture(**EXACT)
    out = torch.compile(model, backend=capture)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    assert capture.rewritten == 1
    [site] = report_of(model).sites
    heads = 4 if grouping == "tiled" else 2
    assert site.shapes["key"] == f"[2, {heads}, {LENGTH}, 16]"


def test_a_model_without_attention_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    capture = Capture()
    assert torch.equal(torch.compile(model, backend=capture)(x), model(x))
    assert report_of(model).sites == []
