"""Laws of the reductions, and what an expression refuses."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.codegen import library
from sparse_compiler.errors import ExpressionInvalid
from sparse_compiler.ir.expression import (
    Access,
    Axis,
    Statement,
    TensorExpression,
    axis_symbol,
    split_axis,
)
from sparse_compiler.ir.monoid import AFFINE, MAX, ONLINE_SOFTMAX, SUM, Monoid, component

MONOIDS = {m.name: m for m in (SUM, MAX, ONLINE_SOFTMAX, AFFINE)}
NUMBERS = st.floats(-20, 20)


def combine(monoid: Monoid, first: tuple[float, ...], second: tuple[float, ...]) -> list[float]:
    sides = [*monoid.symbols("a"), *monoid.symbols("b")]
    return sympy.lambdify(sides, list(monoid.combined), modules="math")(*first, *second)


@pytest.mark.parametrize("name", MONOIDS)
@given(data=st.data())
def test_what_sympy_proves_of_a_monoid_holds_for_numbers(name: str, data: st.DataObject) -> None:
    monoid = MONOIDS[name]
    a, b, c = (tuple(data.draw(NUMBERS) for _ in monoid.state) for _ in range(3))
    if monoid.commutative:
        assert combine(monoid, a, b) == pytest.approx(combine(monoid, b, a))
    assert monoid.associative
    left = combine(monoid, tuple(combine(monoid, a, b)), c)
    assert left == pytest.approx(combine(monoid, a, tuple(combine(monoid, b, c))))
    assert combine(monoid, tuple(map(float, monoid.identity)), a) == pytest.approx(a)


def test_laws_are_derived() -> None:
    assert [m.commutative for m in MONOIDS.values()] == [True, True, True, False]
    assert [m.associative for m in MONOIDS.values()] == [True, True, True, True]
    x, y = component("x", "a"), component("x", "b")
    mean = Monoid("max_of_abs", ("x",), (sympy.Integer(0),), (x + y + x * y * (x - y),))
    assert not mean.commutative
    assert not mean.associative


def test_an_identity_must_be_neutral() -> None:
    x, y = component("x", "a"), component("x", "b")
    with pytest.raises(ExpressionInvalid, match="neutral on both sides"):
        Monoid("product", ("x",), (sympy.Integer(0),), (x * y,))


A, B = axis_symbol("a"), axis_symbol("b")
AXES = (Axis("a", sympy.Integer(4)), Axis("b", sympy.Integer(4)))
X, Y, Z = Access("X", (A, B)), Access("Y", (A,)), Access("Z", (A,))


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        ((Statement(Y, (X,), (X.value,)),), "combined by a monoid"),
        ((Statement(Y, (X,), (X.value,) * 2, SUM),), "of 1 components"),
        ((Statement(Y, (X,), (X.value,), SUM),) * 2, "writing each tensor once"),
        (
            (Statement(Z, (Y,), (Y.value,)), Statement(Y, (X,), (X.value,), SUM)),
            "in the order of their use",
        ),
        (
            (Statement(Y, (X,), (X.value, X.value), AFFINE, result=sympy.Symbol("c")),),
            "a statement's result",
        ),
    ],
)
def test_contradictions_are_refused(statements: tuple[Statement, ...], message: str) -> None:
    with pytest.raises(ExpressionInvalid, match=message):
        TensorExpression("wrong", AXES, statements)


def test_an_unknown_axis_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ExpressionInvalid, match="one of b, h, m, n, d, e, but got 'z'"):
        library.attention().axis("z")


def test_splitting_an_axis_turns_a_quotient_into_an_axis() -> None:
    split = split_axis(library.attention(alibi=True), "h", library.size("G"), ("kv", "r"))
    shapes = {str(access) for _, access in split.accesses()}
    assert {"Q[b, kv, r, m, d]", "K[b, kv, n, d]", "slope[kv, r]", "O[b, kv, r, m, e]"} <= shapes
    assert split.axis("kv").size == library.size("Hq") / library.size("G")


def test_inputs_outputs_and_dependencies() -> None:
    ffn = library.sparse_ffn()
    assert (ffn.inputs, ffn.outputs) == (("X", "U", "W"), ("Y",))
    assert list(ffn.dependencies.successors("Z")) == ["H"]
    attention = library.attention()
    names = {str(a) for a in attention.statements[1].reduced(attention.symbols)}
    assert names == {"n"}
