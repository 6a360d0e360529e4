"""Mask rules registered by the decorator, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from plugin_models import X, assert_close, compiled, failure, sites
from torch import Tensor, fx, nn

from sparse_compiler import plugins
from sparse_compiler.errors import PluginFailed
from sparse_compiler.passes import mask_rules


@torch.library.custom_op("sparse_compiler_tests::band_mask", mutates_args=())
def band_mask(length: int, left: int) -> Tensor:
    place = torch.arange(length)
    back = place[:, None] - place
    return (back >= 0) & (back <= left)


@band_mask.register_fake
def _(length: int, left: int) -> Tensor:
    return torch.empty(length, length, dtype=torch.bool)


@torch.library.custom_op("sparse_compiler_tests::fill", mutates_args=("x",))
def fill(x: Tensor) -> None:
    x.fill_(True)


@torch.compiler.allow_in_graph
def wide_band(x: Tensor) -> Tensor:
    """Not an operator: a function that stands in graphs as it is; its tensor is only read."""
    place = torch.arange(x.shape[2], device=x.device)
    return place[:, None] - place <= 20


def windowed(reader: Any, node: fx.Node, index: Any) -> Any:
    left = plugins.argument(node, 1, "left")
    query, key = index
    return plugins.conj(
        plugins.compare("le", key, query), plugins.compare("le", query - key, sympy.Integer(left))
    )


class WithBand(nn.Module):
    """A mask made by the custom operator."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ops.sparse_compiler_tests.band_mask(x.shape[2], 9)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


class WithFunction(nn.Module):
    """A mask made by the function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=wide_band(x))


@pytest.mark.parametrize(
    "target",
    [
        band_mask,
        torch.ops.sparse_compiler_tests.band_mask,
        torch.ops.sparse_compiler_tests.band_mask.default,
    ],
    ids=["custom_op", "packet", "overload"],
)
def test_a_decorated_rule_reads_an_operator_however_it_is_named(target: Any) -> None:
    (site,) = sites(WithBand())
    assert site.code == "MASK_UNKNOWN"
    plugins.mask_rule(target)(windowed)
    (site,) = sites(WithBand())
    assert (site.decision, site.mask) == ("rewritten", "causal, window 10")
    assert_close(compiled(WithBand(), budget=1.0), WithBand()(X))


def test_a_rule_for_a_function_says_that_it_writes_nothing() -> None:
    (site,) = sites(WithFunction())
    assert site.code == "MASK_UNKNOWN"
    torch.compiler.reset()

    @plugins.mask_rule(wide_band)
    def read(reader: Any, node: fx.Node, index: Any) -> Any:
        return plugins.compare("le", index[0] - index[1], sympy.Integer(20))

    (site,) = sites(WithFunction())
    assert site.decision == "rewritten"
    assert_close(compiled(WithFunction(), budget=1.0), WithFunction()(X))


def test_a_rule_that_does_not_understand_leaves_the_mask_unread() -> None:
    @plugins.mask_rule(band_mask)
    def puzzled(reader: Any, node: fx.Node, index: Any) -> Any:
        raise plugins.NotUnderstood("a reason of its own")

    (site,) = sites(WithBand())
    assert site.code == "MASK_UNKNOWN"
    assert "a reason of its own" in site.reason


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda index: "seen", "a sympy expression or predicate"),
        (lambda index: index[5], "IndexError"),
        (lambda index: sympy.Symbol("n") <= index[0], "made of the index"),
        (lambda index: sympy.Function("f")(index[0]) > 0, "made of the index"),
    ],
    ids=["text", "raises", "symbol", "function"],
)
def test_a_wrong_value_is_an_error_that_names_the_rule(
    value: Callable[[Any], Any], text: str
) -> None:
    @plugins.mask_rule(band_mask)
    def clumsy(reader: Any, node: fx.Node, index: Any) -> Any:
        return value(index)

    error = failure(WithBand())
    assert text in str(error) and "clumsy" in str(error) and "band_mask" in str(error)


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        ((torch.tril,), "that the reader does not know"),
        ((torch.ops.aten.tril.default,), "that the reader does not know"),
        ((fill,), "write to no argument"),
        (("tril",), "operators or functions"),
        ((), "at least one"),
    ],
    ids=["built-in", "aten", "writes", "text", "none"],
)
def test_a_rule_for_the_wrong_thing_is_refused(targets: Sequence[Any], text: str) -> None:
    with pytest.raises(PluginFailed, match=text):
        plugins.mask_rule(*targets)(windowed)
    assert windowed not in [rule.function for rule in mask_rules._rules.values()]


def test_an_operation_has_one_rule() -> None:
    plugins.mask_rule(band_mask)(windowed)
    plugins.mask_rule(band_mask)(windowed)  # the same again, as when a module is loaded anew

    def another(reader: Any, node: fx.Node, index: Any) -> Any:
        return sympy.true

    with pytest.raises(PluginFailed, match="without a rule"):
        plugins.mask_rule(band_mask)(another)
