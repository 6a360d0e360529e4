"""``flex_attention``: score_mod and mask_mod are read, or the call stays with a reason."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparse_compiler.backend import build_context, parse_options
from sparse_compiler.ir.report import SiteReport
from sparse_compiler.passes.manager import run_pipeline

BATCH, HEADS, LENGTH, SIZE = 2, 4, 43, 16
FLEX = torch.ops.higher_order.flex_attention
INF = float("inf")


def qkv(heads: int = HEADS, keys: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, LENGTH, SIZE, generator=g)
    k, v = (torch.randn(BATCH, heads, keys, SIZE, generator=g) for _ in "kv")
    return q, k, v


def compiled(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, list[SiteReport], list[fx.GraphModule]]:
    chosen = {"budget": 1.0, "min_tokens": 0, "inner": "eager", "fallback": "silent"} | options
    config = parse_options(chosen)
    sites: list[SiteReport] = []
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        ctx = build_context(gm, config)
        run_pipeline(gm, ctx)
        sites.extend(ctx.report.sites)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend, dynamic=dynamic)(*args), sites, graphs


def expected(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def check(
    score_mod: Any, mask: str, *buffers: Tensor, dynamic: bool | None = None, heads: int = HEADS
) -> None:
    """The site is rewritten, its mask is proved to be ``mask``, and the result is the same."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        def mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score_mod(score, b, h, i, j, *given)

        return flex_attention(q, k, v, score_mod=mod, enable_gqa=True)

    args = (*qkv(heads), *buffers)
    out, sites, graphs = compiled(attend, *args, dynamic=dynamic)
    assert [(s.decision, s.code, s.reason) for s in sites] == [("rewritten", "", "")]
    assert mask in sites[0].mask, sites[0].mask
    assert sites[0].spelling == "flex_attention"
    assert not any(n.target is FLEX for gm in graphs for n in gm.graph.nodes)
    torch.testing.assert_close(out, expected(attend, *args), rtol=1e-5, atol=1e-5)


def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -INF)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("heads", [HEADS, 2, 1])
def test_causal(dynamic: bool | None, heads: int) -> None:
    check(causal, "causal", dynamic=dynamic, heads=heads)


def test_identity_and_scale() -> None:
    check(lambda s, b, h, i, j: s, "full")
    check(lambda s, b, h, i, j: 3 * s / 2 + 1, "full")


def test_window_spelled_with_a_condition_that_hides() -> None:
    check(lambda s, b, h, i, j: torch.where((j > i) | (i - j >= 8), -INF, s), "8")


@pytest.mark.parametrize("dynamic", [None, True])
def test_softcap_alibi_and_causal(dynamic: bool | None) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, slopes: Tensor) -> Tensor:
        s = 2.0 * torch.tanh(s / 2.0)
        return torch.where(i >= j, s + slopes[h] * (j - i), -INF)

    check(mod, "causal", slopes, dynamic=dynamic)


def test_bias_by_key_and_captured_padding() -> None:
    bias = torch.randn(BATCH, LENGTH, generator=torch.Generator().manual_seed(1))
    seen = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    seen[0, :5] = False

    def mod(
        s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, bias: Tensor, seen: Tensor
    ) -> Tensor:
        return torch.where(seen[b, j], s + bias[b, j], -INF)

    check(mod, "padding", bias, seen)


def test_a_constant_before_a_tanh_does_not_cancel() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s + 1.0))

    declined(attend, "tanh")


def declined(attend: Callable[..., Any], reason: str, *buffers: Tensor, code: str = "FLEX") -> None:
    args = (*qkv(), *buffers)
    out, sites, graphs = compiled(attend, *args)
    assert [(s.decision, s.code) for s in sites] == [("declined", code)], sites
    assert reason in sites[0].reason
    nodes = [n for gm in graphs for n in gm.graph.nodes]
    assert sum(n.target is FLEX for n in nodes) == 1
    assert not any(n.target is torch.arange and n.args == (LENGTH,) for n in nodes)
    torch.testing.assert_close(out, expected(attend, *args), rtol=1e-5, atol=1e-5)


def test_documents_that_are_not_known_to_be_packed_stay_with_flex() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(doc[b, i] == doc[b, j], s, -INF)

        return flex_attention(q, k, v, score_mod=mod)

    doc = torch.arange(LENGTH).expand(BATCH, -1) // 10
    declined(attend, "data", doc.contiguous(), code="MASK_UNKNOWN")


def test_packed_documents_whose_ids_are_counted_in_the_graph() -> None:
    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, doc: Tensor) -> Tensor:
        return torch.where((doc[b, i] == doc[b, j]) & (i >= j), s, -INF)

    def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        doc = torch.cumsum(starts, -1)
        return flex_attention(q, k, v, score_mod=lambda *a: mod(*a, doc))  # type: ignore[call-arg]

    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[:, ::9] = True
    args = (*qkv(), starts)
    out, sites, _ = compiled(attend, *args)
    assert [s.decision for s in sites] == ["rewritten"], sites
    torch.testing.assert_close(out, expected(attend, *args), rtol=1e-5, atol=1e-5)


def test_a_nonlinear_function_of_the_score() -> None:
    declined(
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * s), "score"
    )


def test_a_factor_that_varies_by_pair() -> None:
    declined(
        lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * (j + 1)),
        "no positive number",
    )


def test_hidden_pairs_that_need_not_vanish() -> None:
    declined(
        lambda q, k, v: flex_attention(
            q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -5.0)
        ),
        "does not hide",
    )


def test_a_buffer_row_that_is_indexed_twice_is_not_mistaken() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + table[b][j]

        return flex_attention(q, k, v, score_mod=mod)

    declined(attend, "no scalar", torch.randn(BATCH, LENGTH))


def test_block_lists_made_outside() -> None:
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, device="cpu")
    declined(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), "block lists")


def test_block_lists_made_inside() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, "cpu")
        return flex_attention(q, k, v, block_mask=blocks)

    args = qkv()
    out, sites, _ = compiled(attend, *args)
    assert [(s.decision, s.code) for s in sites] == [("declined", "FLEX")]
    torch.testing.assert_close(out, expected(attend, *args), rtol=1e-5, atol=1e-5)


def test_a_result_beside_the_attention_that_is_read() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, score_mod=causal, return_lse=True)

    args = qkv()
    out, sites, _ = compiled(attend, *args)
    assert [(s.decision, s.code) for s in sites] == [("declined", "FLEX")]
    assert "log-sum-exp" in sites[0].reason
    for mine, other in zip(out, expected(attend, *args), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_short_sites_stay_with_flex_for_the_usual_reason() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=causal)

    _, sites, graphs = compiled(attend, *qkv(), min_tokens=4096)
    assert [s.code for s in sites] == ["SHORT"]
    targets = [n.target for gm in graphs for n in gm.graph.nodes]
    assert targets.count(FLEX) == 1
    assert operator.ge not in targets
