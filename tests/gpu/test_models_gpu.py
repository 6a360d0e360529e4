"""Whole models on a GPU: every kind of mask, bias and spelling through the rewritten graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_compiler

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EXACT: dict[str, Any] = {"budget": 1.0, "min_tokens": 0, "inner": "eager"}
LENGTH = 300


def compare(function: Any, *args: Any, **kwargs: Any) -> list[str]:
    """Runs dense and rewritten, compares, and returns the masks of the rewritten sites."""
    torch._dynamo.reset()
    with torch.no_grad():
        expected = function(*args, **kwargs)
        compiled = torch.compile(function, backend="minference", options=EXACT)
        actual = compiled(*args, **kwargs)
        found = sparse_compiler.explain(function, args, kwargs, options=EXACT)
    if hasattr(expected, "logits"):
        expected, actual = expected.logits, actual.logits
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3 * size)
    assert all(site.decision == "rewritten" for site in found.sites), found
    return [site.mask for site in found.sites]


@pytest.mark.parametrize(
    ("name", "attention", "says"),
    [
        ("llama", "eager", "causal"),
        ("gemma2", "sdpa", "window"),
        ("bloom", "eager", "bias"),
        ("gpt_oss", "eager", "window"),
        ("llama4_text", "sdpa", "causal"),
    ],
)
def test_a_model_on_the_gpu_equals_its_dense_self(name: str, attention: Any, says: str) -> None:
    zoo = pytest.importorskip("zoo")
    model = zoo.build(name, attention).cuda()
    ids = torch.randint(3, 100, (2, LENGTH), device="cuda")
    padding = torch.ones_like(ids)
    masks = compare(model, input_ids=ids, attention_mask=padding, use_cache=False)
    assert any(says in mask for mask in masks), masks


def heads(seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator("cuda").manual_seed(seed)
    return tuple(torch.randn(2, 4, LENGTH, 32, device="cuda", generator=draw) for _ in "qkv")


def test_packed_documents_on_the_gpu() -> None:
    def function(q: Any, k: Any, v: Any, starts: Any) -> Any:
        ids = starts.cumsum(-1)
        rows = torch.arange(LENGTH, device=q.device)
        seen = (rows[None] <= rows[:, None]) & (ids[:, None, :, None] == ids[:, None, None, :])
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    starts = torch.zeros(2, LENGTH, dtype=torch.bool, device="cuda")
    starts[:, [0, 70, 71, 200]] = True
    assert compare(function, *heads(0), starts) == ["causal, rows bounded"]


def test_a_table_by_distance_on_the_gpu() -> None:
    table = torch.randn(40, 4, device="cuda")

    def function(q: Any, k: Any, v: Any, table: Any) -> Any:
        rows = torch.arange(LENGTH, device=q.device)
        bucket = (rows[None] - rows[:, None]).clamp(-20, 19) + 20
        bias = torch.nn.functional.embedding(bucket, table).permute(2, 0, 1)[None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    assert compare(function, *heads(1), table) == ["full, bias"]
