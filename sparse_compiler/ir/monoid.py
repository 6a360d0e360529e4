"""Reductions: a state, an identity and a combination, whose laws are derived and not declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from sparse_compiler.errors import ExpressionInvalid

__all__ = ["AFFINE", "MAX", "ONLINE_SOFTMAX", "SUM", "Monoid", "component", "substituted"]


def component(name: str, side: str = "") -> sympy.Symbol:
    """The symbol of one component of a state: of the left state ``a``, the right ``b``, or a result."""
    return sympy.Symbol(f"{name}_{side}" if side else name, real=True)


def substituted(expression: sympy.Basic, values: Mapping[Any, Any]) -> Any:
    """``expression`` with symbols replaced, all at once; as ``xreplace``, whose type is too wide."""
    return expression.xreplace(dict(values))


@dataclass(frozen=True)
class Monoid:
    """How the entries of a reduced axis become one.

    Args:
        name: for messages.
        state: names of the components; a plain sum has one, online softmax three.
        identity: value of each component for nothing at all; what a skipped entry must equal.
        combined: each component of the combination of states ``a`` and ``b``, in the symbols
            ``component(name, "a")`` and ``component(name, "b")``.
    Raises:
        ExpressionInvalid: lengths differ, or the identity is not neutral.
    """

    name: str
    state: tuple[str, ...]
    identity: tuple[sympy.Expr, ...]
    combined: tuple[sympy.Expr, ...]

    def __post_init__(self) -> None:
        sizes = (len(self.state), len(self.identity), len(self.combined))
        if len(set(sizes)) != 1:
            raise ExpressionInvalid(
                f"monoid {self.name!r}",
                "of as many identities and combinations as components",
                sizes,
            )
        left = self.symbols("a")
        for sides in (("a", "b"), ("b", "a")):
            neutral = dict(zip(self.symbols(sides[0]), self.identity, strict=True))
            kept = [_normal(substituted(e, neutral)) for e in self.combined]
            if kept != list(self.symbols(sides[1])):
                raise ExpressionInvalid(
                    f"identity of monoid {self.name!r}",
                    "neutral on both sides",
                    kept,
                    where=str(left),
                )

    def symbols(self, side: str) -> tuple[sympy.Symbol, ...]:
        """The state's symbols on one side, ``a`` or ``b``."""
        return tuple(component(name, side) for name in self.state)

    def combine(
        self, first: tuple[sympy.Expr, ...], second: tuple[sympy.Expr, ...]
    ) -> tuple[sympy.Expr, ...]:
        """``first`` then ``second``, symbolically."""
        values = dict(zip(self.symbols("a"), first, strict=True))
        values |= dict(zip(self.symbols("b"), second, strict=True))
        return tuple(substituted(expression, values) for expression in self.combined)

    @cached_property
    def commutative(self) -> bool:
        """Whether sympy proves it; unknown is no. Needed to permute a reduced axis."""
        a, b = self.symbols("a"), self.symbols("b")
        return _same(self.combine(a, b), self.combine(b, a))

    @cached_property
    def associative(self) -> bool:
        """Whether sympy proves it; unknown is no. Needed to split a reduction and merge the parts."""
        a, b, c = (self.symbols(side) for side in "abc")
        return _same(self.combine(self.combine(a, b), c), self.combine(a, self.combine(b, c)))


def _normal(expression: sympy.Expr) -> sympy.Expr:
    # Multiplied out, with products of exponentials joined: equal sums look alike then.
    return sympy.powsimp(sympy.expand_mul(expression), combine="exp")


def _same(one: tuple[sympy.Expr, ...], other: tuple[sympy.Expr, ...]) -> bool:
    return all(_normal(x - y) == 0 for x, y in zip(one, other, strict=True))


def _online_softmax() -> Monoid:
    m_a, l_a, acc_a = (component(name, "a") for name in ("m", "l", "acc"))
    m_b, l_b, acc_b = (component(name, "b") for name in ("m", "l", "acc"))
    top = sympy.Max(m_a, m_b)
    left, right = sympy.exp(m_a - top), sympy.exp(m_b - top)
    return Monoid(
        "online_softmax",
        ("m", "l", "acc"),
        (-sympy.oo, sympy.Integer(0), sympy.Integer(0)),
        (top, l_a * left + l_b * right, acc_a * left + acc_b * right),
    )


_x, _y = component("x", "a"), component("x", "b")
SUM = Monoid("sum", ("x",), (sympy.Integer(0),), (_x + _y,))
MAX = Monoid("max", ("x",), (-sympy.oo,), (sympy.Max(_x, _y),))
ONLINE_SOFTMAX = _online_softmax()
"""Running maximum, sum of weights and weighted sum; two states that both hold nothing give nothing
(an evaluator must not take exp(-oo + oo))."""
AFFINE = Monoid(
    "affine",
    ("a", "b"),
    (sympy.Integer(1), sympy.Integer(0)),
    (
        component("a", "a") * component("a", "b"),
        component("a", "b") * component("b", "a") + component("b", "b"),
    ),
)
"""Composition of x -> a x + b, first a then b: associative, so it can be split, yet ordered."""
