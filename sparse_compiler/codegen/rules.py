"""PIT rules, derived from an expression: what is gathered, how small, into which dense tile.

A rule packs micro-tiles (one entry of the PIT axis, whole extents of the others) into dense tiles,
on which an unchanged dense loop runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from sparse_compiler.codegen.pit import AxisVerdict, pit_axes
from sparse_compiler.errors import ExpressionInvalid
from sparse_compiler.ir.expression import Access, Statement, TensorExpression, axis_symbol

__all__ = ["Rule", "TileWork", "derive_rules", "tile_work"]

Extents = Mapping[str, sympy.Expr]


@dataclass(frozen=True)
class Rule:
    """One way to make a sparse operand dense.

    Args:
        expression: what is computed.
        axis: the verdict of the PIT axis; always legal.
        extents: the dense tile: how many places of each axis it holds.
        micro_tile: of each gathered or scattered tensor, the shape of what one entry brings.
        gathered, scattered: input tensors read, and output tensors written, through the list.
    """

    expression: TensorExpression
    axis: AxisVerdict
    extents: tuple[tuple[str, sympy.Expr], ...]
    micro_tile: tuple[tuple[str, tuple[sympy.Expr, ...]], ...]
    gathered: tuple[str, ...]
    scattered: tuple[str, ...]

    def describe(self) -> str:
        """One line for people."""
        tile = " x ".join(f"{name}:{value}" for name, value in self.extents if value != 1)
        micro = ", ".join(f"{t}[{' x '.join(map(str, shape))}]" for t, shape in self.micro_tile)
        sides = f"gather {', '.join(self.gathered) or 'nothing'}"
        if self.scattered:
            sides += f", scatter {', '.join(self.scattered)}"
        return f"{self.expression.name} along {self.axis.axis}: {micro} into {tile}; {sides}"


def derive_rules(
    expression: TensorExpression,
    extents: Mapping[str, int | sympy.Expr],
    *,
    sparse: str | None = None,
) -> tuple[Rule, ...]:
    """Every rule that the expression allows with a dense tile.

    Args:
        extents: places of each axis in the dense tile; an axis left out has one.
        sparse: an input: keep only rules whose PIT axis is one of its dimensions.
    Raises:
        ExpressionInvalid: ``extents`` names an axis, or ``sparse`` an input, that does not exist.
    """
    for name in extents:
        expression.axis(name)
    if sparse is not None and sparse not in expression.inputs:
        raise ExpressionInvalid(
            f"the sparse operand of {expression.name!r}",
            f"one of {', '.join(expression.inputs)}",
            sparse,
        )
    tile = {axis.name: sympy.sympify(extents.get(axis.name, 1)) for axis in expression.axes}
    rules = []
    for verdict in pit_axes(expression).values():
        places = (*verdict.gathered, *verdict.scattered)
        if verdict.legal and (sparse is None or sparse in {t for t, _ in verdict.gathered}):
            rules.append(_rule(expression, verdict, tile, places))
    return tuple(rules)


def _rule(
    expression: TensorExpression,
    verdict: AxisVerdict,
    tile: Mapping[str, sympy.Expr],
    places: tuple[tuple[str, int], ...],
) -> Rule:
    one_entry = dict(tile) | dict.fromkeys(verdict.members, sympy.Integer(1))
    moved = dict.fromkeys(tensor for tensor, _ in places)
    shapes = {}
    for _, access in expression.accesses():
        if access.tensor in moved and access.tensor not in shapes:
            shapes[access.tensor] = tuple(_extent(i, expression, one_entry) for i in access.index)
    return Rule(
        expression=expression,
        axis=verdict,
        extents=tuple(tile.items()),
        micro_tile=tuple(shapes.items()),
        gathered=tuple(dict.fromkeys(t for t, _ in verdict.gathered)),
        scattered=tuple(dict.fromkeys(t for t, _ in verdict.scattered)),
    )


def _extent(index: sympy.Expr, expression: TensorExpression, tile: Extents) -> sympy.Expr:
    """Most places that an index takes in a tile: those of its axes together."""
    axes = [s for s in index.free_symbols if s in expression.symbols]
    return sympy.Mul(*(tile[str(s)] for s in axes))


@dataclass(frozen=True)
class TileWork:
    """What one dense tile costs, in sympy over the tile's extents.

    Args:
        flops: multiplications and additions of products; two for each pair of factors.
        exponents: exponentials of the reduction.
        streamed: elements loaded anew for every tile along the streamed axis.
        resident: elements loaded once for all of them.
        stored: elements written once.
    """

    flops: sympy.Expr
    exponents: sympy.Expr
    streamed: sympy.Expr
    resident: sympy.Expr
    stored: sympy.Expr


def tile_work(rule: Rule, stream: str) -> TileWork:
    """Count a dense tile's work from the expression alone.

    Args:
        stream: the axis that one program walks, tile after tile.
    """
    expression, tile = rule.expression, dict(rule.extents)
    flops = exponents = streamed = resident = stored = sympy.Integer(0)
    along = axis_symbol(expression.axis(stream).name)
    for statement in expression.statements:
        flops += _flops(statement, expression, tile)
        exponents += _exponents(statement, expression, tile)
    counted = set()
    for _, access in expression.accesses():
        if access in counted:
            continue
        counted.add(access)
        elements = sympy.Mul(*(_extent(i, expression, tile) for i in access.index))
        if access.tensor in expression.outputs:
            stored += elements
        elif access.tensor in expression.inputs:
            if along in access.axes:
                streamed += elements
            else:
                resident += elements
    return TileWork(flops, exponents, streamed, resident, stored)


def _points(symbols: frozenset[sympy.Symbol], tile: Extents) -> sympy.Expr:
    return sympy.Mul(*(tile[str(s)] for s in symbols))


def _flops(statement: Statement, expression: TensorExpression, tile: Extents) -> sympy.Expr:
    """Two for each point of a reduction that multiplies: by a weight of its own, or factors."""
    if statement.monoid is None:
        return sympy.Integer(0)
    weighted = len(statement.monoid.state) > 1
    factors = max(len(_read(part, statement)) for part in statement.body)
    if not weighted and factors < 2:
        return sympy.Integer(0)
    return 2 * _points(statement.loops(expression.symbols), tile) * max(1, factors - 1)


def _exponents(statement: Statement, expression: TensorExpression, tile: Extents) -> sympy.Expr:
    """One for each point of the component that is exponentiated, and of bodies with exp."""
    found = sympy.Integer(0)
    if statement.monoid is not None and any(c.has(sympy.exp) for c in statement.monoid.combined):
        scored = frozenset().union(*(o.axes for o in _read(statement.body[0], statement)))
        found += _points(scored & expression.symbols, tile)
    if any(part.has(sympy.exp) for part in statement.body):
        found += _points(statement.loops(expression.symbols), tile)
    return found


def _read(part: sympy.Expr, statement: Statement) -> list[Access]:
    return [o for o in statement.operands if o.value in part.free_symbols]
