"""Matchers registered by the decorator, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plugin_models import OPTIONS, Attention, assert_close, example, failure, sites
from torch import Tensor, fx, nn

from sparse_compiler import plugins
from sparse_compiler.explanation import report_of
from sparse_compiler.passes import matchers


@plugins.matcher
def _never(node: fx.Node, tensors: Any) -> None:
    """Registered when this file is imported, and gone from the tables that tests use."""


matchers._added.pop(_never)


def is_sdpa(node: fx.Node) -> bool:
    return node.target is F.scaled_dot_product_attention


def test_a_decorated_matcher_is_asked_before_the_built_in_ones() -> None:
    @plugins.matcher
    def capped(node: fx.Node, tensors: Any) -> plugins.AttentionForm | None:
        if not is_sdpa(node):
            return None
        form = matchers.match_sdpa(node, tensors)
        assert form is not None
        return replace(form, spelling="mine")

    assert plugins.matcher(capped) is capped
    (site,) = sites(Attention())
    assert (site.spelling, site.decision) == ("mine", "rewritten")


def test_the_example_matcher_serves_every_length_of_a_dynamic_graph() -> None:
    library = example("matcher", "mylib_attention")
    plugins.matcher(library.read_attention)

    class Library(nn.Module):
        """A layer of the library."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, q: Tensor, kv: Tensor) -> Tensor:
            return library.attention(self.linear(q), kv, kv, causal=True)

    model = Library()
    run = torch.compile(
        model, backend="minference", dynamic=True, options=OPTIONS | {"budget": 1.0}
    )
    for length in (50, 70):
        inputs = torch.randn(2, length, 4, 16), torch.randn(2, length, 2, 16)
        assert_close(run(*inputs), model(*inputs))
    (site,) = report_of(model).sites
    assert (site.spelling, site.decision) == ("mylib::attention", "rewritten")


def test_a_matcher_that_does_not_understand_leaves_the_node_to_others() -> None:
    @plugins.matcher
    def puzzled(node: fx.Node, tensors: Any) -> plugins.AttentionForm | None:
        raise plugins.NotUnderstood("no idea")

    (site,) = sites(Attention())
    assert (site.spelling, site.decision) == ("sdpa", "rewritten")


def test_a_matcher_may_say_why_an_attention_cannot_be_read() -> None:
    @plugins.matcher
    def declines(node: fx.Node, tensors: Any) -> plugins.AttentionForm | None:
        if not is_sdpa(node):
            return None
        return plugins.unread_form(node, node, tensors, (plugins.Code.OPAQUE, "my own reason"))

    (site,) = sites(Attention())
    assert (site.code, site.reason) == ("OPAQUE", "my own reason")


def wrong_forms() -> dict[str, tuple[Callable[[Any, fx.Node], Any], str]]:
    def more(form: Any, node: fx.Node) -> Any:
        return replace(form, query=replace(form.query, index=(*form.query.index, 0)))

    def keys_in_query(form: Any, node: fx.Node) -> Any:
        index = (*form.query.index[:2], form.axes.key, form.query.index[3])
        return replace(form, query=replace(form.query, index=index))

    def float_mask(form: Any, node: fx.Node) -> Any:
        return replace(form, terms=(plugins.MaskTerm("keep", form.query),))

    return {
        "text": (lambda form, node: "an attention", "AttentionForm or None"),
        "rank": (more, "one expression for each dimension"),
        "axes": (keys_in_query, "over the axes bhqd only"),
        "dtype": (float_mask, "a bool tensor"),
        "code": (lambda form, node: replace(form, obstacle=("NO_SUCH", "x")), "one of Code"),
        "term": (lambda form, node: replace(form, terms=("mask",)), "free of errors"),
        "raises": (lambda form, node: 1 / 0, "ZeroDivisionError"),
    }


@pytest.mark.parametrize("name", wrong_forms())
def test_a_wrong_form_is_an_error_that_names_the_matcher(name: str) -> None:
    change, text = wrong_forms()[name]

    @plugins.matcher
    def clumsy(node: fx.Node, tensors: Any) -> Any:
        return change(matchers.match_sdpa(node, tensors), node) if is_sdpa(node) else None

    error = failure(Attention())
    assert text in str(error)
    assert "clumsy" in str(error) and f"module {__name__}" in str(error)
