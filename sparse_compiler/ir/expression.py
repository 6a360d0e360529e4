"""Tensor expressions: what a kernel computes, without an order, a tile or a device.

A statement is ``output[index] = reduce over the other axes of body(operands[index], coordinates)``.
Indices are sympy expressions over axes: an axis alone is *bare*, ``h // G`` or ``t - 1`` is compound,
``f(t)`` with an undefined function is a look-up. An expression chains statements through tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import networkx
import sympy

from sparse_compiler.errors import ExpressionInvalid
from sparse_compiler.ir.monoid import Monoid, component, substituted

__all__ = ["Access", "Axis", "Statement", "TensorExpression", "axis_symbol", "split_axis"]


def axis_symbol(name: str) -> sympy.Symbol:
    """The symbol of an axis, a non-negative integer."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


@dataclass(frozen=True)
class Axis:
    """One loop: its letter and its length, a sympy expression over sizes such as ``Lk``."""

    name: str
    size: sympy.Expr

    @property
    def symbol(self) -> sympy.Symbol:
        return axis_symbol(self.name)


@dataclass(frozen=True)
class Access:
    """One element of a tensor as a function of the axes."""

    tensor: str
    index: tuple[sympy.Expr, ...]

    @property
    def value(self) -> sympy.Symbol:
        """The element as a symbol, for bodies."""
        return sympy.Symbol(str(self), real=True)

    @property
    def axes(self) -> frozenset[sympy.Symbol]:
        """Every symbol in the index: axes, and sizes such as G."""
        found = {s for index in self.index for s in index.free_symbols}
        return frozenset(s for s in found if isinstance(s, sympy.Symbol))

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(str(i) for i in self.index)}]"


@dataclass(frozen=True)
class Statement:
    """One assignment.

    Args:
        output: what is written.
        operands: what is read; ``body`` names them by their ``value``.
        body: what one point of the loops contributes, one expression for each component of the
            monoid's state; over values, axes (coordinates) and parameters.
        monoid: how the axes that the output lacks are reduced; None if there are none.
        when: points where this is false contribute the monoid's identity.
        result: the element written, over the state's components (``component(name)``); None takes
            the only component.
    """

    output: Access
    operands: tuple[Access, ...]
    body: tuple[sympy.Expr, ...]
    monoid: Monoid | None = None
    when: sympy.Basic = sympy.true
    result: sympy.Expr | None = None

    @property
    def coordinates(self) -> frozenset[sympy.Symbol]:
        """Symbols that the computation itself reads: coordinates and parameters."""
        values = {operand.value for operand in self.operands}
        read = self.when.free_symbols.union(*(b.free_symbols for b in self.body))
        return frozenset(s for s in read if isinstance(s, sympy.Symbol)) - values

    def loops(self, axes: frozenset[sympy.Symbol]) -> frozenset[sympy.Symbol]:
        """Those of ``axes`` that this statement runs over."""
        used = self.output.axes.union(*(operand.axes for operand in self.operands))
        return (used | self.coordinates) & axes

    def reduced(self, axes: frozenset[sympy.Symbol]) -> frozenset[sympy.Symbol]:
        """Those of ``axes`` that the output lacks."""
        return self.loops(axes) - self.output.axes


@dataclass(frozen=True)
class TensorExpression:
    """Statements in order, chained by the tensors that they write and read.

    Args:
        name: for messages and rules.
        axes: every loop of every statement; one letter means one loop wherever it occurs.
        statements: each tensor is written once.
    Raises:
        ExpressionInvalid: a tensor is written twice or read before it is written, a body does not
            fit its monoid, or something is reduced without one.
    """

    name: str
    axes: tuple[Axis, ...]
    statements: tuple[Statement, ...]

    def __post_init__(self) -> None:
        written = [statement.output.tensor for statement in self.statements]
        if len(set(written)) != len(written):
            raise ExpressionInvalid(
                f"expression {self.name!r}", "writing each tensor once", written
            )
        for place, statement in enumerate(self.statements):
            _check_statement(self, statement)
            late = {o.tensor for o in statement.operands} & set(written[place + 1 :])
            if late:
                raise ExpressionInvalid(
                    f"statements of {self.name!r}", "in the order of their use", sorted(late)
                )

    @cached_property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """The axes as symbols."""
        return frozenset(axis.symbol for axis in self.axes)

    def axis(self, name: str) -> Axis:
        """The axis of that letter.

        Raises:
            ExpressionInvalid: there is none.
        """
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise ExpressionInvalid(
            f"an axis of {self.name!r}", f"one of {', '.join(a.name for a in self.axes)}", name
        )

    @cached_property
    def dependencies(self) -> networkx.DiGraph:
        """Tensors, with an edge from each that is read to the one written from it."""
        graph = networkx.DiGraph()
        for statement in self.statements:
            graph.add_node(statement.output.tensor)
            for operand in statement.operands:
                graph.add_edge(operand.tensor, statement.output.tensor)
        return graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """Tensors that no statement writes, in order of first use."""
        written = {statement.output.tensor for statement in self.statements}
        read = [o.tensor for statement in self.statements for o in statement.operands]
        return tuple(dict.fromkeys(name for name in read if name not in written))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Tensors that no later statement reads."""
        graph = self.dependencies
        return tuple(
            s.output.tensor
            for s in self.statements
            if not set(graph.successors(s.output.tensor)) - {s.output.tensor}
        )

    def accesses(self) -> list[tuple[Statement, Access]]:
        """Every read and write with its statement, in order."""
        return [(s, access) for s in self.statements for access in (*s.operands, s.output)]


def _check_statement(expression: TensorExpression, statement: Statement) -> None:
    where = f"{expression.name}, {statement.output}"
    expected = 1 if statement.monoid is None else len(statement.monoid.state)
    if len(statement.body) != expected:
        raise ExpressionInvalid(
            "a statement's body", f"of {expected} components", len(statement.body), where=where
        )
    reduced = statement.reduced(expression.symbols)
    if reduced and statement.monoid is None:
        names = sorted(str(axis) for axis in reduced)
        raise ExpressionInvalid("reduced axes", "combined by a monoid", names, where=where)
    if expected > 1 and statement.result is None:
        raise ExpressionInvalid("a statement's result", "given for several components", None)
    if statement.result is not None and statement.monoid is not None:
        known = {component(name) for name in statement.monoid.state}
        unknown = statement.result.free_symbols - known
        if unknown:
            raise ExpressionInvalid("a statement's result", f"over {known}", unknown, where=where)


def split_axis(
    expression: TensorExpression, axis: str, inner: sympy.Expr, names: tuple[str, str]
) -> TensorExpression:
    """The same computation with one axis as two, ``axis = outer * inner_size + inner``.

    A dimension indexed by the bare axis becomes two dimensions (a view); ``axis // inner_size``
    becomes the outer axis; coordinates become the whole formula.

    Args:
        inner: length of the inner axis, a divisor of the axis' length.
        names: letters of the outer and the inner axis.
    """
    old = expression.axis(axis)
    outer, low = (axis_symbol(name) for name in names)
    whole = outer * inner + low
    vanishing = {sympy.floor(low / inner): sympy.Integer(0), sympy.Mod(low, inner): low}

    def access(found: Access) -> Access:
        index: list[sympy.Expr] = []
        for place in found.index:
            if place == old.symbol:
                index += [outer, low]
            else:
                index.append(_expanded_floor(substituted(place, {old.symbol: whole}), vanishing))
        return Access(found.tensor, tuple(index))

    statements = []
    for statement in expression.statements:
        operands = tuple(access(o) for o in statement.operands)
        values = {o.value: n.value for o, n in zip(statement.operands, operands, strict=True)}
        statements.append(
            replace(
                statement,
                output=access(statement.output),
                operands=operands,
                body=tuple(substituted(b, {**values, old.symbol: whole}) for b in statement.body),
                when=substituted(statement.when, {old.symbol: whole}),
            )
        )
    axes: list[Axis] = []
    for found in expression.axes:
        pair = [Axis(names[0], old.size / inner), Axis(names[1], inner)]
        axes += pair if found is old else [found]
    return TensorExpression(expression.name, tuple(axes), tuple(statements))


def _expanded_floor(index: sympy.Expr, vanishing: Mapping[sympy.Expr, sympy.Expr]) -> sympy.Expr:
    """``index`` with the arguments of floors multiplied out, so that whole parts leave them."""
    opened = index.replace(sympy.floor, lambda argument: sympy.floor(sympy.expand(argument)))
    return substituted(opened, vanishing)
