"""Which axes of a tensor expression may be permuted, and why the others may not.

Permuting an axis means: gather its entries in any order while loading, run the dense loops on what
was gathered, scatter the results. It is legal where

1. every access uses the axis alone (*bare*): a compound index such as ``h // G`` is computed by the
   dense loops from a place in the tile, which is no longer the entry's coordinate;
2. nothing is computed in its order: a reduction over it is commutative, and no step reads a result
   of another step;
3. all of that holds through intermediate tensors: an axis and the axes that read what it wrote move
   together.

A coordinate that the body itself reads (causal masks, position biases) travels with the data.
Entries may also be left out where all they contribute is the reduction's identity.

Source: PIT (SOSP 2023), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import networkx
import sympy
from sympy.core.function import AppliedUndef

from sparse_compiler.ir.expression import (
    TensorExpression,
    axis_symbol,
    split_axis,
)

__all__ = ["AxisCode", "AxisVerdict", "pit_axes"]


class AxisCode(StrEnum):
    """Why an axis may or may not be permuted."""

    PIT = "PIT"  # any order, any subset
    COMPOUND = "COMPOUND"  # part of an index with other terms
    LOOKUP = "LOOKUP"  # goes through a table known only at run time
    ORDER = "ORDER"  # a step reads another step's result
    MONOID = "MONOID"  # reduced by something that is not proved commutative


@dataclass(frozen=True)
class AxisVerdict:
    """What is known about one axis.

    Args:
        axis: its letter.
        members: the letters that must move together, itself included.
        code, reason: legal only for ``AxisCode.PIT``.
        coordinate_travels: the computation reads the coordinate, so it is loaded beside the data.
        gathered: (input tensor, dimension) pairs that are read through the list of entries.
        scattered: the same of output tensors.
        reduced_by: names of the monoids that reduce it; a skipped entry must equal their identity.
        splittable: reduced by associative monoids only, so that parts of it may be computed apart
            and combined.
        remedy: what would make (part of) it legal; "" if nothing is known.
    """

    axis: str
    members: tuple[str, ...]
    code: AxisCode
    reason: str
    coordinate_travels: bool
    gathered: tuple[tuple[str, int], ...]
    scattered: tuple[tuple[str, int], ...]
    reduced_by: tuple[str, ...]
    splittable: bool
    remedy: str = ""

    @property
    def legal(self) -> bool:
        return self.code is AxisCode.PIT


def pit_axes(expression: TensorExpression) -> dict[str, AxisVerdict]:
    """One verdict for each axis, in the expression's order."""
    together = _joined(expression)
    return {
        axis.name: _judge(expression, axis.name, frozenset(_members(together, axis.symbol)))
        for axis in expression.axes
    }


def _members(together: networkx.Graph, symbol: sympy.Symbol) -> set[sympy.Symbol]:
    return networkx.node_connected_component(together, symbol)


def _joined(expression: TensorExpression) -> networkx.Graph:
    """Axes, joined where one writes a dimension of a tensor that the other reads."""
    graph = networkx.Graph()
    graph.add_nodes_from(expression.symbols)
    writers = {s.output.tensor: s.output for s in expression.statements}
    for statement in expression.statements:
        for operand in statement.operands:
            writer = writers.get(operand.tensor)
            if writer is None:
                continue
            for written, read in zip(writer.index, operand.index, strict=True):
                if written in expression.symbols and read in expression.symbols:
                    graph.add_edge(written, read)
    return graph


def _judge(
    expression: TensorExpression, axis: str, members: frozenset[sympy.Symbol]
) -> AxisVerdict:
    code, reason, remedy = AxisCode.PIT, "bare in every access", ""
    obstacle = (
        _order(expression, members)
        or _index(expression, members)
        or _reduction(expression, members)
    )
    if obstacle is not None:
        code, reason = obstacle
        remedy = _remedy(expression, axis)
    monoids = [
        s.monoid
        for s in expression.statements
        if s.monoid is not None and s.reduced(expression.symbols) & members
    ]
    reduced = tuple(dict.fromkeys(monoid.name for monoid in monoids))
    if code is AxisCode.PIT and reduced:
        reason += f", reduced by {', '.join(reduced)}, which commutes"
    travels = any(s.coordinates & members for s in expression.statements)
    if code is AxisCode.PIT and travels:
        reason += "; the coordinate travels with the data"
    return AxisVerdict(
        axis=axis,
        members=tuple(a.name for a in expression.axes if a.symbol in members),
        code=code,
        reason=reason,
        coordinate_travels=travels,
        gathered=_places(expression, members, expression.inputs),
        scattered=_places(expression, members, expression.outputs),
        reduced_by=reduced,
        splittable=bool(monoids) and all(monoid.associative for monoid in monoids),
        remedy=remedy,
    )


def _places(
    expression: TensorExpression, members: frozenset[sympy.Symbol], tensors: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    found = [
        (access.tensor, dimension)
        for _, access in expression.accesses()
        if access.tensor in tensors
        for dimension, index in enumerate(access.index)
        if index in members
    ]
    return tuple(dict.fromkeys(found))


def _order(
    expression: TensorExpression, members: frozenset[sympy.Symbol]
) -> tuple[AxisCode, str] | None:
    """A step that reads another step's result: a loop of dependencies with a moved index."""
    graph = expression.dependencies
    loops = [
        component
        for component in networkx.strongly_connected_components(graph)
        if len(component) > 1 or any(graph.has_edge(tensor, tensor) for tensor in component)
    ]
    for statement in expression.statements:
        for operand in statement.operands:
            around = any({operand.tensor, statement.output.tensor} <= loop for loop in loops)
            for index in operand.index if around else ():
                if index.free_symbols & members and index not in members:
                    return AxisCode.ORDER, f"{statement.output} needs {operand}: steps run in order"
    return None


def _index(
    expression: TensorExpression, members: frozenset[sympy.Symbol]
) -> tuple[AxisCode, str] | None:
    """An access in which a member is not alone, or an intermediate that it meets half-way."""
    writers = {s.output.tensor: s.output for s in expression.statements}
    for _, access in expression.accesses():
        for dimension, index in enumerate(access.index):
            if not index.free_symbols & members:
                continue
            if index not in members:
                if index.atoms(AppliedUndef):
                    return (
                        AxisCode.LOOKUP,
                        f"{index} in {access} is data: read the table as an operand instead",
                    )
                return AxisCode.COMPOUND, f"index {index} in {access} is compound"
            writer = writers.get(access.tensor)
            if writer is not None and writer.index[dimension] not in members:
                return (
                    AxisCode.COMPOUND,
                    f"{access} reads what was written at index {writer.index[dimension]}",
                )
    return None


def _reduction(
    expression: TensorExpression, members: frozenset[sympy.Symbol]
) -> tuple[AxisCode, str] | None:
    for statement in expression.statements:
        monoid = statement.monoid
        if monoid is None or not statement.reduced(expression.symbols) & members:
            continue
        if not monoid.commutative:
            return AxisCode.MONOID, f"{statement.output} is reduced by {monoid.name}, in order"
    return None


def _remedy(expression: TensorExpression, axis: str) -> str:
    """Splitting by the divisor of a quotient, tried out: which parts would be legal then."""
    symbol = axis_symbol(axis)
    for _, access in expression.accesses():
        for index in access.index:
            for quotient in index.atoms(sympy.floor):
                divisor = symbol / quotient.args[0]
                if divisor.free_symbols & expression.symbols or divisor == 1:
                    continue
                names = (f"{axis}_outer", f"{axis}_inner")
                split = pit_axes(split_axis(expression, axis, divisor, names))
                legal = [name for name in names if split[name].legal]
                if legal:
                    return (
                        f"split {axis} into {names[0]} * {divisor} + {names[1]}: "
                        f"{' and '.join(legal)} may be permuted"
                    )
    return ""
