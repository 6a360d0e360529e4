"""What stays dense, what is said about it and to whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_calls import (
    EXACT,
    LENGTH,
    Capture,
    Masked,
    block_and_input,
    capture_sites,
    check,
    masked_inputs,
    qkv,
    sdpa,
    square,
    warned,
)
from torch import Tensor

import sparse_compiler
from sparse_compiler.errors import SiteDeclined
from sparse_compiler.explanation import report_of
from sparse_compiler.testing import assert_close


def test_active_dropout_is_declined_and_random_numbers_are_the_same() -> None:
    model, x = block_and_input()
    model.dropout = 0.3
    capture = Capture(fallback="silent", **EXACT)
    compiled = torch.compile(model, backend=capture)
    torch.manual_seed(7)
    out = compiled(x)
    torch.manual_seed(7)
    assert torch.equal(out, model(x))
    assert capture.rewritten == 0
    assert report_of(model).sites[0].code == "DROPOUT"


@pytest.mark.parametrize(
    ("options", "length", "code"),
    [
        ({"pattern": "dense"}, LENGTH, "CONFIG_DENSE"),
        ({"min_tokens": 91}, LENGTH, "SHORT"),
        ({"min_tokens": "auto"}, LENGTH, "SHORT"),
        ({}, 1, "DECODE"),
    ],
)
@pytest.mark.parametrize("fallback", ["warn", "error"])
def test_expected_declines_are_dense_and_silent(
    options: dict[str, Any], length: int, code: str, fallback: str
) -> None:
    model, x = block_and_input(length)
    capture = Capture(**{"fallback": fallback} | options)
    compiled = torch.compile(model, backend=capture)
    assert warned(lambda: compiled(x)) == []
    assert_close(compiled(x), model(x), length=length)
    assert capture.rewritten == 0
    [site] = report_of(model).sites
    assert (site.decision, site.code) == ("declined", code)
    assert site.reason


def test_cross_attention_is_declined_silently() -> None:
    q, k, v = qkv(50, 77)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)

    capture = Capture(fallback="error")
    compiled = torch.compile(function, backend=capture, dynamic=True)
    assert warned(lambda: compiled(q, k, v)) == []
    assert_close(compiled(q, k, v), function(q, k, v), length=77)


def test_min_tokens_is_the_least_length_that_is_rewritten() -> None:
    model, x = block_and_input(64)
    for least, count in ((64, 1), (65, 0)):
        torch.compiler.reset()
        capture = Capture(min_tokens=least)
        torch.compile(model, backend=capture)(x)
        assert capture.rewritten == count


def test_fallback_warn_warns_once_per_code_and_model() -> None:
    first_model, second_model = Masked(), Masked()
    for model in (first_model, second_model):
        capture = Capture()
        compiled = torch.compile(model, backend=capture)
        texts = warned(lambda: (compiled(*masked_inputs()), compiled(*masked_inputs(64))))  # noqa: B023
        assert len(texts) == 1, texts
        assert "MASK_INPUT" in texts[0]
        torch.testing.assert_close(compiled(*masked_inputs()), model(*masked_inputs()))


def test_fallback_error_raises_with_the_reason() -> None:
    compiled = torch.compile(Masked(), backend=Capture(fallback="error"))
    with pytest.raises(Exception, match="MASK_INPUT") as caught:
        compiled(*masked_inputs())
    chain: list[BaseException | None] = [caught.value]
    while chain[-1] is not None:
        chain.append(getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__)
    assert any(isinstance(error, SiteDeclined) for error in chain)


def test_fallback_silent_says_nothing() -> None:
    model = Masked()
    compiled = torch.compile(model, backend=Capture(fallback="silent"))
    assert warned(lambda: compiled(*masked_inputs())) == []
    torch.testing.assert_close(compiled(*masked_inputs()), model(*masked_inputs()))


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("fallback", ["warn", "error"])
def test_gradients_keep_a_model_dense_with_one_warning(fallback: str) -> None:
    model, x = block_and_input()
    capture = Capture(fallback=fallback)
    compiled = torch.compile(model, backend=capture)
    texts = warned(lambda: (compiled(x), compiled(torch.randn(2, 64, 48))))
    assert len(texts) == 1, texts
    assert "GRAD_ENABLED" in texts[0]
    assert "inference_mode" in texts[0]
    assert capture.rewritten == 0
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected.sum().backward()
    for got, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_model_is_rewritten(mode: Any) -> None:
    model, x = block_and_input()
    capture = Capture(**EXACT)
    compiled = torch.compile(model, backend=capture)
    compiled(x)
    with mode():
        assert warned(lambda: compiled(x)) == []
        assert_close(compiled(x), model(x), length=LENGTH)
    assert capture.rewritten == 1


@pytest.mark.usefixtures("gradients")
def test_a_frozen_model_needs_no_gradient_mode() -> None:
    model, x = block_and_input()
    model.requires_grad_(False)
    capture = Capture(**EXACT)
    out = torch.compile(model, backend=capture)(x)
    assert capture.rewritten == 1
    assert_close(out, model(x), length=LENGTH)


def test_without_a_cxx_compiler_the_graph_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_compiler.backend.has_cxx_compiler", lambda: False)
    model, x = block_and_input()
    capture = Capture(inner="inductor", **EXACT)
    compiled = torch.compile(model, backend=capture)
    texts = warned(lambda: compiled(x))
    assert any("NO_CXX" in text for text in texts), texts
    assert_close(compiled(x), model(x), length=LENGTH)


def test_every_failed_condition_is_in_the_report() -> None:
    q, k, v, mask = masked_inputs()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, dropout_p=0.1)

    [site] = sparse_compiler.explain(function, (q, k, v, mask), options={"min_tokens": 5000}).sites
    codes = [condition.code for condition in site.conditions]
    assert set(codes) >= {"DROPOUT", "MASK_INPUT", "SHORT"}
    assert site.code == codes[0]
    assert all(condition.reason for condition in site.conditions)


def test_a_declined_site_with_a_proved_mask_loses_the_mask() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.arange(LENGTH)[None] <= torch.arange(LENGTH)[:, None]
        return sdpa(q, k, v, attn_mask=mask)

    capture = check(function, *square(), rewritten=False, min_tokens=5000)
    assert capture.dense == 1
    assert capture.masks(LENGTH, LENGTH) == []
    [site] = capture_sites(function, square(), capture)
    assert site.mask_removed


def test_dryrun_reports_and_changes_nothing() -> None:
    model, x = block_and_input()
    capture = Capture(dryrun=True)
    out = torch.compile(model, backend=capture)(x)
    assert (capture.rewritten, capture.dense) == (0, 1)
    torch.testing.assert_close(out, model(x), rtol=0, atol=0)
    explanation = report_of(model)
    assert explanation.reports[0].dryrun
    assert [site.decision for site in explanation.sites] == ["rewritten"]


@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse"])
def test_every_pattern_serves_a_mask_that_looks_ahead(pattern: str) -> None:
    check(lambda q, k, v: sdpa(q, k, v), *square(), rewritten=True, pattern=pattern)
